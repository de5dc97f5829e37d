"""Strings of a JSON text, changed where they stand: all else keeps its bytes.

Parsing and writing again would round long decimals, turn 1e400 into Infinity, which is no JSON, and respell the rest.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")


def with_strings(text: str, before: Any, after: Any) -> str:
    """The text of ``before``, changed to that of ``after``, which differs in strings only.

    Example:
        >>> with_strings('{"a": "x", "n": 1e400}', {"a": "x", "n": float("inf")}, {"a": "y", "n": float("inf")})
        '{"a": "y", "n": 1e400}'
    """
    pieces, last = list[str](), 0
    for start, stop, string in _changes(text, _skipped(text, 0), before, after):
        # A string keeps to ASCII where it did.
        pieces += [text[last:start], json.dumps(string, ensure_ascii=text[start:stop].isascii())]
        last = stop
    return "".join([*pieces, text[last:]])


def _changes(text: str, at: int, before: Any, after: Any) -> Iterator[tuple[int, int, str]]:
    """Start, stop and new value of each string that differs in the value that begins at ``at``."""
    if isinstance(before, str):
        if before != after:
            yield at, _DECODER.raw_decode(text, at)[1], after
    elif isinstance(before, dict | list) and before != after:
        places = dict(_members(text, at, isinstance(before, dict)))  # of a key that comes twice, the last counts
        for key, start in places.items():
            yield from _changes(text, start, before[key], after[key])


def _members(text: str, at: int, keyed: bool) -> Iterator[tuple[Any, int]]:
    """Key (or index) and start of each member of the object (or array) that begins at ``at``."""
    at, index = _skipped(text, at + 1), 0
    while text[at] not in "]}":
        key: Any = index
        if keyed:
            key, at = _DECODER.raw_decode(text, at)
            at = _skipped(text, _skipped(text, at) + 1)
        yield key, at
        at = _skipped(text, _DECODER.raw_decode(text, at)[1])
        at = _skipped(text, at + 1) if text[at] == "," else at
        index += 1


def _skipped(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at
