"""Queries: any supported document input, tokenised into one small table.

An invalid query (one token, no target, an unreadable line) stays in the table with its error; none is dropped.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa

from stride_ray.corpus.documents import Document, TokenizedDocument, read_with_rows, resolve_columns
from stride_ray.corpus.readers import Rejected, Row
from stride_ray.corpus.rows.row import LONE_SURROGATE, Unreadable, named
from stride_ray.corpus.splits import plan
from stride_ray.corpus.tokenization.encoding import encode
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.urls import redact_url

SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("loss_mask", pa.list_(pa.bool_()), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
    ]
)

_ID_COLUMNS = ("query_id", "id")
_ADVICE = "A query has text; prompt and completion (or answer); messages; or token_ids: rename the columns."


def read_queries(path: str, tokenizer: Any) -> pa.Table:
    """Read and tokenise queries.

    Args:
        path: JSON Lines, Parquet or any other document input with text (loss on every token), prompt and completion
            or answer, messages (loss on the answers), or token_ids; each row may have a ``query_id`` or ``id``, a
            string or a number.
        tokenizer: that of the corpus.

    Returns:
        A table with SCHEMA. A row without an id (or with null, NaN or an empty string) gets its number, q0, q1, … (q1~
        if another row has the id q1). The number 7, or 7.0, is the id "7"; ``status`` is "ok" or "failed".

    Raises:
        StrideError: no queries, or a duplicate id.
    """
    units = plan([path], shard_bytes=2**26)
    columns = resolve_columns(units, {}, _ADVICE)
    items = [item for unit in units for item in read_with_rows(unit, columns, beside=_ID_COLUMNS)]
    if not items:
        raise StrideError(f"{redact_url(path)} has no queries.")
    queries = _named(items, redact_url(path))
    encoded = iter(encode([item for _, item in queries if isinstance(item, Document)], tokenizer))
    table = []
    for name, item in queries:
        result = next(encoded) if isinstance(item, Document) else item
        table.append(failed(name, result.sentence()) if isinstance(result, Rejected) else row(name, result))
    return pa.Table.from_pylist(table, SCHEMA)


def _named(
    items: Sequence[tuple[Row | Rejected, Document | Rejected]], source: str
) -> list[tuple[str, Document | Rejected]]:
    """The queries with their ids, which differ; one whose row has a value that cannot be an id is rejected.

    Raises:
        StrideError: two rows of ``source`` have the same id.
    """
    given = [_given_id(row) if isinstance(row, Row) else None for row, _ in items]
    places = dict[str, str]()
    for (row, _), name in zip(items, given, strict=True):
        if isinstance(row, Row) and isinstance(name, str):
            place = f"{row.file}, row {row.number()}"
            if name in places:
                raise StrideError(
                    f"{source} has more than one query with the id {name!r} ({places[name]}; {place}); ids must differ."
                )
            places[name] = place
    queries = list[tuple[str, Document | Rejected]]()
    for index, ((_, item), name) in enumerate(zip(items, given, strict=True)):
        if isinstance(name, Rejected):
            item = name
        if not isinstance(name, str):
            name = f"q{index}"
            while name in places:  # another query has this id
                name += "~"
        queries.append((name, replace(item, document_id=name)))
    return queries


def _given_id(row: Row) -> str | Rejected | None:
    """The id that a row has, as a string; None without one, Rejected if the value cannot be an id."""
    for column in _ID_COLUMNS:
        value = row.values.get(column)
        # Integers beside nulls become floats in pandas, and nulls NaN.
        if value is None or (isinstance(value, float) and math.isnan(value)):
            continue
        value = named(value)
        if isinstance(value, float | Decimal):
            return str(int(value) if isinstance(value, float) and value.is_integer() else value)
        if isinstance(value, Unreadable):
            return Rejected(row.file, row.number(), f"{column!r} is unreadable: {value.reason}")
        if not isinstance(value, str):
            return Rejected(row.file, row.number(), f"{column!r} is neither a string nor a number")
        if LONE_SURROGATE.search(value):
            return Rejected(row.file, row.number(), f"{column!r} contains an invalid character (a lone surrogate)")
        if value.strip():
            return value
    return None


def row(query_id: str, encoded: TokenizedDocument) -> dict[str, Any]:
    """The table row of a tokenised query; a failed row if it has no token to predict."""
    ids = encoded.ids
    mask = np.ones(len(ids), dtype=bool) if encoded.mask is None else encoded.mask
    if len(ids) < 2:
        return failed(query_id, f"has {len(ids)} token(s); a loss needs at least two, one to be predicted from another")
    if not mask[1:].any():
        return failed(query_id, "has no token whose loss counts")
    return {"query_id": query_id, "token_ids": ids, "loss_mask": mask, "status": "ok", "error": None}


def failed(query_id: str, error: str) -> dict[str, Any]:
    """The table row of an invalid query."""
    return {"query_id": query_id, "token_ids": [], "loss_mask": [], "status": "failed", "error": error}


def fingerprint(table: pa.Table) -> str:
    """Content hash of a query table, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for record in table.to_pylist():
        digest.update(repr(sorted(record.items(), key=lambda item: item[0])).encode())
    return digest.hexdigest()[:16]


def check_name(name: str, of: str = "query set") -> None:
    """Raise StrideError for a name (of a query set or a nightly scan) that cannot be a folder name."""
    if not name or "/" in name or name.startswith((".", "_")) or not name.isprintable():
        raise StrideError(f"{name!r} is not a valid name for a {of}; use letters, digits, '-' and '_'.")
