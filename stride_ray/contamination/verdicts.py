"""One verdict per item, with its evidence: lexical, influence, both or clean.

``lexical``: a document contains enough of one of the item's fields to be a copy, learned by the model or not. What is
only quoted by the item is none; ``leaked`` says so.
``influence``: the item's loss is low and depends on one block more than for controls; a suspicion, never proof.
``both``: lexical and influence. ``clean``: neither, or a false alarm by a person's review. If a channel cannot evaluate
an item, the other decides.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from stride_ray.contamination.influence.channel import item_p_values
from stride_ray.contamination.influence.significance import q_values
from stride_ray.contamination.items import Item
from stride_ray.contamination.lexical import copies
from stride_ray.contamination.lexical.channel import Lexical
from stride_ray.contamination.reviews import FALSE, Review

CLEAN, LEXICAL, INFLUENCE, BOTH = "clean", "lexical", "influence", "both"
VERDICTS = pa.schema(
    [
        pa.field("set", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("verdict", pa.string(), nullable=False),
        pa.field("leaked", pa.string(), nullable=False),  # what the corpus has of it (LEAKED); empty: nothing
        pa.field("alarm", pa.string(), nullable=False),  # the verdict without reviews
        pa.field("review", pa.string()),  # a person's review that holds for this verdict: true, false or null
        pa.field("before", pa.string()),  # the previous scan's verdict; null: the item is new
        pa.field("question", pa.string(), nullable=False),  # its first 200 characters
        pa.field("overlap", pa.float64(), nullable=False),  # largest share of a field found in one document
        pa.field("documents", pa.int32(), nullable=False),  # documents over the threshold
        pa.field("first_document", pa.string()),  # id of the one with the largest overlap; null: no match
        pa.field("first_source", pa.string()),
        pa.field("contrast", pa.float64()),  # influence/channel.py; null: not measured
        pa.field("p", pa.float64()),
        pa.field("q", pa.float64()),  # p adjusted for false discovery
        pa.field("loss", pa.float64()),  # mean over the answer's tokens, nats
        pa.field("memorised", pa.bool_()),  # the loss is below that of 95 % of the controls
        pa.field("share", pa.float64()),  # the tied block's share of all influence
        pa.field("block_id", pa.uint64()),  # the tied block, for every verdict
        pa.field("ordinal", pa.int64()),
        pa.field("tied_document", pa.string()),
        pa.field("tied_source", pa.string()),
        pa.field("influence", pa.float64()),
        pa.field("error", pa.string()),  # why influence could not be measured
    ]
)
# What the corpus has of an item: in one document the question with the answer near; one of them alone, or another of
# its texts; less than a copy: a passage that the item quotes, or a question that is a common phrase.
LEAKED = QUESTION_AND_ANSWER, QUESTION, ANSWER, OTHER, PASSAGE, PHRASE = (
    "question and answer",
    "question",
    "answer",
    "other text",
    copies.PASSAGE,
    copies.PHRASE,
)
# A memorised item has a lower loss than this share of the controls.
MEMORISED = 0.95
_SHOWN = 200


def verdicts(
    items: Sequence[Item],
    lexical: Lexical,
    ties: pa.Table | None,
    false_discovery: float,
    before: dict[str, str],
    reviews: Mapping[str, Review] | None = None,
) -> pa.Table:
    """Build the VERDICTS table, a row per item in the order of the items.

    Args:
        items: of all sets; the false-discovery rate applies to all of them together.
        lexical: results of the lexical channel.
        ties: influence.channel.TIES; None: the channel was off.
        false_discovery: largest q-value (significance.q_values) of a suspicion.
        before: item key to verdict in the previous scan.
        reviews: by item key; one that is about another verdict, or about less than now, does not hold any more.
    """
    # A document is identified by its row, since ids may repeat even within a source.
    # Copies first, then by overlap.
    holding: dict[str, dict[tuple[str, str, str, int], tuple[bool, float]]] = {}
    copied_by: dict[str, set[tuple[str, int]]] = {}
    leaks: dict[str, set[str]] = {}
    names = ["document_id", "source", "file", "place"]
    for batch in lexical.matches.select(["key", "field", *names, "overlap", "kind", "near"]).to_batches():
        for row in batch.to_pylist():
            held = holding.setdefault(row["key"], {})
            document = (row["document_id"], row["source"], row["file"], row["place"])
            size = (row["kind"] == copies.COPY, row["overlap"])
            held[document] = max(size, held.get(document, (False, 0.0)))
            leaks.setdefault(row["key"], set()).add(_leak(row))
            if row["kind"] == copies.COPY:
                copied_by.setdefault(row["key"], set()).add(document[2:])
    tied = {} if ties is None else _influence_columns(items, ties, false_discovery)
    rows = []
    for item in items:
        held, tie = holding.get(item.key, {}), tied.get(item.key, {})
        first = max(held, key=lambda each: (held[each], each)) if held else (None, None)
        copied, suspected = item.key in copied_by, bool(tie.pop("suspected", False))
        verdict = BOTH if copied and suspected else LEXICAL if copied else INFLUENCE if suspected else CLEAN
        leaked = next((leak for leak in LEAKED if leak in leaks.get(item.key, ())), "")
        given = (reviews or {}).get(item.key)
        overlap = lexical.overlaps.get(item.key, 0.0)
        review = given.review if given and given.holds(verdict, leaked, overlap) else None
        rows.append(
            {
                "set": item.set_name,
                "item_id": item.item_id,
                "key": item.key,
                "verdict": CLEAN if review == FALSE else verdict,
                "leaked": leaked,
                "alarm": verdict,
                "review": review,
                "before": before.get(item.key),
                "question": " ".join((item.question or item.answer).split())[:_SHOWN],
                "overlap": overlap,
                "documents": len(copied_by.get(item.key, ())),
                "first_document": first[0],
                "first_source": first[1],
                **tie,
            }
        )
    return pa.Table.from_pylist(rows, VERDICTS)


def _leak(row: dict[str, Any]) -> str:
    """Which of LEAKED a row of channel.MATCHES shows; empty for a part."""
    if row["kind"] != copies.COPY:
        return row["kind"] if row["kind"] in LEAKED else ""
    if row["field"] == "whole" or (row["field"] == "question" and row["near"]):
        return QUESTION_AND_ANSWER
    if row["field"] == "question":
        return QUESTION
    return ANSWER if copies.role(row["field"]) == "answer" else OTHER


def _influence_columns(items: Sequence[Item], ties: pa.Table, false_discovery: float) -> dict[str, dict[str, Any]]:
    """Return the influence channel's columns of VERDICTS and ``suspected``, by item key."""
    p = item_p_values(ties)
    rows = {row["key"]: row for row in ties.to_pylist() if not row["control"]}
    # An item in two sets has a key in each and is tested twice.
    measured = [item.key for item in items if rows.get(item.key, {}).get("contrast") is not None]
    q = dict(zip(measured, q_values(np.array([p[key] for key in measured])).tolist(), strict=True))
    losses = [row["loss"] for row in ties.to_pylist() if row["control"] and _is_finite(row["loss"])]
    low = float(np.quantile(losses, 1 - MEMORISED)) if losses else -np.inf
    found = {}
    for key, row in rows.items():
        kept = {name: row[name] for name in ("contrast", "loss", "share", "block_id", "ordinal", "influence", "error")}
        found[key] = {
            **kept,
            "tied_document": row["document_id"],
            "tied_source": row["source"],
            "p": p[key] if key in q else None,
            "q": q.get(key),
            "memorised": row["loss"] < low if _is_finite(row["loss"]) else None,
            "suspected": q.get(key, 1.0) <= false_discovery,
        }
    return found


def _is_finite(value: float | None) -> bool:
    return value is not None and bool(np.isfinite(value))


def counts(table: pa.Table) -> dict[str, int]:
    """Return the number of items per verdict."""
    found = table["verdict"].to_pylist()
    return {name: found.count(name) for name in (LEXICAL, INFLUENCE, BOTH, CLEAN)}
