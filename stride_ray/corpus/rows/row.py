"""A row as read, a reject, and what both are called in messages."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

from stride_ray.runtime.urls import redact_message

# Half of a surrogate pair: valid in JSON, but neither tokenizers nor Parquet nor UTF-8 take it.
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Rejected:
    """A rejected document, or rows of a file that cannot be read.

    Attributes:
        file: name of the file; for rejects after reading, when only that is known, the document's id.
        row: line number (JSON Lines, from 1) or row number in the file (Parquet and Arrow, from 0, as in document
            ids); None for a whole file.
        reason: what is wrong, for display.
        document_id: the row's id, if it has a valid one.
        rows: rows lost, from ``row`` on; 1 where nobody can know (the rest of a compressed file, a whole file).
    """

    file: str
    row: int | None
    reason: str
    document_id: str = ""
    rows: int = 1

    def sentence(self) -> str:
        """The reject as one line for display."""
        if self.row is None:
            return f"{self.file}: {self.reason}"
        place = f"row {self.row}" if self.rows == 1 else f"rows {self.row} to {self.row + self.rows - 1}"
        return f"{self.file}, {place}: {self.reason}"


class Row(NamedTuple):
    """One row as read, before columns are mapped to roles.

    Attributes:
        file: name of its file.
        document_id: ``name`` for a text file, ``name#<byte offset>`` for JSON Lines, ``name#<row>`` otherwise.
        values: ``{column: value}``; ``{"text": …}`` for a text file. A value may be ``Unreadable``.
        number: returns the row or line number (``Rejected.row``); called for rejects only, since it may scan the file.
        unread: columns that the file has and that were not read, without those of type null; with ``filled`` (see
            ``rows``) only those with content.
    """

    file: str
    document_id: str
    values: dict[str, Any]
    number: Callable[[], int | None]
    unread: frozenset[str] = frozenset()


class Unreadable(NamedTuple):
    """In place of a value that cannot be read; it rejects the row only if its column is used."""

    reason: str


def has_content(value: Any) -> bool:
    """Whether a value holds anything: null, NaN, blank and empty values do not, nor those of nothing but nulls.

    Merged data sets fill the columns that a row does not have with these. What cannot be read may hold something.
    """
    if isinstance(value, str):
        return bool(value) and not value.isspace()
    if isinstance(value, dict | list):
        # One level is enough: columnar files pad structs with nulls, and deeper ones are null as a whole.
        return any(part is not None for part in (value.values() if isinstance(value, dict) else value))
    # NaN, which pandas has for null and Python writes into JSON, is not equal to itself.
    return value is not None and (not isinstance(value, float) or value == value)


def without_nulls(value: Any) -> Any:
    """A nested value without keys whose value is null.

    Columnar files pad every struct with the keys of all others, which chat templates would print. So does the library
    datasets when it reads JSON Lines, and trainers remove them again.
    """
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def parsed(value: Any) -> Any:
    """A value, parsed if it is a string of JSON, in which data sets keep what has no fixed type.

    Raises:
        ValueError: a string is not JSON.
    """
    return json.loads(value) if isinstance(value, str) else value


def named(value: Any) -> Any:
    """An id as text where its type has one form only: whole numbers, UUIDs, dates; anything else as it is.

    Example:
        >>> named(7.0), named(Decimal("7.00")), named(date(2026, 1, 31)), named(True)
        ('7', '7', '2026-01-31', True)
    """
    # pandas makes a column of integers with a gap one of floats, which hold integers below 2^53 exactly.
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    if isinstance(value, Decimal) and value.is_finite() and value == value.to_integral_value():
        return str(int(value))
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, date):  # or a datetime
        return value.isoformat()
    return str(value) if isinstance(value, UUID) else value


_TYPES: dict[type, str] = {
    type(None): "null",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number with a point",
    list: "a list",
    dict: "an object",
    bytes: "bytes",
    Decimal: "a decimal number with a fraction",
}


def kind_of_type(of: type) -> str:
    """What values of a type are called in messages: "a list", "null"."""
    return _TYPES.get(of, of.__name__)


def kind_of_value(value: Any) -> str:
    """What a value is called in messages."""
    return "NaN" if value != value else kind_of_type(type(value))


def escaped(text: str) -> str:
    """A text that can be stored and printed: lone surrogates are written as JSON writes them, escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def reason(error: Exception) -> str:
    """The first line of an error, without credentials and without characters that a terminal would obey."""
    lines = redact_message(str(error)).strip().splitlines()
    return "".join(c if c.isprintable() else "?" for c in lines[0]) if lines else type(error).__name__
