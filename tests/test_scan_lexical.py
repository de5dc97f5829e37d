"""The lexical channel: n-grams against a plain search, offsets in both texts, rarity, boilerplate, short items."""

import numpy as np
import pyarrow.compute as pc
import pytest
from conftest import run_plainly, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st

from stride_ray.contamination.influence.significance import adjusted, p_values, q_values, standardised
from stride_ray.contamination.items import Item, read_set
from stride_ray.contamination.lexical import channel, ngrams, search
from stride_ray.contamination.lexical.channel import lexical_matches
from stride_ray.contamination.lexical.copies import COPY
from stride_ray.contamination.lexical.ngrams import Index, fields_of, numbering
from stride_ray.contamination.lexical.words import split
from stride_ray.contamination.nightly import corpus_of
from stride_ray.runtime.options import ScanConfig
from stride_ray.runtime.run import Run, Stage
from stride_ray.runtime.storage import Store

QUESTION = (
    "Natalia sold clips to forty eight of her friends in April, and then she sold half as many clips in May; how "
    "many clips did Natalia sell altogether in April and May?"
)
ANSWER = "She sold twenty four clips in May because forty eight halved is twenty four."


@pytest.fixture
def found(tmp_path, monkeypatch):
    """Scans a corpus of texts (or files of rows) for items, without Ray; returns Lexical."""
    run_plainly(monkeypatch)

    def scan(files, items, **options):
        for name, rows in files.items():
            write_lines(tmp_path / "corpus" / name, [{"text": r} if isinstance(r, str) else r for r in rows])
        (each,) = [read_set(write_lines(tmp_path / "items.jsonl", items))]
        run = Run(str(tmp_path / "run"), changes={"corpus.input": str(tmp_path / "corpus")})
        corpus = corpus_of(run, Store(str(tmp_path / "state")))
        stage = Stage(Store(str(tmp_path / "state/lexical")), "id")
        chosen = ScanConfig(**options)
        search.search(stage, corpus, each.items, chosen.words, chosen.shortest, run.config.compute)
        return lexical_matches(stage, corpus, each.items, chosen)

    return scan


WORDS = st.lists(st.sampled_from("a b c d".split()), min_size=6, max_size=24)


@settings(deadline=None)
@given(WORDS, WORDS, st.integers(2, 5))
def test_runs_are_those_of_a_plain_search(item, text, n):
    field = ngrams.Field("k", "question", " ".join(item), split(" ".join(item)), n)
    index = Index([field])
    numbers = numbering(index).numbers(" ".join(text))[0]
    covered = set()
    for run in index.find(numbers):
        length = run.stop - run.first
        assert item[run.first : run.stop] == text[run.place : run.place + length]
        assert length >= n
        # It cannot be made longer on either side.
        assert run.first == 0 or run.place == 0 or item[run.first - 1] != text[run.place - 1]
        ends = run.stop == len(item) or run.place + length == len(text)
        assert ends or item[run.stop] != text[run.place + length]
        covered |= {(run.first + i, run.place + i) for i in range(length - n + 1)}
    plain = {
        (i, j) for i in range(len(item) - n + 1) for j in range(len(text) - n + 1) if item[i : i + n] == text[j : j + n]
    }
    assert covered == plain


def test_a_copy_beside_a_lone_surrogate_is_found(found):
    user, copy = {"role": "user", "content": "Well?"}, f"half \ud800 {QUESTION}"
    rows = [
        {"messages": [user, {"role": "assistant", "content": [{"type": "text", "text": copy}]}]},
        {"messages": [user, {"role": "assistant", "content": "No.", "\ud800": QUESTION}]},
        {"messages": [user, {"role": "assistant", "content": "No."}], "tools": [{"name": "f", "description": copy}]},
    ]
    found = found({"a.jsonl": rows}, [{"question": QUESTION}]).matches.to_pylist()
    assert [(row["part"], row["kind"]) for row in found] == [
        ("messages.1.content.0.text", COPY),
        ("messages.1.\\ud800", COPY),
        ("template.tools.0.description", COPY),
    ]
    assert found[0]["excerpt"] == "half \ufffd " + QUESTION
    assert copy[found[0]["start"] : found[0]["stop"]] == QUESTION[:-1]


def test_a_copy_is_found_with_its_place_in_both_texts(found):
    copied = QUESTION.upper().replace(",", " --").replace(" ", "\n  ")
    text = f"Import this. {copied} The end."
    leaks = [{"question": QUESTION, "answer": ANSWER}]
    lexical = found({"a.jsonl": ["Nothing to see here.", text], "b.jsonl": ["more of the same"]}, leaks)
    (row,) = lexical.matches.to_pylist()
    assert (row["field"], row["document_id"], row["source"]) == ("question", "a.jsonl#33", "a.jsonl")
    assert (row["overlap"], row["kind"]) == (1.0, COPY)
    assert split(text[row["start"] : row["stop"]]).words == split(QUESTION).words
    assert QUESTION[row["item_start"] : row["item_stop"]] == QUESTION[:-1]
    assert (row["excerpt"], row["excerpt_start"]) == (text, 0)
    assert lexical.overlaps == {row["key"]: 1.0}
    assert lexical.documents == 3


HIDING = {
    "comments": "<!-- {} -->",
    "scripts": "<script async>let x = '{}';</script>",
    "styles": "<style>.{} {{ color: red }}</style>",
    "character data": "]]> <![CDATA[",
    "instructions": "<?php echo {} ?>",
}


@pytest.mark.parametrize("name", HIDING)
def test_what_browsers_do_not_show_neither_hides_nor_makes_a_copy(name, found):
    words = QUESTION.split()
    marks = [HIDING[name].format(f"word{i}") for i in range(len(words))]
    hiding = " ".join(part for pair in zip(words, marks, strict=True) for part in pair)
    halved = " ".join(words[i] if i % 2 else HIDING[name].format(words[i]) for i in range(len(words)))
    rows = [f"<p>So: {hiding}</p>", f"<p>So: {halved}</p>"]
    lexical = found({"a.jsonl": rows}, [{"question": QUESTION}])
    (row,) = lexical.matches.to_pylist()
    assert (row["document_id"], row["overlap"]) == ("a.jsonl#0", 1.0)
    assert rows[0][row["start"] : row["stop"]] == hiding[: hiding.index("May?") + 3]


def test_a_copy_in_a_comment_is_found_there_as_is_one_in_an_item_of_code(found):
    code = f"<p>Say:</p><script>say('{QUESTION}')</script><!-- {ANSWER} -->"
    rows = [f"<p>Nothing here.</p><!-- {QUESTION} --><p>The end.</p>", f"Now: {code}"]
    lexical = found({"a.jsonl": rows}, [{"id": "plain", "question": QUESTION}, {"id": "code", "question": code}])
    matches = [row for row in lexical.matches.to_pylist() if row["kind"] == COPY]
    texts = {(row["item_id"], rows[row["place"] > 0][row["start"] : row["stop"]]) for row in matches}
    copies = {(item, QUESTION[:-1]) for item in ("plain", "code")}  # the code item's in the first row's comment too
    assert texts == {*copies, ("code", f"say('{QUESTION[:-1]}"), ("code", ANSWER[:-1])}


def test_excerpts_show_what_stands_around_a_copy(found):
    long = " ".join(f"{word}{i}" for i in range(20) for word in QUESTION.split()[:10])
    texts = ["é" * 100 + f" {QUESTION} " + "after " * 100, f"{'before ' * 20}{long}"]
    lexical = found({"a.jsonl": texts}, [{"question": QUESTION}, {"question": long}])
    short, cut = sorted(lexical.matches.to_pylist(), key=lambda row: row["document_id"])
    for row, text in ((short, texts[0]), (cut, texts[1])):
        assert row["excerpt_start"] == row["start"] - 80
        assert text[row["excerpt_start"] :].startswith(row["excerpt"])
    assert short["excerpt_start"] + len(short["excerpt"]) == short["stop"] + 80
    assert len(cut["excerpt"]) == 600


def test_answers_choices_prompts_and_chats(found, tmp_path):
    items = [
        {"id": "free", "question": "Why so?", "answer": ANSWER},
        {"id": "choice", "question": "Which one?", "choices": ["yes", ANSWER.replace("She", "He")], "answer": 0},
    ]
    rows = [
        {"prompt": "Tell me. " + ANSWER, "completion": "no"},
        {"prompt": "x", "completion": ANSWER.replace("She", "He")},
    ]
    lexical = found({"a.jsonl": rows}, items)
    places = {(r["item_id"], r["field"], r["part"]) for r in lexical.matches.to_pylist() if r["overlap"] == 1}
    assert places == {("free", "answer", "prompt"), ("choice", "choice 2", "answer")}


def test_short_items_are_joined_or_told(found):
    items = [
        {"id": "joined", "question": "Who wrote Emma?", "answer": "Jane Austen did"},
        {"id": "short", "question": "Two plus two?", "answer": "4"},
    ]
    lexical = found({"a.jsonl": ["who wrote emma: Jane Austen did!", "two plus two? 4"]}, items)
    assert [(r["item_id"], r["field"]) for r in lexical.matches.to_pylist()] == [("joined", "whole")]
    assert len(lexical.short) == 1


def test_a_share_of_a_field_is_weighed_by_rarity(found):
    words = QUESTION.split()
    half = " ".join(words[:15])
    common = [f"how many clips did Natalia {i}" for i in range(20)]
    lexical = found({"a.jsonl": [half, *common]}, [{"question": QUESTION, "answer": ""}])
    (row,) = lexical.matches.to_pylist()
    assert 0.5 < row["overlap"] < 0.7  # 15 of 29 words, and the other half's words are in more documents
    assert row["kind"] == COPY
    lexical = found({"a.jsonl": [half, *common]}, [{"question": QUESTION, "answer": ""}], overlap=0.8)
    assert lexical.matches["kind"][0].as_py() == "part"


@pytest.mark.parametrize("unrelated", [0, 50])
@pytest.mark.parametrize("copies", [1, 2, 5, 50])
def test_copies_with_a_word_changed_are_found_however_many_of_the_documents_hold_them(copies, unrelated, found):
    words = [f"word{i}" for i in range(21)]
    items = [{"question": " ".join(words)}, {"question": " ".join([*words[:5], "changed", *words[6:]])}]
    rows = [f"{i} {' '.join([*words[:10], 'other', *words[11:]])}" for i in range(copies)]
    lexical = found({"a.jsonl": [*rows, *(f"unrelated text {i}" for i in range(unrelated))]}, items)
    assert lexical.matches["kind"].to_pylist() == [COPY] * len(lexical.matches)
    assert len(lexical.matches) == 3 * copies  # both halves of the first item, and the second half of the other
    assert 0.3 < min(lexical.overlaps.values()) < 0.7 < max(lexical.overlaps.values())


@pytest.mark.parametrize("documents", [1000, 10**6, 10**9])
def test_words_of_boilerplate_weigh_little_in_large_corpora(documents):
    text = "which of the following is the best way to describe the kinetochore of a saccharomyces cerevisiae spindle"
    field = ngrams.Field("k", "question", text, split(text), 8)
    common = "which of the following is best way to describe a".split()
    holding = {**dict.fromkeys(common, documents // 2), "spindle": 1}
    weighing = channel._Weighing({("k", "question"): field}, set(), holding, documents, ScanConfig())
    run = {"key": "k", "field": "question", "source": "s", "file": "f", "place": 0, "first_word": 0, "stop_word": 8}
    run |= {"near": False, "part": "text", "start": 0, "stop": 40}
    (row,) = weighing.weigh([run])
    assert row["overlap"] < 0.21  # all words alike: 0.44
    assert row["kind"] != COPY


def test_boilerplate_is_left_out_and_counted_but_many_copies_are_none(found):
    opening = "the following are multiple choice questions with answers about all of"
    items = [
        {"id": f"q{i}", "question": f"{opening} {topic}", "answer": ""}
        for i, topic in enumerate([QUESTION, QUESTION.replace("Natalia", "Weng").replace("clips", "apples")])
    ]
    files = {f"{name}.jsonl": [f"{opening} law {i}" for i in range(4)] for name in "abc"}
    files["a.jsonl"] += [items[0]["question"]] * 12
    files["b.jsonl"] += [items[0]["question"]] * 12
    lexical = found(files, items, words=8)
    assert lexical.boilerplate == 8  # of either item, 11 words of it in n-grams of 8
    assert lexical.filtered >= 12
    findings = lexical.matches.filter(pc.equal(lexical.matches["kind"], COPY))
    assert set(findings["item_id"].to_pylist()) == {"q0"}
    assert findings.num_rows >= 24


def test_n_grams_of_too_many_items_are_left_out(monkeypatch):
    monkeypatch.setattr(ngrams, "COMMON", 3)
    items = [Item(f"k{i}", "s", f"i{i}", "f", i, f"one two three four five six seven x{i}", (), "") for i in range(5)]
    index = Index([field for item in items for field in fields_of(item, 6, 4)])
    assert index.common == 4  # n-grams of four words in the first seven
    numbers = numbering(index).numbers("one two three four five six seven x3")[0]
    assert [index.fields[run.field].key for run in index.find(numbers)] == ["k3"]


def test_every_copy_is_found_and_the_first_have_excerpts(found, monkeypatch):
    monkeypatch.setattr(search, "MOST", 2)
    rows = [{"text": f"{i}: {QUESTION}"} for i in range(5)] + [{"text": " ".join(QUESTION.split()[:14])}]
    files = {"a.jsonl": rows, "bad.jsonl": [{"other": 1}]}
    lexical = found(files, [{"question": QUESTION, "answer": ""}], overlap=0.9)
    matches = lexical.matches.to_pylist()
    assert [bool(row["excerpt"]) for row in matches] == [True, True, False, False, False]
    assert {(row["overlap"], row["kind"]) for row in matches} == {(1.0, COPY)}
    assert [rows[i]["text"][row["start"] : row["stop"]] for i, row in enumerate(matches)] == [QUESTION[:-1]] * 5
    assert len({row["document_id"] for row in matches}) == 5
    assert (lexical.beyond, lexical.rejected) == (4, 1)
    assert "bad.jsonl" in lexical.rejects[0]


def test_boilerplate_is_left_out_of_what_has_no_excerpt(found, monkeypatch):
    monkeypatch.setattr(search, "MOST", 5)
    opening = "the following are multiple choice questions with answers about all of"
    files = {f"{name}.jsonl": [f"{opening} law {i}" for i in range(8)] for name in "abc"}
    files["a.jsonl"] += [f"{opening} {QUESTION}"] * 12
    lexical = found(files, [{"question": f"{opening} {QUESTION}"}], words=8)
    findings = lexical.matches.filter(pc.equal(lexical.matches["kind"], COPY))
    assert set(findings["source"].to_pylist()) == {"a.jsonl"}
    assert len(findings) == 12
    assert lexical.filtered == 24


def test_strings_of_a_chat_are_parts(found):
    turns = [
        {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": ANSWER},
    ]
    lexical = found({"a.jsonl": [{"messages": turns}]}, [{"question": QUESTION, "answer": ANSWER}])
    places = {(row["field"], row["part"]) for row in lexical.matches.to_pylist() if row["overlap"] == 1}
    assert places == {("question", "messages.0.content.0.text"), ("answer", "messages.1")}


def test_adjusted_p_values_are_those_of_scipy():
    from scipy.stats import false_discovery_control

    rng = np.random.default_rng(0)
    for n in (1, 2, 50):
        p = np.concatenate([rng.random(n), rng.random(n) / 100])
        np.testing.assert_allclose(adjusted(p), false_discovery_control(p, method="bh"))
    assert adjusted(np.zeros(0)).shape == (0,)


def test_p_values_count_controls_and_go_on_beyond_them():
    rng = np.random.default_rng(1)
    for draw, most in ((rng.normal, 1.1), (rng.logistic, 1.5)):  # the second's tail is what is fitted
        drawn = np.concatenate([p_values(draw(size=500), draw(size=200)) for _ in range(200)])
        for level in (0.05, 0.01, 0.001):
            assert 0.3 * level < (drawn <= level).mean() < most * level
    controls, items = rng.normal(size=200), rng.normal(size=5000)
    assert p_values(np.array([np.nan, controls.max() + 9]), controls) == pytest.approx([1.0, 0.0], abs=1e-3)
    assert p_values(np.array([1e9]), controls)[0] > 0
    assert p_values(np.array([1e9]), controls[:15])[0] == pytest.approx(1 / 16)  # too few for a tail
    assert p_values(np.array([1.0]), np.array([np.nan, 2.0])) == pytest.approx([1.0])
    assert (p_values(items, controls) > 0).all()


def test_values_are_measured_in_the_controls_spread():
    values = np.array([1.0, 2.0, 3.0, 4.0, np.nan, 10.0])
    control = np.array([True, True, True, True, True, False])
    assert standardised(values, control)[5] == pytest.approx((10 - 2.5) / 1.4826)
    assert np.isnan(standardised(values, control)[4])
    assert standardised(np.array([1.0, 1.0, 3.0]), np.array([True, True, False]))[2] == 2.0  # no spread
    assert np.isnan(standardised(values, ~control & False)).all()


def test_q_values_keep_the_false_discovery_rate_where_half_is_leaked_and_where_nothing_is():
    rng = np.random.default_rng(0)
    shares, found = [], 0
    for _ in range(200):
        p = np.concatenate([rng.random(100), 0.02 * rng.random(100)])
        hits = q_values(p) <= 0.05
        shares.append(hits[:100].sum() / max(1, hits.sum()))
        found += hits.sum() > (adjusted(p) <= 0.05).sum()
    assert 0.03 < np.mean(shares) < 0.055
    assert found > 150
    assert np.mean([(q_values(rng.random(100)) <= 0.05).any() for _ in range(400)]) < 0.08
    assert q_values(np.array([0.01, 0.2])) == pytest.approx([0.02, 0.2])
