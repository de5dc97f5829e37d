"""Evaluation sets: items with a question, choices and an answer, from JSON Lines or Parquet in common schemas.

Detected schemas: GSM8K (question, answer), ARC (question, choices {text, label}, answerKey), MMLU (question, choices,
answer as index or letter), HellaSwag (ctx, endings, label), TruthfulQA (question, best_answer; mc1_targets), PIQA-like
(goal, sol1, sol2), prompt with completion or target, and plain text, among others (schemas/shapes.py). Any other schema
can be read by naming its fields; otherwise a row's longest text is the question. The row's other texts (RACE's article,
MBPP's code, nested or in lists) are kept and searched too, as are those of a field that is not understood; that field
is reported.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stride_ray.contamination.schemas.choices import (
    Choices,
    answer_numbers,
    free_answer,
    read_answer,
    read_choices,
)
from stride_ray.contamination.schemas.shapes import first_number, longest_field, plain_name, shape_of
from stride_ray.contamination.schemas.texts import as_text, field_text, is_readable, strings
from stride_ray.corpus.readers import Rejected, Row, rows
from stride_ray.corpus.rows.row import LONE_SURROGATE, escaped, has_content, kind_of_value, named
from stride_ray.corpus.splits import plan
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.urls import redact_url

ROLES = ("question", "choices", "answer", "id", "others")
# Names of identifiers, without case, spaces and marks (plain_name), the likeliest first.
_IDS = (
    "id itemid queryid questionid taskid ind uid docid qid uuid guid sampleid problemid instanceid uniqueid recordid "
    "storyid pubid idstring questionuniqueid idx".split()
)
_SUFFIXES = re.compile(r"(-\d{5}-of-\d{5})?(\.(jsonl|json|ndjson|parquet|txt))?(\.(gz|zst))?$", re.I)


@dataclass(frozen=True)
class Item:
    """One item of an evaluation set.

    Attributes:
        key: digest (16 hexadecimal digits) of the set's name and the item's content, stable over nights.
        set_name: of its evaluation set.
        item_id: the row's own id, else ``file#row``.
        file: its file's name.
        row: line (from 1) in JSON Lines, row (from 0) in Parquet; -1 if unknown.
        question: the question, or the whole of a plain text.
        choices: the answer choices; empty for free answers.
        answer: text of the correct answer; empty if the row does not give it.
        others: the row's other texts, each with its field's name ("code", "meta.evidence.0.text").
        left_out: names of fields whose strings are not searched: identifiers, links, and fields not among those named.
        asked: name of the field (or of several, comma-separated) that holds the question.
        not_understood: a sentence for each field that was not understood; its text is among ``others``.
    """

    key: str
    set_name: str
    item_id: str
    file: str
    row: int
    question: str
    choices: tuple[str, ...]
    answer: str
    others: tuple[tuple[str, str], ...] = ()
    left_out: tuple[str, ...] = ()
    asked: str = "question"
    not_understood: tuple[str, ...] = ()


@dataclass(frozen=True)
class EvaluationSet:
    """A named evaluation set.

    Attributes:
        name: of the set.
        items: distinct items in reading order.
        repeated: number of rows that duplicate an earlier item.
        rejects: rows that could not be parsed, each with file, row and reason.
    """

    name: str
    items: tuple[Item, ...]
    repeated: int
    rejects: tuple[Rejected, ...]

    @property
    def not_understood(self) -> list[Rejected]:
        """Fields that were not understood, each with file, row and reason; the rest of their rows was."""
        return [Rejected(it.file, it.row, why) for it in self.items for why in it.not_understood]


def read_folder(folder: str, fields: Mapping[str, str] | None = None) -> list[EvaluationSet]:
    """Read every file of a folder (a glob, or any fsspec URL) as an evaluation set named by its path without suffixes.

    Files that differ only in a shard suffix such as ``-00000-of-00002`` form one set.

    Args:
        folder: of JSON Lines (``.gz``, ``.zst``), Parquet or text files.
        fields: role to field, or to several, comma-separated. Roles are question, choices, answer, id, and others (all
            further fields to search). Roles that are not given are detected; by default every other text is searched.

    Raises:
        StrideError: as read_set.
    """
    names = sorted({_SUFFIXES.sub("", file.name) for unit in plan([folder], 2**30) for file in unit.files})
    return [read_set(folder, name, fields, only=name) for name in names]


def read_set(
    path: str, name: str = "", fields: Mapping[str, str] | None = None, only: str | None = None
) -> EvaluationSet:
    """Read one evaluation set.

    Args:
        path: a file, or several by folder or glob.
        name: of the set; empty: the file name without suffixes.
        fields: as in read_folder.
        only: read only files whose name without suffixes is this.

    Raises:
        StrideError: nothing is there, no row is an item, or a role is unknown.
    """
    unknown = [role for role in fields or {} if role not in ROLES]
    if unknown:
        raise StrideError(
            f"{unknown[0]!r} is not a role of an evaluation set's fields; the roles are {_quoted_list(ROLES)}."
        )
    name = name or _SUFFIXES.sub("", os.path.basename(redact_url(path).rstrip("/")))
    counting = _Counting()
    items, rejects, count, missing = _read_items(path, name, fields or {}, only, counting)
    if counting.settle():
        items, rejects, count, missing = _read_items(path, name, fields or {}, only, counting)
    if items and missing:
        raise StrideError(f"The evaluation set {name} ({redact_url(path)}) lacks a given field: {missing[0]}.")
    if not items:
        why = f"; the first row that could not be parsed: {rejects[0].sentence()}" if rejects else ""
        raise StrideError(f"The evaluation set {name} ({redact_url(path)}) has no items{why}.")
    return EvaluationSet(name, tuple(items.values()), count - len(items) - len(rejects), tuple(rejects))


class _Counting:
    """Whether a set's answers count its choices from 0 or from 1: the usual number, unless the set shows otherwise.

    It counts from 0 if some answer is 0, and from 1 if none is 0 and some answer is the number of the choices (KMMLU).
    """

    def __init__(self) -> None:
        self.first: dict[str, int] = {}
        self.ends: dict[str, set[int]] = {}

    def first_number(self, field: str, value: Any, choices: Choices) -> int:
        """Return the number of the first choice, and learn from this row's answer; ``field`` holds the choices."""
        field = field.partition(",")[0]  # of a field each; some rows have fewer
        numbers = answer_numbers(value, choices)
        self.ends.setdefault(field, set()).update(
            end for end, number in ((0, 0), (1, len(choices.texts))) if number in numbers
        )
        return self.first.setdefault(field, first_number(field))

    def settle(self) -> bool:
        """Decide by all rows; returns whether this changes anything, so that the rows have to be read again."""
        usual = dict(self.first)
        self.first |= {field: 0 if 0 in ends else 1 for field, ends in self.ends.items() if ends}
        return self.first != usual


def _read_items(
    path: str, name: str, fields: Mapping[str, str], only: str | None, counting: _Counting
) -> tuple[dict[str, Item], list[Rejected], int, list[str]]:
    """Return the distinct items by key, the rejects, the number of rows, and a sentence per given field in no row."""
    items: dict[str, Item] = {}
    rejects: list[Rejected] = []
    count = 0
    missing, present = dict[str, str](), set[str]()
    for unit in plan([path], 2**30):
        if only is not None and all(_SUFFIXES.sub("", file.name) != only for file in unit.files):
            continue
        for row in rows(unit, None):
            count += 1
            found = row if isinstance(row, Rejected) else _parse_item(row, name, fields, counting, missing)
            present |= set(row.values) if isinstance(row, Row) else set()
            if only is not None and isinstance(row, Row) and _SUFFIXES.sub("", row.file) != only:
                count -= 1
            elif isinstance(found, Rejected):
                rejects.append(found)
            else:
                items.setdefault(found.key, found)
    return items, rejects, count, [why for field, why in missing.items() if field not in present]


def check_names(sets: Sequence[EvaluationSet]) -> None:
    """Check that the names of the sets are distinct.

    Raises:
        StrideError: naming a duplicate.
    """
    seen: set[str] = set()
    for each in sets:
        if each.name in seen:
            raise StrideError(f"Two evaluation sets are called {each.name!r}; rename one of them (NAME=PATH).")
        seen.add(each.name)


def _parse_item(
    row: Row, name: str, given: Mapping[str, str], counting: _Counting, missing: dict[str, str]
) -> Item | Rejected:
    """Return the row's item; ``missing`` gets a sentence for each given field that this row is the first to lack."""
    number, values = row.number(), {key: _decode_bytes(value) for key, value in row.values.items()}
    if not given:
        values = _unwrapped(values)
    notes: list[str] = []

    def note_missing(field: str, why: str) -> None:
        notes.append(why)
        missing.setdefault(field, escaped(why))

    shape = shape_of(values, {role: field for role, field in given.items() if role != "id"}, note_missing)
    asked, question = _question(values, shape, notes)
    choices, answer = _choices_and_answer(values, shape, notes, counting)
    if LONE_SURROGATE.search("".join((question, *choices, answer))):
        notes.append("it contains an invalid character (a lone surrogate)")
    question, answer, *texts = (LONE_SURROGATE.sub("\ufffd", text) for text in (question, answer, *choices))
    own = given.get("id") or _own_id(values)
    item_id = escaped(str(named(values[own]))) if has_content(values.get(own)) else row.document_id
    others, left_out = _other_texts(values, {**shape, "question": asked}, own, [question, *texts, answer])
    if not any(text.strip() for text in (question, answer, *texts, *(text for _, text in others))):
        names = _quoted_list(sorted(map(str, values)))
        why = f"none of its fields {names} holds a text; name the question's field, as in --fields question=FIELD"
        return Rejected(row.file, number, escaped(notes[0] if notes else f"{why},answer=FIELD"))
    content = json.dumps([name, question, texts, answer, *others], ensure_ascii=True)
    key = hashlib.sha256(content.encode()).hexdigest()[:16]
    line = -1 if number is None else number
    rest = (others, left_out, escaped(asked), tuple(map(escaped, notes)))
    return Item(key, name, item_id, row.file, line, question, tuple(texts), answer, *rest)


def _unwrapped(values: dict[str, Any]) -> dict[str, Any]:
    """Return the row within a sample log of the evaluation harness; and the choices that ARC has in its question."""
    if isinstance(values.get("doc"), dict):
        values = {**{key: values[key] for key in values if plain_name(key) in _IDS}, **values["doc"]}
    asked = values.get("question")
    if (
        isinstance(asked, dict)
        and isinstance(asked.get("stem"), str)
        and "choices" in asked
        and "choices" not in values
    ):
        values = {**asked, **values, "question": asked["stem"]}
        values.pop("stem")
    return values


def _own_id(values: Mapping[str, Any]) -> str:
    """Return the field of a row's own id; "" if it has none."""
    fields: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, str | int | float):
            fields.setdefault(plain_name(key), key)
    return next((fields[name] for name in _IDS if name in fields), "")


def _question(values: Mapping[str, Any], shape: Mapping[str, str], notes: list[str]) -> tuple[str, str]:
    """Return the question's field and text: the longest text elsewhere if that field has none."""
    field = shape.get("question", "")
    text = field_text(values, field) or ""
    if text.strip():
        return field, text
    used = {part for role in ("choices", "answer") for part in shape.get(role, "").split(",")}
    other = longest_field({name: value for name, value in values.items() if name not in used})
    if has_content(values.get(field)):
        notes.append(f"{field!r} holds {kind_of_value(values[field])}, not a text")
    return (other, field_text(values, other) or "") if other else (field, text or as_text(values.get(field)) or "")


def _choices_and_answer(
    values: Mapping[str, Any], shape: Mapping[str, str], notes: list[str], counting: _Counting
) -> tuple[tuple[str, ...], str]:
    """Return the texts of the choices that are not blank, and that of the correct answer."""

    def note(role: str) -> Callable[[str], None]:
        return lambda what: notes.append(f"{shape[role]!r} {what}")

    choices = Choices()
    if "choices" in shape:
        names = [shape["choices"]] if shape["choices"] in values else shape["choices"].split(",")
        choices = read_choices(
            [values[part] for part in names] if names[1:] else values[names[0]], names, note("choices")
        )
    held = values.get(shape.get("answer", ""))
    answer = "" if choices.right is None else choices.texts[choices.right]
    if has_content(held):
        if any(choices.texts):
            first = counting.first_number(shape["choices"], held, choices)
            answer = read_answer(held, choices, first, note("answer"))
        else:
            answer = free_answer(held, note("answer"))
    return tuple(text for text in choices.texts if text.strip()), answer


def _decode_bytes(value: Any) -> Any:
    """Decode a text that is stored as bytes; anything else is returned unchanged."""
    with contextlib.suppress(UnicodeDecodeError):
        return value.decode() if isinstance(value, bytes) else value
    return value


def field_name(path: str) -> str:
    """Return the name of the field that a text's path leads to: "meta.evidence.text" of "meta.evidence.0.text"."""
    return ".".join(part for part in path.split(".") if not part.isdigit())


def _other_texts(
    values: Mapping[str, Any], shape: Mapping[str, str], own: str, known: Sequence[str]
) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """Return (path, text) of texts that no known text contains, and the fields whose strings are left out."""
    used = {part for role, field in shape.items() if role != "others" for part in field.split(",")} | {own}
    chosen = shape["others"].split(",") if "others" in shape else None
    seen: set[str] = set()
    others, left_out = dict[str, str](), dict[str, None]()
    for field, value in values.items():
        for path, text in strings(field, value):
            if text in seen or any(text.strip() in each for each in known):
                continue
            seen.add(text)
            if (chosen is None or field in chosen or field in used) and is_readable(text):
                others[escaped(path)] = text
            elif field not in used:
                left_out[escaped(field_name(path))] = None
    return tuple(others.items()), tuple(left_out)


def _quoted_list(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"
