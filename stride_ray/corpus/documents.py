"""Documents of a unit: mapping input columns to roles, and converting rows into documents or rejects.

A document is text, a prompt with its answer, a conversation or token ids. Its source and id identify it together, since
ids often start again in every file; they do not depend on the machine that read it, and both are part of block ids and
of all results. An id is text: the number 1 and the string "1" are the same id.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stride_ray.corpus.readers import Rejected, Row, rows
from stride_ray.corpus.splits import InputSplit
from stride_ray.runtime.errors import StrideError

# The sets of roles that can form a document.
_CONTENTS: tuple[tuple[str, ...], ...] = (("text",), ("prompt", "answer"), ("messages",), ("token_ids",))
_ROLES = ("text", "prompt", "answer", "messages", "token_ids", "loss_mask", "id", "source")

# Column names of public data sets by role, most specific first.
_KNOWN: tuple[dict[str, str], ...] = (
    {"messages": "messages"},
    {"prompt": "prompt", "answer": "completion"},
    {"prompt": "prompt", "answer": "answer"},
    {"prompt": "question", "answer": "answer"},
    {"prompt": "instruction", "answer": "output"},
    {"token_ids": "token_ids"},
    {"token_ids": "input_ids"},
    {"text": "text"},
    {"text": "content"},
)

# A mapped column must occur at least once in this many rows, or the mapping is rejected.
_PROBE_ROWS = 100
_ADVICE = "Say which one does, as in --columns text=body or --columns prompt=query,answer=reply."


@dataclass(frozen=True)
class Document:
    """One document; exactly one of text, prompt with answer, messages and token_ids is set.

    Attributes:
        document_id: value of the id column; without one, ``name`` for a text file, ``name#<byte offset>`` for a line
            of JSON Lines (in the decompressed file), ``name#<row of the file>`` for Parquet and Arrow.
        source: value of the source column, else the file's name.
        place: where its row is in the unit: the byte offset of a line (in the decompressed file), the number of a row
            of the file (Parquet, Arrow), or the index of a text file among the unit's.
        text: plain text, not blank.
        prompt: text before the answer; may be empty.
        answer: the completion that carries the loss, not blank.
        messages: turns with "role" and "content", in the form that chat templates take.
        token_ids: token ids, at least one.
        loss_mask: with token_ids: whether each carries loss, same length.
    """

    document_id: str
    source: str
    text: str | None = None
    prompt: str | None = None
    answer: str | None = None
    messages: list[dict[str, Any]] | None = None
    token_ids: list[int] | None = None
    loss_mask: list[bool] | None = None
    place: int = 0


def read(unit: InputSplit, columns: Mapping[str, str]) -> Iterator[Document | Rejected]:
    """The documents of a unit in file order, with a reject for each invalid row.

    Args:
        unit: from ``plan``.
        columns: complete mapping of roles to columns (see ``resolve_columns``); ignored for text files.

    Raises:
        StrideError: the mapping is inconsistent, or a file cannot be fetched. Bad content never raises.
    """
    if unit.kind == "text":
        columns = {"text": "text"}
    elif not _content_roles(columns):
        raise StrideError(f"No column of {unit.files[0].name} is mapped to a text; see columns = {{text = ...}}.")
    files = {file.name: number for number, file in enumerate(unit.files)}
    for row in rows(unit, set(columns.values())):
        if isinstance(row, Rejected):
            yield row
            continue
        place = files[row.file] if unit.kind == "text" else int(row.document_id.rpartition("#")[2])
        yield _document(row, columns, place)


def resolve_columns(units: Sequence[InputSplit], columns: Mapping[str, str] | None = None) -> dict[str, str]:
    """Validate a mapping of roles to columns; detects the content columns if the mapping has none.

    Returns:
        The complete mapping, role to column; empty if all units are text files and nothing was given.

    Raises:
        StrideError: unknown role, incompatible roles, a mapped column missing from all of the first rows, or no known
            column names to detect.
    """
    given = dict(columns or {})
    content = _content_roles(given)
    if all(unit.kind == "text" for unit in units):
        return given
    if not content:
        detected = detect_columns(units)
        if "loss_mask" in given and "token_ids" not in detected:
            raise StrideError("A loss_mask column goes with token_ids only; map token_ids too, or drop loss_mask.")
        return {**detected, **given}
    missing, names = dict(given), set[str]()
    for row, _ in zip(_readable_rows(units), range(_PROBE_ROWS), strict=False):
        names |= set(row.values)
        missing = {role: name for role, name in missing.items() if name not in names}
        if not missing:
            return given
    if not names:  # no readable rows; reading will report each as a reject
        return given
    role, name = next(iter(missing.items()))
    raise StrideError(
        f"There is no column {name!r} to take as {role}; the columns found are {_listed(names)}. "
        f"Say which one it is, as in --columns {role}={sorted(names)[0]}."
    )


def detect_columns(units: Sequence[InputSplit], advice: str = _ADVICE) -> dict[str, str]:
    """Detect the content columns by their names in the first readable row.

    Known names, in this order: messages; prompt with completion or answer; question with answer; instruction with
    output; token_ids (with loss_mask if present) or input_ids (likewise); text; content.

    Args:
        units: the input.
        advice: last sentence of the error message if no known name is found.

    Returns:
        Role to column; empty if all units are text files.

    Raises:
        StrideError: no row can be read, or no known name is found.
    """
    if all(unit.kind == "text" for unit in units):
        return {}
    rejects: list[Rejected] = []
    row = next(_readable_rows(units, rejects), None)
    if row is None:
        why = f" The first fault: {rejects[0].file}: {rejects[0].reason}." if rejects else ""
        raise StrideError(f"No row of the input can be read, so that its columns are unknown.{why}")
    for known in _KNOWN:
        if all(name in row.values for name in known.values()):
            masked = "token_ids" in known and "loss_mask" in row.values
            return {**known, "loss_mask": "loss_mask"} if masked else dict(known)
    pairs = [sorted(known.values(), key=row.values.__contains__) for known in _KNOWN if len(known) == 2]
    half = next((f" {there!r} stands without {missing!r}." for missing, there in pairs if there in row.values), "")
    raise StrideError(
        f"None of the columns of {row.file} is known to hold a text; found: {_listed(row.values)}.{half} {advice}"
    )


def _readable_rows(units: Sequence[InputSplit], rejects: list[Rejected] | None = None) -> Iterator[Row]:
    for unit in units:
        if unit.kind == "text":
            continue
        for row in rows(unit, None):
            if isinstance(row, Row):
                yield row
            elif rejects is not None and len(rejects) < 1:
                rejects.append(row)


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in sorted(names)) or "none"


def _content_roles(columns: Mapping[str, str]) -> tuple[str, ...]:
    """The mapped content roles; empty if none is mapped.

    Raises:
        StrideError: unknown or incompatible roles.
    """
    unknown = [role for role in columns if role not in _ROLES]
    if unknown:
        raise StrideError(f"{unknown[0]!r} is no role of a column; the roles are {', '.join(_ROLES)}.")
    mapped = tuple(role for role in columns if role not in ("id", "source", "loss_mask"))
    content = next((roles for roles in _CONTENTS if set(roles) == set(mapped)), ())
    if mapped and not content:
        raise StrideError(
            f"Columns for {' and '.join(mapped)} do not make a document; map text, or prompt and answer, "
            "or messages, or token_ids."
        )
    if content and "loss_mask" in columns and content != ("token_ids",):
        raise StrideError("A loss_mask column goes with token_ids only; drop it.")
    return content


def shown_name(source: str, document_id: str) -> str:
    """A document's name for display: its id, after its source if the id does not begin with that.

    Example:
        >>> shown_name("b.jsonl", "7"), shown_name("b.jsonl", "b.jsonl#1024")
        ('b.jsonl: 7', 'b.jsonl#1024')
    """
    whole = not source or document_id == source or document_id.startswith(f"{source}#")
    return document_id if whole else f"{source}: {document_id}"


class InvalidRowError(Exception):
    """A row is not a valid document; becomes a reject."""


def _document(row: Row, columns: Mapping[str, str], place: int) -> Document | Rejected:
    identity: dict[str, str] = {}
    try:
        for role in ("id", "source"):
            if role in columns:
                identity[role] = _name(row, columns[role])
        content = {
            role: _CHECKS[role](_value(row, columns[role]), columns[role]) for role in columns if role in _CHECKS
        }
        if "loss_mask" in content and len(content["loss_mask"]) != len(content["token_ids"]):
            raise InvalidRowError(
                f"{len(content['loss_mask'])} values in {columns['loss_mask']!r} "
                f"for {len(content['token_ids'])} in {columns['token_ids']!r}"
            )
    except InvalidRowError as error:
        return Rejected(row.file, row.number(), str(error), identity.get("id", ""))
    return Document(identity.get("id", row.document_id), identity.get("source", row.file), place=place, **content)


def _value(row: Row, column: str) -> Any:
    if column not in row.values:
        raise InvalidRowError(f"no column {column!r}")
    return row.values[column]


def _name(row: Row, column: str) -> str:
    """An id or source as a string; the value may be an integer."""
    value = _value(row, column)
    # pandas makes a column of integers with a gap one of floats, which hold integers below 2^53 exactly.
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not _checked_text(value, column):
        raise InvalidRowError(f"{column!r} is empty")
    return value


def _checked_text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise InvalidRowError(f"{column!r} is {_kind(value)}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate: valid in JSON, but neither Parquet nor UTF-8 can store it
        raise InvalidRowError(f"{column!r} contains an invalid character (a lone surrogate)") from None
    return value


def _full_text(value: Any, column: str) -> str:
    if not _checked_text(value, column).strip():
        raise InvalidRowError(f"{column!r} is empty")
    return value


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise InvalidRowError(f"{column!r} is {_kind(value)}, not a list of messages")
    if not value:
        raise InvalidRowError(f"{column!r} is empty")
    turns = []
    for turn in value:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise InvalidRowError(f"{column!r} holds a message without a role")
        # Columnar files pad every message with the keys of all others; templates would treat null as a value.
        turns.append({key: part for key, part in turn.items() if part is not None})
        content = turns[-1].get("content")
        if isinstance(content, str):
            _checked_text(content, column)
        elif "content" not in turns[-1] and "tool_calls" not in turns[-1]:
            raise InvalidRowError(f"{column!r} holds a message without content")
    return turns


def _integers(value: Any, column: str) -> list[int]:
    if not isinstance(value, list):
        raise InvalidRowError(f"{column!r} is {_kind(value)}, not a list of token ids")
    if not value:
        raise InvalidRowError(f"{column!r} is empty")
    # A set of types is built at C speed and, unlike isinstance, distinguishes bool from int.
    odd = next(iter(set(map(type, value)) - {int}), None)
    if odd is not None:
        raise InvalidRowError(f"{column!r} holds {_TYPE_NAMES.get(odd, odd.__name__)} among its token ids")
    return value


def _flags(value: Any, column: str) -> list[bool]:
    if not isinstance(value, list) or not set(map(type, value)) <= {bool, int} or not set(value) <= {0, 1}:
        raise InvalidRowError(f"{column!r} is not a list of true and false (or 1 and 0)")
    return list(map(bool, value))


_TYPE_NAMES: dict[type, str] = {
    type(None): "null",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number with a point",
    list: "a list",
    dict: "an object",
    bytes: "bytes",
}


def _kind(value: Any) -> str:
    return _TYPE_NAMES.get(type(value), type(value).__name__)


_CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "text": _full_text,
    "prompt": _checked_text,
    "answer": _full_text,
    "messages": _messages,
    "token_ids": _integers,
    "loss_mask": _flags,
}


@dataclass(frozen=True, eq=False)
class TokenizedDocument:
    """A tokenised document.

    Attributes:
        document_id: as in Document.
        source: as in Document.
        ids: token ids, int32 [tokens], at least one.
        mask: which tokens carry loss, bool [tokens], at least one True; None: all.
        place: as in Document.
    """

    document_id: str
    source: str
    ids: npt.NDArray[np.int32]
    mask: npt.NDArray[np.bool_] | None = None
    place: int = 0
