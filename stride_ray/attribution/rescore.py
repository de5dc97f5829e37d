"""Stage rescore: exact influence of a query's candidates, estimates for the rest, and the ranked tables.

Exact is J(x)ᵀ H⁻¹ J_i (sites.py): a K-FAC influence function at layers' outputs (Grosse et al. 2023, arXiv 2308.03296).
Of a query's candidates it costs a forward and a backward pass per candidate. With every block as a candidate
(``exact_influence``) no operators, responses or estimates are needed, and a batch of queries costs one pass over the
pool.
"""

import math
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from stride_ray.attribution.directions import (
    UNIT,
    begin_directions,
    clear_directions,
    compute_directions,
    gradient_bytes,
    queries_a_unit,
)
from stride_ray.attribution.recover import read_estimates
from stride_ray.attribution.scoring import QueryWorker, ScoreUnit, ScoreWorker, query_name
from stride_ray.attribution.tables import rank_unit
from stride_ray.corpus.blocks import Blocks, unit_count
from stride_ray.corpus.queries import check_name, fingerprint
from stride_ray.models.curvature.kfac import begin_curvature, finish_curvature
from stride_ray.models.loading import measured_weights
from stride_ray.models.pool_worker import check_tokenizer
from stride_ray.runtime.actor_pool import ActorPool, shared_actor_pool
from stride_ray.runtime.config import Config
from stride_ray.runtime.costs import costed
from stride_ray.runtime.run import Run, Stage, tolerate_concurrent_finish
from stride_ray.runtime.storage import Store
from stride_ray.runtime.tasks import progress

# The most queries in one pass over the pool; the most candidates in a unit of work, and units of a group at least.
MOST, CANDIDATES, UNITS = 256, 128, 8
# Candidates that hold 95 % of the exact best ten: ten, and so many times N^⅓ more where operators have 1 KiB a block,
# falling with that power of the bytes (RESULTS.md, Shortlists; fitted at 1,600 to 25,600 blocks). And the most.
BASE_CANDIDATES, CANDIDATE_FACTOR, BYTES_EXPONENT, MAX_CANDIDATES = 10, 55.0, 1.75, 1600


def exact_influence(run: Run, table: pa.Table, name: str) -> dict[str, Any]:
    """Score every block for every query and write the ranked tables.

    The tables of ``exact/<name>/`` are those of rescore, with the blocks of largest influence (``attribute.top``) and
    nothing in the solver's columns.

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
    curvature = begin_curvature(run, blocks, weights)
    stage = run.begin("exact", name, corpus=corpus, queries=fingerprint(table), weights=weights)
    if not stage.store.exists("queries.parquet"):
        stage.store.write_table("queries.parquet", table)
    if not stage.store.exists("manifest.json"):
        with (
            tolerate_concurrent_finish(stage, "manifest.json"),
            shared_actor_pool(run.config, unit_count(len(blocks))) as actors,
        ):
            finish_curvature(run.config, blocks, curvature, actors)
            with costed(stage):
                answers, groups = _query_gradients(run, blocks, curvature.store, stage, name, actors)
                ranges = list(enumerate(blocks.cut(unit_count(len(blocks)))))
                units = [ScoreUnit(_unit_name(g, i), g, *ordinals) for g in groups for i, ordinals in ranges]
                _score(run.config, blocks, curvature.store, stage, units, actors)
                _rank(run.config, blocks, stage, units, answers, actors)
    clear_directions(run, name)
    stage.clear_tensors()
    return stage.store.read_json("manifest.json")


def rescore(run: Run, name: str) -> dict[str, Any]:
    """Compute the influence of every query's candidates exactly, and write the ranked tables.

    ``influence-*.parquet`` holds the blocks with influence, most helpful first and most harmful last, and says of each
    whether it is exact or estimated; ``documents-*`` the same summed to documents, each block's influence shared by
    tokens; ``recovery-*`` a row per query with the solver's figures, how many blocks are named and how many of them are
    exact, and the error of a failed query. Candidates are the ``attribute.candidates`` blocks of largest estimate
    (candidate_count).

    Args:
        run: with finished estimates of that name.
        name: the query set.

    Returns:
        As exact_influence, with ``exact``, how many of the rows are.

    Raises:
        StrideError: for a missing stage, other settings, or a model without sites.
    """
    estimates = run.require("estimates", "manifest.json", f"stride-ray recover --name {name}", name)
    keys = estimates.store.read_json("stage.json")["keys"]
    about = {key: keys[key] for key in ("corpus", "queries", "weights")}
    blocks = Blocks(run.stage("blocks").store)
    facts = run.require("operators", "metadata.json", "stride-ray fit").store.read_json("metadata.json")
    wanted = candidate_count(run.config, facts)
    curvature = begin_curvature(run, blocks, keys["weights"]) if wanted else None
    stage = run.begin("influence", name, **about)
    if not stage.store.exists("queries.parquet"):
        stage.store.write_table("queries.parquet", run.stage("responses", name).store.read_table("queries.parquet"))
    if not stage.store.exists("manifest.json"):
        with (
            tolerate_concurrent_finish(stage, "manifest.json"),
            shared_actor_pool(run.config, unit_count(len(blocks))) as actors,
        ):
            if curvature is not None:
                finish_curvature(run.config, blocks, curvature, actors)
            with costed(stage):
                _rescore(run, blocks, curvature.store if curvature else None, stage, estimates, name, wanted, actors)
    clear_directions(run, name)
    stage.clear_tensors()
    return stage.store.read_json("manifest.json")


def _rescore(
    run: Run,
    blocks: Blocks,
    curvature: Store | None,
    stage: Stage,
    estimates: Stage,
    name: str,
    candidates: int,
    actors: ActorPool,
) -> None:
    rows = read_estimates(estimates)
    units: list[ScoreUnit] = []
    if curvature is None:
        answers = [rows[at : at + UNIT] for at in range(0, len(rows), UNIT)]
    else:
        answers, groups = _query_gradients(run, blocks, curvature, stage, name, actors, rows)
        units = [unit for group in groups for unit in candidate_units(group, answers, candidates)]
        _score(run.config, blocks, curvature, stage, units, actors)
    _rank(run.config, blocks, stage, units, answers, actors)


def candidate_count(config: Config, operators: dict[str, Any]) -> int:
    """How many candidates a query has.

    Example: 115,465 blocks with 18 KiB of operators each get 27 candidates a query; a million blocks get 155 with 8 KiB
    each, and 496 with 4.

    Args:
        config: of the run.
        operators: their metadata.json; the paper's forms have no bytes a block, and 100 candidates.
    """
    wanted = config.attribute.candidates
    if wanted < 0 and "row_bytes" in operators:
        a_block = operators["row_bytes"] * operators["subsets"] / operators["blocks"]
        return min(MAX_CANDIDATES, candidates_needed(operators["blocks"], a_block))
    return 100 if wanted < 0 else wanted


def candidates_needed(n_blocks: int, bytes_a_block: float) -> int:
    """How many candidates of a query hold 95 % of the exact best ten of so many blocks."""
    return round(BASE_CANDIDATES + CANDIDATE_FACTOR * n_blocks ** (1 / 3) / (bytes_a_block / 1024) ** BYTES_EXPONENT)


def candidate_units(group: tuple[int, ...], answers: list[list[dict[str, Any]]], candidates: int) -> list[ScoreUnit]:
    """Units over the union of a group's candidates, CANDIDATES blocks at most; only a query's own are scored for it."""
    good = [row for part in group for row in answers[part] if row["status"] == "ok"]
    chosen = [_largest(row["ordinals"], row["estimates"], candidates) for row in good]
    union = np.unique(np.concatenate([np.zeros(0, np.int64), *chosen]))
    units, size = [], max(1, min(CANDIDATES, -(-len(union) // UNITS)))
    for index, at in enumerate(range(0, len(union), size)):
        some = union[at : at + size]
        pairs = [(row, np.flatnonzero(np.isin(some, mine))) for row, mine in enumerate(chosen)]
        rows = np.concatenate([np.full(len(places), row) for row, places in pairs])
        wanted = np.stack([rows, np.concatenate([places for _, places in pairs])]).astype(np.int32)
        units.append(ScoreUnit(_unit_name(group, index), group, ordinals=some, wanted=wanted))
    return units


def _largest(ordinals: np.ndarray, estimates: np.ndarray, count: int) -> np.ndarray:
    """The ordinals of largest estimate, helpful or harmful; ties by ordinal."""
    return ordinals[np.lexsort((ordinals, -np.abs(estimates)))[:count]]


def _query_gradients(
    run: Run,
    blocks: Blocks,
    curvature: Store,
    stage: Stage,
    name: str,
    actors: ActorPool,
    estimated: list[dict[str, Any]] | None = None,
) -> tuple[list[list[dict[str, Any]]], list[tuple[int, ...]]]:
    """Publish H⁻¹ times all queries' directions.

    Returns:
        What is known of each part's queries, with their estimates where there are some, a query that failed before
        or here failed; and groups of parts whose H⁻¹J fit in ``compute.query_gb``.
    """
    table = stage.store.read_table("queries.parquet")
    size, queries = gradient_bytes(curvature), table.num_rows
    unit = queries_a_unit(size)
    known = [{"error": None}] * queries if estimated is None else estimated
    parts = [
        (index, tuple(row["error"] for row in known[at : at + unit]))
        for index, at in enumerate(range(0, queries, unit))
    ]
    done = stage.done()
    missing = [part for part in parts if query_name(part[0]) not in done]
    if missing:
        directions = begin_directions(run, table, name)
        compute_directions(run.config, blocks, curvature, directions, queries, actors)
        results = actors.map(QueryWorker, (directions, actors.device, curvature, stage), missing)
        stage.remember(progress(results, "invert", len(missing), "parts", lambda _: 1))
    done = stage.done()
    before = iter(known)
    answers = [[{**next(before), **answer} for answer in done[query_name(part)]["answers"]] for part, _ in parts]
    passes = passes_over(size, queries, run.config.compute.query_gb)
    return answers, [tuple(group.tolist()) for group in np.array_split(np.arange(len(parts)), passes) if len(group)]


def passes_over(gradient_bytes: int, queries: int, query_gb: float) -> int:
    """How many passes over the pool so many queries need, whose H⁻¹J takes so many bytes each."""
    room = math.ceil(gradient_bytes * queries / max(1, query_gb * 2**30))
    return min(max(1, room, -(-queries // MOST)), max(1, -(-queries // queries_a_unit(gradient_bytes))))


def _unit_name(group: tuple[int, ...], index: int) -> str:
    # First and last of its parts: with another query_gb other parts go together.
    return f"scores-{group[0]:05d}-{group[-1]:05d}-{index:05d}"


def _score(
    config: Config, blocks: Blocks, curvature: Store, stage: Stage, units: list[ScoreUnit], actors: ActorPool
) -> None:
    """Score what is missing."""
    done = stage.done()
    missing = [unit for unit in units if unit.name not in done]
    results = actors.map(ScoreWorker, (config, blocks, actors.device, curvature, stage), missing)
    progress(results, "score", sum(unit.blocks for unit in missing), "blocks", lambda marker: marker["blocks"])


def _rank(
    config: Config,
    blocks: Blocks,
    stage: Stage,
    units: list[ScoreUnit],
    answers: list[list[dict[str, Any]]],
    actors: ActorPool,
) -> None:
    """Write what is missing of the tables, and the manifest."""
    done = stage.done()
    left = [part for part in range(len(answers)) if f"{part:05d}" not in done]
    groups = [(unit.group, unit.name) for unit in units]
    told = actors.map(partial, (rank_unit, config, blocks, stage, groups, answers), left)
    stage.remember(progress(told, "rank", len(left), "parts", lambda _: 1))
    markers = [marker for name, marker in stage.done().items() if name.isdigit()]
    kept = [rows for marker in markers for rows in marker["nonzeros"]]
    reliable = [each for marker in markers for each in marker["reliability"] if each is not None]
    stage.store.write_json(
        "manifest.json",
        {
            "queries": sum(marker["queries"] for marker in markers),
            "failed": sum(marker["failed"] for marker in markers),
            "rows": sum(kept),
            "exact": sum(rows for marker in markers for rows in marker["exact"]),
            "median_nonzeros": float(np.median(kept)) if kept else 0.0,
            **({"reliability": float(np.median(reliable))} if reliable else {}),
            "unsolved": sum(marker["unsolved"] for marker in markers),
            "parts": len(answers),
        },
    )
