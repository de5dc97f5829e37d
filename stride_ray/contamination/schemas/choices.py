r"""Answer choices and answers of evaluation rows, in the forms in which data sets write them.

An answer may name a choice by its label or letter in any brackets (``(B)``, ``B. two cats``, ``\boxed{B}``), its text,
its number, its field's name, or a list with a 1 at its place. A value that is not understood is noted, never rejected.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple
from unicodedata import normalize

from stride_ray.contamination.schemas.texts import as_text, is_tagged_correct, longest_text
from stride_ray.corpus.rows.row import has_content, kind_of_value

_SPOKEN = {True: ("true", "yes"), False: ("false", "no")}
# Keys of the text, the label and the correctness of a choice or answer that is an object, the likeliest first.
_TEXTS = ("text", "value", "content", "option", "choice", "answer", "output")
_LABELS = ("label", "key", "id", "letter", "index", "option")
_RIGHT = ("correct", "is_correct", "isCorrect", "is_answer")
# A label in brackets or before a mark: (B), [B], B), B., B:, B\u3001, **B**; what follows it is the choice's text.
_LABEL = re.compile(r"[\s*(\[{<#]*([a-z]|\d{1,2})(?:\s?[)\]}>.:*\u3001]+(?!\d)(.*)|\s*)", re.IGNORECASE | re.DOTALL)
# The label that a choice's own text begins with, in any script: "(ii) ...", "\u0411) ...".
_OWN_LABEL = re.compile(r"\s*[(\[]?([^\W\d_]{1,4})\s?[)\].:\u3001]\s*\S")
_BRACKETED = re.compile(r"\s*[(\[]?\w{1,2}\s?[)\]]")
_SAID = re.compile(
    r"\\boxed\{\s*(?:\\text\w*\{)?([^{}]+)|\b(?:answer|option|choice)\b(?:\s+is)?\s*:?\s*", re.IGNORECASE
)
_SEVERAL = re.compile(r"\s*(?:[,;/&|+]|\band\b)\s*", re.IGNORECASE)
# The labels in a text of all choices: "a ) 38 , b ) 27" or "A. x\nB. y".
_MARK = re.compile(r"(?:(?<=[\s,;])|^)[(\[\uff08]?([a-z])\s?[).:\]\u3001\uff0e\uff1a\uff09]\s*", re.IGNORECASE)
_NUMBER = re.compile(r"([0-9]{1,9})(?:\.0+)?")


class Choices(NamedTuple):
    """The choices of a row.

    Attributes:
        texts: text of each choice; "" for a null.
        labels: label of each choice, or ().
        right: index of the correct choice, if the choices mark it.
    """

    texts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    right: int | None = None


def read_choices(value: Any, names: Sequence[str], note: Callable[[str], None]) -> Choices:
    """Return the choices in a field, or in several fields of these names.

    Args:
        value: the field's value, or the list of the fields' values.
        names: of the fields.
        note: called with a clause that follows the field's name, for a value that is not understood.
    """
    if isinstance(value, str):
        value = _parse_choices_text(value)
    labels: Any = list(names) if len(names) > 1 else ()
    right = None
    if isinstance(value, dict):
        listed = next((key for key in (*_TEXTS, "choices", "texts") if isinstance(value.get(key), list)), None)
        if listed is not None:
            labels = next((value[key] for key in (*_LABELS, "labels") if has_content(value.get(key))), ())
            value = value[listed]
        elif any(len(str(key)) > 2 for key in value) and not any(isinstance(each, str) for each in value.values()):
            labels, value = list(value.values()), list(value)  # scores of texts: {"So it is.": 1}
        else:
            labels, value = list(value), list(value.values())  # MedQA's {"A": …, "B": …}
    elif isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        labels = [_first_text(each, _LABELS) or "" for each in value]
        flags = [any(each.get(key) in (True, 1) for key in _RIGHT) or is_tagged_correct(each) for each in value]
        right = flags.index(True) if any(flags) else None
        value = [_first_text(each, _TEXTS) for each in value]
    elif isinstance(value, list) and value and all(_is_pair(each) for each in value):
        labels, value = [each[0] for each in value], [each[1] for each in value]
    texts = [as_text(each) for each in value] if isinstance(value, list) else [None]
    if None in texts:
        note("does not hold a list of texts")
        return Choices()
    if labels != () and not (isinstance(labels, list) and len(labels) in (0, len(texts))):
        note(f"does not hold a label for each of its {len(texts)} choices")
        labels = ()
    spelt = tuple(str(label) for label in labels) or _own_labels(texts)
    if right is None and names[0].lower().endswith(("_targets", "_scores")) and isinstance(labels, list):
        right = next((i for i, label in enumerate(labels) if label in (1, "1")), None)
    return Choices(tuple(text or "" for text in texts), spelt if any(spelt) else (), right)


def _own_labels(texts: Sequence[str | None]) -> tuple[str, ...]:
    """Return the labels that the choices' texts begin with; () unless each has one of its own."""
    marks = [_OWN_LABEL.match(normalize("NFKC", text or "")) for text in texts]
    found = [mark[1] for mark in marks if mark]
    return tuple(found) if len({label.lower() for label in found}) == len(texts) else ()


def _first_text(value: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """Return the first text (or number as text) under these keys; for _TEXTS, the longest string if there is none."""
    held = (value.get(key) for key in keys)
    # HELM has {"output": {"text": …}}.
    texts = (as_text(each.get("text") if isinstance(each, dict) else each) for each in held)
    longest = max((each for each in value.values() if isinstance(each, str)), key=len, default=None)
    return next(filter(None, texts), longest if keys is _TEXTS else None)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and len(str(value[0])) < 3 and isinstance(value[1], str)


def _parse_choices_text(text: str) -> Any:
    """Parse choices written as one text (JSON, Python, or "A. … B. …"); any other text is returned as it is."""
    for parse in (json.loads, ast.literal_eval) if text.lstrip()[:1] in ("[", "{") else ():
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    marks, wanted = [], "a"
    for mark in _MARK.finditer(text):
        if mark[1].lower() == wanted:
            marks.append(mark)
            wanted = chr(ord(wanted) + 1)
    if len(marks) > 1:
        stops = [mark.start() for mark in marks[1:]] + [len(text)]
        return {m[1]: text[m.end() : stop].strip().rstrip(",;").strip() for m, stop in zip(marks, stops, strict=True)}
    return text


def read_answer(value: Any, choices: Choices, first: int, note: Callable[[str], None]) -> str:
    """Return the text of the choice that an answer names; "" if it names none, or is hidden as in test splits.

    Args:
        value: value of the answer's field.
        choices: the row's choices, at least one.
        first: number of the first choice, 0 or 1.
        note: as in read_choices.
    """
    if _is_one_hot(value, choices):
        return choices.texts[value.index(1)]
    for each in _scalar_values(value):
        place = _choice_index(each, choices, first)
        if place is not None:
            return choices.texts[place]
    if has_content(value) and value not in (-1, "-1"):
        held = value if isinstance(value, str | int | float | Decimal) else None
        what = f"is {value!r:.80}, which" if held is not None else f"holds {kind_of_value(value)} that"
        note(f"{what} names none of the {len(choices.texts)} choices")
    return ""


def answer_numbers(value: Any, choices: Choices) -> list[int]:
    """Return the numbers by which an answer names choices; [] if it names them by label, text or a 1 at their place."""
    if _is_one_hot(value, choices):
        return []
    found = [str(each).strip() for each in _scalar_values(value) if not isinstance(each, bool)]
    known = {*choices.labels, *(text.strip() for text in choices.texts)} if isinstance(value, str) else choices.labels
    return [int(float(each)) for each in found if _NUMBER.fullmatch(each) and each not in known]


def _is_one_hot(value: Any, choices: Choices) -> bool:
    return (
        isinstance(value, list)
        and len(value) == len(choices.texts)
        and all(type(each) in (bool, int, float) and each in (0, 1) for each in value)
        and 1 in value
    )


def _scalar_values(value: Any) -> Iterator[Any]:
    """Yield the values by which an answer may name a choice; those of an object in order of likelihood."""
    if isinstance(value, dict):
        keys = sorted(value, key=lambda key: key not in (*_LABELS, *_TEXTS))
        value = [value[key] for key in keys]
    for each in value if isinstance(value, list) else (value,):
        if isinstance(each, list | dict):
            yield from _scalar_values(each)
        elif isinstance(each, str | int | float | Decimal):
            yield each


def _choice_index(value: Any, choices: Choices, first: int) -> int | None:
    """Resolve an answer to a choice: by label, text, number counted from ``first`` (WinoGrande: 1), or letter."""
    texts = choices.texts
    if isinstance(value, bool):
        spoken = [text.strip().lower() for text in texts]
        return next((spoken.index(each) for each in _SPOKEN[value] if each in spoken), None)
    # Python refuses to convert an integer of 5,000 digits to text.
    word = str(value).strip() if isinstance(value, str) or abs(value) < 10**20 else ""
    if not word:
        return None
    if isinstance(value, str) and word not in choices.labels:
        stripped = [text.strip() for text in texts]
        if word in stripped:
            return stripped.index(word)
    place = _index_by_label(word, choices, first)
    if place is None:
        bare = _comparable(word)
        place = _index_by_label(bare, choices, first) if bare in map(str.lower, choices.labels) else None
    if place is None:
        said = list(_SAID.finditer(word))
        tail = (said[-1][1] or word[said[-1].end() :]) if said else word
        found = (
            _index_by_text(word, texts),
            _index_by_marked_label(normalize("NFKC", tail), choices, first),
            _index_by_text(tail, texts),
        )
        place = next((each for each in found if each is not None), None)
    return place


def _index_by_text(word: str, texts: Sequence[str]) -> int | None:
    """Return the choice with this text, ignoring case and surrounding marks, and labels too if only one matches."""
    plain = [_comparable(text) for text in texts]
    if _comparable(word) and _comparable(word) in plain:
        return plain.index(_comparable(word))
    bare = [_comparable(_without_label(text)) for text in texts]
    word = _comparable(_without_label(word))
    return bare.index(word) if word and bare.count(word) == 1 else None


def _index_by_label(word: str, choices: Choices, first: int) -> int | None:
    """Return the choice with this label, number or letter, and nothing else in the word."""
    count = len(choices.texts)
    if word in choices.labels:
        return choices.labels.index(word)
    folded = [label.lower() for label in choices.labels]
    if word.lower() in folded:
        return folded.index(word.lower())
    number = _NUMBER.fullmatch(word)
    if number:
        place = int(number[1]) - first
        return place if 0 <= place < count else None
    if len(word) == 1 and word.isascii() and word.isalpha() and ord(word.upper()) - ord("A") < count:
        return ord(word.upper()) - ord("A")
    return None


def _index_by_marked_label(word: str, choices: Choices, first: int) -> int | None:
    """Return the choice whose label stands in brackets or before its text; of several labels, the first."""
    marked = _LABEL.fullmatch(word)
    if marked:
        place, rest = _index_by_label(marked[1], choices, first), _comparable(marked[2] or "")
        # "A. Smith" begins like a label; "(A) since so" has one.
        if place is not None and (not rest or _BRACKETED.match(word) or rest == _comparable(choices.texts[place])):
            return place
    parts = [each and each[1] for each in map(_LABEL.fullmatch, _SEVERAL.split(word))]
    if len(parts) == 1 and word.isascii() and word.isupper() and len(word) <= len(choices.texts):
        parts = list(word)
    places = [_index_by_label(part, choices, first) for part in parts if part]
    return places[0] if len(places) == len(parts) > 1 and None not in places else None


def _without_label(text: str) -> str:
    marked = _LABEL.fullmatch(normalize("NFKC", text))
    return marked[2] if marked and marked[2] else text


def _comparable(text: str) -> str:
    """Return a text without case and surrounding marks, for comparison."""
    return " ".join(normalize("NFKC", text).lower().split()).strip(" .;,:\"'`*$()")


def free_answer(value: Any, note: Callable[[str], None]) -> str:
    """Return the text of an answer without choices: SQuAD's ``{"text": […]}``, TriviaQA's ``{"value": …}``, a list."""
    if isinstance(value, bool):  # BoolQ: the question stands alone
        return ""
    if as_text(value) is not None:
        return as_text(value) or ""
    held, known = (value if isinstance(value, list) else []), False
    if isinstance(value, dict):
        held = [value[key] for key in ("value", *_TEXTS, "spans") if key in value]
        known = bool(held)
        held = held or [longest_text(value)]
    found = next(filter(None, (free_answer(each, lambda _: None) for each in held)), "")
    if not (found or known) and has_content(value):
        note(f"holds {kind_of_value(value)} without a text")
    return found
