"""Queries: any supported document input, tokenised into one small table.

An invalid query (one token, no target, an unreadable line) stays in the table with its error; none is dropped.

A contrast asks why the model says one completion rather than another: its loss is the first one's minus the other's.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa

from stride_ray.corpus.documents import Document, TokenizedDocument, document_of, read_with_rows, resolve_columns
from stride_ray.corpus.readers import Rejected, Row, rows
from stride_ray.corpus.rows.roles import roles_of
from stride_ray.corpus.rows.row import LONE_SURROGATE, Unreadable, has_content, named
from stride_ray.corpus.splits import InputSplit, plan
from stride_ray.corpus.tokenization.encoding import encode
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.urls import redact_url

SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("loss_mask", pa.list_(pa.bool_()), nullable=False),
        pa.field("contrast_ids", pa.list_(pa.int32())),
        pa.field("contrast_mask", pa.list_(pa.bool_())),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
    ]
)

_ID_COLUMNS = ("query_id", "id")
# Columns with the completion that a contrast compares with: that of preference data, and ours.
_CONTRASTS = ("rejected", "contrast")
_ADVICE = "A query has text; prompt and completion (or answer); messages; or token_ids: rename the columns."


def read_queries(path: str, tokenizer: Any) -> pa.Table:
    """Read and tokenise queries.

    Args:
        path: JSON Lines, Parquet or any other document input with text (loss on every token), prompt and completion
            or answer, messages (loss on the answers), or token_ids; each row may have a ``query_id`` or ``id``, a
            string or a number. With a ``rejected`` (or ``contrast``) column in the form of the completion, messages or
            text, the query is a contrast; preference data has ``chosen`` in their place.
        tokenizer: that of the corpus.

    Returns:
        A table with SCHEMA. A row without an id (or with null, NaN or an empty string) gets its number, q0, q1, … (q1~
        if another row has the id q1). The number 7, or 7.0, is the id "7"; ``status`` is "ok" or "failed".

    Raises:
        StrideError: no queries, or a duplicate id.
    """
    units = plan([path], shard_bytes=2**26)
    columns = resolve_columns(units, _preference_columns(units), _ADVICE)
    beside = (*_ID_COLUMNS, *_CONTRASTS)
    items = [item for unit in units for item in read_with_rows(unit, columns, beside=beside)]
    if not items:
        raise StrideError(f"{redact_url(path)} has no queries.")
    queries = _named(items, redact_url(path))
    others = [_contrast(each, columns) for each, _ in items]
    return pa.Table.from_pylist(_encoded(queries, others, tokenizer), SCHEMA)


def query_row(values: Mapping[str, Any], tokenizer: Any, query_id: str = "query") -> dict[str, Any]:
    """Tokenise one query; returns its row in the table (SCHEMA).

    Example: ``query_row({"prompt": "2 + 2 = ", "completion": "4"}, tokenizer)["status"]`` is "ok".

    Args:
        values: as a row of ``read_queries``; its own id is not used.
        tokenizer: that of the corpus.
        query_id: of the query.
    """
    row, columns = Row("the query", query_id, dict(values), lambda: None), _preference_of(values)
    roles, _ = roles_of(row.values, columns)
    encoded = _encoded([(query_id, document_of(row, roles, 0))], [_contrast(row, columns)], tokenizer)
    (found,) = pa.Table.from_pylist(encoded, SCHEMA).to_pylist()
    return dict(found)


def _encoded(
    queries: Sequence[tuple[str, Document | Rejected]], others: Sequence[Document | Rejected | None], tokenizer: Any
) -> list[dict[str, Any]]:
    """The table rows of queries (id, document), with what each is contrasted with, if anything."""
    wanted = [each for each in (*(item for _, item in queries), *others) if isinstance(each, Document)]
    encoded = iter(encode(wanted, tokenizer))
    first = [next(encoded) if isinstance(item, Document) else item for _, item in queries]
    second = [next(encoded) if isinstance(item, Document) else item for item in others]
    return [_row(name, *both) for (name, _), both in zip(queries, zip(first, second, strict=True), strict=True)]


def _preference_columns(units: Sequence[InputSplit]) -> dict[str, str]:
    """The mapping of roles for preference data, which has prompt, chosen and rejected, or the latter two alone."""
    found = (row for unit in units if unit.kind != "text" for row in rows(unit, {"prompt", "chosen", "rejected"}))
    row = next((row for row in found if isinstance(row, Row)), None)
    return {} if row is None else _preference_of(row.values)


def _preference_of(values: Mapping[str, Any]) -> dict[str, str]:
    """The mapping of roles for a row of preference data; empty for any other."""
    if not {"chosen", "rejected"} <= values.keys():
        return {}
    if "prompt" in values:
        return {"prompt": "prompt", "answer": "chosen"}
    return {"messages" if isinstance(values["chosen"], list) else "text": "chosen"}


def _contrast(row: Row | Rejected, columns: Mapping[str, str]) -> Document | Rejected | None:
    """The row's document with the other completion in the place of its own; None for a plain query.

    Example: {"prompt": "2+2=", "completion": "4", "rejected": "5"} makes the prompt with the answer "5".
    """
    if isinstance(row, Rejected):
        return None
    column = next((name for name in _CONTRASTS if has_content(row.values.get(name))), None)
    if column is None:
        return None
    roles, _ = roles_of(row.values, columns)
    role = next((role for role in ("answer", "messages", "text") if role in roles), "")
    if not role:
        return Rejected(row.file, row.number(), f"{column!r} needs a prompt and completion, messages or text beside it")
    return document_of(row, {**roles, role: (column,)}, 0)


def _row(
    name: str, encoded: TokenizedDocument | Rejected, contrast: TokenizedDocument | Rejected | None
) -> dict[str, Any]:
    """A query's row in the table."""
    if isinstance(encoded, Rejected):
        return failed(name, encoded.sentence())
    return failed(name, contrast.sentence()) if isinstance(contrast, Rejected) else row(name, encoded, contrast)


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


def row(query_id: str, encoded: TokenizedDocument, contrast: TokenizedDocument | None = None) -> dict[str, Any]:
    """The table row of a tokenised query; a failed row if it, or what it is contrasted with, has no token to predict.

    What two contrasted texts begin with in common carries no loss, unless one of them would have none.
    """
    both = [each for each in (encoded, contrast) if each is not None]
    masks = [np.ones(len(each.ids), bool) if each.mask is None else each.mask for each in both]
    if contrast is not None:
        shared = _common_prefix(encoded.ids, contrast.ids)
        rest = [mask & (np.arange(len(mask)) >= shared) for mask in masks]
        masks = rest if all(mask[1:].any() for mask in rest) else masks
    for what, each, mask in zip(("", "what it is contrasted with "), both, masks, strict=False):
        if len(each.ids) < 2:
            one = f"{what}has {len(each.ids)} token(s); a loss needs at least two, one to be predicted from another"
            return failed(query_id, one)
        if not mask[1:].any():
            return failed(query_id, f"{what}has no token whose loss counts")
    other = (None, None) if contrast is None else (contrast.ids, masks[1])
    values = (query_id, encoded.ids, masks[0], *other, "ok", None)
    return dict(zip(SCHEMA.names, values, strict=True))


def _common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens two texts have in common at the beginning."""
    length = min(len(first), len(second))
    different = np.flatnonzero(np.asarray(first[:length]) != np.asarray(second[:length]))
    return int(different[0]) if len(different) else length


def failed(query_id: str, error: str) -> dict[str, Any]:
    """The table row of an invalid query."""
    return dict(zip(SCHEMA.names, (query_id, [], [], None, None, "failed", error), strict=True))


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
