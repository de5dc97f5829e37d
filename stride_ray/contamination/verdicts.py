"""One verdict per item, each with its evidence: lexical, influence, both or clean.

``lexical``: some document holds enough of one of the item's fields; a copy, whatever the model made of it.
``influence``: its loss is low and leans on a block as no control's does; a suspicion, never proof.
``both`` and ``clean`` say what they are called. An item that a channel could not look at is judged by the other.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from stride_ray.contamination.influence import item_p_values
from stride_ray.contamination.items import Item
from stride_ray.contamination.lexical.channel import Lexical
from stride_ray.contamination.significance import q_values

CLEAN, LEXICAL, INFLUENCE, BOTH = "clean", "lexical", "influence", "both"
VERDICTS = pa.schema(
    [
        pa.field("set", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("verdict", pa.string(), nullable=False),
        pa.field("before", pa.string()),  # the verdict of the scan before; null: the item is new
        pa.field("question", pa.string(), nullable=False),  # its first 200 characters
        pa.field("overlap", pa.float64(), nullable=False),  # largest share of a field that a document holds
        pa.field("documents", pa.int32(), nullable=False),  # documents over the threshold
        pa.field("first_document", pa.string()),  # the one with most, null: no match at all
        pa.field("contrast", pa.float64()),  # influence.py; null: not asked
        pa.field("p", pa.float64()),
        pa.field("q", pa.float64()),  # p adjusted for false discovery
        pa.field("loss", pa.float64()),  # mean over the answer's tokens, nats
        pa.field("memorised", pa.bool_()),  # the loss is below that of 95 % of the controls
        pa.field("share", pa.float64()),  # of all influence, the tied block's
        pa.field("block_id", pa.uint64()),  # the tied block, whatever the verdict
        pa.field("ordinal", pa.int64()),
        pa.field("tied_document", pa.string()),
        pa.field("influence", pa.float64()),
        pa.field("error", pa.string()),  # why influence could not be asked
    ]
)
# Share of the controls that a memorised item is predicted better than.
MEMORISED = 0.95
_SHOWN = 200


def verdicts(
    items: Sequence[Item], lexical: Lexical, ties: pa.Table | None, false_discovery: float, before: dict[str, str]
) -> pa.Table:
    """VERDICTS, a row per item in the order of the items.

    Args:
        items: of all sets; the false-discovery rate is over all of them together.
        lexical: that channel's findings.
        ties: influence.TIES; None: the channel was off.
        false_discovery: largest q-value (significance.q_values) of a suspicion.
        before: item's key to verdict in the scan before.
    """
    holding: dict[str, dict[str, float]] = {}
    finding: dict[str, set[str]] = {}
    for batch in lexical.matches.select(["key", "document_id", "overlap", "finding"]).to_batches():
        for row in batch.to_pylist():
            held = holding.setdefault(row["key"], {})
            held[row["document_id"]] = max(row["overlap"], held.get(row["document_id"], 0.0))
            if row["finding"]:
                finding.setdefault(row["key"], set()).add(row["document_id"])
    tied = {} if ties is None else _tied(items, ties, false_discovery)
    rows = []
    for item in items:
        held, tie = holding.get(item.key, {}), tied.get(item.key, {})
        copied, suspected = item.key in finding, bool(tie.pop("suspected", False))
        rows.append(
            {
                "set": item.set_name,
                "item_id": item.item_id,
                "key": item.key,
                "verdict": BOTH if copied and suspected else LEXICAL if copied else INFLUENCE if suspected else CLEAN,
                "before": before.get(item.key),
                "question": " ".join((item.question or item.answer).split())[:_SHOWN],
                "overlap": lexical.overlaps.get(item.key, 0.0),
                "documents": len(finding.get(item.key, ())),
                "first_document": max(held, key=lambda name: (held[name], name)) if held else None,
                **tie,
            }
        )
    return pa.Table.from_pylist(rows, VERDICTS)


def _tied(items: Sequence[Item], ties: pa.Table, false_discovery: float) -> dict[str, dict[str, Any]]:
    """By item's key, what the influence channel says of it."""
    p = item_p_values(ties)
    rows = {row["key"]: row for row in ties.to_pylist() if not row["control"]}
    # One item in two sets is one test each: it has a key in each.
    asked = [item.key for item in items if rows.get(item.key, {}).get("contrast") is not None]
    q = dict(zip(asked, q_values(np.array([p[key] for key in asked])).tolist(), strict=True))
    losses = [row["loss"] for row in ties.to_pylist() if row["control"] and row["loss"] is not None]
    low = float(np.quantile(losses, 1 - MEMORISED)) if losses else -np.inf
    found = {}
    for key, row in rows.items():
        kept = {name: row[name] for name in ("contrast", "loss", "share", "block_id", "ordinal", "influence", "error")}
        found[key] = {
            **kept,
            "tied_document": row["document_id"],
            "p": p[key] if key in q else None,
            "q": q.get(key),
            "memorised": None if row["loss"] is None else row["loss"] < low,
            "suspected": q.get(key, 1.0) <= false_discovery,
        }
    return found


def counts(table: pa.Table) -> dict[str, int]:
    """How many items have each verdict."""
    found = table["verdict"].to_pylist()
    return {name: found.count(name) for name in (LEXICAL, INFLUENCE, BOTH, CLEAN)}
