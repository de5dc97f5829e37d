"""Evaluation sets: items with a question, choices and an answer, from JSON Lines or Parquet in common schemas.

Detected schemas: GSM8K (question, answer), ARC (question, choices {text, label}, answerKey), MMLU (question, choices,
answer as index or letter), HellaSwag (ctx, endings, label), TruthfulQA (question, best_answer; mc1_targets), PIQA-like
(goal, sol1, sol2), prompt with completion or target, and plain text, among others (_SHAPES). Any other schema can be
read by naming its fields; otherwise a row's longest text is the question. The row's other texts (RACE's article, MBPP's
code, nested or in lists) are kept beside them.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stride_ray.corpus.readers import Rejected, Row, rows
from stride_ray.corpus.rows.row import LONE_SURROGATE, escaped, has_content, named
from stride_ray.corpus.splits import plan
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.urls import redact_url

ROLES = ("question", "choices", "answer", "id", "others")
# Known schemas, the most specific first; the first one whose fields are all present, in any case, applies.
_SHAPES: tuple[dict[str, str], ...] = (
    {"question": "ctx", "choices": "endings", "answer": "label"},  # HellaSwag
    {"question": "question", "choices": "choices", "answer": "answerKey"},  # ARC, OpenBookQA, CommonsenseQA
    {"question": "question_stem", "choices": "choices", "answer": "answerKey"},  # OpenBookQA on the hub
    {"question": "question", "choices": "choices", "answer": "answer"},  # MMLU
    {"question": "question", "choices": "options", "answer": "answer"},  # MMLU-Pro, AQuA
    {"question": "question", "choices": "mc1_targets"},  # TruthfulQA, multiple choice
    {"question": "question", "answer": "best_answer"},  # TruthfulQA, generation
    {"question": "question", "answer": "answers"},  # SQuAD, TriviaQA, Natural Questions
    {"question": "question", "answer": "answer"},  # GSM8K
    {"question": "problem", "answer": "solution"},  # MATH
    {"question": "problem", "answer": "answer"},  # AIME
    {  # GPQA
        "question": "question",
        "choices": "correct answer,incorrect answer 1,incorrect answer 2,incorrect answer 3",
        "answer": "correct answer",
    },
    {"question": "goal", "choices": "sol1,sol2", "answer": "label"},  # PIQA
    {"question": "sentence", "choices": "option1,option2", "answer": "answer"},  # WinoGrande
    {  # StoryCloze
        "question": "input_sentence_1,input_sentence_2,input_sentence_3,input_sentence_4",
        "choices": "sentence_quiz1,sentence_quiz2",
        "answer": "answer_right_ending",
    },
    {"question": "prompt", "answer": "canonical_solution"},  # HumanEval
    {"question": "complete_prompt", "answer": "canonical_solution"},  # BigCodeBench
    {"question": "prompt", "answer": "completion"},
    {"question": "prompt", "answer": "answer"},
    {"question": "prompt", "answer": "target"},
    {"question": "input", "answer": "target"},  # BIG-bench
    {"question": "instruction", "answer": "output"},
    {"question": "problem_statement", "answer": "patch"},  # SWE-bench
    {"question": "query", "answer": "answer"},
    {"question": "question"},
    {"question": "problem"},
    {"question": "prompt"},  # IFEval; MT-bench's is a list
    {"question": "query"},
    {"question": "question_content"},  # LiveCodeBench
    {"question": "premise"},  # with a hypothesis
    {"question": "sentence"},
    {"question": "text"},
    {"question": "content"},
)
_FROM_ONE = ("option1,", "sentence_quiz1,")  # choices that answers count from 1
_IDS = ("id", "item_id", "query_id", "question_id", "task_id", "ind", "uid", "doc_id")
_SPOKEN = {True: ("true", "yes"), False: ("false", "no")}
# Not a text: an identifier, link or number.
_TOKEN = re.compile(r"\s*[!-~]*\s*")
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
        left_out: names of fields with strings that are not searched: identifiers and links, or not among those named.
        asked: name of the field (or of several, with commas) that holds the question.
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


def read_folder(folder: str, fields: Mapping[str, str] | None = None) -> list[EvaluationSet]:
    """Read every file of a folder (a glob, or any fsspec URL) as an evaluation set named by its path without suffixes.

    Files that differ only in a shard suffix such as ``-00000-of-00002`` form one set.

    Args:
        folder: of JSON Lines (``.gz``, ``.zst``), Parquet or text files.
        fields: role (question, choices, answer, id; others: all others to search) to field, or to several with commas
            between them; detected where not given, with every other text among the others.

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
            f"{unknown[0]!r} is not a role of an evaluation set's fields; the roles are {_listed(ROLES)}."
        )
    name = name or _SUFFIXES.sub("", os.path.basename(redact_url(path).rstrip("/")))
    items, rejects, count = _read(path, name, fields or {}, only)
    if not items and not fields:  # fields of known names that hold something else
        items, rejects, count = _read(path, name, {}, only, ())
    if not items:
        why = f"; the first row that could not be parsed: {rejects[0].sentence()}" if rejects else ""
        raise StrideError(f"The evaluation set {name} ({redact_url(path)}) has no items{why}.")
    return EvaluationSet(name, tuple(items.values()), count - len(items) - len(rejects), tuple(rejects))


def _read(
    path: str, name: str, fields: Mapping[str, str], only: str | None, shapes: Sequence[dict[str, str]] = _SHAPES
) -> tuple[dict[str, Item], list[Rejected], int]:
    """Return the distinct items by key, the rejects and the number of rows."""
    items: dict[str, Item] = {}
    rejects: list[Rejected] = []
    count = 0
    for unit in plan([path], 2**30):
        if only is not None and all(_SUFFIXES.sub("", file.name) != only for file in unit.files):
            continue
        for row in rows(unit, None):
            count += 1
            found = row if isinstance(row, Rejected) else _item(row, name, fields, shapes)
            if only is not None and isinstance(row, Row) and _SUFFIXES.sub("", row.file) != only:
                count -= 1
            elif isinstance(found, Rejected):
                rejects.append(found)
            else:
                items.setdefault(found.key, found)
    return items, rejects, count


def check_names(sets: Sequence[EvaluationSet]) -> None:
    """Check that the names of the sets are distinct.

    Raises:
        StrideError: naming a duplicate.
    """
    seen: set[str] = set()
    for each in sets:
        if each.name in seen:
            raise StrideError(f"Two evaluation sets are called {each.name!r}; give one another name (NAME=PATH).")
        seen.add(each.name)


class _InvalidRowError(Exception):
    """The reason why a row is not an item; turned into a reject."""


def _item(row: Row, name: str, given: Mapping[str, str], shapes: Sequence[dict[str, str]]) -> Item | Rejected:
    number, values = row.number(), row.values
    if not given and isinstance(values.get("doc"), dict):  # a sample log of the evaluation harness
        values = {**values["doc"], **{key: values[key] for key in _IDS if key in values and key not in values["doc"]}}
    try:
        shape = _shape(values, given, shapes)
        question = _text(values, shape["question"])
        choices, labels = _choices(values, shape["choices"]) if "choices" in shape else ((), ())
        answer = _answer(values, shape, choices, labels)
        if not question.strip() and not answer.strip():
            raise _InvalidRowError(f"{shape['question']!r} is empty")
    except _InvalidRowError as error:
        return Rejected(row.file, number, str(error))
    own = given.get("id") or next((key for key in _IDS if isinstance(values.get(key), str | int | float)), "")
    item_id = escaped(str(named(values[own]))) if has_content(values.get(own)) else row.document_id
    others, left_out = _others(values, shape, own, [question, *choices, answer])
    content = json.dumps([name, question, choices, answer, *others], ensure_ascii=True)
    key = hashlib.sha256(content.encode()).hexdigest()[:16]
    line = -1 if number is None else number
    asked = escaped(shape["question"])
    return Item(key, name, item_id, row.file, line, question, choices, answer, others, left_out, asked)


def field_name(path: str) -> str:
    """Return the name of the field that a text's path leads to: "meta.evidence.text" of "meta.evidence.0.text"."""
    return ".".join(part for part in path.split(".") if not part.isdigit())


def _others(
    values: Mapping[str, Any], shape: Mapping[str, str], own: str, known: Sequence[str]
) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """Return the texts that none of the known ones holds, with their paths; and the fields of strings left out."""
    used = {part for role, field in shape.items() if role != "others" for part in field.split(",")} | {own}
    chosen = shape["others"].split(",") if "others" in shape else None
    seen: set[str] = set()
    others, left_out = dict[str, str](), dict[str, None]()
    for field, value in values.items():
        for path, text in strings(field, value):
            if text in seen or any(text.strip() in each for each in known):
                continue
            seen.add(text)
            if (chosen is None or field in chosen or field in used) and _readable(text):
                others[escaped(path)] = text
            elif field not in used:
                left_out[escaped(field_name(path))] = None
    return tuple(others.items()), tuple(left_out)


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


def _shape(values: Mapping[str, Any], given: Mapping[str, str], shapes: Sequence[dict[str, str]]) -> dict[str, str]:
    """Return role to field(s): the given ones, else the first matching schema's, else the longest text's."""
    there = {key for key, value in values.items() if value is not None}
    named = {role: field for role, field in given.items() if role != "id"}
    for role, field in named.items():
        missing = [part for part in field.split(",") if part not in (values if role == "others" else there)]
        if missing:
            raise _InvalidRowError(f"it has no field {missing[0]!r}; its fields are {_listed(sorted(there))}")
    if "question" in named:
        return named
    spelt = {key.lower(): key for key in there} | {key: key for key in there}
    for shape in shapes:
        fields = {role: [spelt.get(part) for part in field.split(",")] for role, field in shape.items()}
        if all(None not in parts for parts in fields.values()):
            return {**{role: ",".join(map(str, parts)) for role, parts in fields.items()}, **named}
    texts = {field: max(map(len, _readable_texts(values[field])), default=0) for field in there}
    plain = [field for field in texts if texts[field] and isinstance(values[field], str)]
    longest = max(sorted(plain or texts), key=texts.__getitem__, default="")
    if longest and texts[longest]:
        return {"question": longest, **named}
    raise _InvalidRowError(
        f"none of its fields {_listed(sorted(there))} holds a text; say which holds the question, as in "
        "--fields question=FIELD,answer=FIELD"
    )


def _readable_texts(value: Any) -> list[str]:  # no identifiers, links or numbers
    return [text for _, text in strings("", value) if _readable(text)]


def _readable(text: str) -> bool:
    return not _TOKEN.fullmatch(text) and not LONE_SURROGATE.search(text)


def _text(values: Mapping[str, Any], field: str) -> str:
    if field not in values:  # several
        return "\n".join(_text(values, part) for part in field.split(","))
    value = values[field]
    if isinstance(value, dict):  # MMLU-like {"stem": …}, TriviaQA's {"value": …}
        value = next((value[key] for key in ("stem", "text", "value") if isinstance(value.get(key), str)), value)
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):  # the turns of a dialogue
        value = "\n".join(value)
    if isinstance(value, dict | list):  # XNLI's premise in all languages: one of them; the rest is with the others
        value = max(_readable_texts(value), key=len, default=value)
    if not isinstance(value, str):
        raise _InvalidRowError(f"{field!r} holds {type(value).__name__}, not a text")
    return _whole(value, field)


def _whole(value: str, field: str) -> str:
    if LONE_SURROGATE.search(value):
        raise _InvalidRowError(f"{field!r} contains an invalid character (a lone surrogate)")
    return value


def _choices(values: Mapping[str, Any], field: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the choices' texts and their labels (empty if there are none)."""
    value = values[field] if "," not in field else [values[part] for part in field.split(",")]
    labels: Sequence[Any] = ()
    if isinstance(value, dict) and value and all(isinstance(each, str) for each in value.values()):
        labels, value = list(value), list(value.values())  # MedQA's {"A": …, "B": …}
    elif isinstance(value, dict):
        labels = value.get("label") or value.get("labels") or ()
        value = value.get("text", value.get("choices"))
    elif isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        labels = [each.get("label", each.get("key", "")) for each in value]
        value = [each.get("text", each.get("value")) for each in value]
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise _InvalidRowError(f"{field!r} does not hold a list of texts")
    if labels and not (isinstance(labels, list) and len(labels) == len(value)):
        raise _InvalidRowError(f"{field!r} does not hold a label for each of its {len(value)} choices")
    return tuple(_whole(each, field) for each in value), tuple(str(label) for label in labels)


def _answer(
    values: Mapping[str, Any], shape: Mapping[str, str], choices: tuple[str, ...], labels: tuple[str, ...]
) -> str:
    """Return the correct answer's text: the field's own, or the choice that it points to."""
    if "answer" not in shape:
        if shape.get("choices", "").endswith("_targets") and "1" in labels:  # TruthfulQA's: 1 for a correct choice
            return choices[labels.index("1")]
        return ""
    field = shape["answer"]
    value = values[field]
    if isinstance(value, dict):  # SQuAD's {"text": […]}, TriviaQA's {"value": …}
        value = value.get("value", value.get("text", value))
    if isinstance(value, list):
        value = value[0] if value else ""  # SQuAD 2 has questions without an answer
        if isinstance(value, dict):
            value = value.get("text", value.get("value"))
        if not isinstance(value, str):
            raise _InvalidRowError(f"{field!r} does not hold a list of texts")
    if not choices:
        if isinstance(value, bool):  # BoolQ: the question stands alone
            return ""
        if not isinstance(value, str | int | float) or value != value:
            raise _InvalidRowError(f"{field!r} holds {type(value).__name__ if value == value else 'NaN'}, not a text")
        return _whole(str(value), field)
    place = _place(value, choices, labels, int(shape["choices"].startswith(_FROM_ONE)))
    if place is None:
        if value in ("", -1, "-1"):  # test splits hide their answers
            return ""
        raise _InvalidRowError(f"{field!r} is {value!r:.80}, which names none of the {len(choices)} choices")
    return choices[place]


def _place(value: Any, choices: tuple[str, ...], labels: tuple[str, ...], first: int) -> int | None:
    """Resolve an answer to a choice: by label, text, number counted from ``first`` (WinoGrande: 1), or letter."""
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    word = str(value).strip()
    if word and word in labels:
        return labels.index(word)
    if value in choices:
        return choices.index(value)
    if isinstance(value, bool):
        spoken = [choice.strip().lower() for choice in choices]
        return next((spoken.index(each) for each in _SPOKEN[value] if each in spoken), None)
    # Python makes no number of 5,000 digits.
    if len(word) < 20 and (isinstance(value, int) or (isinstance(value, str) and word.isdecimal())):
        place = int(word) - first
        return place if 0 <= place < len(choices) else None
    if len(word) == 1 and word.isascii() and word.isalpha() and ord(word.upper()) - ord("A") < len(choices):
        return ord(word.upper()) - ord("A")
    return None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"
