"""Influence tables: blocks ranked per query, their influence summed to documents, and diagnostics per query."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stride_ray.corpus.blocks import Blocks, document_shares
from stride_ray.runtime.config import Config
from stride_ray.runtime.run import Stage

INFLUENCE = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("block_id", pa.uint64(), nullable=False),
        pa.field("ordinal", pa.int64(), nullable=False),
        pa.field("document_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("influence", pa.float64(), nullable=False),
        pa.field("exact", pa.bool_(), nullable=False),
    ]
)
TOKENS = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("ordinal", pa.int64(), nullable=False),
        pa.field("influence", pa.list_(pa.float32()), nullable=False),
    ]
)
SPANS = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("ordinal", pa.int64(), nullable=False),
        pa.field("document_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("influence", pa.float64(), nullable=False),
    ]
)
SOURCES = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("documents", pa.int32(), nullable=False),
        pa.field("influence", pa.float64(), nullable=False),
    ]
)
DOCUMENTS = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("document_id", pa.string(), nullable=False),  # unique within its source only
        pa.field("source", pa.string(), nullable=False),
        pa.field("blocks", pa.int32(), nullable=False),
        pa.field("influence", pa.float64(), nullable=False),
    ]
)
# A span holds at least this share of its block's influence, if a run of tokens within one document does.
SPAN_SHARE = 0.5
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
        pa.field("reliability", pa.float32()),
        pa.field("steps", pa.int32()),
        pa.field("exact", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Influence:
    """The influence of some blocks on a query.

    Attributes:
        ordinals: (n,) int64, ascending.
        weights: (n,) float64; positive: training on the block lowers the query's loss.
        exact: (n,) bool; False: estimated.
    """

    ordinals: NDArray[np.int64]
    weights: NDArray[np.float64]
    exact: NDArray[np.bool_]


def units(negative_scale: float) -> dict[str, str]:
    """Metadata of the influence columns, whose name alone does not give the unit."""
    reason = ": negative scores are noisier" if negative_scale < 1 else ""
    return {
        "unit": "a block's mean influence on itself; positive: training on it lowers the query's loss",
        "negative": f"multiplied by {negative_scale:g}{reason}",
    }


def rank_tables(
    queries: list[str], influences: list[Influence], blocks: Blocks, negative_scale: float
) -> tuple[pa.Table, pa.Table]:
    """Build the influence and documents tables (INFLUENCE, DOCUMENTS) of some queries; ``influences`` has one each."""
    everything = np.unique(np.concatenate([np.zeros(0, np.int64), *(each.ordinals for each in influences)]))
    known = blocks.take(everything, ["block_id", "spans"])
    block_ids = known["block_id"].to_numpy()
    span_rows, span_documents, shares = document_shares(known)
    first_span = np.searchsorted(span_rows, np.arange(len(everything)))
    ranked, summed = [], []
    for query, each in zip(queries, influences, strict=True):
        # Ties are broken by ordinal, so the ranking does not depend on the solver's order.
        order = np.lexsort((each.ordinals, -each.weights))
        at = np.searchsorted(everything, each.ordinals[order])
        weights = each.weights[order]
        largest = [_largest_document(i, span_documents, shares, first_span) for i in at]
        ranked.append(
            {
                "query_id": [query] * len(at),
                "rank": np.arange(1, len(at) + 1, dtype=np.int32),
                "block_id": block_ids[at],
                "ordinal": each.ordinals[order],
                "document_id": [document for _, document in largest],
                "source": [source for source, _ in largest],
                "influence": weights,
                "exact": each.exact[order],
            }
        )
        summed.append(_sum_to_documents(query, at, weights, (span_rows, span_documents, shares)))
    tables = (_concat_pieces(ranked, INFLUENCE), _concat_pieces(summed, DOCUMENTS))
    ranked_table, summed_table = (_with_units(table, negative_scale) for table in tables)
    return ranked_table, summed_table


def _largest_document(
    row: int, documents: list[tuple[str, str]], shares: np.ndarray, first_span: np.ndarray
) -> tuple[str, str]:
    """Return the document (source, id) with the largest share of a block's tokens."""
    stop = first_span[row + 1] if row + 1 < len(first_span) else len(documents)
    return documents[first_span[row] + int(np.argmax(shares[first_span[row] : stop]))]


def _sum_to_documents(
    query: str, at: np.ndarray, weights: np.ndarray, spans: tuple[np.ndarray, list[tuple[str, str]], np.ndarray]
) -> dict[str, Any]:
    """Sum one query's influence to documents, each block split by token share; in rank order."""
    span_rows, span_documents, shares = spans
    by_row = dict(zip(at.tolist(), weights.tolist(), strict=True))
    totals: dict[tuple[str, str], list[Any]] = {}
    for index in np.flatnonzero(np.isin(span_rows, at)):
        entry = totals.setdefault(span_documents[index], [0.0, 0])
        entry[0] += by_row[int(span_rows[index])] * shares[index]
        entry[1] += 1
    order = sorted(totals, key=lambda document: (-totals[document][0], document[1], document[0]))
    return {
        "query_id": [query] * len(order),
        "rank": np.arange(1, len(order) + 1, dtype=np.int32),
        "document_id": [document for _, document in order],
        "source": [source for source, _ in order],
        "blocks": [totals[document][1] for document in order],
        "influence": [totals[document][0] for document in order],
    }


def sum_to_sources(documents: pa.Table) -> pa.Table:
    """Sum a documents table (DOCUMENTS) to sources (SOURCES), by query and in rank order."""
    rows = list[dict[str, Any]]()
    ranges = zip(documents["query_id"].to_pylist(), documents["source"].to_pylist(), strict=True)
    totals: dict[str, dict[str, list[Any]]] = {}
    for (query, source), influence in zip(ranges, documents["influence"].to_pylist(), strict=True):
        total = totals.setdefault(query, {}).setdefault(source, [0, 0.0])
        total[0] += 1
        total[1] += influence
    for query, sources in totals.items():
        order = sorted(sources, key=lambda source: (-sources[source][1], source))
        rows += [
            dict(zip(SOURCES.names, (query, rank, source, *sources[source]), strict=True))
            for rank, source in enumerate(order, 1)
        ]
    return pa.Table.from_pylist(rows, SOURCES)


def shortest_run(values: np.ndarray, lengths: list[int]) -> tuple[int, int]:
    """The shortest run of a block's tokens that holds SPAN_SHARE of its influence, within one document.

    Example: 0.1, 0, 0.5 and 0.3 add up to 0.9, and 0.5 alone is more than half of it: (2, 1).

    Args:
        values: (T,) influence by token.
        lengths: tokens of each of the block's documents, in order.

    Returns:
        Start and length. Of runs as short, that with most influence; all of the document that holds most, if no run
        within a document holds as much.
    """
    values = values[: sum(lengths)].astype(np.float64)
    sums = np.concatenate([[0.0], np.cumsum(values if values.sum() >= 0 else -values)])
    document = np.repeat(np.arange(len(lengths)), lengths)
    for length in range(1, len(values) + 1):
        within = document[length - 1 :] == document[: len(document) - length + 1]
        held = np.where(within, sums[length:] - sums[:-length], -np.inf)
        if held.max() >= SPAN_SHARE * sums[-1]:
            return int(held.argmax()), length
    ends = np.cumsum(lengths)
    most = int(np.diff(sums[np.concatenate([[0], ends])]).argmax())
    return int(ends[most] - lengths[most]), lengths[most]


def block_spans(known: list[dict[str, Any]], tokenizer: Any, split: dict[int, np.ndarray]) -> list[dict[str, Any]]:
    """The span of each block that has most of its influence, rows of SPANS without the query.

    Args:
        known: the blocks' rows in the pool, with ``token_ids`` and ``spans``, in the order of ``split``.
        tokenizer: that of the corpus.
        split: influence by token (T,) of each block, by ordinal.
    """
    rows = []
    for (ordinal, values), block in zip(split.items(), known, strict=True):
        padded = np.zeros(len(block["token_ids"]), np.float32)
        padded[: len(values)] = values
        lengths = [each["length"] for each in block["spans"]]
        start, length = shortest_run(padded, lengths)
        ends = np.cumsum(lengths)
        document = block["spans"][int(np.searchsorted(ends, start, side="right"))]
        before = int(ends[ends <= start].max(initial=0))
        rows.append(
            {
                "ordinal": ordinal,
                "document_id": document["document_id"],
                "source": document["source"],
                "start": document["start"] + start - before,
                "length": length,
                "text": tokenizer.decode(block["token_ids"][start : start + length]),
                "influence": float(padded[start : start + length].sum(dtype=np.float64)),
            }
        )
    return rows


def tokens_name(part: int) -> str:
    """Name of the file with the influence by token of a part's queries, and of its done marker."""
    return f"tokens-{part:05d}"


def ends_of(influence: pa.Table, count: int) -> list[int]:
    """Ordinals of a query's ``count`` most helpful and most harmful blocks with exact influence, in rank order."""
    exact = influence.filter(influence["exact"])
    values, ordinals = exact["influence"].to_numpy(), exact["ordinal"].to_numpy()
    helping, harming = ordinals[values > 0][:count], ordinals[values < 0]
    return [*helping.tolist(), *harming[max(0, len(harming) - count) :].tolist()]


def _with_units(table: pa.Table, negative_scale: float) -> pa.Table:
    at = table.schema.get_field_index("influence")
    return table.cast(table.schema.set(at, table.schema.field(at).with_metadata(units(negative_scale))))


def _concat_pieces(pieces: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    return pa.concat_tables([schema.empty_table(), *(pa.Table.from_pydict(piece, schema) for piece in pieces)])


def rank_unit(
    config: Config,
    blocks: Blocks,
    stage: Stage,
    scored: list[tuple[tuple[int, ...], str]],
    answers: list[list[dict[str, Any]]],
    part: int,
) -> dict[str, Any]:
    """Write the tables of one part of the queries; returns the done marker.

    Args:
        config: of the run.
        blocks: the pool.
        stage: with the scores (scoring.ScoreWorker).
        scored: (group, name) of each score file; empty: use estimates alone.
        answers: per part, a row per query with fields of RECOVERY, plus ``ordinals`` and ``estimates`` if there are
            estimates.
        part: index of the part.
    """
    started = time.monotonic()
    mine = answers[part]
    found = list(_influences(config, stage, scored, answers, part))
    good = [answer["query_id"] for answer in mine if answer["status"] == "ok"]
    ranked, documents = rank_tables(good, found, blocks, config.attribute.negative_scale)
    sources = _with_units(sum_to_sources(documents), config.attribute.negative_scale)
    influences = iter(found)
    diagnostics = []
    for answer in mine:
        row = {key: answer.get(key) for key in RECOVERY.names}
        if answer["status"] == "ok":
            influence = next(influences)
            row |= {"nonzeros": len(influence.ordinals), "exact": int(influence.exact.sum())}
        diagnostics.append(row)
    name = f"{part:05d}"
    stage.store.write_table(f"influence-{name}.parquet", ranked)
    stage.store.write_table(f"documents-{name}.parquet", documents)
    stage.store.write_table(f"sources-{name}.parquet", sources)
    stage.store.write_table(f"recovery-{name}.parquet", pa.Table.from_pylist(diagnostics, RECOVERY))
    return stage.mark(
        name,
        started,
        queries=len(diagnostics),
        failed=len(diagnostics) - len(good),
        nonzeros=[len(influence.ordinals) for influence in found],
        exact=[int(influence.exact.sum()) for influence in found],
        unsolved=sum(answer.get("steps") == 0 for answer in mine if answer["status"] == "ok"),
        reliability=[answer.get("reliability") for answer in mine if answer["status"] == "ok"],
    )


def _influences(
    config: Config,
    stage: Stage,
    scored: list[tuple[tuple[int, ...], str]],
    answers: list[list[dict[str, Any]]],
    part: int,
) -> Any:
    """Yield the Influence for each query of a part, leaving out failed queries."""
    good = [answer for answer in answers[part] if answer["status"] == "ok"]
    group = next((group for group, _ in scored if part in group), (part,))
    before = sum(answer["status"] == "ok" for each in group if each < part for answer in answers[each])
    rows = slice(before, before + len(good))
    read = [stage.store.read_tensors(f"{name}.safetensors") for of, name in scored if of == group]
    ordinals = np.concatenate(
        [np.zeros((len(good), 0), np.int64), *(each["ordinals"][rows].numpy() for each in read)], 1
    )
    values = np.concatenate([np.zeros((len(good), 0)), *(each["influence"][rows].double().numpy() for each in read)], 1)
    for answer, at, weights in zip(good, ordinals, values, strict=True):
        yield merge_influence(answer, at, weights, config.attribute.top, calibrate=config.operators.form != "sites")


def merge_influence(
    answer: dict[str, Any], ordinals: np.ndarray, scores: np.ndarray, top: int, calibrate: bool = False
) -> Influence:
    """Merge a query's exact scores with estimates for the other blocks, keeping the ``top`` largest by |influence|.

    Args:
        answer: the query's row, with ``ordinals`` (ascending) and ``estimates`` if there are estimates.
        ordinals: (n,) scored blocks.
        scores: (n,) float64; NaN if the block was not scored for this query.
        top: maximum number of blocks kept.
        calibrate: set if estimates are not in the unit of the scores. They are then multiplied by the least-squares
            factor fitted on the blocks that have both, if it is positive.
    """
    scored = np.isfinite(scores)
    ordinals, scores = ordinals[scored], scores[scored]
    estimated = np.asarray(answer.get("ordinals", ()), dtype=np.int64)
    estimates = np.asarray(answer.get("estimates", ()), dtype=np.float64)
    rest = ~np.isin(estimated, ordinals)
    if calibrate and not rest.all():
        both = np.isin(ordinals, estimated)
        same = estimates[np.searchsorted(estimated, ordinals[both])]
        factor = float(same @ scores[both]) / max(float(same @ same), 1e-300)
        estimates = estimates * (factor if factor > 0 else 1.0)
    at = np.concatenate([ordinals, estimated[rest]])
    weights = np.concatenate([scores, estimates[rest]])
    exact = np.arange(len(at)) < len(ordinals)
    kept = np.lexsort((at, -np.abs(weights)))[:top]
    kept = kept[weights[kept] != 0]
    kept = kept[np.argsort(at[kept])]
    return Influence(at[kept], weights[kept], exact[kept])
