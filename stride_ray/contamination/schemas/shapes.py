"""Which field of an evaluation row is the question, the choices and the answer, by the names in use."""

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import takewhile
from typing import Any

from stride_ray.contamination.schemas.texts import as_text, has_wrong_reference, longest_text
from stride_ray.corpus.rows.row import has_content

# Known schemas, the most specific first; the first one whose fields all have content applies. Names are compared
# without case, spaces and marks: "correct_answer" is also GPQA's "Correct Answer".
_SHAPES: tuple[dict[str, str], ...] = (
    {"question": "ctx", "choices": "endings", "answer": "label"},  # HellaSwag
    {"question": "ctx", "choices": "endings"},
    {"question": "context,question", "choices": "answera,answerb,answerc", "answer": "label"},  # SocialIQA
    {"question": "context,question", "choices": "answer0,answer1,answer2,answer3", "answer": "label"},  # CosmosQA
    {"question": "question", "choices": "opa,opb,opc,opd", "answer": "cop"},  # MedMCQA
    {  # SciQ
        "question": "question",
        "choices": "correct_answer,distractor1,distractor2,distractor3",
        "answer": "correct_answer",
    },
    {"question": "premise", "choices": "choice1,choice2", "answer": "label"},  # COPA, where "question" is "cause"
    {"question": "premise", "choices": "choice1,choice2"},
    {"question": "question", "choices": "mc1_targets"},  # TruthfulQA, multiple choice
    {"question": "question", "choices": "mc2_targets"},
    {"question": "question", "answer": "best_answer"},  # TruthfulQA, generation
    {"question": "question", "answer": "answers"},  # SQuAD, TriviaQA, Natural Questions
    {"question": "question", "answer": "answer"},  # GSM8K
    {"question": "problem", "answer": "solution"},  # MATH
    {"question": "problem", "answer": "answer"},  # AIME
    {  # GPQA
        "question": "question",
        "choices": "correct_answer,incorrect_answer_1,incorrect_answer_2,incorrect_answer_3",
        "answer": "correct_answer",
    },
    {"question": "goal", "choices": "sol1,sol2", "answer": "label"},  # PIQA
    {"question": "goal", "choices": "sol1,sol2"},
    {"question": "sentence", "choices": "option1,option2", "answer": "answer"},  # WinoGrande
    {  # StoryCloze
        "question": "input_sentence_1,input_sentence_2,input_sentence_3,input_sentence_4",
        "choices": "sentence_quiz1,sentence_quiz2",
        "answer": "answer_right_ending",
    },
    {"question": "input_sentence_1,input_sentence_2,input_sentence_3,input_sentence_4"},
    {"question": "prompt", "answer": "canonical_solution"},  # HumanEval
    {"question": "complete_prompt", "answer": "canonical_solution"},  # BigCodeBench
    {"question": "prompt", "answer": "completion"},
    {"question": "prompt", "answer": "answer"},
    {"question": "prompt", "answer": "target"},
    {"question": "input", "choices": "target_scores"},  # BIG-bench
    {"question": "input", "answer": "target"},
    {"question": "instruction", "answer": "output"},
    {"question": "problem_statement", "answer": "patch"},  # SWE-bench
    {"question": "query", "answer": "answer"},
    {"question": "question"},
    {"question": "question_stem"},  # OpenBookQA on the hub
    {"question": "problem"},
    {"question": "prompt"},  # IFEval; MT-bench's is a list
    {"question": "query"},
    {"question": "question_content"},  # LiveCodeBench
    {"question": "question_text"},
    {"question": "code,input", "answer": "output"},  # CRUXEval
    {"question": "input", "answer": "output"},
    {"question": "input", "answer": "answers"},  # LongBench
    {"question": "input", "answer": "ideal"},  # OpenAI's evals
    {"question": "input", "answer": "references"},  # HELM
    {"question": "input", "choices": "choices"},
    {"question": "inputs", "answer": "targets"},
    {"question": "inputs_pretokenized", "answer": "targets_pretokenized"},
    {"question": "turns"},  # MT-bench
    {"question": "startphrase"},  # SWAG
    {"question": "premise"},  # with a hypothesis
    {"question": "sentence"},
    {"question": "text"},
    {"question": "content"},
    {"question": "messages"},
)
# Fields of all choices, in a row with a question; those of _POINTED count only beside one that says which is right.
_CHOICES = "choices options multiplechoicetargets answerchoices answeroptions".split()
_POINTED = "answers endings candidates alternatives".split()
# What comes before the labels of fields that hold a choice each: option_a, "Option 1", ending0, A.
_STEMS = "option choice op ending mcanswer alternative sentencequiz randomfifthsentencequiz".split()
_POINTED_STEMS = ["", "answer", "ans", "sol"]
# Fields that say which choice is right.
_POINTERS = (
    "multiplechoicescores answerkey answer answeridx answerindex correct correctanswer correctoption label gold target "
    "answerletter answertext answernum answernumber goldlabel goldindex goldidx correctindex correctidx correctlabel "
    "correctletter correctchoice correctansweridx correctanswerindex correctanswerid correctanswernum "
    "correctanswerkey cop ideal groundtruth targets targetspretokenized answerrightending".split()
)
# Fields of an answer without choices, for questions whose schema is not among the above.
_ANSWERS = (
    "bestanswer answers answer solution canonicalsolution target targets ideal groundtruth referenceanswer "
    "expectedanswer expectedanswers goldanswer goldanswers correctanswer finalanswer answersspans answernumber "
    "referencecode references".split()
)
_SPELLING = re.compile(r"[\s_#.-]+")
# First fields of a choice each that answers count from 1, as their names do; not so COPA's choice1 and PIQA's sol1.
_FROM_ONE = frozenset(f"{stem}1" for stem in (*_STEMS, *_POINTED_STEMS) if stem not in ("", "choice", "sol"))


def plain_name(field: str) -> str:
    """Return a field's name without case, spaces and marks: "correctanswer" for "Correct Answer"."""
    return _SPELLING.sub("", field).lower()


_PLAIN_SHAPES = [
    {role: [plain_name(part) for part in field.split(",")] for role, field in shape.items()} for shape in _SHAPES
]


def first_number(choices: str) -> int:
    """Return the number that answers usually have for the first choice in these fields: 0 or 1."""
    first = plain_name(choices.partition(",")[0])
    return int(first == "answera" or first in _FROM_ONE)


def shape_of(
    values: Mapping[str, Any], given: Mapping[str, str], note_missing: Callable[[str, str], None]
) -> dict[str, str]:
    """Return role to field(s): the given ones, else the first matching schema's, else the longest text's if any.

    Args:
        values: the row's values by field.
        given: role to field(s) as given for the whole set, without the id; fields that the row lacks are left out.
        note_missing: called for each given field that the row lacks, with its name and a sentence.
    """
    there = {key for key, value in values.items() if has_content(value) or isinstance(value, str)}
    named = dict[str, str]()
    for role, field in given.items():
        parts = [field] if field in values else field.split(",")
        for part in parts:
            if part not in values:
                names = ", ".join(map(repr, sorted(map(str, there)))) or "none"
                note_missing(part, f"it has no field {part!r}; its fields are {names}")
        if kept := ",".join(part for part in parts if part in (values if role == "others" else there)):
            named[role] = kept
    # Merged sets fill the columns that a row does not have with blanks.
    filled = _by_name(key for key in values if has_content(values[key]))
    shape = {"question": named["question"]} if "question" in named else _known_shape(filled)
    shape = shape or _known_shape(_by_name(there))
    if "choices" not in shape and (choices := _choices(values, filled)):
        pointer = next((filled[name] for name in _POINTERS if name in filled), shape.pop("answer", choices))
        shape |= {"choices": choices, **({"answer": pointer} if pointer != choices else {})}
    if "question" not in shape:
        used = {part for field in shape.values() for part in field.split(",")}
        longest = longest_field({field: value for field, value in values.items() if field not in used})
        shape |= {"question": longest} if longest else {}
    elif "answer" not in shape and "choices" not in shape:
        answer = next((filled[name] for name in _ANSWERS if name in filled), None)
        shape |= {"answer": answer} if answer else {}
    return {**shape, **named}


def _by_name(fields: Iterable[str]) -> dict[str, str]:
    """Return name (plain_name) to field; of several fields of one name, the one that is spelt so."""
    found: dict[str, str] = {}
    for field in fields:
        name = plain_name(field)
        found[name] = field if field == name else found.get(name, field)
    return found


def _known_shape(filled: Mapping[str, str]) -> dict[str, str]:
    """Return the first of _SHAPES whose fields all have content, as role to field(s); {} if there is none."""
    for shape in _PLAIN_SHAPES:
        fields = {role: [filled.get(part) for part in parts] for role, parts in shape.items()}
        if all(None not in parts for parts in fields.values()):
            return {role: ",".join(map(str, parts)) for role, parts in fields.items()}
    return {}


def _choices(values: Mapping[str, Any], filled: Mapping[str, str]) -> str:
    """Return the field that holds a row's choices, or the fields of a choice each; "" if there are none."""
    pointers = [filled[name] for name in _POINTERS if name in filled]
    labelled = any(_is_label(values[each]) for each in pointers)
    for name in (*_CHOICES, "references", *(_POINTED if labelled else ())):
        value = values[filled[name]] if name in filled else None
        if value is None or (name in _POINTED and not _is_list_of_texts(value)):
            continue
        if name != "references" or has_wrong_reference(value):
            return filled[name]
    every = _by_name(values)
    stems = [*_STEMS, *(_POINTED_STEMS if labelled else [])]
    found = next(filter(None, (_series(values, every, stem) for stem in stems)), "")
    if not found and any(name in every for name in _POINTERS):  # A to D, where a test split hides the answers
        letters = _series(values, every, "")
        found = letters if not pointers or letters.count(",") > 2 else ""
    return found


def _is_label(value: Any) -> bool:
    """Whether a value may name a choice by its label or number: 2, "B", "(B)", ["A", "C"]."""
    if isinstance(value, list):
        return bool(value) and all(map(_is_label, value))
    return isinstance(value, int | float) or (isinstance(value, str) and len(plain_name(value).strip("()[]:*")) < 3)


def _series(values: Mapping[str, Any], fields: Mapping[str, str], stem: str) -> str:
    """Return the fields whose names are this stem with a, b, c …, or 0 or 1 and up, if two or more have content."""
    for labels in ("abcdefghijklmnop", *(() if not stem else ("0123456789", "123456789"))):
        names = list(takewhile(fields.__contains__, (stem + label for label in labels)))
        found = [fields[name] for name in names]
        if sum(as_text(values[field]) not in (None, "") for field in found) > 1:
            return ",".join(found)
    return ""


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(each, str) for each in value)


def longest_field(values: Mapping[str, Any]) -> str:
    """Return the field with the longest readable text, preferring plain strings; "" if there is none."""
    texts = {field: len(longest_text(value)) for field, value in values.items()}
    plain = [field for field in texts if texts[field] and isinstance(values[field], str)]
    longest = max(sorted(plain or texts), key=texts.__getitem__, default="")
    return longest if longest and texts[longest] else ""
