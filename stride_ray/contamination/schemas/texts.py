"""Texts in the values of evaluation rows."""

import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from stride_ray.corpus.rows.row import LONE_SURROGATE

# Not a text: an identifier, link or number.
_TOKEN = re.compile(r"\s*[!-~]*\s*")


def strings(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield the strings in a value of JSON, each with its path: ``path.key.0``."""
    waiting = [(path, value)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, str):
            yield path, value
        elif isinstance(value, dict):
            waiting += [(f"{path}.{key}", value[key]) for key in reversed(value)]
        elif isinstance(value, list):
            waiting += [(f"{path}.{i}", value[i]) for i in reversed(range(len(value)))]


def is_readable(text: str) -> bool:
    """Whether a text is valid and is not just an identifier, link or number."""
    return not _TOKEN.fullmatch(text) and not LONE_SURROGATE.search(text)


def longest_text(value: Any) -> str:
    """Return the longest text in a value that is not just an identifier, link or number; empty if there is none."""
    return max((text for _, text in strings("", value) if not _TOKEN.fullmatch(text)), key=len, default="")


def as_text(value: Any) -> str | None:
    """Return a string, or a number or boolean as text; "" for null and NaN, None for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float | Decimal):
        return str(value) if value == value and (not isinstance(value, int) or abs(value) < 10**20) else ""
    return "" if value is None else None


def has_wrong_reference(value: Any) -> bool:
    """Whether a list of HELM's references holds choices: some are tagged as correct and some are not."""
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        return False
    return len({is_tagged_correct(each) for each in value}) == 2


def is_tagged_correct(value: Mapping[str, Any]) -> bool:
    """Whether a choice has HELM's tag "correct"."""
    return isinstance(value.get("tags"), list) and "correct" in value["tags"]


def turns_text(value: Any) -> str | None:
    """Return what users say in a conversation, or all that is said if they say nothing; None if it is none."""
    if not (isinstance(value, list) and value and all(isinstance(each, dict) for each in value)):
        return None
    turns = [(each.get("role", each.get("from")), each.get("content", each.get("value"))) for each in value]
    if not all(isinstance(part, str) for turn in turns for part in turn):
        return None
    asked = [text for role, text in turns if role in ("user", "human")]
    return "\n".join(asked or [text for _, text in turns])


def field_text(values: Mapping[str, Any], field: str) -> str | None:
    """Return the text of a field, or of several, comma-separated; None if it holds a number or no text."""
    if field not in values and "," in field:
        texts = [field_text(values, part) for part in field.split(",")]
        return "\n".join(filter(None, texts)) if any(texts) else None
    value = values.get(field)
    if isinstance(value, dict):  # MMLU-like {"stem": …}, TriviaQA's {"value": …}
        value = next((value[key] for key in ("stem", "text", "value") if isinstance(value.get(key), str)), value)
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):  # the turns of a dialogue
        value = "\n".join(value)
    value = turns_text(value) or value
    if isinstance(value, dict | list):  # XNLI's premise in all languages: one of them; the rest is with the others
        value = longest_text(value) or None
    return value if isinstance(value, str) else None
