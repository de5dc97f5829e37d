"""Stage recover: estimate every query's block influence from its responses, in parallel over queries.

If operator rows are subsets, a Lasso recovers the influence of N blocks from K responses (lasso/recovery.py); if rows
are blocks, a response already is an estimate. Estimates from operators at all sites are approximately in the unit of
exact influence, the mean influence of a block on itself. Estimates from the paper's forms are in the unit of the
responses.
"""

import time
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from stride_ray.attribution.lasso.recovery import Recovery, recover
from stride_ray.attribution.responses import read_responses
from stride_ray.corpus.failures import LARGEST_NORM, RESPONSE_NOT_FINITE, fail, failed_ordinals
from stride_ray.corpus.queries import check_name
from stride_ray.operators.membership import Membership, membership_of
from stride_ray.runtime.actor_pool import shared_actor_pool
from stride_ray.runtime.config import Config
from stride_ray.runtime.costs import START, record_separately, record_stage_costs
from stride_ray.runtime.options import RecoverConfig
from stride_ray.runtime.progress import run_missing
from stride_ray.runtime.run import Run, Stage, part_name
from stride_ray.runtime.tasks import WorkerAllocation, map_tasks

# Response parts per work unit; the queries of a unit share the solver's passes over M.
PARTS_PER_UNIT = 4
ESTIMATES = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("base_loss", pa.float32()),
        pa.field("ordinals", pa.list_(pa.int64()), nullable=False),
        pa.field("estimates", pa.list_(pa.float64()), nullable=False),
        pa.field("penalty", pa.float64()),
        pa.field("intercept", pa.float64()),
        pa.field("gap", pa.float64()),
        pa.field("rounds", pa.int32()),
        pa.field("reliability", pa.float32()),
    ]
)


def recover_estimates(run: Run, name: str) -> dict[str, Any]:
    """Estimate the influence of the blocks on every query.

    ``estimates/<name>/part-*.parquet`` has a row per query: ``ordinals`` and ``estimates`` of the blocks with a
    non-zero estimate; the Lasso's penalty, intercept, relative duality gap and rounds (null without a solve); and the
    split-half reliability of responses at all sites (site_responses.respond_sites).

    Example:
        >>> from stride_ray import Run
        >>> from stride_ray.attribution.recover import recover_estimates
        >>> recover_estimates(Run("mine"), "asked")["failed"]
        0

    Args:
        run: with finished responses to this query set.
        name: the query set.

    Returns:
        Counts: ``queries``, ``failed``, ``rows``, ``median_nonzeros``, ``largest_gap`` (relative) and ``parts``.

    Raises:
        StrideError: a stage is missing or was made with other settings.
    """
    check_name(name)
    responses = run.require("responses", name)
    parts = responses.manifest()["parts"]
    keys = responses.store.read_json("stage.json")["keys"]
    operators = run.require("operators")
    # facts["blocks"] is the number of blocks at the fit; blocks sharded later have higher ordinals.
    facts = operators.manifest()
    failed = sorted({*failed_ordinals(operators.store), *failed_ordinals(responses.store)})
    stage = run.begin("estimates", name, **{key: keys[key] for key in ("corpus", "queries", "weights")})
    if stage.is_finished():
        return stage.manifest()
    starts = range(0, parts, PARTS_PER_UNIT)
    units = {part_name(i): list(range(at, min(at + PARTS_PER_UNIT, parts))) for i, at in enumerate(starts)}
    with record_stage_costs(stage), shared_actor_pool(run.config, len(units)) as actors:
        work = estimates_of_block_rows if facts.get("rows") == "blocks" else solve_estimates
        given = (run.config, responses, stage, facts["blocks"], failed)
        # The Lasso runs on CPUs. If the actors hold GPUs, the more numerous CPUs are idle.
        spare = actors.device == "cuda" and work is solve_estimates
        cpus = WorkerAllocation(actors.allocation.workers, "cpu")
        mapped = partial(map_tasks, allocation=cpus) if spare else actors.map_function
        markers = run_missing(stage, units, partial(mapped, work, given), "recover", "units")
    nonzeros = [n for marker in markers for n in marker["nonzeros"]]
    summary = {
        "queries": sum(marker["queries"] for marker in markers),
        "failed": sum(marker["failed"] for marker in markers),
        "rows": sum(nonzeros),
        "median_nonzeros": float(np.median(nonzeros)) if nonzeros else 0.0,
        "largest_gap": max((marker["largest_gap"] for marker in markers), default=0.0),
        "parts": len(units),
    }
    return stage.finish(summary)


def estimates_of_block_rows(
    config: Config, responses: Stage, stage: Stage, n_blocks: int, failed: list[int], unit: list[int]
) -> dict[str, Any]:
    """Write the responses of block rows as estimates; negative ones are scaled (``attribute.negative_scale``)."""
    started = time.monotonic()
    tables = [responses.store.read_table(f"{part_name(part)}.parquet") for part in unit]
    rows = pa.concat_tables(tables).to_pylist()
    for row in rows:
        take_estimates(row, np.array(row.pop("rows")), np.array(row.pop("response")), config.attribute.negative_scale)
    return _publish(stage, unit, started, rows)


def take_estimates(row: dict[str, Any], ordinals: np.ndarray, response: np.ndarray, negative_scale: float) -> None:
    """Set a query's ``ordinals`` and ``estimates``, given its products with the rows of blocks.

    Args:
        row: with ``status``; one with a response that is not finite fails here.
        ordinals: (n,) of the blocks.
        response: (n,) products.
        negative_scale: factor of negative ones.
    """
    value, ordinals = response.astype(np.float64), ordinals.astype(np.int64)
    if row["status"] == "ok" and not (np.abs(value) < LARGEST_NORM).all():
        fail(row, RESPONSE_NOT_FINITE)
    value = np.where(value > 0, value, negative_scale * value)
    kept = (value != 0) & (row["status"] == "ok")
    row |= {"ordinals": ordinals[kept], "estimates": value[kept]}


def solve_estimates(
    config: Config, responses: Stage, stage: Stage, n_blocks: int, failed: list[int], unit: list[int]
) -> dict[str, Any]:
    """Recover estimates from responses of subset rows with one Lasso per query; failed blocks get no estimate."""
    started = time.monotonic()
    membership = membership_of(config)
    # Warm up imports and the Numba cache, so that start-up is recorded separately from solving.
    recover(np.arange(config.membership.subsets, dtype=float)[None], membership, 64, ratio=0.9)
    record_separately(START, time.monotonic() - started)
    rows, vectors = read_response_parts(responses, unit)
    recovered = solve_rows(config, rows, vectors, n_blocks, failed)
    record_separately("columns", sum(each.seconds for each in recovered))
    return _publish(stage, unit, started, rows)


def solve_rows(
    config: Config, rows: list[dict[str, Any]], vectors: np.ndarray, n_blocks: int, failed: list[int]
) -> list[Recovery]:
    """Recover some queries' influence from their responses; sets their ``ordinals``, ``estimates`` and diagnostics.

    Args:
        config: of the run.
        rows: the queries, with ``status``.
        vectors: (rows, K) responses; those of failed queries are not read.
        n_blocks: N.
        failed: ascending ordinals of blocks that get no estimate.
    """
    membership = membership_of(config)
    good = vectors[[row["status"] == "ok" for row in rows]]
    recovered = recover(good, membership, n_blocks, **lasso_options(config.recover))
    factor = influence_scale(config, membership, n_blocks)
    found = iter(recovered)
    for row in rows:
        row |= {"ordinals": [], "estimates": []}
        if row["status"] == "ok":
            each = next(found)
            known = ~np.isin(each.ordinals, failed)
            row |= {"ordinals": each.ordinals[known], "estimates": each.weights[known] * factor}
            row |= {"penalty": each.penalty, "intercept": each.intercept, "gap": each.gap, "rounds": each.rounds}
    return recovered


def read_response_parts(responses: Stage, unit: list[int]) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Read and concatenate response parts: rows without the vectors, and the vectors (rows, K) float32."""
    read = [read_responses(responses.store, part) for part in unit]
    return [row for rows, _ in read for row in rows], np.concatenate([found for _, found in read])


def influence_scale(config: Config, membership: Membership, n_blocks: int) -> float:
    """Factor from a Lasso weight to influence: the mean subset size for row-scaled site operators, else 1.

    An operator row at all sites is the mean over its subset, so y = diag(1/|S_k|) M v with v the influence; the w that
    ``recover`` returns is v divided by the mean subset size.
    """
    scaled = config.operators.form == "sites" and config.recover.row_scaling
    return float(membership.sizes(n_blocks).mean()) if scaled else 1.0


def _publish(stage: Stage, unit: list[int], started: float, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Write a unit's table and its done marker."""
    name = part_name(unit[0] // PARTS_PER_UNIT)
    columns = {key: [row.get(key) for row in rows] for key in ESTIMATES.names}
    digest = stage.store.write_table(f"{name}.parquet", pa.Table.from_pydict(columns, ESTIMATES))
    good = [row for row in rows if row["status"] == "ok"]
    return stage.mark(
        name,
        started,
        queries=len(rows),
        failed=len(rows) - len(good),
        nonzeros=[len(row["ordinals"]) for row in good],
        largest_gap=max((row.get("gap") or 0.0 for row in good), default=0.0),
        sha256=digest,
    )


def read_estimates(stage: Stage) -> list[dict[str, Any]]:
    """Read the estimates of a finished query set, in order: rows of ESTIMATES with lists as NumPy arrays."""
    parts = stage.manifest()["parts"]
    rows: list[dict[str, Any]] = []
    for part in range(parts):
        table = stage.store.read_table(f"{part_name(part)}.parquet")
        lists = {key: [np.asarray(each.values) for each in table[key]] for key in ("ordinals", "estimates")}
        plain = table.drop_columns(list(lists)).to_pylist()
        rows += [
            {**row, "ordinals": ordinals, "estimates": estimates}
            for row, ordinals, estimates in zip(plain, *lists.values(), strict=True)
        ]
    return rows


def lasso_options(options: RecoverConfig) -> dict[str, Any]:
    """Return the run's options as arguments of lasso.recovery.recover."""
    return {"ratio": options.penalty_ratio, "nonnegative": options.nonnegative, "row_scaling": options.row_scaling}
