"""Which field of an evaluation row is the question, the choices and the answer, by the names in use."""

from collections.abc import Callable, Mapping
from typing import Any

from stride_ray.contamination.schemas.texts import longest_text
from stride_ray.corpus.rows.row import has_content

_ANSWERS = "answerkey answer answer_idx answer_index correct correct_answer correct_option label gold target".split()
# Known schemas, the most specific first; the first one whose fields are all present, in any case, applies.
_SHAPES: tuple[dict[str, str], ...] = (
    {"question": "ctx", "choices": "endings", "answer": "label"},  # HellaSwag
    {"question": "ctx", "choices": "endings"},
    {"question": "question_stem", "choices": "choices", "answer": "answerKey"},  # OpenBookQA on the hub
    {"question": "question_stem", "choices": "choices"},
    # ARC, CommonsenseQA, MMLU, MMLU-Pro, AQuA, AGIEval, MathQA, LogiQA
    *(
        {"question": question, "choices": choices, "answer": answer}
        for question in ("question", "problem", "query")
        for choices in ("choices", "options")
        for answer in _ANSWERS
    ),
    *({"question": q, "choices": c} for q in ("question", "problem", "query") for c in ("choices", "options")),
    {"question": "question", "choices": "answers", "answer": "label"},  # ReClor
    {"question": "question", "choices": "a,b,c,d", "answer": "answer"},  # C-Eval, CMMLU
    {"question": "context,question", "choices": "answera,answerb,answerc", "answer": "label"},  # SocialIQA
    {"question": "context,question", "choices": "answer0,answer1,answer2,answer3", "answer": "label"},  # CosmosQA
    {"question": "question", "choices": "opa,opb,opc,opd", "answer": "cop"},  # MedMCQA
    {  # SciQ
        "question": "question",
        "choices": "correct_answer,distractor1,distractor2,distractor3",
        "answer": "correct_answer",
    },
    {"question": "premise", "choices": "choice1,choice2", "answer": "label"},  # COPA
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
    {"question": "input", "choices": "target_scores"},  # BIG-bench
    {"question": "input", "answer": "target"},
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
_FROM_ONE = ("option1,", "sentence_quiz1,", "answera,")  # choices that answers count from 1


def first_number(choices: str) -> int:
    """Return the number that answers use for the first choice in these fields: 0 or 1."""
    return int(choices.lower().startswith(_FROM_ONE))


def shape_of(values: Mapping[str, Any], given: Mapping[str, str], note: Callable[[str], None]) -> dict[str, str]:
    """Return role to field(s): the given ones, else the first matching schema's, else the longest text's if any.

    Args:
        values: the row's values by field.
        given: role to field(s) as given for the whole set, without the id; fields that the row lacks are left out.
        note: called with a sentence for each field that the row lacks.
    """
    there = {key for key, value in values.items() if has_content(value) or isinstance(value, str)}
    named = dict[str, str]()
    for role, field in given.items():
        parts = [field] if field in values else field.split(",")
        for part in parts:
            if part not in values:
                names = ", ".join(map(repr, sorted(map(str, there)))) or "none"
                note(f"it has no field {part!r}; its fields are {names}")
        if kept := ",".join(part for part in parts if part in (values if role == "others" else there)):
            named[role] = kept
    if "question" in named:
        return named
    spelt = {key.lower(): key for key in there} | {key: key for key in there}
    for shape in _SHAPES:
        fields = {role: [spelt.get(part) for part in field.split(",")] for role, field in shape.items()}
        if all(None not in parts for parts in fields.values()):
            return {**{role: ",".join(map(str, parts)) for role, parts in fields.items()}, **named}
    return {**({"question": longest} if (longest := longest_field(values)) else {}), **named}


def longest_field(values: Mapping[str, Any]) -> str:
    """Return the field with the longest readable text, preferring plain strings; "" if there is none."""
    texts = {field: len(longest_text(value)) for field, value in values.items()}
    plain = [field for field in texts if texts[field] and isinstance(values[field], str)]
    longest = max(sorted(plain or texts), key=texts.__getitem__, default="")
    return longest if longest and texts[longest] else ""
