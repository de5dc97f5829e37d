"""Contrasts: why one completion rather than another, from the file to the tables."""

import io
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import documents, run_plainly, save_tokenizer, settings, write_lines

from stride_ray.attribution.attribute import attribute, read_influence
from stride_ray.attribution.respond import respond
from stride_ray.corpus.queries import read_queries
from stride_ray.evaluate.closed_loop.arms import compare_arms
from stride_ray.evaluate.tailpatch import tail_patch
from stride_ray.evaluate.verify import verify
from stride_ray.operators.fit import fit
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run

PROMPT, ONE, OTHER = "the anchor met", " the tide and the gull", " a butter and an oven"
ASKED = [
    {"id": "one", "prompt": PROMPT, "completion": ONE},
    {"id": "other", "prompt": PROMPT, "completion": OTHER},
    {"id": "contrast", "prompt": PROMPT, "completion": ONE, "contrast": OTHER},
    {"id": "itself", "prompt": PROMPT, "completion": ONE, "rejected": ONE},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), documents(4), chat=True)


def read(tmp_path, tokenizer, rows):
    """Each query's texts, split into what carries no loss and what does, and its error."""
    found = read_queries(write_lines(tmp_path / "q.jsonl", rows), tokenizer).to_pylist()

    def split(ids, mask):
        if not ids:
            return None
        both = ([i for i, m in zip(ids, mask, strict=True) if m is counts] for counts in (False, True))
        return tuple(tokenizer.decode(each).removesuffix("<|endoftext|>") for each in both)

    sides = [
        (split(row["token_ids"], row["loss_mask"]), split(row["contrast_ids"], row["contrast_mask"])) for row in found
    ]
    return sides, [row["error"] for row in found]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": PROMPT, "completion": ONE, "contrast": OTHER},
        {"prompt": PROMPT, "answer": ONE, "rejected": OTHER},
        {"prompt": PROMPT, "chosen": ONE, "rejected": OTHER},
        {"chosen": PROMPT + ONE, "rejected": PROMPT + OTHER},
        {"text": PROMPT + ONE, "contrast": PROMPT + OTHER},
    ],
)
def test_the_forms_of_preference_data(tmp_path, tokenizer, row):
    sides, errors = read(tmp_path, tokenizer, [row])
    assert errors == [None]
    (first, second), *_ = sides
    assert (first[0].strip(), second[0].strip()) == (PROMPT, PROMPT)
    assert (first[1].strip(), second[1].strip()) == (ONE.strip(), OTHER.strip())


def test_conversations(tmp_path, tokenizer):
    user = {"role": "user", "content": "the anchor"}
    says = [{"role": "assistant", "content": text.strip()} for text in (ONE, OTHER)]
    rows = [
        {"chosen": [user, says[0]], "rejected": [user, says[1]]},
        {"prompt": [user], "chosen": says[:1], "rejected": says[1:]},
    ]
    for each in rows:
        ((first, second),), errors = read(tmp_path, tokenizer, [each])
        assert errors == [None]
        assert first[0] == second[0]
        assert ONE.split()[1] in first[1]
        assert OTHER.split()[1] in second[1]


def test_what_both_begin_with_carries_no_loss_unless_one_would_have_none(tmp_path, tokenizer):
    rows = [
        {"prompt": PROMPT, "completion": " the tide and the gull", "contrast": " the tide and the oven"},
        {"prompt": PROMPT, "completion": ONE, "contrast": ONE},
        {"prompt": PROMPT, "completion": ONE, "contrast": None},
    ]
    sides, errors = read(tmp_path, tokenizer, rows)
    assert errors == [None] * 3
    assert [side[1].split()[0] for side in sides[0]] == ["gull", "oven"]
    assert sides[1][0] == sides[1][1]
    assert sides[1][0][1].strip().startswith("the tide")
    assert sides[2][1] is None


def test_a_contrast_that_cannot_be_asked_fails_alone(tmp_path, tokenizer):
    rows = [
        {"prompt": PROMPT, "completion": ONE, "contrast": 7},
        {"prompt": PROMPT, "completion": ONE, "contrast": [{"role": "user"}]},
        {"token_ids": [1, 2, 3], "contrast": "a"},
        {"text": "the tide", "contrast": "a"},
        {"prompt": PROMPT, "completion": ONE, "contrast": OTHER},
    ]
    _, errors = read(tmp_path, tokenizer, rows)
    assert errors[0] == "q.jsonl, row 1: 'contrast' is a number, not a string"
    assert errors[1].startswith("q.jsonl, row 2: 'contrast' is a list and 'prompt' is a string")
    assert errors[2] == "q.jsonl, row 3: 'contrast' needs a prompt and completion, messages or text beside it"
    assert errors[3].startswith("what it is contrasted with has 1 token(s); a loss needs at least two")
    assert errors[4] is None


@pytest.fixture(scope="module")
def attributed(parts, sharded, tmp_path_factory):
    """A run with exact influence on the two completions and their contrasts, unsolved so that they add up."""
    patch = pytest.MonkeyPatch()
    run_plainly(patch)
    try:
        queries = write_lines(tmp_path_factory.mktemp("contrasts") / "asked.jsonl", ASKED)
        more = {"attribute__exact": True, "solve__steps": 0, "attribute__negative_scale": 1.0}
        run = Run(str(sharded("contrasts")), changes=settings(parts, **more))
        out = io.StringIO()
        summary = attribute(run, queries, "asked", out)
    finally:
        patch.undo()
    return run, queries, summary, out.getvalue()


def by_query(run, name="asked"):
    """Influence by query, (N,) each."""
    table = read_influence(run, name).to_pandas()
    return {
        query: rows.set_index("ordinal")["influence"].sort_index().to_numpy()
        for query, rows in table.groupby("query_id")
    }


def test_influence_on_a_contrast_is_the_difference(attributed):
    run, _, summary, printed = attributed
    assert summary["failed"] == 0
    found = by_query(run)
    np.testing.assert_allclose(found["contrast"], found["one"] - found["other"], rtol=1e-4, atol=1e-5)
    assert np.abs(found["contrast"]).max() > 0.01
    losses = {row["query_id"]: row["base_loss"] for row in read_influence(run, "asked", "recovery").to_pylist()}
    assert losses["contrast"] == pytest.approx(losses["one"] - losses["other"], abs=1e-5)
    # A completion contrasted with itself has no influence from anything.
    assert not found.get("itself", np.zeros(1)).any()
    assert losses["itself"] == 0
    page = (run.store.child("exact/asked").read("page.html")).decode()
    assert re.search(r'"contrast": ?" a butter and an oven', page)
    assert "the tide and the gull<|endoftext|> rather than a butter and an oven" in printed


def test_tail_patch_measures_both_completions(attributed, monkeypatch):
    run, *_ = attributed
    run_plainly(monkeypatch)
    found = tail_patch(run, "asked", k=3, learning_rate=0.001)
    base = dict(zip(found.query_ids, found.base, strict=True))
    assert base["contrast"] == pytest.approx(base["one"] - base["other"], abs=1e-4)
    assert base["itself"] == 0


def test_what_measures_one_loss_refuses(attributed, tmp_path, monkeypatch):
    run, *_ = attributed
    run_plainly(monkeypatch)
    with pytest.raises(StrideError, match="Query 'contrast' is a contrast of two completions, and verify measures"):
        verify(run, "asked")
    chosen, asked = {"asked": ["one"]}, {"asked": ["contrast"]}
    with pytest.raises(StrideError, match="Query 'contrast' is a contrast of two completions, and a closed loop"):
        compare_arms(Run(run.url, run.config, {"select.tokens": 0.3}), chosen, asked, str(tmp_path / "out"))


@pytest.mark.parametrize("mode", ["linear", "exact"])
def test_responses_of_the_papers_forms_are_differences(parts, sharded, attributed, mode, tmp_path, monkeypatch):
    run_plainly(monkeypatch)
    run = Run(str(sharded(f"steered-{mode}")), changes=settings(parts, respond__mode=mode))
    fit(run)
    respond(run, attributed[1], "asked")
    found = {row["query_id"]: row for row in run.store.read_table("responses/asked/part-00000.parquet").to_pylist()}
    y = {name: np.array(row["response"]) for name, row in found.items()}
    np.testing.assert_allclose(y["contrast"], y["one"] - y["other"], rtol=1e-4, atol=1e-6)
    assert not y["itself"].any()
    assert found["contrast"]["base_loss"] == pytest.approx(found["one"]["base_loss"] - found["other"]["base_loss"])


def test_the_default_answers_contrasts(parts, sharded, attributed, monkeypatch):
    run_plainly(monkeypatch)
    changes = settings(parts, operators__form="sites", attribute__candidates=-1)
    run = Run(str(sharded("default")), changes=changes)
    summary = attribute(run, attributed[1], "asked", io.StringIO())
    assert (summary["mode"], summary["failed"]) == ("estimated", 0)
    found = by_query(run)
    assert np.abs(found["contrast"]).max() > 0.01
    assert not found.get("itself", np.zeros(1)).any()


def test_parquet_with_contrasts_in_some_rows(tmp_path, tokenizer):
    table = pa.table({"prompt": [PROMPT] * 2, "completion": [ONE] * 2, "rejected": [OTHER, None]})
    pq.write_table(table, tmp_path / "q.parquet")
    found = read_queries(str(tmp_path / "q.parquet"), tokenizer).to_pylist()
    assert [row["contrast_ids"] is None for row in found] == [False, True]
