"""How well a scan detects planted leaks: recall and precision by channel, disguise and memorisation.

A small model is trained on the planted corpus, a regular scan runs on it, and its verdicts are compared with the truth.
The paper's protocol is measured as well: is a block with a replica of an item among the item's 100 most positive or 100
most negative influences?
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.stats import binomtest

from stride_ray.contamination.influence.channel import query_table
from stride_ray.contamination.items import Item, read_set
from stride_ray.contamination.nightly import scan
from stride_ray.corpus.blocks import Blocks
from stride_ray.corpus.shard import shard
from stride_ray.corpus.tokenization.tokenizer import load_tokenizer
from stride_ray.evaluate.baselines.gradient.logra import scores as logra
from stride_ray.evaluate.baselines.problem import Problem, Texts
from stride_ray.evaluate.leaks.planting import KINDS
from stride_ray.models.builtin.toy import train_model, train_tokenizer
from stride_ray.runtime.run import Run
from stride_ray.runtime.storage import Store

BLOCK_TOKENS, EPOCHS = 128, 6
# Blocks at each end in the paper's protocol; rank of LoGRA's projections.
BUCKET, RANK = 100, 16


@dataclass(frozen=True)
class RecallRow:
    """One row of a recall table.

    Attributes:
        channel: "lexical", "influence", "either"; or a method of the paper's protocol.
        leaks: kind of leaks, or "all".
        memorised: whether only memorised leaks count.
        count: leaked items.
        recall: share of them detected.
        precision: share of leaked ones among all detected items (nan in the paper's protocol).
        chance: recall expected when detecting as many items at random.
        p: one-sided binomial test of the recall against chance.
    """

    channel: str
    leaks: str
    memorised: bool
    count: int
    recall: float
    precision: float
    chance: float
    p: float


def planted_run(root: Path, changes: dict[str, Any] | None = None, epochs: int = EPOCHS, seed: int = 0) -> Run:
    """Make tokenizer, blocks and a model trained on them in a planting's folder; existing ones are kept."""
    texts = (json.loads(line)["text"] for line in (root / "corpus/planted.jsonl").open(encoding="utf-8"))
    train_tokenizer(texts, root / "tokenizer")
    settings: dict[str, Any] = {
        "corpus.input": [str(root / "corpus")],
        "corpus.columns": {"text": "text", "id": "id", "source": "source"},
        "corpus.tokenizer": str(root / "tokenizer"),
        "corpus.block_tokens": BLOCK_TOKENS,
        "corpus.shard_mb": 0.5,
        "model.path": str(root / "model"),
    }
    run = Run(str(root / "run"), changes=settings | (changes or {}))
    shard(run)
    train_model(Blocks(run.stage("blocks").store), root / "tokenizer", root / "model", epochs, seed)
    return run


def measure(root: Path, run: Run, baseline: bool = True) -> list[RecallRow]:
    """Scan a planting and compare the verdicts with its truth.

    Args:
        root: the folder written by ``plant``.
        run: from ``planted_run``.
        baseline: whether to score LoGRA too, for the paper's protocol.

    Returns:
        The tables' rows.
    """
    items = read_set(str(root / "sets/items.jsonl"))
    out = root / "scans"
    done = scan(run, [items], str(out), [read_set(str(root / "controls/controls.jsonl"), "controls")])
    table = Store(f"{out}/nights/{done['night']}").read_table("verdicts.parquet").to_pylist()
    truth = {row["id"]: row for row in map(json.loads, (root / "truth.jsonl").open(encoding="utf-8"))}
    lines = _channels(table, truth)
    places = replica_blocks(root, run, truth)
    leaked = [item for item in items.items if truth[item.item_id]["role"] == "leaked"]
    memory = {row["item_id"]: bool(row["memorised"]) for row in table}
    stride = _buckets_of(run, out, leaked)
    methods = {"STRIDE exact": stride}
    if baseline:
        gradient = _logra_buckets(run, leaked)
        methods |= {
            "LoGRA": gradient,
            "LoGRA ∪ STRIDE exact": {key: gradient[key] | stride[key] for key in gradient},
        }
    for name, buckets in methods.items():
        lines += _protocol(name, buckets, leaked, truth, memory, places, len(Blocks(run.stage("blocks").store)))
    return lines


def _channels(table: Sequence[dict[str, Any]], truth: dict[str, dict[str, Any]]) -> list[RecallRow]:
    found: dict[str, Callable[[str], bool]] = {
        "lexical": lambda verdict: verdict in ("lexical", "both"),
        "influence": lambda verdict: verdict in ("influence", "both"),
        "either": lambda verdict: verdict != "clean",
    }
    lines = []
    for channel, is_found in found.items():
        hits = [row for row in table if is_found(row["verdict"])]
        right = sum(truth[row["item_id"]]["role"] == "leaked" for row in hits)
        precision, chance = right / len(hits) if hits else float("nan"), len(hits) / len(table)
        for kind in (*KINDS, "all"):
            for memorised in (False, True):
                mine = [row for row in table if truth[row["item_id"]]["role"] == "leaked"]
                mine = [row for row in mine if kind in ("all", truth[row["item_id"]]["kind"])]
                mine = [row for row in mine if row["memorised"] or not memorised]
                caught = sum(is_found(row["verdict"]) for row in mine)
                lines.append(_line(channel, kind, memorised, caught, len(mine), precision, chance))
    return lines


def _line(
    channel: str, leaks: str, memorised: bool, caught: int, count: int, precision: float, chance: float
) -> RecallRow:
    if not count:
        return RecallRow(channel, leaks, memorised, 0, float("nan"), precision, chance, 1.0)
    p = float(binomtest(caught, count, chance, alternative="greater").pvalue)
    return RecallRow(channel, leaks, memorised, count, caught / count, precision, chance, p)


def replica_blocks(root: Path, run: Run, truth: dict[str, dict[str, Any]]) -> dict[str, set[int]]:
    """Ordinals of the blocks that hold the first replica of each leaked item, by item id."""
    pieces = {row["id"]: row["text"] for row in map(json.loads, (root / "corpus/planted.jsonl").open(encoding="utf-8"))}
    blocks = Blocks(run.stage("blocks").store)
    where: dict[str, list[tuple[int, int, int]]] = {}
    spans = blocks.take(np.arange(len(blocks)), ["spans"])["spans"].to_pylist()
    for ordinal, found in enumerate(spans):
        for span in found:
            where.setdefault(span["document_id"], []).append((span["start"], span["length"], ordinal))
    tokenizer = load_tokenizer(run.config.corpus.tokenizer)
    places = {}
    for name, row in truth.items():
        if row["role"] != "leaked":
            continue
        document = row["documents"][0]
        start = pieces[document].index(row["text"])
        offsets = tokenizer(pieces[document], return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
        inside = [i for i, (low, high) in enumerate(offsets) if high > start and low < start + len(row["text"])]
        low, high = inside[0], inside[-1] + 1
        places[name] = {o for first, length, o in where[document] if first < high and first + length > low}
    return places


def _buckets_of(run: Run, out: Path, leaked: Sequence[Item]) -> dict[str, set[int]]:
    """Each item's BUCKET most positive and most negative blocks, from the scan's own influence tables."""
    wanted = {item.key for item in leaked}
    found: dict[str, set[int]] = {}
    exact = run.store.child("exact")
    for name in exact.names():
        if not name.startswith("scan-") or name.endswith("-controls"):
            continue
        stage = run.stage("exact", name)
        for part in range(stage.manifest()["parts"]):
            table = stage.store.read_table(f"influence-{part:05d}.parquet", ["query_id", "ordinal", "influence"])
            for key in set(table["query_id"].to_pylist()) & wanted:
                mine = table.filter(pa.array([each == key for each in table["query_id"].to_pylist()]))
                found[key] = _extremes(mine["ordinal"].to_numpy(), mine["influence"].to_numpy())
    return {item.item_id: found.get(item.key, set()) for item in leaked}


def _logra_buckets(run: Run, leaked: Sequence[Item]) -> dict[str, set[int]]:
    blocks = Blocks(run.stage("blocks").store)
    pooled = blocks.batch(np.arange(len(blocks)))
    rows = query_table(run, leaked).to_pylist()
    longest = max(len(row["token_ids"]) for row in rows)
    ids, mask = np.zeros((len(rows), longest), np.int32), np.zeros((len(rows), longest), bool)
    for i, row in enumerate(rows):
        ids[i, : len(row["token_ids"])] = row["token_ids"]
        mask[i, : len(row["loss_mask"])] = row["loss_mask"]
    pool = Texts(pooled.ids.astype(np.int32), pooled.mask)
    found = logra(Problem(pool, Texts(ids, mask), run.config.model.path), rank=RANK)
    everything = np.arange(len(blocks))
    return {item.item_id: _extremes(everything, row) for item, row in zip(leaked, found, strict=True)}


def _extremes(ordinals: np.ndarray, influence: np.ndarray) -> set[int]:
    """The BUCKET largest positive and BUCKET largest negative, without zeros; ties by ordinal."""
    order = np.lexsort((ordinals, -influence))
    top = [i for i in order[:BUCKET] if influence[i] > 0]
    bottom = [i for i in order[::-1][:BUCKET] if influence[i] < 0]
    return set(ordinals[[*top, *bottom]].tolist())


def _protocol(
    method: str,
    buckets: dict[str, set[int]],
    leaked: Sequence[Item],
    truth: dict[str, dict[str, Any]],
    memory: dict[str, bool],
    places: dict[str, set[int]],
    n: int,
) -> list[RecallRow]:
    """Recall of the first replica in the buckets; chance: that as many random blocks include one of its blocks."""
    lines = []
    for kind in (*KINDS, "all"):
        for memorised in (False, True):
            names = [item.item_id for item in leaked if kind in ("all", truth[item.item_id]["kind"])]
            names = [name for name in names if memory[name] or not memorised]
            caught = sum(bool(buckets[name] & places[name]) for name in names)
            chances = [1 - (1 - len(places[name]) / n) ** len(buckets[name]) for name in names]
            chance = float(np.mean(chances)) if chances else 0.0
            lines.append(
                _line(f"{method}, top and bottom {BUCKET}", kind, memorised, caught, len(names), float("nan"), chance)
            )
    return lines


def as_table(lines: Sequence[RecallRow]) -> str:
    """Format the rows as Markdown, with recall of all leaks and of memorised ones side by side."""
    head = "| channel | leaks | recall (n) | of memorised (n) | precision | chance | p |\n|---|---|---|---|---|---|---|"
    rows = [head]
    for every, memory in zip(lines[::2], lines[1::2], strict=True):
        precision = "" if np.isnan(every.precision) else f"{every.precision:.2f}"
        rows.append(
            f"| {every.channel} | {every.leaks} | {every.recall:.2f} ({every.count}) | {memory.recall:.2f} "
            f"({memory.count}) | {precision} | {every.chance:.2f} | {every.p:.1e} |"
        )
    return "\n".join(rows)
