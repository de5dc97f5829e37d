"""Stage recover: response vectors to ranked, sparse influence on blocks and documents, as Ray tasks over queries."""

import time
from typing import Any

import numpy as np
import pyarrow as pa

from stride_ray.blocks import Blocks, document_shares
from stride_ray.config import Config
from stride_ray.costs import START, apart, costed
from stride_ray.distribute import Pool, connected, map_tasks, pool, progress
from stride_ray.membership import membership_of
from stride_ray.recover import Recovery, recover
from stride_ray.responses import read_responses
from stride_ray.run import Run, Stage
from stride_ray.storage import Store

# Response parts in a unit: the solver shares its passes over M between the queries of a unit.
PARTS_PER_UNIT = 4

INFLUENCE = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("block_id", pa.uint64(), nullable=False),
        pa.field("ordinal", pa.int64(), nullable=False),
        pa.field("document_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("influence", pa.float64(), nullable=False),
    ]
)
DOCUMENTS = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("document_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("blocks", pa.int32(), nullable=False),
        pa.field("influence", pa.float64(), nullable=False),
    ]
)
RECOVERY = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("base_loss", pa.float32()),
        pa.field("nonzeros", pa.int32()),
        pa.field("penalty", pa.float64()),
        pa.field("intercept", pa.float64()),
        pa.field("gap", pa.float64()),
        pa.field("rounds", pa.int32()),
    ]
)


def recover_influence(run: Run, name: str) -> dict[str, Any]:
    """Recover every query's influence and write the ranked tables.

    ``influence-*.parquet`` holds the non-zero blocks, most helpful first and most harmful last; ``documents-*`` the
    same summed to documents, each block's influence shared by tokens; ``recovery-*`` a row per query with the
    solver's penalty, relative duality gap, number of non-zeros, and the error of a failed query.

    Args:
        run: with finished responses of that name.
        name: the query set.

    Returns:
        Counts: ``queries``, ``failed``, ``rows``, the median number of non-zeros and the largest relative gap.

    Raises:
        StrideError: for a missing stage or other settings.
    """
    responses = run.require("responses", "manifest.json", f"stride-ray respond --name {name}", name)
    parts = responses.store.read_json("manifest.json")["parts"]
    keys = responses.store.read_json("stage.json")["keys"]
    # The blocks that the operators were fitted on: whatever was sharded since then comes after them.
    n_blocks = run.require("operators", "metadata.json", "stride-ray fit").store.read_json("metadata.json")["blocks"]
    stage = run.begin("influence", name, **{key: keys[key] for key in ("corpus", "queries", "weights")})
    units = [list(range(start, min(start + PARTS_PER_UNIT, parts))) for start in range(0, parts, PARTS_PER_UNIT)]
    done = stage.done()
    missing = [unit for unit in units if _unit_name(unit) not in done]
    if missing:
        with connected(run.config.compute), costed(stage):
            workers = Pool(pool(run.config.compute, len(missing)).workers, "cpu")
            given = (run.config, run.store, responses.store, stage, n_blocks)
            results = map_tasks(recover_unit, given, missing, workers)
            stage.remember(progress(results, "recover", len(missing), "units", lambda _: 1))
    done = stage.done()
    markers = [done[_unit_name(unit)] for unit in units]
    nonzeros = [n for marker in markers for n in marker["nonzeros"]]
    summary = {
        "queries": sum(marker["queries"] for marker in markers),
        "failed": sum(marker["failed"] for marker in markers),
        "rows": sum(nonzeros),
        "median_nonzeros": float(np.median(nonzeros)) if nonzeros else 0.0,
        "largest_gap": max((marker["largest_gap"] for marker in markers), default=0.0),
        "parts": len(units),
    }
    stage.store.write_json("manifest.json", summary)
    return summary


def _unit_name(unit: list[int]) -> str:
    return f"{unit[0] // PARTS_PER_UNIT:05d}"


def recover_unit(
    config: Config, root: Store, responses: Store, stage: Stage, n_blocks: int, unit: list[int]
) -> dict[str, Any]:
    """The tables of some response parts."""
    started = time.monotonic()
    membership = membership_of(config)
    # Imports and compiles what recovery needs, so that its cost is told apart.
    recover(np.arange(config.membership.subsets, dtype=float)[None], membership, 64, ratio=0.9)
    apart(START, time.monotonic() - started)
    rows: list[dict[str, Any]] = []
    vectors = []
    for part in unit:
        some, found = read_responses(responses, part)
        rows += some
        vectors.append(found)
    blocks = Blocks(root.child("blocks"))
    good = np.array([row["status"] == "ok" for row in rows])
    options = config.recover
    recovered = recover(
        np.concatenate(vectors)[good],
        membership,
        n_blocks,
        ratio=options.penalty_ratio,
        nonnegative=options.nonnegative,
        row_scaling=options.row_scaling,
    )
    apart("columns", sum(each.seconds for each in recovered))
    asked = [row["query_id"] for row in rows if row["status"] == "ok"]
    name = _unit_name(unit)
    influence, documents = rank_tables(asked, recovered, blocks)
    stage.store.write_table(f"influence-{name}.parquet", influence)
    stage.store.write_table(f"documents-{name}.parquet", documents)
    stage.store.write_table(f"recovery-{name}.parquet", _recovery_table(rows, recovered))
    return stage.mark(
        name,
        started,
        queries=len(rows),
        failed=int((~good).sum()),
        nonzeros=[len(each.ordinals) for each in recovered],
        largest_gap=max((each.gap for each in recovered), default=0.0),
    )


def rank_tables(queries: list[str], recovered: list[Recovery], blocks: Blocks) -> tuple[pa.Table, pa.Table]:
    """The influence and documents tables (INFLUENCE, DOCUMENTS) of some queries' recovered influence."""
    everything = np.unique(np.concatenate([np.zeros(0, np.int64), *(each.ordinals for each in recovered)]))
    known = blocks.take(everything, ["block_id", "source", "spans"])
    block_ids, sources = known["block_id"].to_numpy(), np.array(known["source"].to_pylist(), dtype=object)
    span_rows, span_documents, shares = document_shares(known)
    first_span = np.searchsorted(span_rows, np.arange(len(everything)))
    ranked, summed = [], []
    for query, each in zip(queries, recovered, strict=True):
        # Ties in influence go by ordinal, so the order is the same however the solver met them.
        order = np.lexsort((each.ordinals, -each.weights))
        at = np.searchsorted(everything, each.ordinals[order])
        weights = each.weights[order]
        ranked.append(
            {
                "query_id": [query] * len(at),
                "rank": np.arange(1, len(at) + 1, dtype=np.int32),
                "block_id": block_ids[at],
                "ordinal": each.ordinals[order],
                "document_id": [_largest_document(i, span_documents, shares, first_span) for i in at],
                "source": sources[at],
                "influence": weights,
            }
        )
        summed.append(_documents(query, at, weights, (span_rows, span_documents, shares), sources))
    return _concatenated(ranked, INFLUENCE), _concatenated(summed, DOCUMENTS)


def _largest_document(row: int, documents: np.ndarray, shares: np.ndarray, first_span: np.ndarray) -> str:
    """The document that most of a block's tokens belong to."""
    stop = first_span[row + 1] if row + 1 < len(first_span) else len(documents)
    return documents[first_span[row] + int(np.argmax(shares[first_span[row] : stop]))]


def _documents(
    query: str, at: np.ndarray, weights: np.ndarray, spans: tuple[np.ndarray, np.ndarray, np.ndarray], sources: Any
) -> dict[str, Any]:
    """One query's influence summed to documents, in rank order."""
    span_rows, span_documents, shares = spans
    by_row = dict(zip(at.tolist(), weights.tolist(), strict=True))
    totals: dict[str, list[Any]] = {}
    for index in np.flatnonzero(np.isin(span_rows, at)):
        entry = totals.setdefault(span_documents[index], [0.0, 0, sources[span_rows[index]]])
        entry[0] += by_row[int(span_rows[index])] * shares[index]
        entry[1] += 1
    order = sorted(totals, key=lambda document: (-totals[document][0], document))
    return {
        "query_id": [query] * len(order),
        "rank": np.arange(1, len(order) + 1, dtype=np.int32),
        "document_id": order,
        "source": [totals[document][2] for document in order],
        "blocks": [totals[document][1] for document in order],
        "influence": [totals[document][0] for document in order],
    }


def _concatenated(pieces: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    return pa.concat_tables([schema.empty_table(), *(pa.Table.from_pydict(piece, schema) for piece in pieces)])


def _recovery_table(rows: list[dict[str, Any]], recovered: list[Recovery]) -> pa.Table:
    found = iter(recovered)
    records = []
    for row in rows:
        record = {key: row[key] for key in ("query_id", "status", "error", "base_loss")}
        if row["status"] == "ok":
            each = next(found)
            record |= {
                "nonzeros": len(each.ordinals),
                "penalty": each.penalty,
                "intercept": each.intercept,
                "gap": each.gap,
                "rounds": each.rounds,
            }
        records.append(record)
    return pa.Table.from_pylist(records, RECOVERY)
