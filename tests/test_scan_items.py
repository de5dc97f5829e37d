"""Evaluation sets: every shape in use, what is not understood, repeated items, folders; shared words."""

import gzip
import json
import time
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from stride_ray.contamination.items import Item, check_names, read_folder, read_set
from stride_ray.contamination.lexical.ngrams import fields_of, searched_fields
from stride_ray.contamination.lexical.words import Numbering, chunks, joined, normalised, passages, split
from stride_ray.runtime.errors import StrideError

SHAPES = {
    "gsm8k": ({"question": "How many?", "answer": "3 + 4 = 7\n#### 7"}, "How many?", (), "3 + 4 = 7\n#### 7"),
    "arc": (
        {"id": "M1", "question": "Why?", "choices": {"text": ["a1", "b2"], "label": ["A", "B"]}, "answerKey": "B"},
        "Why?",
        ("a1", "b2"),
        "b2",
    ),
    "arc_numbers": (
        {"question": "Why?", "choices": {"text": ["a1", "b2"], "label": ["1", "2"]}, "answerKey": "1"},
        "Why?",
        ("a1", "b2"),
        "a1",
    ),
    "openbook": (
        {"question": {"stem": "Why?"}, "choices": [{"text": "x", "label": "A"}], "answerKey": "A"},
        "Why?",
        ("x",),
        "x",
    ),
    "mmlu": ({"question": "Which?", "choices": ["p", "q", "r"], "answer": 2}, "Which?", ("p", "q", "r"), "r"),
    "mmlu_letter": ({"question": "Which?", "choices": ["p", "q", "r"], "answer": "B"}, "Which?", ("p", "q", "r"), "q"),
    "hellaswag": ({"ctx": "He", "endings": ["runs", "sits"], "label": "1"}, "He", ("runs", "sits"), "sits"),
    "hellaswag_hidden": ({"ctx": "He", "endings": ["runs", "sits"], "label": ""}, "He", ("runs", "sits"), ""),
    "truthful": ({"question": "Is it?", "best_answer": "No."}, "Is it?", (), "No."),
    "truthful_choices": (
        {"question": "Is it?", "mc1_targets": {"choices": ["Yes.", "No."], "labels": [0, 1]}},
        "Is it?",
        ("Yes.", "No."),
        "No.",
    ),
    "squad": ({"question": "Who?", "answers": {"text": ["Ada"], "answer_start": [3]}}, "Who?", (), "Ada"),
    "squad_unanswerable": ({"question": "Who?", "answers": {"text": [], "answer_start": []}}, "Who?", (), ""),
    "answer_records": ({"question": "Who?", "answers": [{"text": "Ada"}, {"text": "A"}]}, "Who?", (), "Ada"),
    "piqa": ({"goal": "Boil", "sol1": "heat", "sol2": "cool", "label": 0}, "Boil", ("heat", "cool"), "heat"),
    "winogrande": (
        {"sentence": "The _ fell", "option1": "cup", "option2": "cat", "answer": "2"},
        "The _ fell",
        ("cup", "cat"),
        "cat",
    ),
    "winogrande_one": (
        {"sentence": "The _ fell", "option1": "cup", "option2": "cat", "answer": "1"},
        "The _ fell",
        ("cup", "cat"),
        "cup",
    ),
    "text": ({"text": "only a text"}, "only a text", (), ""),
    "boolq": ({"question": "is it so", "passage": "It is.", "answer": True}, "is it so", (), ""),
    "bool_choices": (
        {"question": "Is it?", "choices": ["False", "True"], "answer": True},
        "Is it?",
        ("False", "True"),
        "True",
    ),
    "float_label": ({"ctx": "He", "endings": ["runs", "sits"], "label": 1.0}, "He", ("runs", "sits"), "sits"),
    "gpqa": (
        {
            "Question": "Why?",
            "Correct Answer": "a1",
            "Incorrect Answer 1": "b2",
            "Incorrect Answer 2": "c3",
            "Incorrect Answer 3": "d4",
        },
        "Why?",
        ("a1", "b2", "c3", "d4"),
        "a1",
    ),
    "medqa": (
        {"question": "Why?", "options": {"A": "x", "B": "y"}, "answer": "y", "answer_idx": "B"},
        "Why?",
        ("x", "y"),
        "y",
    ),
    "aime": ({"Problem": "How many?", "Answer": 204}, "How many?", (), "204"),
    "mt_bench": ({"prompt": ["Write.", "Rewrite."], "category": "x"}, "Write.\nRewrite.", (), ""),
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_read_as_it_is(name, tmp_path):
    row, question, choices, answer = SHAPES[name]
    found = read_set(write(tmp_path / f"{name}.jsonl", [row]))
    (item,) = found.items
    assert (found.name, item.question, item.choices, item.answer) == (name, question, choices, answer)
    assert item.item_id == row.get("id", f"{name}.jsonl#0")


def test_any_other_shape_by_naming_its_fields(tmp_path):
    path = write(tmp_path / "own.jsonl", [{"q": "Why?", "a1": "x", "a2": "y", "gold": 1, "nr": 7}])
    (item,) = read_set(path, fields={"question": "q", "choices": "a1,a2", "answer": "gold", "id": "nr"}).items
    assert (item.question, item.choices, item.answer, item.item_id) == ("Why?", ("x", "y"), "y", "7")
    textless = write(tmp_path / "none.jsonl", [{"q": 3, "nr": "a7"}])
    with pytest.raises(StrideError, match=r"none\.jsonl, row 1: none of its fields 'nr', 'q' holds a text; .*=FIELD"):
        read_set(textless)
    with pytest.raises(StrideError, match="it has no field 'ask'; its fields are 'a1', 'a2'"):
        read_set(path, fields={"question": "ask"})
    with pytest.raises(StrideError, match="'prompt' is not a role"):
        read_set(path, fields={"prompt": "q"})


# Rows of public sets that have no shape of their own, or an odd one; the question, choices, answer and other texts.
ODD = {
    "openbookqa": (
        {
            "id": "7",
            "question_stem": "Why so?",
            "choices": {"text": ["a b", "c d"], "label": ["A", "B"]},
            "answerKey": "B",
        },
        ("Why so?", ("a b", "c d"), "c d", {}),
    ),
    "coqa": (
        {
            "story": "It was long ago.",
            "questions": ["Was it?", "Why so?"],
            "answers": {"input_text": ["so so", "yes, yes"]},
        },
        (
            "It was long ago.",
            (),
            "",
            {
                "questions.0": "Was it?",
                "questions.1": "Why so?",
                "answers.input_text.0": "so so",
                "answers.input_text.1": "yes, yes",
            },
        ),
    ),
    "bigcodebench": (
        {
            "complete_prompt": "def f(a):",
            "instruct_prompt": "Write f of a.",
            "canonical_solution": " return a",
            "task_id": "B/0",
        },
        ("def f(a):", (), " return a", {"instruct_prompt": "Write f of a."}),
    ),
    "medqa": (
        {
            "question": "Why so?",
            "options": [{"key": "A", "value": "a b"}, {"key": "E", "value": "c d"}],
            "answer_idx": "E",
            "answer": "c d",
        },
        ("Why so?", ("a b", "c d"), "c d", {}),
    ),
    "xnli": (
        {
            "premise": {"en": "It was so.", "de": "Es war einmal so."},
            "hypothesis": {"language": ["en"], "translation": ["Was it?"]},
            "label": 0,
        },
        ("Es war einmal so.", (), "", {"premise.en": "It was so.", "hypothesis.translation.0": "Was it?"}),
    ),
    "code contests": (
        {
            "name": "1_A. Sum",
            "description": "Add the two.",
            "solutions": {"solution": ["print(a + b) # as it was asked for"]},
        },
        ("Add the two.", (), "", {"name": "1_A. Sum", "solutions.solution.0": "print(a + b) # as it was asked for"}),
    ),
    "storycloze": (
        {
            **{f"input_sentence_{i}": f"So it was {i}." for i in (1, 2, 3, 4)},
            "sentence_quiz1": "a b",
            "sentence_quiz2": "c d",
            "answer_right_ending": 1,
        },
        ("So it was 1.\nSo it was 2.\nSo it was 3.\nSo it was 4.", ("a b", "c d"), "a b", {}),
    ),
    "sample log": (
        {"doc_id": 3, "doc": {"question": "Why so?", "answer": "so so"}, "arguments": [["Many shots. Why so?", ""]]},
        ("Why so?", (), "so so", {}),
    ),
    "unknown": (
        {"nr": 3, "hint": "Be short.", "ask": "Why was it so?", "key": "a1", "more": [{"notes": "as it was"}]},
        ("Why was it so?", (), "", {"hint": "Be short.", "more.0.notes": "as it was"}),
    ),
    "known names that hold something else": (
        {"question": "Why was it so?", "choices": [[1]], "answer": {"no": 1}, "note": "a b"},
        ("Why was it so?", (), "", {"note": "a b"}),
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_sets_of_any_shape_are_searched_for_all_their_texts(name, tmp_path):
    row, (question, choices, answer, others) = ODD[name]
    (item,) = read_set(write(tmp_path / "set.jsonl", [row])).items
    assert (item.question, item.choices, item.answer, dict(item.others)) == (question, choices, answer, others)
    assert item.asked.split(",")[0] in {**row, **row.get("doc", {})}
    assert item.item_id == str(row.get("id", row.get("task_id", row.get("doc_id", "set.jsonl#0"))))


OTHERS = {
    "mbpp": (
        {
            "task_id": 2,
            "text": "Do so.",
            "code": "def f(a):\n  return a",
            "test_list": ["assert f(1) == 1", "f(2) == 2"],
        },
        (("code", "def f(a):\n  return a"), ("test_list.0", "assert f(1) == 1"), ("test_list.1", "f(2) == 2")),
        (),
    ),
    "race": (
        {
            "article": "It was so.",
            "question": "Was it?",
            "options": ["it was", "no, no"],
            "answer": "A",
            "example_id": "h1",
        },
        (("article", "It was so."),),
        ("example_id",),
    ),
    "nested": (
        {"question": "Was it?", "answer": "no", "meta": {"from": "http://a.b/c_d", "seen": [{"text": "It was so."}]}},
        (("meta.seen.0.text", "It was so."),),
        ("meta.from",),
    ),
    "contained": ({"ctx": "It was so", "ctx_a": "It was", "endings": ["x y", "z"], "label": 0}, (), ()),
    "second answer": (
        {"question": "Was it?", "answers": {"text": ["no", "not so"]}},
        (("answers.text.1", "not so"),),
        (),
    ),
    "surrogate": ({"question": "Was it?", "note": "half a \ud800"}, (), ("note",)),
    "without spaces": ({"question": "Was it?", "note": "\u6771\u4eac"}, (("note", "\u6771\u4eac"),), ()),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_texts_are_kept_and_what_is_not_searched_is_named(name, tmp_path):
    row, others, left_out = OTHERS[name]
    (item,) = read_set(write(tmp_path / "set.jsonl", [row])).items
    assert (item.others, item.left_out) == (others, left_out)


@pytest.mark.parametrize(
    ("own", "read"), [(7.0, "7"), (7, "7"), ("a", "a"), (None, "set.jsonl#0"), (float("nan"), "set.jsonl#0")]
)
def test_ids_are_text_and_what_is_not_filled_is_none(own, read, tmp_path):
    for key, fields in (("id", None), ("my", {"id": "my"})):
        path = write(tmp_path / "set.jsonl", [{"question": "Was it so?", "answer": "yes", key: own}])
        assert read_set(path, fields=fields or {}).items[0].item_id == read


def test_a_field_that_only_some_rows_lack_is_named_for_these(tmp_path):
    rows = [{"q": "Why was it so?", "gold": "it was"}, {"text": "And why was this so?", "gold": float("nan")}]
    found = read_set(write(tmp_path / "set.jsonl", rows), fields={"question": "q", "answer": "gold"})
    assert [(item.question, item.answer) for item in found.items] == [
        ("Why was it so?", "it was"),
        ("And why was this so?", ""),
    ]
    (told,) = found.not_understood
    assert told.sentence() == "set.jsonl, row 2: it has no field 'q'; its fields are 'text'"


def test_the_others_to_search_can_be_named(tmp_path):
    row = {"question": "Was it?", "article": "It was so.", "notice": "All rights are reserved."}
    path = write(tmp_path / "set.jsonl", [row])
    (item,) = read_set(path, fields={"others": "article"}).items
    assert (item.others, item.left_out) == ((("article", "It was so."),), ("notice",))
    assert item.key != read_set(path).items[0].key
    with pytest.raises(StrideError, match="it has no field 'artcle'"):
        read_set(path, fields={"others": "artcle"})


def test_fields_searched_and_left_out_for_their_length():
    long = "as many words as make a field"
    others = (("code", long), ("tests.0", "one two three"), ("tests.1", "four five six"), ("topic", "an art"))
    item = Item("k", "s", "i", "f", 0, "A short one?", ("yes", "no"), "yes", (*others, ("question", long)))
    fields = {field.name: len(field.words.words) for field in fields_of(item, 13, 6)}
    assert fields == {"code": 7, "other question": 7, "tests": 6}
    assert searched_fields(item, 13, 6) == ({"code", "question", "tests"}, {"choices", "topic"})
    joined = Item("k", "s", "i", "f", 0, "Is this a short one?", (), "It is", ())
    assert searched_fields(joined, 13, 6) == ({"question", "answer"}, set())


NESTED = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "B", "(B)", "a b", "\ud800", "[1", "{}"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["A", "text", "label", "index", "so it is"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(NESTED, NESTED, NESTED)
@example(None, {"text": [], "label": False}, None)
@example("so it is", {"text": ["a b", "c"], "label": 0}, 1)
def test_no_row_with_a_text_is_rejected_whatever_its_fields_hold(tmp_path, question, choices, answer):
    names = ("question", "choices", "answer")
    row = {**dict(zip(names, (question, choices, answer), strict=True)), "note": "It was so."}
    found = read_set(write(tmp_path / "set.jsonl", [row]))
    assert (len(found.items), found.rejects) == (1, ())
    (item,) = found.items
    texts = [item.question, *item.choices, item.answer, *(text for _, text in item.others)]
    assert any("It was so." in text for text in texts)


def test_texts_that_are_stored_as_bytes_are_texts(tmp_path):
    rows = [{"question": b"Why was it so?", "choices": [None, "a b", "c d"], "answer": 2.0, "image": b"\xff\xd8"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set.parquet")
    (item,) = read_set(str(tmp_path / "set.parquet")).items
    assert (item.question, item.choices, item.answer) == ("Why was it so?", ("a b", "c d"), "c d")


ASKED = "Which one of them was it?"
LETTERS = dict(zip("ABCD", ("a b", "c d", "e f", "g h"), strict=True))
EACH = tuple(LETTERS.values())
# Rows of public sets, and what a person reads there: the choices and the answer.
PUBLIC = {
    "ARC, as published": (
        {"question": {"stem": ASKED, "choices": [{"text": "a b", "label": "A"}, {"text": "c d", "label": "B"}]}}
        | {"answerKey": "B"},
        (("a b", "c d"), "c d"),
    ),
    "EXAMS": (
        {"question": {"stem": ASKED, "choices": {"text": EACH[:2], "label": ["A", "B"]}}, "answerKey": "A"},
        (("a b", "c d"), "a b"),
    ),
    "a log of ARC": (
        {"doc": {"question": {"stem": ASKED, "choices": [{"text": "a b", "label": "A"}]}, "answerKey": "A"}},
        (("a b",), "a b"),
    ),
    "SWAG": (
        {"startphrase": ASKED, "sent1": "So.", **{f"ending{i}": EACH[i] for i in range(4)}, "label": 0},
        (EACH, "a b"),
    ),
    "Global-MMLU": (
        {"question": ASKED, **{f"option_{k.lower()}": LETTERS[k] for k in LETTERS}, "answer": "B"},
        (EACH, "c d"),
    ),
    "ArabicMMLU": (
        {"Question": ASKED, "Answer Key": "C", **{f"Option {i + 1}": EACH[i] for i in range(4)}, "Option 5": None},
        (EACH, "e f"),
    ),
    "KMMLU": ({"question": ASKED, "answer": 4, **LETTERS, "Category": "law"}, (EACH, "g h")),
    "Belebele": (
        {"question": ASKED, **{f"mc_answer{i + 1}": EACH[i] for i in range(4)}, "correct_answer_num": "2"},
        (EACH, "c d"),
    ),
    "LongBench v2": ({"question": ASKED, **{f"choice_{k}": LETTERS[k] for k in LETTERS}, "answer": "D"}, (EACH, "g h")),
    "QuALITY": ({"article": "So.", "question": ASKED, "options": EACH, "gold_label": 4}, (EACH, "g h")),
    "QuAIL": ({"context": "So.", "question": ASKED, "answers": EACH, "correct_answer_id": 1}, (EACH, "c d")),
    "BBQ": ({"question": ASKED, "ans0": "a b", "ans1": "c d", "ans2": "e f", "label": 1}, (EACH[:3], "c d")),
    "five letters": ({"question": ASKED, **LETTERS, "E": "i j", "answer": "E"}, ((*EACH, "i j"), "i j")),
    "three letters": ({"question": ASKED, **LETTERS, "D": None, "answer": "C"}, (EACH[:3], "e f")),
    "a test split": ({"question": ASKED, **LETTERS, "answer": ""}, (EACH, "")),
    "camel case": ({"question": ASKED, "choiceA": "a b", "choiceB": "c d", "correctAnswer": "B"}, (EACH[:2], "c d")),
    "from 0 by name": ({"question": ASKED, "option0": "a b", "option1": "c d", "label": 0}, (EACH[:2], "a b")),
    "TruthfulQA, second": (
        {"question": ASKED, "mc2_targets": {"choices": EACH[:2], "labels": [0, 1]}},
        (EACH[:2], "c d"),
    ),
    "inspect": ({"input": ASKED, "choices": EACH, "target": "B"}, (EACH, "c d")),
    "inspect, a chat": (
        {
            "input": [
                {"role": "system", "content": "You are the most careful of all."},
                {"role": "user", "content": ASKED},
            ]
        }
        | {"target": "so so"},
        ((), "so so"),
    ),
    "OpenAI's evals": (
        {
            "input": [
                {"role": "system", "content": "You are the most careful of all."},
                {"role": "user", "content": ASKED},
            ]
        }
        | {"ideal": ["so so", "not so"]},
        ((), "so so"),
    ),
    "HELM": (
        {"input": {"text": ASKED}, "split": "test"}
        | {"references": [{"output": {"text": "a b"}, "tags": []}, {"output": {"text": "c d"}, "tags": ["correct"]}]},
        (EACH[:2], "c d"),
    ),
    "HELM without choices": (
        {"input": {"text": ASKED}, "references": [{"output": {"text": "so so"}, "tags": ["correct"]}]},
        ((), "so so"),
    ),
    "BIG-bench on the hub": (
        {"inputs": ASKED, "targets": ["c d"]} | {"multiple_choice_targets": EACH[:2], "multiple_choice_scores": [0, 1]},
        (EACH[:2], "c d"),
    ),
    "lighteval": ({"query": ASKED, "choices": EACH, "gold_index": 3}, (EACH, "g h")),
    "MGSM": ({"question": ASKED, "answer": None, "answer_number": 18}, ((), "18")),
    "DROP": (
        {"passage": "So.", "question": ASKED, "answers_spans": {"spans": ["so so"], "types": ["span"]}},
        ((), "so so"),
    ),
    "LongBench": ({"input": ASKED, "context": "So it was, once.", "answers": ["so so"]}, ((), "so so")),
    "LiveBench": ({"turns": [ASKED], "ground_truth": "so so"}, ((), "so so")),
    "MT-bench": ({"turns": [ASKED], "reference": ["It was longer ago than any question."]}, ((), "")),
    "FLAN": ({"inputs": ASKED, "targets": "so so"}, ((), "so so")),
    "ReCoRD": ({"query": ASKED, "answers": ["so so"]}, ((), "so so")),
    "marks of Chinese": (
        {"question": ASKED, "options": "A\u3001a b\nB\u3001c d", "answer": "\uff22"},
        (EACH[:2], "c d"),
    ),
    "labels of the texts": (
        {"question": ASKED, "options": ["(i) a b", "(ii) c d"], "answer": "(ii)"},
        (None, "(ii) c d"),
    ),
    "shuffled labels": ({"question": ASKED, "options": ["B) a b", "A) c d"], "answer": "A"}, (None, "A) c d")),
    # Merged sets fill the columns of the others with blanks.
    "blank answers": ({"question": ASKED, "answers": "", "answer": "so so"}, ((), "so so")),
    "blank answer": ({"question": ASKED, "options": EACH, "answer": "", "label": "B"}, (EACH, "c d")),
    "blank letters": ({"text": ASKED, "question": "", "A": "", "B": "", "answer": ""}, ((), "")),
    # No choices.
    "sentences": ({"text": ASKED, "sentence1": "It is so.", "sentence2": "It is not.", "label": 1}, ((), "")),
    "other answers": ({"question": ASKED, "answer": "so so", "answers": ["so so", "not so"]}, ((), "so so")),
    "a class": ({"question": ASKED, "answers": ["so so", "not so"], "label": "supported"}, ((), "so so")),
    "letters of something else": ({"question": ASKED, "answer": "so so", "a": 1, "b": 2}, ((), "so so")),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_rows_of_public_sets_have_their_choices_and_answers(name, tmp_path):
    row, (choices, answer) = PUBLIC[name]
    (item,) = read_set(write(tmp_path / "set.jsonl", [row])).items
    assert (item.question, item.answer, item.not_understood) == (ASKED, answer, ())
    assert item.choices == choices or choices is None


@pytest.mark.parametrize(
    ("numbers", "answers"),
    [
        ((1, 2, 4), ("a b", "c d", "g h")),  # none is 0, and one is the number of the choices
        ((0, 1, 3), ("a b", "c d", "g h")),
        (("4", "1"), ("g h", "a b")),
        (([0], [3]), ("a b", "g h")),
        ((1, 2), ("c d", "e f")),  # nothing shows that these count from 1
    ],
)
def test_a_whole_set_shows_whether_its_answers_count_from_0_or_1(numbers, answers, tmp_path):
    rows = [{"question": f"{ASKED} {n}", "choices": EACH, "answer": n} for n in numbers]
    found = read_set(write(tmp_path / "set.jsonl", rows))
    assert [(item.answer, item.not_understood) for item in found.items] == [(answer, ()) for answer in answers]


@pytest.mark.parametrize("own", ["ID", "_id", "qID", "Record ID", "uuid", "instance_id", "unique_id", "sample_id"])
def test_ids_are_known_by_their_names(own, tmp_path):
    (item,) = read_set(write(tmp_path / "set.jsonl", [{"question": ASKED, "answer": "so so", own: "x1"}])).items
    assert item.item_id == "x1"


def test_an_answer_without_its_question_is_an_item(tmp_path):
    rows = [{"question": "", "answer": "so"}, {"question": None, "other": ASKED, "answer": "so so"}]
    found = read_set(write(tmp_path / "set.jsonl", rows))
    assert [(item.question, item.answer) for item in found.items] == [("", "so"), (ASKED, "")]
    assert found.rejects == ()


def test_roles_that_are_not_given_are_detected(tmp_path):
    path = write(tmp_path / "set.jsonl", [{"ask": ASKED, "choices": EACH, "answer": "B"}])
    (item,) = read_set(path, fields={"question": "ask"}).items
    assert (item.question, item.choices, item.answer) == (ASKED, EACH, "c d")


# Answers and choices as data sets write them: fields, the choices and the answer that a person reads there.
TWO = ("a b", "c d")
SPELT = {
    **{
        f"answer {answer}": ({"choices": TWO, "answer": answer}, TWO, "c d")
        for answer in (
            *("(B)", "B. c d", "b)", "[B]", "**B**", "(B) since so", "The answer is (B).", "\\boxed{B}"),
            *("\uff22\uff0e", "C D.", "1.0", "B, A", "BA", "Option B", "c d\n"),
        )
    },
    "null choice": ({"choices": ["a b", None, "c d"], "answer": 2}, TWO, "c d"),
    "null in an object": ({"options": {"A": "a b", "B": "c d", "E": None}, "answer": "B"}, TWO, "c d"),
    "one-hot": ({"choices": TWO, "answer": [0, 1]}, TWO, "c d"),
    "object": ({"choices": TWO, "answer": {"index": 1, "label": "B"}}, TWO, "c d"),
    "numbers": ({"choices": [4, 2.5], "answer": "B"}, ("4", "2.5"), "2.5"),
    "labels within": ({"options": ["A)21 m", "B)22 m"], "correct": "B"}, ("A)21 m", "B)22 m"), "B)22 m"),
    "label and text within": ({"options": ["A. a b", "B. c d"], "answer": "c d"}, ("A. a b", "B. c d"), "B. c d"),
    "one text": ({"options": "a ) a b , b ) c d", "correct": "b"}, TWO, "c d"),
    "JSON": ({"choices": '["a b", "c d"]', "answer": "1"}, TWO, "c d"),
    "Python": ({"choices": "['a b', 'c d']", "answer_index": 1}, TWO, "c d"),
    "flags": ({"choices": [{"text": "a b", "correct": False}, {"text": "c d", "correct": True}]}, TWO, "c d"),
    "ids": ({"options": [{"id": "p", "content": "a b"}, {"id": "q", "content": "c d"}], "answer": "q"}, TWO, "c d"),
    "pairs": ({"choices": [["A", "a b"], ["B", "c d"]], "answer": "B"}, TWO, "c d"),
    "scores of texts": ({"mc1_targets": {"a b": 0, "c d": 1}}, TWO, "c d"),
    "a choice each": ({"A": "a b", "B": "c d", "C": "e f", "D": "g h", "answer": "B"}, (*TWO, "e f", "g h"), "c d"),
    "field's name": ({"option1": "a b", "option2": "c d", "answer": "option2"}, TWO, "c d"),
    "from one": ({"context": "So.", "answerA": "a b", "answerB": "c d", "answerC": "e", "label": "2"}, None, "c d"),
    "choices called answers": ({"answers": TWO, "label": 1}, TWO, "c d"),
    "no answer": ({"choices": TWO, "answer": None}, TWO, ""),
    "no choices": ({"choices": [], "answer": "so so"}, (), "so so"),
    "spans": ({"answer": {"number": "", "spans": ["c d"], "date": {"day": ""}}}, (), "c d"),
    "lists of lists": ({"answers": [["c d", "e f"]]}, (), "c d"),
    "numbers as answers": ({"answers": [3, 4]}, (), "3"),
    "NaN": ({"answer": float("nan")}, (), ""),
}


@pytest.mark.parametrize("name", SPELT)
def test_answers_and_choices_are_read_as_a_person_would(name, tmp_path):
    row, choices, answer = SPELT[name]
    asked = "sentence" if "option1" in row else "question"
    (item,) = read_set(write(tmp_path / "set.jsonl", [{asked: "Why was it so?", **row}])).items
    assert item.choices == choices or choices is None
    assert (item.answer, item.not_understood) == (answer, ())


@pytest.mark.parametrize(
    ("choices", "answer"),
    [(["a b", "c d"], "A. Smith"), (["x, y", "z, y"], "y"), (["a b", "c d"], "A or so"), (["a b", "c d"], "Be so")],
)
def test_a_text_that_begins_like_a_label_names_no_choice(choices, answer, tmp_path):
    (item,) = read_set(
        write(tmp_path / "set.jsonl", [{"question": "Why?", "choices": choices, "answer": answer}])
    ).items
    assert item.answer == ""
    assert "names none of the 2 choices" in item.not_understood[0]
    assert " " not in answer or ("answer", answer) in item.others


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"question": 3, "answer": "x"}, "'question' holds a number, not a text"),
        ({"question": "a", "choices": ["x"], "answer": 4}, "'answer' is 4, which names none of the 1 choices"),
        ({"question": "a", "choices": [[1]], "answer": 0}, "'choices' does not hold a list of texts"),
        ({"question": "half \ud800"}, "a lone surrogate"),
        ({"unknown": "half a \ud800"}, "a lone surrogate"),
        ({"question": "a", "answer": {"b": 1}}, "'answer' holds an object without a text"),
        (
            {"question": "a", "choices": ["x", "y"], "answer": "\u00df"},
            "'answer' is '\u00df', which names none of the 2",
        ),
        ({"question": "a", "choices": ["x", "y"], "answer": "\u0149"}, "names none of the 2 choices"),
        ({"question": "a", "choices": ["x", "y"], "answer": "1" * 5000}, "111, which names none of the 2 choices"),
        ({"question": "a", "choices": ["x", "y"], "answer": int("1" * 4300)}, "names none of the 2 choices"),
        ({"question": "a", "choices": {"text": ["x", "y"], "label": 5}, "answerKey": "A"}, "a label for each of its 2"),
        (
            {"question": "a", "choices": {"text": ["x", "y"], "label": "AB"}, "answerKey": "A"},
            "a label for each of its 2",
        ),
        (
            {"question": "a", "choices": {"text": ["x"], "label": ["A", "B"]}, "answerKey": "B"},
            "a label for each of its 1",
        ),
        ({"question": "a", "mc1_targets": {"choices": ["x"], "labels": [0, 1]}}, "a label for each of its 1 choices"),
    ],
)
def test_what_is_not_understood_is_told_with_file_and_row(row, why, tmp_path):
    path = write(tmp_path / "bad.jsonl", [{"question": "fine", "answer": "yes"}, row])
    found = read_set(path)
    assert (len(found.items), found.rejects) == (2, ())
    assert found.not_understood[0].sentence().startswith("bad.jsonl, row 2: ")
    assert why in found.not_understood[0].sentence()


@pytest.mark.parametrize("row", [{"question": " ", "answer": ""}, {"nr": 3}, {"q": None, "id": "a7"}])
def test_only_rows_without_any_text_are_rejected(row, tmp_path):
    found = read_set(write(tmp_path / "bad.jsonl", [{"question": "fine", "answer": "yes"}, row]))
    assert len(found.items) == 1
    assert "bad.jsonl, row 2: none of its fields" in found.rejects[0].sentence()


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"mc1_targets": {"choices": ["x", "y"], "labels": ["\u00b2", 1]}}, "y"),
        ({"mc1_targets": {"choices": ["x", "y"], "labels": ["1" * 5000, 1]}}, "y"),
        ({"choices": [{"text": "x"}, {"text": "y"}], "answerKey": ""}, ""),  # hidden, and the choices have no labels
    ],
)
def test_labels_that_are_no_numbers_point_to_no_choice(row, answer, tmp_path):
    (item,) = read_set(write(tmp_path / "set.jsonl", [{"question": "Was it?", **row}])).items
    assert item.answer == answer


def test_lone_surrogates_in_ids_and_names_of_fields_are_escaped(tmp_path):
    row = {"id": "\ud800", "half \udc00 a": "Was it so?", "b": {"\ud800": "It was not so."}, "\ud801": "a_b"}
    (item,) = read_set(write(tmp_path / "set.jsonl", [row]), fields={"others": "b"}).items
    assert (item.item_id, item.asked) == ("\\ud800", "half \\udc00 a")
    assert (item.others, item.left_out) == ((("b.\\ud800", "It was not so."),), ("\\ud801",))


def test_folders_parts_repeated_items_and_names(tmp_path):
    rows = [{"question": f"Question {i}?", "answer": "x"} for i in range(4)]
    folder = tmp_path / "sets"
    (folder / "gsm8k").mkdir(parents=True)
    for part in (0, 1):
        table = pa.Table.from_pylist(rows[2 * part : 2 * part + 2])
        pq.write_table(table, folder / f"gsm8k/test-0000{part}-of-00002.parquet")
    (folder / "other.jsonl.gz").write_bytes(gzip.compress((json.dumps(rows[0]) + "\n").encode() * 3))
    first, second = read_folder(str(folder))
    assert (first.name, len(first.items), first.repeated) == ("gsm8k/test", 4, 0)
    assert (second.name, len(second.items), second.repeated) == ("other", 1, 2)
    assert first.items[0].key != second.items[0].key  # one text, two sets, two findings
    with pytest.raises(StrideError, match="Two evaluation sets are called 'other'"):
        check_names([second, second])
    with pytest.raises(StrideError, match="does not exist"):
        read_folder(str(tmp_path / "nothing"))


# Text to the words it is compared by.
READ = {
    "accents, ligatures, widths": (
        "Caf\u00e9, CAFE\u0301 \ufb01nd\u00ad-it; \uff21\uff22 don\u2019t 1,000 _x_",
        "caf\u00e9 caf\u00e9 find it ab don t 1 000 x",
    ),
    "invisible": (
        "stop\u200bped \ufeffso\u2060me\ufe0f \u202aleft\u202c m\u00ady\u034f \u200f",
        "stopped some left my",
    ),
    "vowel signs": (
        "\u0915\u0940 \u0926\u093f\u0932\u094d\u0932\u0940",
        "\u0915\u0940 \u0926\u093f\u0932\u094d\u0932\u0940",
    ),
    "points and strokes": (
        "\u05e9\u05b8\u05c1\u05dc \u0643\u0640\u0640\u062a\u064e\u0628",
        "\u05e9\u05dc \u0643\u062a\u0628",
    ),
    "letters without spaces": (
        "\u6771\u4eac\u3067 \u0e19\u0e49\u0e32 \U00020000",
        "\u6771 \u4eac \u3067 \u0e19\u0e49 \u0e32 \U00020000",
    ),
    "points and letters in one, hamza and madda": (
        "\ufb2a\u05b8\u05dc\u05d5\u05b9\u05dd \u0623\u064e\u0643\u064e\u0644\u064e "
        "\u0627\u064e\u0653\u0646 \u0643\u064e\u0651\u0648",
        "\u05e9\u05dc\u05d5\u05dd \u0623\u0643\u0644 \u0622\u0646 \u0643\u0648",
    ),
    "half-width kana": ("\uff76\uff9e\uff70 \u304b\u3099", "\u30ac \u30fc \u304c"),
    "case beyond ASCII": (
        "Stra\u00dfe \u0130zmir \u0131rmak \u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2",
        "strasse izmir irmak \u03c3\u03af\u03c3\u03c5\u03c6\u03bf\u03c3",
    ),
    "digits": ("\u0661\u0669\u0669\u0665 \u0967\u0968 x\u00b2", "1995 12 x2"),
    "entities": (
        "caf&eacute;&nbsp;d&#39;Orl&#xE9;ans &amp;amp; AT&amp;T R&D; p&shy;q",
        "caf\u00e9 d orl\u00e9ans at t r d pq",
    ),
    "entities without a semicolon": (
        "caf&eacute au lait, don&#39t &amp co&nbsp? a&lt b AT&T; /?a=1&copy=2&para3",
        "caf\u00e9 au lait don t co a b at t a 1 copy 2 para3",
    ),
    "apostrophes that are letters": (
        "\u043f\u02bc\u044f\u0442\u044c Hawai\u02bbi",
        "\u043f \u044f\u0442\u044c hawai i",
    ),
    "escapes of URLs": (
        "So%20it%20was%2C%0Acaf%C3%A9%2520%E6%9D%B1 %3Cb%3Ex%3C/b%3E%26amp%3By; 100%, %02d 5%ff %C3%20 100%25",
        "so it was caf\u00e9 \u6771 x y 100 02d 5 ff c3 100",
    ),
    "escapes of JSON and code": (
        r'"It is so.\nThen caf\u00e9\\n\ud83d\ude00ended\tat \"once\""',
        "it is so then caf\u00e9 ended at once",
    ),
    "letters beyond the first plane, escaped": (r"\ud840\udc00 \ud835\udc00\\ud835\\udc01 \ud840", "\U00020000 ab"),
    "escapes of bytes and code points": (
        r"don\x27t caf\xe9 caf\xc3\xa9 \\xd1\\x8f caf\u{e9} caf\U000000e9 \U99999999 \x3cb\x3ebo\x3c/b\x3eld",
        "don t caf\u00e9 caf\u00e9 \u044f caf\u00e9 caf\u00e9 bold",
    ),
    "escapes of the old JavaScript": ("caf%u00e9%20caf%25u00E9 100%u %ud83d", "caf\u00e9 caf\u00e9 100 u"),
    "reading aids": (
        "<ruby>\u6f22<rp>(</rp><rt>\u304b\u3093</rt><rp>)</rp>\u5b57<rt>\u3058</rt></ruby>",
        "\u6f22 \u5b57",
    ),
    "reading aids without an end": (
        "<ruby>\u6f22<rp>(<rt>\u304b\u3093<rp>)</ruby>\u5b57 <ruby><rb>\u6771<rt>\u3068<rb>\u4eac</ruby>",
        "\u6f22 \u5b57 \u6771 \u4eac",
    ),
    "lines below and through letters": ("l\u0336a\u0336rge\u0332 \u2260 c\u0327a", "large \u00e7a"),
    "escaped twice": ("a&amp;nbsp;b&amp;#x27;c &amp;lt;i&amp;gt;d", "a b c d"),
    "tags": ('<p class="x y">H<sub>2</sub>O<br/>is <a href=/w?a=1&b=2 hidden>wet</a></p>', "h2o is wet"),
    "escaped tags": ('&lt;b&gt;bo&lt;/b&gt;ld <a href=\\"u\\">link</a>', "bold link"),
    "unknown tags": ("<seg id='1'>one</seg> <q1>two</q1> <x/>", "1 2"),
    "what tags show": ('<img src="a b" alt="the cat sat on a mat">', "the cat sat on a mat"),
    "attributes without a value": (
        "<p data-v-7ba5>Which <b data-v-7ba5>hi</b>ll <img alt src=a><a download href=x>st</a>a<i v-cloak>nds</i>"
        "<video playsinline>by <table border>the <li value>two <a href=>la</a>k<b contenteditable>es</b> <x-y z>here",
        "which hill stands by the 2 lakes here",
    ),
    "attributes without a space": ('s<a href="x"class="y">ho</a><b id=\'x\'hidden>r</b>e', "shore"),
    "no tags": (
        "a < b and c > d vector<int> <noinput> if x <y and z> w or x <b we see c> y <i or j> <your-name> Set<A in B>",
        "a b and c d vector int noinput if x y and z w or x b we see c y i or j your name set a in b",
    ),
    "fractions": ("Take ½ cup, 3½ spoons, 2⅓cups, ⅟8", "take 1 2 cup 3 1 2 spoons 2 1 3 cups 1 8"),
    "symbols of letters": ("5㎏ on 9㎢ Ⓐⓑ ㍿ 20℃ x² ⒈one ™ Foo™ ★ ☺", "5kg on 9km2 ab 株 式 会 社 20 c x2 1 1 foo"),
    "code": ("if a<b and c>d: List<int> &lt; Map<K, V> x <y", "if a b and c d list int map k v x y"),
    "broken lines": ("exam-\nple well-\r\n  known so\u00ad\nft A-\nB o-\rther", "example wellknown soft a b other"),
    "lines broken in markup": (
        "exam-<br>\nple <span>an-</span>\n<span>other</span> <p>ex-</p>\n\n<p>ample</p> well-<b>known</b>",
        "example another example well known",
    ),
}


@pytest.mark.parametrize("name", READ)
def test_words_are_those_a_reader_sees(name):
    text, words = READ[name]
    assert split(text).words == words.split()


# The letters and marks of each script; of Latin, of the half-width forms and of kana some.
SCRIPTS = {
    "latin": "aeo\u00e9\u1ec7\u0301\u0323\u0308\uff21\ufb01 1",
    "greek": "\u03b1\u03ac\u1fc7\u03a3\u03c3\u03c2\u0301\u0345 ",
    "hebrew": "\u05e9\u05c1\u05b8\u05dc\ufb2a ",
    "arabic": "\u0627\u0622\u0653\u0644\u064e\u0651\ufefb ",
    "kana": "\u304b\u304c\u3099\u30ab\u30ac\uff76\u30fc\uff70 \u6771",
    "hangul": "\ud55c\u1112\u1161\u11ab\uae00 ",
    **{
        name: "".join(map(chr, range(first, last))) + " "
        for name, first, last in (
            ("devanagari", 0x901, 0x970),
            ("bengali", 0x981, 0x9FD),
            ("gurmukhi", 0xA01, 0xA76),
            ("tamil", 0xB82, 0xBD8),
            ("telugu", 0xC01, 0xC70),
            ("kannada", 0xC82, 0xCF3),
            ("malayalam", 0xD02, 0xD70),
            ("sinhala", 0xD82, 0xDF4),
            ("thai", 0xE01, 0xE5C),
            ("lao", 0xE81, 0xEE0),
            ("tibetan", 0xF71, 0xFBD),
            ("myanmar", 0x1000, 0x104A),
            ("khmer", 0x1780, 0x17D4),
        )
    },
}


@pytest.mark.parametrize("name", SCRIPTS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_words_are_the_same_in_each_normal_form(name, data):
    text = data.draw(st.text(SCRIPTS[name], max_size=24))
    words = split(text).words
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert split(unicodedata.normalize(form, text)).words == words


@pytest.mark.parametrize(
    "text", ["\u0e19\u0e49\u0e33\u0e15\u0e32\u0e25 \u0e17\u0e33", "\u0e99\u0ec9\u0eb3 \u0edc\u0eb2\u0edd\u0eb9"]
)
def test_thai_and_lao_letters_of_two_characters_are_one_in_either_form(text):
    other = unicodedata.normalize("NFKC", text)
    found = split(other)
    assert found.words == split(text).words
    assert "".join(other[start:stop] for start, stop in found.spans) == other.replace(" ", "")
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(found.words), 1)}
    (numbers,) = Numbering(vocabulary).numbers(text)
    assert numbers.tolist() == Numbering(vocabulary).numbers(other)[0].tolist()
    assert (numbers > 0).all()


def test_words_keep_their_places_in_the_raw_text():
    text = "x <b>S</b>top\u200bped&nbsp;CAF&Eacute; exam-\nple 1&#48;; &amp;lt;i&gt;so"
    found = split(text)
    assert found.words == "x stopped caf\u00e9 example 10 so".split()
    pieces = [text[start:stop] for start, stop in found.spans]
    assert pieces == ["x", "S</b>top\u200bped", "CAF&Eacute;", "exam-\nple", "1&#48;", "so"]


def test_a_word_broken_at_a_lines_end_is_joined_if_an_item_has_it():
    numbering = Numbering({"example": 1, "well": 2, "known": 3})
    text = "Exam-\nple, well-\nknown"
    assert numbering.numbers(text)[0].tolist() == [1, 2, 3]
    assert len(split(text, numbering.is_word).spans) == 3


def test_letters_of_scripts_without_spaces_count_as_parts_of_words():
    assert split("one two three").length == 3
    assert split("\u6771\u4eac\u90fd ok").length == 2
    assert (
        split("\u0e01\u0e23\u0e38\u0e07\u0e40\u0e17\u0e1e\u0e21\u0e2b\u0e32\u0e19\u0e04\u0e23").length == 3
    )  # 12 letters: Bangkok
    assert split("\u0928\u0908 \u0926\u093f\u0932\u094d\u0932\u0940 \u092e\u0947\u0902 \u0939\u0948").length == 4


MARKS = ["<!--", "-->", "<script>", "</script>", "<![CDATA[", "]]>", "<?x", "?>", "<", ">", '"', "&lt;!--", "a", " "]


@given(st.lists(st.sampled_from(MARKS)).map("".join))
def test_passages_and_their_numbers_agree_whatever_is_left_open(text):
    found = passages(text)
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(joined(found).words), 1)}
    numbers = Numbering(vocabulary).numbers(text)
    assert [each.tolist() for each in numbers] == [[vocabulary[word] for word in each.words] for each in found]
    assert all(split(text[start:stop]).words == [word] for word, (start, stop) in zip(*found[0], strict=True))


# Text to what a reader sees of it, then what stands apart.
APART = {
    "a comment": ("so <!-- as they say --> it was", ["so it was", "as they say"]),
    "in a word": ("so<!-- -->me <!-->one<!---> is<style/> here", ["some 1 is here"]),
    "a script and its tags": ("a <SCRIPT type='x>y'>let b = '<i>';</Script > c", ["a c", "let b"]),
    "a style": ("a<style media=all>p { b: c }</style>, d", ["a d", "p b c"]),
    "in each other": ("a <!-- <script> b --> c </script> <script>'<!--'; d</script> e --!>", ["a c e", "b", "d"]),
    "escaped": ("a &lt;!-- b --&gt; c", ["a c", "b"]),
    "character data": ("a <![CDATA[b <i>c</i>]]>d x[y[1]]>2", ["a b cd x y 1 2"]),
    "declarations": ("<?xml version='1.0'?><!DOCTYPE html>a <![if !IE]>b<![endif]>", None),
    "left open": ('a <!-- b <script> c <![CDATA[ d <?php e <style media="', ["a b c d php e style media"]),
    "no such element": ("<scripture>a</scripture> <!- b -> <stylé>", ["a b stylé"]),
}


@pytest.mark.parametrize("name", APART)
def test_what_browsers_do_not_show_stands_apart(name):
    text, read = APART[name]
    found = passages(text)
    if read is None:
        assert found[0].words == ["a", "b"]
    else:
        assert [" ".join(each.words) for each in found if each.words] == read


@pytest.mark.parametrize(
    "unit", ["<!-- ", "<!--a-->", "<script ", "<script>", '<style "', "<![CDATA[", "<?x ", "<", "\\"]
)
def test_markup_without_end_takes_linear_time(unit):
    numbering = Numbering({})

    def seconds(size):
        started = time.process_time()
        numbering.numbers(unit * (size // len(unit)))
        return time.process_time() - started

    # Quadratic: 64 times. The least of three, for a collection of garbage may fall into one.
    least = [min(seconds(size) for _ in range(3)) for size in (30_000, 240_000)]
    assert least[1] < 32 * least[0] + 0.1


@settings(deadline=None)
@given(st.text(max_size=200))
def test_every_span_is_its_word_and_numbers_agree(text):
    found = split(text)
    for word, (start, stop) in zip(found.words, found.spans, strict=True):
        again = split(text[start:stop]).words
        several = any(len(unicodedata.normalize("NFKC", each)) > 1 for each in text[start:stop])  # words in a symbol
        assert again == [word] or (several and word in again)
    assert [normalised(word) for word in found.words] == found.words
    assert all(a < b for a, b in found.spans)
    assert (np.diff(found.spans, axis=0) >= 0).all()  # the words of a symbol have the same place
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(found.words), 1)}
    assert Numbering(vocabulary).numbers(text)[0].tolist() == [vocabulary[word] for word in found.words]


def test_long_texts_in_chunks_are_the_same_words(monkeypatch):
    from stride_ray.contamination.lexical import words

    text = "one two\nthree " * 50 + "x" * 40 + " four"
    whole = split(text)
    monkeypatch.setattr(words, "_CHUNK", 32)
    assert "".join(chunks(text)) == text
    kept = split(text)
    assert kept.words[:150] == whole.words[:150]
    assert kept.spans[:150].tolist() == whole.spans[:150].tolist()
    numbering = Numbering({word: i for i, word in enumerate(dict.fromkeys(kept.words), 1)})
    assert len(numbering.numbers(text)[0]) == len(kept.words)
    monkeypatch.setattr(words, "_REMEMBERED", 2)  # the cache is emptied, the numbers stay
    small = Numbering(dict(numbering.vocabulary))
    assert small.numbers(text)[0].tolist() == numbering.numbers(text)[0].tolist()
    assert split("").words == []
