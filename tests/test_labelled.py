"""Scans on the labelled set: precision and recall by kind, beside the rules of two other scanners."""

import json
from pathlib import Path

import pytest
from conftest import run_plainly

from stride_ray.evaluate.leaks.labelled import KINDS, Material, label_scan, write_labelled
from stride_ray.evaluate.leaks.rules import decon, harness
from stride_ray.evaluate.leaks.scanners import GROUPS, measure_rules, table
from stride_ray.runtime.errors import StrideError

SET = Path(__file__).parent / "labelled/set"
LEAKED, OTHERS = ([kind for kind, (leaked, _) in KINDS.items() if leaked is wanted] for wanted in (True, False))


@pytest.fixture(scope="module")
def measured():
    with pytest.MonkeyPatch.context() as patch:
        run_plainly(patch)
        return {rule.name: rule for rule in measure_rules(SET)}


def test_scans_find_leaks_of_every_kind_and_little_else(measured):
    ours = measured["stride-ray scan"]
    assert ours.precision >= 0.95
    assert ours.recall(GROUPS["verbatim"]) >= 0.95
    assert ours.recall(GROUPS["reordered"]) >= 0.95
    assert ours.recall(GROUPS["paraphrase"]) >= 0.75


@pytest.mark.parametrize("kind", LEAKED)
def test_a_kind_of_leak_is_found(measured, kind):
    assert measured["stride-ray scan"].recall([kind]) >= 0.75


@pytest.mark.parametrize("kind", OTHERS)
def test_what_looks_like_a_leak_raises_no_alarm(measured, kind):
    assert measured["stride-ray scan"].recall([kind]) <= 0.1


def test_the_other_rules_fail_where_they_are_known_to(measured):
    others = [measured[name] for name in ("lm-evaluation-harness", "decon")]
    assert all(rule.recall(GROUPS["verbatim"]) < 0.8 for rule in others)
    assert others[0].precision < 0.8
    assert others[1].found["paraphrase"] == 0
    assert "| precision | | | " in table(list(measured.values()))


def test_the_same_seed_makes_the_same_set(tmp_path):
    words = [f"w{i}" for i in range(400)]

    def texts(count, size):
        return [(f"name{i}", " ".join(words[(7 * i + j) % 400] for j in range(size)) + ".") for i in range(count)]

    material = Material(texts(90, 30), texts(90, 6) + texts(90, 20), texts(30, 20), *(texts(12, 25) for _ in range(5)),
                        [text for _, text in texts(5, 90)])  # fmt: skip
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        write_labelled(label_scan(material, 2, seed), tmp_path / name)
    one, two, three = ((tmp_path / name / "items.jsonl").read_bytes() for name in ("one", "two", "three"))
    assert one == two != three
    labels = [json.loads(line) for line in (tmp_path / "one/labels.jsonl").read_text().splitlines()]
    assert {(label["kind"], label["leaked"]) for label in labels} == {(kind, leak) for kind, (leak, _) in KINDS.items()}


def test_too_little_material_is_told():
    few = [(f"name{i}", f"a text of some words number {i}.") for i in range(3)]
    with pytest.raises(StrideError, match="There are 3 word problems, too few for so many items"):
        label_scan(Material(*[few] * 8, filler=["so"]), 12, 0)


QUESTION = "How many of the seven old bridges of the town can one cross without crossing any of them twice"
ITEM = {"id": "a", "question": QUESTION, "answer": "none"}


def test_the_harness_flags_thirteen_words_unless_they_are_common():
    assert harness([f"so: {QUESTION}?"], [ITEM]) == {"a"}
    assert harness([" ".join(QUESTION.split()[:12])], [ITEM]) == set()
    assert harness([QUESTION] * 10, [ITEM]) == {"a"}
    assert harness([QUESTION] * 11, [ITEM]) == set()


def test_decon_wants_the_answer_near_and_a_perfect_match_of_short_texts():
    assert decon([f"{QUESTION}? None."], [ITEM]) == {"a"}
    assert decon([f"{QUESTION}?"], [ITEM]) == set()
    assert decon([f"{QUESTION}? {'so ' * 60} none"], [ITEM]) == set()
    assert decon([f"{QUESTION.replace('seven', 'six')}? None."], [ITEM]) == set()
    long = {**ITEM, "question": f"{QUESTION} {QUESTION.replace('bridges', 'gates')} {QUESTION.replace('old', 'new')}"}
    assert decon([f"{long['question'].replace('gates', 'doors')}? None."], [long]) == {"a"}
    assert decon([long["question"]], [{**long, "answer": ""}]) == {"a"}
