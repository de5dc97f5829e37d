"""Evaluation sets: every shape in use, what is not understood, repeated items, folders; shared words."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stride_ray.contamination.items import check_names, read_folder, read_set
from stride_ray.contamination.lexical.words import WORD, Numbering, chunks, normalised, split
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
    with pytest.raises(StrideError, match=r"own\.jsonl, row 1: none of its fields .*'q'.* --fields question=FIELD"):
        read_set(path)
    with pytest.raises(StrideError, match="it has no field 'ask'; its fields are 'a1', 'a2'"):
        read_set(path, fields={"question": "ask"})
    with pytest.raises(StrideError, match="'prompt' is not a role"):
        read_set(path, fields={"prompt": "q"})


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"question": 3, "answer": "x"}, "'question' holds int, not a text"),
        ({"question": "a", "choices": ["x"], "answer": 4}, "'answer' is 4, which names none of the 1 choices"),
        ({"question": "a", "choices": [1], "answer": 0}, "'choices' does not hold a list of texts"),
        ({"question": " ", "answer": ""}, "'question' is empty"),
        ({"question": "half \ud800"}, "a lone surrogate"),
        ({"question": "a", "answer": {"b": 1}}, "'answer' holds dict"),
    ],
)
def test_what_is_not_understood_is_told_with_file_and_row(row, why, tmp_path):
    path = write(tmp_path / "bad.jsonl", [{"question": "fine", "answer": "yes"}, row])
    found = read_set(path)
    assert len(found.items) == 1
    assert found.rejects[0].sentence().startswith("bad.jsonl, row 2: ")
    assert why in found.rejects[0].sentence()


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


def test_words_are_normalised_and_keep_their_places():
    text = "Caf\u00e9, CAFE\u0301 \ufb01nd\u00ad-it; \uff21\uff22 don\u2019t stop\u200bped \u6771\u4eac 1,000 _x_"
    found = split(text)
    assert found.words == "café café find it ab don t stopped \u6771 \u4eac 1 000 x".split()
    pieces = [text[start:stop] for start, stop in found.spans]
    assert pieces[0] == "Caf\u00e9"
    assert pieces[1] == "CAFE\u0301"
    assert pieces[7] == "stop\u200bped"


@given(st.text(max_size=200))
def test_every_span_is_its_word_and_numbers_agree(text):
    found = split(text)
    assert [normalised(text[start:stop]) for start, stop in found.spans] == found.words
    assert all(a < b for a, b in found.spans)
    assert (found.spans[1:, 0] >= found.spans[:-1, 1]).all()
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(found.words), 1)}
    assert Numbering(vocabulary).numbers(text).tolist() == [vocabulary[word] for word in found.words]


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
    assert len(numbering.numbers(text)) == len(kept.words)
    monkeypatch.setattr(words, "_REMEMBERED", 2)  # the cache is emptied, the numbers stay
    small = Numbering(dict(numbering.vocabulary))
    assert small.numbers(text).tolist() == numbering.numbers(text).tolist()
    assert WORD.findall("") == []
