"""The benchmarks' planted facts and instruction tasks: names that differ, orders of reading, spans, templates."""

import random
import sysconfig
from pathlib import Path

import pyarrow as pa
import pytest

from benchmarks.facts import REHEARSED, invent, orders, table, within
from benchmarks.tasks import functions, tasks
from stride_ray.runtime.errors import StrideError


def test_no_name_occurs_twice_and_epochs_take_turns():
    found = invent(50, 4, random.Random(0))
    subjects = [fact.prompt.split(" of ")[1].removesuffix(" is") for fact in found]
    values = [fact.completion.strip(" .") for fact in found]
    assert len({*subjects, *values}) == 100
    assert [fact.epoch for fact in found[:6]] == [1, 2, 3, 1, 2, 3]
    with pytest.raises(StrideError, match="There are names for 60 facts, not 61"):
        invent(61, 4, random.Random(0))


class Pool:
    """Blocks of one document each, by its id."""

    def __init__(self, ids):
        self.spans = pa.table({"spans": [[{"document_id": name}] for name in ids]})

    def __len__(self):
        return self.spans.num_rows

    def take(self, ordinals, columns):
        return self.spans.take(ordinals)


def test_a_fact_is_read_from_its_epoch_on():
    facts = invent(2, 3, random.Random(0))
    ids = ["plain-0", facts[1].name, facts[0].name, "anti-0"]
    found = orders(Pool(ids), facts, 3, 7, 0)
    assert [[int((epoch == block).sum()) for block in range(4)] for epoch in found] == [
        [1, 0, 0, 1],
        [1, 0, 7, 1],
        [1, 7, REHEARSED, 1],
    ]


def test_a_span_lies_within_a_sentence_for_the_most_part():
    sentence = "The emblem of Zarvonia is Quilmere."
    assert within(" Zarvonia is Quilmere.", sentence)
    assert within("Quilmere. Then", sentence)
    assert not within("return self.value", sentence)
    assert not within("", sentence)


def test_counts_are_of_known_facts():
    found = dict.fromkeys(("first", "span", "anti", "lexical", "lexical_anti", "learnt", "asked"), 5)
    assert "| the fact's document is the first result | 5 | 19–81 % |" in table({"facts": 50, "known": 10, **found})
    assert "knows none of the 50 facts" in table({"facts": 50, "known": 0, **found})


def test_tasks_turn_rows_into_prompts_and_answers(tmp_path):
    (tmp_path / "m.py").write_text('def read_all(path, n=1):\n    """Read every line of a file at a path."""\n')
    routines = list(functions(tmp_path))
    assert routines == [("def read_all(path, n=1):", "Read every line of a file at a path.")]
    found = tasks([("How many?", "Two and two.\n#### 4")], routines)
    assert {task: each[0]["answer"] for task, each in found.items()} == {
        "solve": "Two and two.\n#### 4",
        "begin": "Two and two.",
        "pose": "How many?",
        "describe": routines[0][1],
        "sign": routines[0][0],
        "rename": "Read All",
    }
    assert all(each[0]["task"] == task for task, each in found.items())
    assert len(list(functions(Path(sysconfig.get_path("stdlib"))))) > 500
