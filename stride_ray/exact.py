"""Stages curvature and exact: every query's inner product with every block, in one pass over the pool.

No operators, no subsets, no recovery: J(x)ᵀ H⁻¹ J_i itself (sites.py). ``curvature/`` holds the preconditioners, made
once from a sample of the pool. Then a batch of queries costs one forward and one backward pass over the pool, whatever
their number, and the largest influences per query are kept.
"""

import time
from dataclasses import replace
from functools import partial, reduce
from operator import add
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from stride_ray.blocks import Blocks
from stride_ray.config import Config
from stride_ray.distribute import Crew, connected, pool, progress
from stride_ray.influence import RECOVERY, rank_tables
from stride_ray.passes import PoolWorker, check_tokenizer, token_counts
from stride_ray.queries import batches, check_name, checked, fingerprint, padded
from stride_ray.recover import Recovery
from stride_ray.run import Run, Stage
from stride_ray.sites import (
    EMBEDDING,
    EMBEDDING_WEIGHT,
    HEAD,
    ORIGIN,
    Moments,
    Site,
    distribution,
    find_sites,
    influence,
    origin_weight,
    preconditioned,
    site_gradients,
    site_moments,
)
from stride_ray.storage import Store, tensor_bytes, tensors_from

# Tokens that second moments are taken over, and blocks that sites' scales are.
MOMENT_TOKENS, SCALE_BLOCKS = 131_072, 256
SLICES = 16
# Queries whose J are made in one unit; numbers in all J that one pass over the pool holds (1 GiB), and its queries.
UNIT, HELD, MOST = 16, 2**28, 256
TENSORS = ("W_in", "W_out", "unigram")


def exact_influence(run: Run, table: pa.Table, name: str) -> dict[str, Any]:
    """Score every block for every query and write the ranked tables.

    The tables of ``exact/<name>/`` are those of recover_influence, with the blocks of largest influence
    (``attribute.top``) in place of the non-zero ones, and nothing in the solver's columns.

    Args:
        run: with finished ``blocks/``.
        table: tokenised queries (queries.SCHEMA).
        name: of the query set.

    Returns:
        Counts: ``queries``, ``failed``, ``rows``, ``median_nonzeros``, ``parts``.

    Raises:
        StrideError: for a missing stage, other settings, another query set of that name, or a model without sites.
    """
    check_name(name)
    blocks = Blocks(run.require("blocks", "manifest.json", "stride-ray shard").store)
    corpus = blocks.manifest["fingerprint"]
    check_tokenizer(run.config, blocks)
    curvature = run.begin("curvature", corpus=corpus)
    stage = run.begin("exact", name, corpus=corpus, queries=fingerprint(table))
    if not stage.store.exists("queries.parquet"):
        stage.store.write_table("queries.parquet", table)
    if not stage.store.exists("manifest.json"):
        with connected(run.config.compute), Crew(pool(run.config.compute, len(blocks.shards()))) as crew:
            if not curvature.store.exists("manifest.json"):
                _curvature(run.config, blocks, curvature, crew)
            _score(run.config, blocks, curvature, stage, table.num_rows, crew)
    _clear(stage)
    return stage.store.read_json("manifest.json")


def _curvature(config: Config, blocks: Blocks, stage: Stage, crew: Crew) -> None:
    """Preconditioners and scales of all sites."""
    counts = token_counts(blocks, crew)
    sample = blocks.sample(max(32, MOMENT_TOKENS // blocks.block_tokens), config.seed)
    given = (config, blocks.store, crew.device)
    results = _mapped(crew, MomentWorker, given, sample, "precondition")
    positions = sum(found["positions"] for found in results)
    vocabulary = results[0]["vocabulary"]
    counted = torch.zeros(vocabulary, dtype=torch.long)
    counted[: min(len(counts), vocabulary)] = torch.from_numpy(counts[:vocabulary])
    sites = []
    for name in results[0]["moments"]:
        moments = reduce(add, (found["moments"][name] for found in results)) / positions
        sites.append(preconditioned(name, moments, counted, config.seed))
        if name == HEAD and not config.model.start:
            sites.append(preconditioned(ORIGIN, moments, counted, config.seed))
    save_sites(stage.store, "sites-unscaled", tuple(sites))
    few = np.sort(np.random.default_rng(config.seed).permutation(sample)[:SCALE_BLOCKS])
    found = _mapped(crew, ScaleWorker, (*given, stage.store), few, "scale")
    scales = {site.name: sum(each["squares"][site.name] for each in found) / len(few) for site in sites}
    scales[EMBEDDING] /= EMBEDDING_WEIGHT
    if ORIGIN in scales:
        loss = sum(each["loss"] for each in found) / sum(each["targets"] for each in found)
        scales[ORIGIN] /= origin_weight(len(sites) - 3, loss, distribution(counted))
    save_sites(stage.store, "sites", tuple(replace(site, scale=max(scales[site.name], 1e-30)) for site in sites))
    stage.store.write_json("manifest.json", {"sites": scales, "blocks": len(blocks), "sample": len(sample)})
    for ending in ("json", "safetensors"):
        stage.store.remove(f"sites-unscaled.{ending}")


def _mapped(crew: Crew, make: Any, given: tuple, ordinals: np.ndarray, what: str) -> list[dict[str, Any]]:
    """A worker's findings on slices of a sample, in order."""
    units = [(index, part) for index, part in enumerate(np.array_split(ordinals, SLICES)) if len(part)]
    results = progress(crew.map(make, given, units), what, len(ordinals), "blocks", lambda found: found["blocks"])
    return sorted(results, key=lambda found: found["index"])


def save_sites(store: Store, name: str, sites: tuple[Site, ...]) -> None:
    """Publish sites as ``name``.safetensors and ``name``.json."""
    tensors = {f"{i}.{part}": getattr(site, part).cpu() for i, site in enumerate(sites) for part in TENSORS}
    store.write(f"{name}.safetensors", tensor_bytes(tensors))
    store.write_json(f"{name}.json", [{"name": site.name, "scale": site.scale} for site in sites])


def load_sites(store: Store, name: str, device: Any) -> tuple[Site, ...]:
    """Read what save_sites wrote."""
    tensors = tensors_from(store.read(f"{name}.safetensors"))
    facts = store.read_json(f"{name}.json")
    return tuple(
        Site(**each, **{part: tensors[f"{i}.{part}"] for part in TENSORS}).to(device) for i, each in enumerate(facts)
    )


class MomentWorker(PoolWorker):
    """Second moments at all sites over some blocks."""

    def __call__(self, unit: tuple[int, np.ndarray]) -> dict[str, Any]:
        """Do one unit; returns its findings."""
        index, ordinals = unit
        names, total, positions = find_sites(self.model), dict[str, Moments](), 0
        for start in range(0, len(ordinals), self.rows):
            batch = self.blocks.batch(ordinals[start : start + self.rows])
            sums, count = site_moments(self.model, names, self.tensors(batch.ids), self.tensors(batch.mask))
            total = {name: total[name] + sums[name] if name in total else sums[name] for name in names}
            positions += count
        facts = {"index": index, "blocks": len(ordinals), "positions": positions}
        return {**facts, "moments": total, "vocabulary": self.model.vocabulary}


class ScaleWorker(PoolWorker):
    """Σ |H^-½ J|² by site, and the loss, over some blocks."""

    def __init__(self, config: Config, store: Store, device: str, curvature: Store) -> None:
        super().__init__(config, store, device)
        self.sites = load_sites(curvature, "sites-unscaled", self.model.device)

    def __call__(self, unit: tuple[int, np.ndarray]) -> dict[str, Any]:
        """Do one unit; returns its findings."""
        index, ordinals = unit
        squares, loss, targets = dict.fromkeys((site.name for site in self.sites), 0.0), 0.0, 0
        for start in range(0, len(ordinals), self.rows):
            batch = self.blocks.batch(ordinals[start : start + self.rows])
            each, losses = site_gradients(self.model, self.sites, self.tensors(batch.ids), self.tensors(batch.mask))
            for site, J in each:
                squares[site.name] += float(J.double().square().sum())
            counted = batch.mask[:, 1:].sum(1)
            loss += float((losses.nan_to_num().cpu().double() * torch.from_numpy(counted)).sum())
            targets += int(counted.sum())
        return {"index": index, "blocks": len(ordinals), "squares": squares, "loss": loss, "targets": targets}


def _score(config: Config, blocks: Blocks, curvature: Stage, stage: Stage, queries: int, crew: Crew) -> None:
    """Queries' J, then all blocks against them, then the ranked tables."""
    given = (config, blocks.store, crew.device, curvature.store, stage)
    parts = [(index, start) for index, start in enumerate(range(0, queries, UNIT))]
    missing = [part for part in parts if f"queries-{part[0]:05d}" not in stage.done()]
    asked = progress(crew.map(QueryWorker, given, missing), "queries", len(missing), "parts", lambda _: 1)
    sizes = [marker["numbers"] for marker in (*asked, *stage.done().values()) if "numbers" in marker]
    passes = max(1, -(-max(sizes, default=0) * queries // HELD), -(-queries // MOST))
    groups = np.array_split(np.arange(len(parts)), min(passes, len(parts)))
    units = [
        (group.tolist(), index, *shard) for group in groups if len(group) for index, shard in enumerate(blocks.shards())
    ]
    done = stage.done()
    missing_units = [unit for unit in units if _score_name(unit) not in done]
    results = crew.map(ScoreWorker, given, missing_units)
    total = sum(unit[3] - unit[2] for unit in missing_units)
    progress(results, "score", total, "blocks", lambda marker: marker["blocks"])
    done = stage.done()
    left = [part for part, _ in parts if f"{part:05d}" not in done]
    told = crew.map(partial, (rank_unit, config, blocks.store, stage, units), left)
    progress(told, "rank", len(left), "parts", lambda _: 1)
    markers = [marker for name, marker in stage.done().items() if name.isdigit()]
    kept = [rows for marker in markers for rows in marker["nonzeros"]]
    stage.store.write_json(
        "manifest.json",
        {
            "queries": sum(marker["queries"] for marker in markers),
            "failed": sum(marker["failed"] for marker in markers),
            "rows": sum(kept),
            "median_nonzeros": float(np.median(kept)) if kept else 0.0,
            "parts": len(parts),
        },
    )


def _score_name(unit: tuple[list[int], int, int, int]) -> str:
    return f"scores-{unit[0][0]:05d}-{unit[1]:03d}"


class QueryWorker(PoolWorker):
    """Publishes H^-½ J of some queries, with their losses and errors."""

    def __init__(self, config: Config, store: Store, device: str, curvature: Store, stage: Stage) -> None:
        super().__init__(config, store, device)
        self.sites, self.stage = load_sites(curvature, "sites", self.model.device), stage
        self.table = stage.store.read_table("queries.parquet")

    def __call__(self, unit: tuple[int, int]) -> dict[str, Any]:
        """Do one unit; returns its marker."""
        started = time.monotonic()
        index, start = unit
        rows = self.table.slice(start, UNIT).to_pylist()
        answers = [{**checked(self.model, row), "base_loss": None} for row in rows]
        found: dict[str, list[torch.Tensor]] = {site.name: [] for site in self.sites}
        waiting = [i for i, answer in enumerate(answers) if answer["status"] == "ok"]
        for batch in batches(rows, waiting, self.config.compute.batch_tokens):
            each, losses = site_gradients(self.model, self.sites, *padded([rows[i] for i in batch], self.model.device))
            for site, J in each:
                found[site.name].append(J.cpu())
            for i, loss in zip(batch, losses.tolist(), strict=True):
                answers[i]["base_loss"] = loss
        tensors = {name: torch.cat(pieces) for name, pieces in found.items() if pieces}
        finite = torch.ones(len(waiting), dtype=torch.bool)
        for J in tensors.values():
            finite &= J.isfinite().all(1)
        for i, good in zip(waiting, finite.tolist(), strict=True):
            if not good:
                answers[i] |= {"status": "failed", "error": "J is not finite; the model overflows on this text"}
        name = f"queries-{index:05d}"
        self.stage.store.write(f"{name}.safetensors", tensor_bytes({k: v[finite] for k, v in tensors.items()}))
        numbers = sum(J.shape[1] for J in tensors.values())
        return self.stage.mark(name, started, answers=answers, numbers=numbers)


class ScoreWorker(PoolWorker):
    """Scores a shard's blocks for a group of queries and publishes each query's largest influences among them."""

    def __init__(self, config: Config, store: Store, device: str, curvature: Store, stage: Stage) -> None:
        super().__init__(config, store, device)
        self.sites, self.stage = load_sites(curvature, "sites", self.model.device), stage
        self.group: list[int] = []
        self.queries: dict[str, torch.Tensor] = {}

    def __call__(self, unit: tuple[list[int], int, int, int]) -> dict[str, Any]:
        """Do one unit; returns its marker."""
        started = time.monotonic()
        group, _, start, stop = unit
        if group != self.group:
            self.group, self.queries = group, self._load(group)
        pieces = []
        for batch in self.blocks.batches(start, stop, self.rows) if self.queries else []:
            each, _ = site_gradients(self.model, self.sites, self.tensors(batch.ids), self.tensors(batch.mask))
            pieces.append(influence(self.queries, each).cpu())
        scores = torch.cat(pieces, 1) if pieces else torch.zeros(0, stop - start)
        # Ties go by ordinal, whatever the shard: the order of equals must not depend on the sort.
        order = scores.abs().argsort(dim=1, descending=True, stable=True)[:, : self.config.attribute.top]
        kept = {"ordinals": order + start, "influence": scores.gather(1, order)}
        name = _score_name(unit)
        self.stage.store.write(f"{name}.safetensors", tensor_bytes(kept))
        return self.stage.mark(name, started, blocks=stop - start)

    def _load(self, group: list[int]) -> dict[str, torch.Tensor]:
        """H^-½ J of a group's queries by site; nothing where all of them failed."""
        stored = [tensors_from(self.stage.store.read(f"queries-{part:05d}.safetensors")) for part in group]
        full = [tensors for tensors in stored if tensors]
        names = full[0] if full else {}
        return {name: torch.cat([tensors[name] for tensors in full]).to(self.model.device) for name in names}


def rank_unit(
    config: Config, pool_store: Store, stage: Stage, units: list[tuple[list[int], int, int, int]], part: int
) -> dict[str, Any]:
    """The ranked tables of one part's queries from all shards' largest influences."""
    started = time.monotonic()
    group = next(unit[0] for unit in units if part in unit[0])
    markers = stage.done()
    answers = {each: markers[f"queries-{each:05d}"]["answers"] for each in group}
    good = [answer["query_id"] for answer in answers[part] if answer["status"] == "ok"]
    before = sum(answer["status"] == "ok" for each in group if each < part for answer in answers[each])
    rows = slice(before, before + len(good))
    shards = [tensors_from(stage.store.read(f"{_score_name(u)}.safetensors")) for u in units if u[0] == group]
    ordinals = torch.cat([shard["ordinals"][rows] for shard in shards], 1).numpy()
    values = torch.cat([shard["influence"][rows] for shard in shards], 1).double().numpy()
    found = []
    for at, weights in zip(ordinals, values, strict=True):
        kept = np.lexsort((at, -np.abs(weights)))[: config.attribute.top]
        kept = np.sort(kept[weights[kept] != 0])
        kept = kept[np.argsort(at[kept])]
        found.append(Recovery(at[kept], weights[kept], 0.0, 0.0, 0.0, 0))
    ranked, documents = rank_tables(good, found, Blocks(pool_store))
    counts = iter(len(each.ordinals) for each in found)
    told = [{**answer, "nonzeros": next(counts) if answer["status"] == "ok" else None} for answer in answers[part]]
    name = f"{part:05d}"
    stage.store.write_table(f"influence-{name}.parquet", ranked)
    stage.store.write_table(f"documents-{name}.parquet", documents)
    stage.store.write_table(f"recovery-{name}.parquet", pa.Table.from_pylist(told, RECOVERY))
    nonzeros = [len(each.ordinals) for each in found]
    return stage.mark(name, started, queries=len(told), failed=len(told) - len(good), nonzeros=nonzeros)


def _clear(stage: Stage) -> None:
    """Remove the scaffolding of finished queries."""
    for name in stage.store.names(ending=".safetensors"):
        stage.store.remove(name)
