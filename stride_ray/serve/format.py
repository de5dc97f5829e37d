"""Formats an attribution as JSON: the body of a response, which the page shows."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stride_ray.attribution.attribute import source_shares
from stride_ray.attribution.tables import block_spans
from stride_ray.corpus.blocks import Blocks
from stride_ray.corpus.tokenization.decoding import token_texts, unpadded
from stride_ray.models.query_batches import texts_of
from stride_ray.serve.attributor import Attribution


def format_attribution(
    query: dict[str, Any],
    found: Attribution,
    blocks: Blocks,
    tokenizer: Any,
    count: int,
    sources: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Format the attribution of a query.

    Args:
        query: row of queries.SCHEMA.
        found: its attribution; the query did not fail.
        blocks: the pool.
        tokenizer: that of the corpus.
        count: number of blocks at either end, and of documents.
        sources: show only blocks and documents of these sources; their ranks stay. None: all.

    Returns:
        ``query``, and for a contrast ``contrast``: pairs of a token's text and the influence of the most helpful blocks
        on its loss (Attribution.query_tokens), None for tokens that carry no loss. ``loss`` in nats, of a contrast the
        difference. ``reliability`` of the estimates, or None. ``blocks`` with influence, and ``exact`` ones among them.
        ``helping`` and ``harming``: rows of tables.INFLUENCE, most helpful and most harmful first, with the block's
        ``text`` and, where its influence is known by token, ``tokens``, pairs of text and influence, and ``span``, a
        row of tables.SPANS. ``matches``: Attribution.matches, in the same form. ``documents``: rows of
        tables.DOCUMENTS. ``sources``: pairs of source and share of the positive influence.
    """
    values = found.influence["influence"].to_numpy()
    shown, listed = found.influence, found.documents
    if sources is not None:
        wanted = pa.array(list(sources), pa.string())
        shown, listed = (table.filter(pc.is_in(table["source"], wanted)) for table in (shown, listed))
    kept = shown["influence"].to_numpy()
    sides = {
        "helping": shown.slice(0, min(count, int((kept > 0).sum()))).to_pylist(),
        "harming": shown.slice(max(0, len(kept) - min(count, int((kept < 0).sum())))).to_pylist()[::-1],
        "matches": [dict(row) for row in found.matches if sources is None or row["source"] in sources],
    }
    rows = [row for side in sides.values() for row in side]
    _add_texts(rows, found.block_tokens, blocks, tokenizer)
    texts = [
        _query_tokens(text, tokenizer, found.query_tokens[i : i + 1]) for i, (text, _) in enumerate(texts_of(query))
    ]
    return {
        **dict(zip(("query", "contrast"), texts, strict=False)),
        "loss": found.query["base_loss"],
        "reliability": found.query["reliability"],
        "blocks": found.query["nonzeros"],
        "exact": found.query["exact"],
        **sides,
        "documents": listed.slice(0, count).to_pylist(),
        "sources": source_shares(found.influence["source"].to_pylist(), values),
    }


def _add_texts(rows: list[dict[str, Any]], tokens: dict[int, np.ndarray], blocks: Blocks, tokenizer: Any) -> None:
    """Add ``text`` to rows of blocks, and ``tokens`` and ``span`` where their influence is known by token."""
    ordinals = sorted({row["ordinal"] for row in rows})
    known = dict(zip(ordinals, blocks.take(ordinals, ["token_ids", "spans"]).to_pylist(), strict=True))
    split = {ordinal: tokens[ordinal] for ordinal in ordinals if ordinal in tokens}
    found = block_spans([known[ordinal] for ordinal in split], tokenizer, split)
    spans = {span.pop("ordinal"): span for span in found}
    for row in rows:
        ids = unpadded(known[row["ordinal"]])
        # JavaScript's numbers hold 53 bits.
        row |= {"block_id": str(row["block_id"]), "text": tokenizer.decode(ids), "tokens": None}
        row["span"] = spans.get(row["ordinal"])
        if row["span"]:
            # Values end after the last target of their batch, texts before the padding.
            values = np.zeros(len(ids))
            influence = split[row["ordinal"]][: len(ids)]
            values[: len(influence)] = influence
            row["tokens"] = list(zip(token_texts(ids, tokenizer), map(_rounded, values.tolist()), strict=True))


def _query_tokens(text: dict[str, Any], tokenizer: Any, values: list[np.ndarray]) -> list[tuple[str, float | None]]:
    """A text's tokens with what is known of each: 0 if nothing is, None without loss."""
    changes = values[0] if values else np.zeros(len(text["token_ids"]))
    known = [value if counts else None for value, counts in zip(changes.tolist(), text["loss_mask"], strict=True)]
    return list(zip(token_texts(text["token_ids"], tokenizer), map(_rounded, known), strict=True))


def _rounded(value: float | None) -> float | None:
    if value is None:
        return None
    return float(f"{value:.3g}") if math.isfinite(value) else 0.0
