"""Stage exact: every query's inner product with every block, in one pass over the pool.

No operators, no subsets, no recovery: J(x)ᵀ H⁻¹ J_i itself (sites.py), with H from the stage before (curvature.py). A
batch of queries costs one forward and one backward pass over the pool, whatever their number, and the largest
influences per query are kept.
"""

import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from stride_ray.blocks import Blocks
from stride_ray.config import Config
from stride_ray.costs import costed
from stride_ray.crew import Crew
from stride_ray.curvature import SITES, load_sites, measure_curvature
from stride_ray.distribute import connected, pool, progress
from stride_ray.fitted import load_measured_model, load_run_model, measured_weights
from stride_ray.influence import RECOVERY, rank_tables
from stride_ray.model import masked_mean
from stride_ray.passes import PoolWorker, check_tokenizer
from stride_ray.queries import batches, check_name, checked, fingerprint, padded
from stride_ray.recover import Recovery
from stride_ray.run import Run, Stage, unless_finished
from stride_ray.sites import Site, influence, site_gradients
from stride_ray.storage import Store, tensor_bytes

# Queries whose J are made in one unit, and the most in one pass over the pool.
UNIT, MOST = 16, 256


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
    weights = measured_weights(run.config)
    curvature = run.begin("curvature", corpus=corpus, weights=weights)
    stage = run.begin("exact", name, corpus=corpus, queries=fingerprint(table), weights=weights)
    if not stage.store.exists("queries.parquet"):
        stage.store.write_table("queries.parquet", table)
    if not stage.store.exists("manifest.json"):
        workers = unit_count(len(blocks))
        with (
            unless_finished(stage, "manifest.json"),
            connected(run.config.compute),
            Crew(pool(run.config.compute, workers)) as crew,
        ):
            if not curvature.store.exists("manifest.json"):
                with costed(curvature):
                    measure_curvature(run.config, blocks, curvature, crew)
            with costed(stage):
                _score(run.config, blocks, curvature, stage, table.num_rows, crew)
    _clear(stage)
    return stage.store.read_json("manifest.json")


def _score(config: Config, blocks: Blocks, curvature: Stage, stage: Stage, queries: int, crew: Crew) -> None:
    """Queries' J, then all blocks against them, then the ranked tables."""
    given = (config, blocks, crew.device, curvature.store, stage)
    parts = [(index, start) for index, start in enumerate(range(0, queries, UNIT))]
    done = stage.done()
    missing = [part for part in parts if f"queries-{part[0]:05d}" not in done]
    told = crew.map(QueryWorker, given, missing)
    stage.remember(progress(told, "queries", len(missing), "parts", lambda _: 1))
    done = stage.done()
    asked = [done[f"queries-{index:05d}"] for index, _ in parts]
    sizes = [marker["numbers"] for marker in asked]
    passes = passes_over(max(sizes, default=0), queries, config.compute.query_gb)
    groups = np.array_split(np.arange(len(parts)), passes)
    ranges = list(enumerate(blocks.cut(unit_count(len(blocks)))))
    units = [(group.tolist(), index, *ordinals) for group in groups for index, ordinals in ranges]
    missing_units = [unit for unit in units if _score_name(unit) not in done]
    results = crew.map(ScoreWorker, given, missing_units)
    total = sum(unit[3] - unit[2] for unit in missing_units)
    progress(results, "score", total, "blocks", lambda marker: marker["blocks"])
    answers = [marker["answers"] for marker in asked]
    left = [part for part, _ in parts if f"{part:05d}" not in done]
    told = crew.map(partial, (rank_unit, config, blocks, stage, units, answers), left)
    stage.remember(progress(told, "rank", len(left), "parts", lambda _: 1))
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


def unit_count(n_blocks: int) -> int:
    """How many units a pool is scored in: a thousand blocks each, in eights, so that few workers end together."""
    return min(n_blocks, 8 * min(max(1, -(-n_blocks // 8192)), 16))


def passes_over(numbers: int, queries: int, query_gb: float) -> int:
    """How many passes over the pool so many queries need, whose J has so many float32 numbers each."""
    room = math.ceil(4 * numbers * queries / max(1, query_gb * 2**30))
    return min(max(1, room, -(-queries // MOST)), max(1, -(-queries // UNIT)))


def _score_name(unit: tuple[list[int], int, int, int]) -> str:
    # First and last of its parts: with another query_gb other parts go together.
    return f"scores-{unit[0][0]:05d}-{unit[0][-1]:05d}-{unit[1]:03d}"


class Scorer(PoolWorker):
    """A worker that takes J at all sites."""

    load = staticmethod(load_measured_model)

    def __init__(self, config: Config, blocks: Blocks, device: str, curvature: Store, stage: Stage) -> None:
        super().__init__(config, blocks, device)
        self.stage = stage
        self.sites = load_sites(curvature, SITES, self.model.device)

    def gradients(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> Iterator[tuple[Site, torch.Tensor]]:
        """J of each sequence, site by site."""
        return site_gradients(self.model, self.sites, ids_BT, mask_BT)[0]


class QueryWorker(Scorer):
    """Publishes H⁻¹ J of some queries, with their losses and errors."""

    def __init__(self, config: Config, blocks: Blocks, device: str, curvature: Store, stage: Stage) -> None:
        super().__init__(config, blocks, device, curvature, stage)
        self.table = stage.store.read_table("queries.parquet")
        self.trained = load_run_model(config, device)

    def __call__(self, unit: tuple[int, int]) -> dict[str, Any]:
        """Do one unit; returns its marker."""
        started = time.monotonic()
        index, start = unit
        rows = self.table.slice(start, UNIT).to_pylist()
        answers = [{**checked(self.model, row), "base_loss": None} for row in rows]
        found: dict[str, list[torch.Tensor]] = {}
        waiting = [i for i, answer in enumerate(answers) if answer["status"] == "ok"]
        for batch in batches(rows, waiting, self.config.compute.batch_tokens):
            ids, mask = padded([rows[i] for i in batch], self.model.device)
            for site, J in self.gradients(ids, mask):
                found.setdefault(site.name, []).append(site.solved(J).flatten(1).cpu())
            losses = self.trained.token_losses(self.trained.read(ids), ids, mask)
            for i, loss in zip(batch, masked_mean(losses, mask).tolist(), strict=True):
                answers[i]["base_loss"] = loss
        tensors = {name: torch.cat(pieces) for name, pieces in found.items()}
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


class ScoreWorker(Scorer):
    """Scores a unit's blocks for a group of queries and publishes each query's largest influences among them."""

    def __init__(self, config: Config, blocks: Blocks, device: str, curvature: Store, stage: Stage) -> None:
        super().__init__(config, blocks, device, curvature, stage)
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
            J = self.gradients(*self.trimmed(batch))
            pieces.append(influence(self.queries, J).cpu())
        scores = torch.cat(pieces, 1) if pieces else torch.zeros(0, stop - start)
        # Ties go by ordinal, whatever the shard: the order of equals must not depend on the sort.
        order = scores.abs().argsort(dim=1, descending=True, stable=True)[:, : self.config.attribute.top]
        kept = {"ordinals": order + start, "influence": scores.gather(1, order)}
        name = _score_name(unit)
        self.stage.store.write(f"{name}.safetensors", tensor_bytes(kept))
        return self.stage.mark(name, started, blocks=stop - start)

    def _load(self, group: list[int]) -> dict[str, torch.Tensor]:
        """H⁻¹ J of a group's queries by site; nothing where all of them failed."""
        stored = [self.stage.store.read_tensors(f"queries-{part:05d}.safetensors") for part in group]
        full = [tensors for tensors in stored if tensors]
        names = full[0] if full else {}
        return {name: torch.cat([tensors[name] for tensors in full]).to(self.model.device) for name in names}


def rank_unit(
    config: Config,
    blocks: Blocks,
    stage: Stage,
    units: list[tuple[list[int], int, int, int]],
    answers: list[list[dict[str, Any]]],
    part: int,
) -> dict[str, Any]:
    """The ranked tables of one part's queries from all units' largest influences and every part's answers."""
    started = time.monotonic()
    group = next(unit[0] for unit in units if part in unit[0])
    good = [answer["query_id"] for answer in answers[part] if answer["status"] == "ok"]
    before = sum(answer["status"] == "ok" for each in group if each < part for answer in answers[each])
    rows = slice(before, before + len(good))
    shards = [stage.store.read_tensors(f"{_score_name(u)}.safetensors") for u in units if u[0] == group]
    ordinals = torch.cat([shard["ordinals"][rows] for shard in shards], 1).numpy()
    values = torch.cat([shard["influence"][rows] for shard in shards], 1).double().numpy()
    found = []
    for at, weights in zip(ordinals, values, strict=True):
        kept = np.lexsort((at, -np.abs(weights)))[: config.attribute.top]
        kept = np.sort(kept[weights[kept] != 0])
        kept = kept[np.argsort(at[kept])]
        found.append(Recovery(at[kept], weights[kept], 0.0, 0.0, 0.0, 0))
    ranked, documents = rank_tables(good, found, blocks)
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
