"""Tables of influence: a query's blocks ranked, the same summed to documents, and a row on how each query went."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stride_ray.blocks import Blocks, document_shares

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
        exact: (n,) bool; else estimated.
    """

    ordinals: NDArray[np.int64]
    weights: NDArray[np.float64]
    exact: NDArray[np.bool_]


def rank_tables(queries: list[str], influences: list[Influence], blocks: Blocks) -> tuple[pa.Table, pa.Table]:
    """The influence and documents tables (INFLUENCE, DOCUMENTS) of some queries."""
    everything = np.unique(np.concatenate([np.zeros(0, np.int64), *(each.ordinals for each in influences)]))
    known = blocks.take(everything, ["block_id", "source", "spans"])
    block_ids, sources = known["block_id"].to_numpy(), np.array(known["source"].to_pylist(), dtype=object)
    span_rows, span_documents, shares = document_shares(known)
    first_span = np.searchsorted(span_rows, np.arange(len(everything)))
    ranked, summed = [], []
    for query, each in zip(queries, influences, strict=True):
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
                "exact": each.exact[order],
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
