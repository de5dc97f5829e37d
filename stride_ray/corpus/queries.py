"""Queries: any supported document input, tokenised into one small table.

An invalid query (one token, no target, an unreadable line) stays in the table with its error; none is dropped.
"""

import collections
import hashlib
from typing import Any

import numpy as np
import pyarrow as pa

from stride_ray.corpus.documents import Document, TokenizedDocument, detect_columns, read
from stride_ray.corpus.readers import Rejected, Row, rows
from stride_ray.corpus.splits import InputSplit, plan
from stride_ray.corpus.tokenizing import encode
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.urls import safe_url

SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("loss_mask", pa.list_(pa.bool_()), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
    ]
)

_ADVICE = "A query has text; prompt and completion (or answer); messages; or token_ids: rename the columns."


def read_queries(path: str, tokenizer: Any) -> pa.Table:
    """Read and tokenise queries.

    Args:
        path: JSON Lines, Parquet or any other document input with text (loss on every token), prompt and completion
            or answer, messages (loss on the answers), or token_ids; optionally ``query_id`` or ``id``.
        tokenizer: that of the corpus.

    Returns:
        A table with SCHEMA. Queries without an id are numbered q0, q1, … (q1~ if another query has the id q1);
        ``status`` is "ok" or "failed".

    Raises:
        StrideError: no queries, or a duplicate id.
    """
    units = plan([path], shard_bytes=2**26)
    columns = {**detect_columns(units, _ADVICE), **_id_column(units[0])}
    items: list[Any] = [item for unit in units for item in read(unit, columns)]
    documents = [item for item in items if not isinstance(item, Rejected)]
    encoded = iter(encode(documents, tokenizer))
    named = "id" in columns
    given = {item.document_id for item in items} if named else set()
    table = []
    for index, item in enumerate(items):
        result = item if isinstance(item, Rejected) else next(encoded)
        number = f"q{index}"
        while number in given:  # taken by another query's explicit id
            number += "~"
        if isinstance(result, Rejected):
            known = result.document_id or (result.file if named and isinstance(item, Document) else number)
            table.append(failed(known, result.sentence()))
            continue
        table.append(row(result.document_id if named else number, result))
    twice = [name for name, count in collections.Counter(r["query_id"] for r in table).items() if count > 1]
    if twice:
        raise StrideError(f"{safe_url(path)} has more than one query with the id {twice[0]!r}; ids must differ.")
    if not table:
        raise StrideError(f"{safe_url(path)} has no queries.")
    return pa.Table.from_pylist(table, SCHEMA)


def _id_column(unit: InputSplit) -> dict[str, str]:
    """Mapping of the id role to the column with query ids, if the first readable row has one."""
    first = next((item for item in rows(unit, None) if isinstance(item, Row)), None)
    found = [name for name in ("query_id", "id") if first is not None and name in first.values]
    return {"id": found[0]} if found else {}


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
    if not name or "/" in name or name.startswith((".", "_")):
        raise StrideError(f"{name!r} is not a valid name for a {of}; use letters, digits, '-' and '_'.")
