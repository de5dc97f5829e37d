"""What is a copy of an item, and what only looks like one: small inputs of the usual shapes."""

import pytest
from conftest import run_plainly, write_lines

from stride_ray.contamination.items import read_set
from stride_ray.contamination.lexical.copies import site
from stride_ray.contamination.nightly import scan
from stride_ray.runtime.run import Run
from stride_ray.runtime.storage import Store

SHORT = "What is the capital city of the state of Montana?"
LONG = (
    "Janet's ducks lay sixteen eggs per day, of which she eats three for breakfast every morning and bakes muffins for "
    "her friends every day with four; how much in dollars does she make every day at the farmers' market?"
)
CONTEXT = (
    "The Panthers finished the regular season with a 15-1 record, and the Denver Broncos, who had the best defence of "
    "the league, beat the defending champions in the last minute of the game that decided the conference."
)
PROMPT = (
    "def has_close_elements(numbers: List[float], threshold: float) -> bool:\n"
    '    """ Check if in given list of numbers, are any two numbers closer to each other than\n    given threshold, '
    "and return whether there are any at all among them.\n"
    '    >>> has_close_elements([1.0, 2.0, 3.0], 0.5)\n    False\n    """\n'
)
VERSE = "And seeing the multitudes, he went up into a mountain, and when he was set, his disciples came unto him"


@pytest.fixture
def verdict(tmp_path, monkeypatch):
    """Scans files of rows for one item; returns its verdict's row."""
    run_plainly(monkeypatch)

    def of(item, **files):
        for name, rows in files.items():
            write_lines(tmp_path / f"corpus/{name}.jsonl", [{"text": r} if isinstance(r, str) else r for r in rows])
        filler = [{"text": f"unrelated text number {i} about the weather in {i} towns"} for i in range(40)]
        write_lines(tmp_path / "corpus/filler.jsonl", filler)
        items = read_set(write_lines(tmp_path / "items.jsonl", [item]))
        run = Run(str(tmp_path / "run"), changes={"corpus.input": str(tmp_path / "corpus"), "scan.influence": False})
        scan(run, [items], str(tmp_path / "scans"), night="n1")
        (row,) = Store(str(tmp_path / "scans")).read_table("nights/n1/verdicts.parquet").to_pylist()
        return row["verdict"], row["leaked"]

    return of


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


SQUAD = {"question": "Which side turned out to be better than the winner of the year before?", "context": CONTEXT}
QUOTING = {"question": f"In which book of the Bible does this passage stand? {VERSE}", "answer": "no"}
CASES = {
    "an answer in the next turn": (
        {"question": SHORT, "answer": "Helena"},
        {name: [chat(SHORT, "Helena.")] for name in "abc"},
        ("lexical", "question and answer"),
    ),
    "a prompt and its answer": (
        {"question": SHORT, "answer": "Helena"},
        {"a": [{"prompt": SHORT, "completion": "Helena"}]},
        ("lexical", "question and answer"),
    ),
    "a common question without its answer": (
        {"question": SHORT, "answer": "Helena"},
        {name: [SHORT] for name in "abc"},
        ("clean", "phrase"),
    ),
    "shards of one data set": (
        {"question": SHORT, "answer": "Helena"},
        {f"train-0000{i}-of-00003": [SHORT] for i in range(3)},
        ("lexical", "question"),
    ),
    "a context with its answer in it": (
        {**SQUAD, "answers": {"text": ["Denver Broncos"], "answer_start": [60]}},
        {"a": [CONTEXT]},
        ("clean", "passage"),
    ),
    "a context without a known answer": (
        {**SQUAD, "answers": {"text": [], "answer_start": []}},
        {"a": [CONTEXT]},
        ("clean", "passage"),
    ),
    "a long answer quoted from the context": (
        {**SQUAD, "answers": {"text": ["who had the best defence of the league"], "answer_start": [80]}},
        {"a": [CONTEXT]},
        ("clean", "passage"),
    ),
    "a context with its question": (
        {**SQUAD, "answers": {"text": ["Denver Broncos"], "answer_start": [60]}},
        {"a": [f"{CONTEXT} {SQUAD['question']}"]},
        ("lexical", "question and answer"),
    ),
    "code without its import": (
        {"prompt": f"from typing import List\n\n\n{PROMPT}", "canonical_solution": "    return False\n"},
        {"a": [f"{PROMPT}    raise NotImplementedError"]},
        ("lexical", "question"),
    ),
    "a short question joined with its answer": (
        {"question": "Who painted Guernica?", "answer": "Pablo Ruiz Picasso"},
        {name: ["Who painted Guernica? Pablo Ruiz Picasso."] for name in "abc"},
        ("lexical", "question and answer"),
    ),
    "a passage after a word that happens to be the answer": (
        QUOTING,
        {"a": [f"There is no doubt. {VERSE}"]},
        ("clean", "passage"),
    ),
    "the final answer of a worked solution": (
        {"question": LONG, "answer": "She eats 3 and bakes 4, so 9 are left.\nShe makes 9 * 2 = 18.\n#### 18"},
        {"a": [f"{LONG}\n#### 18"]},
        ("lexical", "question and answer"),
    ),
    "a float": (
        {"question": SHORT.replace("the state of Montana", "all the people there then"), "answer": 145.0},
        {name: [f"{SHORT.replace('the state of Montana', 'all the people there then')} 145"] for name in "abc"},
        ("lexical", "question and answer"),
    ),
    "an answer a long way off": (
        {**QUOTING, "answer": "It stands in the gospel that is the first of the four"},
        {"a": [f"{VERSE} {'and so on ' * 600} It stands in the gospel that is the first of the four"]},
        ("lexical", "answer"),
    ),
}


@pytest.mark.parametrize(("item", "files", "expected"), CASES.values(), ids=CASES.keys())
def test_what_leaked(verdict, item, files, expected):
    assert verdict(item, **files) == expected


def test_shards_are_one_source():
    assert {site(f"train-0000{i}-of-00003.jsonl") for i in range(3)} == {"train"}
    assert site("wiki_07.jsonl.gz") == "wiki"
    assert site("en.wikipedia.org") == "en.wikipedia.org"
    assert site("a.jsonl") != site("b.jsonl")
