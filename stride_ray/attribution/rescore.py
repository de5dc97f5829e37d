"""Stages rescore and exact: exact influence for a query's shortlist, estimates for the rest, and the ranked tables.

Exact influence is J(x)ᵀ H⁻¹ J_i (sites.py), a K-FAC influence function at layer outputs (Grosse et al. 2023, arXiv
2308.03296). It costs a forward and a backward pass per candidate. Scoring every block (``exact_influence``) needs no
operators, responses or estimates, and costs one pass over the pool per batch of queries.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from stride_ray.attribution.directions import (
    MAX_QUERIES_PER_UNIT,
    begin_directions,
    clear_directions,
    compute_directions,
    gradient_bytes,
    queries_per_unit,
)
from stride_ray.attribution.recover import read_estimates
from stride_ray.attribution.scoring import QueryWorker, ScoreUnit, ScoreWorker, TokenWorker, query_name
from stride_ray.attribution.tables import rank_unit, tokens_name
from stride_ray.corpus.blocks import Blocks, unit_count
from stride_ray.corpus.failures import check_failed_blocks, check_failed_queries, failed_ordinals, write_failed_blocks
from stride_ray.corpus.queries import check_name, fingerprint
from stride_ray.models.curvature.kfac import begin_curvature, finish_curvature
from stride_ray.models.loading import measured_model_fingerprint
from stride_ray.models.pool_worker import check_tokenizer
from stride_ray.runtime.actor_pool import ActorPool, shared_actor_pool
from stride_ray.runtime.config import Config
from stride_ray.runtime.costs import record_stage_costs
from stride_ray.runtime.progress import run_missing
from stride_ray.runtime.run import Run, Stage
from stride_ray.runtime.storage import Store

# Maximum queries per pass over the pool; maximum candidates per work unit, and target number of units per group.
MAX_QUERIES_PER_PASS, MAX_CANDIDATES_PER_UNIT, TARGET_UNITS = 256, 128, 8
# Candidates that hold 95 % of the exact top ten: BASE + FACTOR · N^⅓ / KiB^EXPONENT, with the operators' KiB per block
# (RESULTS.md, Shortlists; fitted at 1,600 to 115,465 blocks). The last is the cap.
BASE_CANDIDATES, CANDIDATE_FACTOR, BYTES_EXPONENT, MAX_CANDIDATES = 12, 100.0, 1.75, 1600

# Indices of consecutive query parts whose H⁻¹J are in memory together; the queries by part, one dict each.
Group = tuple[int, ...]
Parts = list[list[dict[str, Any]]]


def exact_influence(run: Run, table: pa.Table, name: str) -> dict[str, Any]:
    """Score every block for every query and write the ranked tables.

    The tables in ``exact/<name>/`` have the columns of rescore's. They hold the ``attribute.top`` blocks of largest
    |influence|; the Lasso columns are null.

    Args:
        run: with finished ``blocks/``.
        table: tokenised queries (queries.SCHEMA).
        name: of the query set.

    Returns:
        ``queries``, ``failed``, ``rows`` and ``exact`` (here equal to ``rows``), ``median_nonzeros``, ``unsolved``
        (queries whose Gauss–Newton solve took no step, leaving the preconditioner's direction), ``not_finite`` (blocks
        without influence, since a loss or gradient is not finite; ``failed-blocks.parquet`` lists them), ``parts``.

    Raises:
        StrideError: a stage is missing or was made with other settings, another query set has this name, the model
            has no sites, or too many blocks or queries are not finite (failures).
    """
    check_name(name)
    blocks = Blocks(run.require("blocks").store)
    corpus = blocks.manifest["fingerprint"]
    check_tokenizer(run.config, blocks)
    weights = measured_model_fingerprint(run.config)
    curvature = begin_curvature(run, blocks, weights)
    stage = run.begin("exact", name, corpus=corpus, queries=fingerprint(table), weights=weights)
    if not stage.store.exists("queries.parquet"):
        stage.store.write_table("queries.parquet", table)
    if not stage.is_finished():
        with _scoring(run, blocks, stage, name, curvature) as scoring:
            queries, groups = scoring.invert(curvature.store)
            ranges = list(enumerate(blocks.cut(unit_count(len(blocks)))))
            units = [ScoreUnit(_unit_name(g, i), g, *ordinals) for g in groups for i, ordinals in ranges]
            failed = scoring.score(curvature.store, units)
            scoring.rank(units, queries, failed, curvature.store)
    return _manifest_of_cleared(run, stage, name)


def rescore(run: Run, name: str) -> dict[str, Any]:
    """Compute the influence of every query's candidates exactly, and write the ranked tables.

    ``influence-*.parquet`` holds the blocks with influence, most helpful first and most harmful last, each marked exact
    or estimated; ``documents-*`` the same summed to documents, with a block's influence split by token share, and
    ``sources-*`` summed to sources; ``tokens-*`` and ``spans-*`` where the influence of the first and last blocks lies;
    ``recovery-*`` a row per query with the solver's diagnostics, the numbers of blocks listed and of exact ones, and
    the error of a failed query. Candidates are the ``attribute.candidates`` blocks of largest |estimate|
    (candidate_count).

    Example:
        >>> from stride_ray import Run, read_influence
        >>> from stride_ray.attribution.rescore import rescore
        >>> done = rescore(Run("mine"), "asked")
        >>> best = read_influence(Run("mine"), "asked").to_pylist()[0]
        >>> best["query_id"], best["rank"], best["exact"], best["influence"] > 0
        ('sea', 1, True, True)

    Args:
        run: with finished estimates for this query set.
        name: the query set.

    Returns:
        As exact_influence; ``exact`` is the number of rows that are not estimates, and ``reliability``, if known, the
        median split-half reliability of the responses.

    Raises:
        StrideError: a stage is missing or was made with other settings, or the model has no sites.
    """
    check_name(name)
    estimates = run.require("estimates", name)
    keys = estimates.store.read_json("stage.json")["keys"]
    inputs = {key: keys[key] for key in ("corpus", "queries", "weights")}
    blocks = Blocks(run.stage("blocks").store)
    facts = run.require("operators").manifest()
    candidates = candidate_count(run.config, facts)
    curvature = begin_curvature(run, blocks, keys["weights"]) if candidates else None
    stage = run.begin("influence", name, **inputs)
    if not stage.store.exists("queries.parquet"):
        stage.store.write_table("queries.parquet", run.stage("responses", name).store.read_table("queries.parquet"))
    if not stage.is_finished():
        with _scoring(run, blocks, stage, name, curvature) as scoring:
            rows = read_estimates(estimates)
            units, failed = list[ScoreUnit](), set(failed_ordinals(run.stage("operators").store))
            failed |= set(failed_ordinals(run.stage("responses", name).store))
            if curvature is None:
                queries = [rows[at : at + MAX_QUERIES_PER_UNIT] for at in range(0, len(rows), MAX_QUERIES_PER_UNIT)]
            else:
                queries, groups = scoring.invert(curvature.store, rows)
                units = [unit for group in groups for unit in candidate_units(group, queries, candidates)]
                failed |= scoring.score(curvature.store, units)
            scoring.rank(units, queries, failed, None if curvature is None else curvature.store)
    return _manifest_of_cleared(run, stage, name)


@dataclass(frozen=True)
class _Scoring:
    """Steps that exact_influence and rescore share, with their inputs; used in the driver only.

    A part is the work unit of the queries' gradients: a list with one dict per query, which holds the query's fields of
    tables.RECOVERY and, if there are estimates, ``ordinals`` and ``estimates``.
    """

    run: Run
    blocks: Blocks
    stage: Stage
    name: str
    actors: ActorPool

    def invert(self, curvature: Store, estimated: list[dict[str, Any]] | None = None) -> tuple[Parts, list[Group]]:
        """Write H⁻¹ times the directions of all queries.

        Returns:
            The queries by part, with status "failed" for a query that failed here or in an earlier stage; and groups
            of parts whose H⁻¹J fit in ``compute.query_gb``.
        """
        config, stage = self.run.config, self.stage
        table = stage.store.read_table("queries.parquet")
        size, n_queries = gradient_bytes(curvature), table.num_rows
        unit = queries_per_unit(size)
        before = [{"error": None}] * n_queries if estimated is None else estimated
        parts = {
            query_name(part): (part, tuple(row["error"] for row in before[at : at + unit]))
            for part, at in enumerate(range(0, n_queries, unit))
        }

        def compute(missing: list[Any]) -> Iterator[dict[str, Any]]:
            directions = begin_directions(self.run, table, self.name)
            compute_directions(config, self.blocks, curvature, directions, n_queries, self.actors)
            return self.actors.map(QueryWorker, (directions, self.actors.device, curvature, stage), missing)

        markers, following = run_missing(stage, parts, compute, "invert", "parts"), iter(before)
        queries = [[{**next(following), **row} for row in marker["answers"]] for marker in markers]
        check_failed_queries(row for part in queries for row in part)
        passes = passes_over(size, n_queries, config.compute.query_gb)
        return queries, [tuple(group.tolist()) for group in np.array_split(np.arange(len(parts)), passes) if len(group)]

    def score(self, curvature: Store, units: list[ScoreUnit]) -> set[int]:
        """Score the units without a done marker; returns the ordinals of blocks, over all units, that are not finite.

        Raises:
            StrideError: as check_failed_blocks.
        """
        arguments = (self.run.config, self.blocks, self.actors.device, curvature, self.stage)
        work, named = partial(self.actors.map, ScoreWorker, arguments), {unit.name: unit for unit in units}
        markers = run_missing(self.stage, named, work, "score", "blocks", lambda unit: unit.blocks)
        failed = {ordinal for marker in markers for ordinal in marker["not_finite"]}
        check_failed_blocks(sorted(failed), len(self.blocks))
        return failed

    def rank(self, units: list[ScoreUnit], queries: Parts, failed: set[int], curvature: Store | None) -> None:
        """Write the missing tables and the list of failed blocks, then the manifest.

        With ``curvature`` also the tables of tokens, which need the queries' H⁻¹J.
        """
        stage = self.stage
        write_failed_blocks(stage.store, self.blocks, sorted(failed))
        parts = range(len(queries))
        arguments = (self.run.config, self.blocks, stage, [(u.group, u.name) for u in units], queries)
        work = partial(self.actors.map_function, rank_unit, arguments)
        markers = run_missing(stage, {f"{part:05d}": part for part in parts}, work, "rank", "parts")
        if curvature is not None and self.run.config.attribute.tokens:
            split = partial(
                self.actors.map, TokenWorker, (self.run.config, self.blocks, self.actors.device, curvature, stage)
            )
            run_missing(stage, {tokens_name(part): part for part in parts}, split, "tokens", "parts")
        stage.finish(_summary(markers, len(failed)))


@contextmanager
def _scoring(run: Run, blocks: Blocks, stage: Stage, name: str, curvature: Stage | None) -> Iterator[_Scoring]:
    """The frame of both stages: actors, the preconditioner (None if nothing is scored exactly), and the costs."""
    with stage.ignore_errors_if_finished(), shared_actor_pool(run.config, unit_count(len(blocks))) as actors:
        if curvature is not None:
            finish_curvature(run.config, blocks, curvature, actors)
        with record_stage_costs(stage):
            yield _Scoring(run, blocks, stage, name, actors)


def _manifest_of_cleared(run: Run, stage: Stage, name: str) -> dict[str, Any]:
    """Remove the files that only the work of a finished stage needed; returns its manifest."""
    clear_directions(run, name)
    stage.clear_tensors()
    return stage.manifest()


def _summary(markers: list[dict[str, Any]], not_finite: int) -> dict[str, Any]:
    """Summarise the done markers of all parts into the stage's manifest."""
    rows = [count for marker in markers for count in marker["nonzeros"]]
    reliable = [value for marker in markers for value in marker["reliability"] if value is not None]
    return {
        "queries": sum(marker["queries"] for marker in markers),
        "failed": sum(marker["failed"] for marker in markers),
        "rows": sum(rows),
        "exact": sum(count for marker in markers for count in marker["exact"]),
        "median_nonzeros": float(np.median(rows)) if rows else 0.0,
        **({"reliability": float(np.median(reliable))} if reliable else {}),
        "unsolved": sum(marker["unsolved"] for marker in markers),
        "not_finite": not_finite,
        "parts": len(markers),
    }


def candidate_count(config: Config, operators: dict[str, Any]) -> int:
    """Number of candidates per query: ``attribute.candidates`` or, if that is -1, derived from the operators' size.

    Example: 115,465 blocks with 18 KiB of operators per block get 43 candidates per query; a million blocks get 275
    with 8 KiB and 896 with 4 KiB.

    Args:
        config: of the run.
        operators: their manifest. The paper's forms have no ``row_bytes`` and get 100 candidates.
    """
    wanted = config.attribute.candidates
    if wanted < 0 and "row_bytes" in operators:
        a_block = operators["row_bytes"] * operators["subsets"] / operators["blocks"]
        return min(MAX_CANDIDATES, candidates_needed(operators["blocks"], a_block))
    return 100 if wanted < 0 else wanted


def candidates_needed(n_blocks: int, bytes_per_block: float) -> int:
    """Number of candidates that hold 95 % of a query's exact top ten, fitted (RESULTS.md, Shortlists).

    Example: 1,000,000 blocks with 8 KiB (8,192 bytes) each need 12 + 100 · 100 / 8^1.75 = 275.
    """
    return round(BASE_CANDIDATES + CANDIDATE_FACTOR * n_blocks ** (1 / 3) / (bytes_per_block / 1024) ** BYTES_EXPONENT)


def candidate_units(group: Group, queries: Parts, candidates: int) -> list[ScoreUnit]:
    """Cut the union of a group's candidates into units of blocks; a query keeps only its own scores.

    Example: two queries with candidates [5, 9] and [5, 7] have the union [5, 7, 9]. Fewer than TARGET_UNITS, each gets
    its own unit: ``ordinals`` [5] with ``wanted`` [[0, 1], [0, 0]], [7] with [[1], [0]], and [9] with [[0], [0]].
    """
    valid = [row for part in group for row in queries[part] if row["status"] == "ok"]
    chosen = [_top_candidates(row["ordinals"], row["estimates"], candidates) for row in valid]
    union = np.unique(np.concatenate([np.zeros(0, np.int64), *chosen]))
    units, size = [], max(1, min(MAX_CANDIDATES_PER_UNIT, -(-len(union) // TARGET_UNITS)))
    for index, start in enumerate(range(0, len(union), size)):
        chunk = union[start : start + size]
        pairs = [(row, np.flatnonzero(np.isin(chunk, candidates_of))) for row, candidates_of in enumerate(chosen)]
        rows = np.concatenate([np.full(len(places), row) for row, places in pairs])
        wanted = np.stack([rows, np.concatenate([places for _, places in pairs])]).astype(np.int32)
        units.append(ScoreUnit(_unit_name(group, index), group, ordinals=chunk, wanted=wanted))
    return units


def _top_candidates(ordinals: np.ndarray, estimates: np.ndarray, count: int) -> np.ndarray:
    """Return the ordinals of largest |estimate|; ties are broken by ordinal."""
    return ordinals[np.lexsort((ordinals, -np.abs(estimates)))[:count]]


def passes_over(gradient_bytes: int, queries: int, query_gb: float) -> int:
    """Number of passes over the pool for queries whose H⁻¹J take ``gradient_bytes`` each; at most one pass per part."""
    room = math.ceil(gradient_bytes * queries / max(1, query_gb * 2**30))
    return min(
        max(1, room, -(-queries // MAX_QUERIES_PER_PASS)), max(1, -(-queries // queries_per_unit(gradient_bytes)))
    )


def _unit_name(group: Group, index: int) -> str:
    # Names include the group's first and last part, because compute.query_gb decides how parts are grouped.
    return f"scores-{group[0]:05d}-{group[-1]:05d}-{index:05d}"
