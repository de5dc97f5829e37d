"""The closed loop on the tiny run: arms of equal size, honest halves, resume, and the job."""

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import answered, run_plainly, write_lines
from test_select import with_options
from transformers import AutoModelForCausalLM

from stride_ray.attribution.attribute import stored_queries
from stride_ray.corpus.blocks import Blocks, document_shares
from stride_ray.corpus.tokenization.tokenizer import load_tokenizer
from stride_ray.evaluate.closed_loop import answer_f1 as unigram
from stride_ray.evaluate.closed_loop.answer_f1 import answer_f1, has_answers, unigram_f1
from stride_ray.evaluate.closed_loop.arms import F1, FOLDERS, LOSS, arm_benchmark, closed_loop, compare_arms
from stride_ray.evaluate.retraining.finetune import FineTune
from stride_ray.evaluate.retraining.lds import mean_interval
from stride_ray.evaluate.word_counts import similar_blocks
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run
from stride_ray.runtime.storage import Store

JOBS = Path(__file__).parent.parent / "jobs"
ARMS = {"selected", "random", "TF-IDF"}
RECIPE = """
from stride_ray.evaluate.retraining.finetune import FineTune

def make(benchmark):
    return FineTune(benchmark, epochs=2, batch=4, warmup_steps=2, learning_rate=0.01)
"""


@pytest.fixture(scope="module")
def attributed(parts, sharded, tmp_path_factory):
    """A run with a set of questions and answers on one subject, and one of texts; and a recipe that takes seconds."""
    root = tmp_path_factory.mktemp("loop")
    patch = pytest.MonkeyPatch()
    run_plainly(patch)
    try:
        asked = [
            {"id": f"q{i}", "prompt": "the anchor met", "completion": f" the {w}"}
            for i, w in enumerate("gull tide wave sail keel storm".split())
        ]
        questions = write_lines(root / "questions.jsonl", asked)
        run, _, _ = answered(sharded("loop"), _with(parts, questions))
    finally:
        patch.undo()
    (root / "recipe.py").write_text(RECIPE)
    return run, f"{root / 'recipe.py'}:make"


def _with(parts, queries):
    return type(parts)(**{**vars(parts), "queries": queries})


@pytest.fixture(scope="module")
def found(attributed, one_ray, tmp_path_factory):
    """A closed loop through Ray."""
    run, recipe = attributed
    out = tmp_path_factory.mktemp("closed") / "out"
    one_worker = Run(run.url, run.config, {"select.tokens": 0.3, "compute.workers": 1})
    return out, closed_loop(one_worker, ["asked"], str(out), seeds=2, recipe=recipe)


def test_arms_are_of_equal_size_and_measured_on_queries_that_did_not_select(found):
    out, result = found
    asked = pq.read_table(out / "queries.parquet")["query_id"].to_pylist()
    assert (result.selected_by, result.measured_on, result.seeds, len(asked)) == (3, 3, 2, 3)
    stage = json.loads((out / "selected/selection.json").read_text())
    assert stage["targets"] == {"asked": 3}
    assert set(result.tokens) == ARMS
    assert all(0.2 < tokens / result.pool_tokens <= 0.3 for tokens in result.tokens.values())
    assert result.tokens["TF-IDF"] <= result.tokens["selected"]
    for measure in (LOSS, F1):
        assert set(result.arms[measure]) == ARMS
        assert all(each.low <= each.value <= each.high for each in result.arms[measure].values())
        differences = result.differences[measure]
        expected = result.arms[measure]["selected"].value - result.arms[measure]["random"].value
        assert differences["random"].value == pytest.approx(expected, abs=1e-6)
    table = result.as_table()
    assert "| selected |" in table
    assert "unigram F1" in table
    assert json.loads((out / "closed_loop.json").read_text())["seeds"] == 2


def test_losses_are_those_of_the_recipe_on_the_arms_blocks(attributed, found):
    out, _ = found
    run, _ = attributed
    benchmark = arm_benchmark(Store(str(out)), FOLDERS["TF-IDF"], run.config.model.path, "")
    recipe = FineTune(benchmark, epochs=2, batch=4, warmup_steps=2, learning_rate=0.01)
    torch.set_num_threads(1)
    losses = recipe.losses(recipe.train(np.arange(len(benchmark.blocks)), 1))
    stored = np.load(out / f"_retrain/losses/{found[1].trainings['TF-IDF'][1]}.npy")
    np.testing.assert_allclose(losses, stored, atol=1e-6)
    # The prompt is read and carries no loss.
    model = AutoModelForCausalLM.from_pretrained(run.config.model.path).eval()
    for loss, query in zip(recipe.losses(model), pq.read_table(out / "queries.parquet").to_pylist(), strict=True):
        ids, mask = torch.tensor([query["token_ids"]]), torch.tensor([query["loss_mask"]])
        assert not mask[0, 0]
        with torch.no_grad():
            expected = model(input_ids=ids, labels=ids.masked_fill(~mask, -100)).loss
        assert loss == pytest.approx(float(expected), abs=1e-5)


def test_the_lexical_arm_is_what_lexical_search_finds(attributed, found):
    out, _ = found
    run, _ = attributed
    kept = pq.read_table(out / "tfidf/manifest.parquet").to_pandas()
    chosen = set(json.loads((out / "tfidf/stage.json").read_text())["keys"]["targets"])
    assert chosen == {"asked"}
    asked = set(pq.read_table(out / "queries.parquet")["query_id"].to_pylist())
    selecting = [row for row in stored_queries(run, "asked").to_pylist() if row["query_id"] not in asked]
    blocks = Blocks(run.stage("blocks").store)
    tops = similar_blocks(blocks, (row["token_ids"] for row in selecting), 1)
    first = set()
    for top in tops:
        first |= {name for _, name in document_shares(blocks.take(top, ["spans"]))[1]}
    assert kept.set_index("document_id").loc[sorted(first), "best_rank"].min() == 1
    assert kept["score"].dropna().is_monotonic_increasing


def test_a_rerun_trains_what_is_missing_and_a_plain_loop_agrees(attributed, found, tmp_path, monkeypatch):
    run, recipe = attributed
    _, result = found
    run_plainly(monkeypatch)
    out = tmp_path / "out"
    options = with_options(run, tokens=0.3)
    one = closed_loop(options, ["asked"], str(out), seeds=1, recipe=recipe)
    before = {path: path.stat().st_mtime_ns for path in (out / "_retrain/losses").iterdir()}
    assert len(before) == 3
    assert closed_loop(options, ["asked"], str(out), seeds=2, recipe=recipe) == result
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert one.arms[LOSS]["selected"] != result.arms[LOSS]["selected"]


def test_rivals_select_by_their_own_scores_of_documents(attributed, tmp_path, monkeypatch):
    run, recipe = attributed
    run_plainly(monkeypatch)
    out, options = tmp_path / "out", with_options(run, tokens=0.3)
    alone = closed_loop(options, ["asked"], str(out), seeds=1, recipe=recipe, rivals=[])
    assert set(alone.arms[LOSS]) == {"selected", "random"}
    before = {path: path.stat().st_mtime_ns for path in (out / "_retrain/losses").iterdir()}
    found = closed_loop(options, ["asked"], str(out), seeds=1, recipe=recipe, rivals=["dsdm", "less", "dsir"])
    assert set(found.arms[LOSS]) == {"selected", "random", "DSIR", "LESS", "DsDm"}
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert all(0 < tokens <= found.tokens["selected"] for tokens in found.tokens.values())
    # DsDm takes the documents with the largest mean of TRAK's scores, summed over a document's blocks by its shares.
    scores = np.load(out / "_rivals/scores-dsdm.npz")["scores"]
    blocks = Blocks(run.stage("blocks").store)
    rows, names, shares = document_shares(blocks.take(np.arange(len(blocks)), ["spans"]))
    expected = Counter()
    for row, name, share in zip(rows, names, shares, strict=True):
        expected[name] += float(scores[:, row].mean() * share)
    kept = pq.read_table(out / "dsdm/manifest.parquet").to_pylist()
    assert [(each["source"], each["document_id"]) for each in kept] == sorted(expected, key=expected.get, reverse=True)
    assert [each["score"] for each in kept] == pytest.approx(sorted(expected.values(), reverse=True), rel=1e-6)
    assert len(list((out / "_rivals/checkpoints").iterdir())) == 4  # three epochs and the claim


def test_what_cannot_be_compared_is_told(attributed, tmp_path, monkeypatch):
    run, _ = attributed
    run_plainly(monkeypatch)
    options, out = with_options(run, tokens=0.3), str(tmp_path / "out")
    for call, told in (
        (lambda: closed_loop(options, ["asked"], out, measure=["asked"]), "is to select and to measure"),
        (lambda: closed_loop(options, ["asked"], out, seeds=0), "0 seeds make no model"),
        (lambda: closed_loop(options, ["asked"], out, rivals=["trek"]), "Unknown rival 'trek'; known are tfidf, bm25"),
        (lambda: closed_loop(options, ["other"], out), "is not finished"),
        (lambda: closed_loop(with_options(run, tokens=1), ["asked"], f"{out}-one"), "Nothing was selected"),
        (lambda: compare_arms(run, {"asked": ["q0"]}, {"asked": ["q1"]}, out), "Say how much to take"),
        (lambda: closed_loop(options, ["asked"], out, recipe="nothing"), "is not package.module:attribute"),
    ):
        with pytest.raises(StrideError, match=told):
            call()


def test_unigram_f1_and_answers(parts, monkeypatch):
    assert unigram_f1("The cat", "the CAT") == 1
    assert unigram_f1("a b b c", "b b d") == pytest.approx(2 * 2 / 7)
    assert unigram_f1("", "x") == unigram_f1("", "") == 0
    tokenizer = load_tokenizer(str(parts.model))
    model = AutoModelForCausalLM.from_pretrained(parts.model)
    prompt, rest = tokenizer("the anchor met")["input_ids"], None
    with torch.no_grad():
        rest = model.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=0
        )[0, len(prompt) :].tolist()
    query = {"token_ids": [*prompt, *rest], "loss_mask": [False] * len(prompt) + [True] * len(rest)}
    other = {**query, "token_ids": [*prompt, *tokenizer(" zebra")["input_ids"]]}
    other["loss_mask"] = [False] * len(prompt) + [True] * (len(other["token_ids"]) - len(prompt))
    assert has_answers([query, other])
    assert not has_answers([query, {"token_ids": [1, 2], "loss_mask": [True, True]}])
    monkeypatch.setattr(unigram, "LONGEST", 6)
    assert answer_f1(model, tokenizer, [query, other]).tolist() == [1, 0]


def test_an_interval_covers_queries_and_seeds():
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, (1, 400)) + rng.normal(0, 1, (40, 1)) + rng.normal(0, 0.1, (40, 400))
    figure = mean_interval(values)
    assert figure.low < figure.value < figure.high
    # Variances of the two means add: 1/40 and 1/400.
    assert figure.high - figure.low == pytest.approx(2 * 1.96 * np.sqrt(1 / 40 + 1 / 400), rel=0.2)


def test_the_job_and_that_it_does_not_hide_the_standard_librarys_select(
    attributed, found, monkeypatch, capsys, tmp_path
):
    run, recipe = attributed
    out, result = found
    spec = importlib.util.spec_from_file_location("select_job", JOBS / "select.py")
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    run_plainly(monkeypatch)
    command = [run.url, "--name", "asked", "--tokens", "0.3"]
    assert job.main([*command, "--out", str(out), "--retrain", "--seeds", "2", "--recipe", recipe]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["measured_on"] == result.measured_on
    assert job.main([*command, "--out", str(tmp_path / "plain")]) == 0
    assert "documents" in capsys.readouterr().out
    assert job.main([*command, "--out", str(out), "--retrain", "--seeds", "0"]) == 1
    assert "0 seeds make no model" in capsys.readouterr().err
    # Every script in the folder has it first on its path.
    code = f"import sys; sys.path.insert(0, {str(JOBS)!r}); import select, selectors, subprocess; print(select.select)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "built-in function select" in done.stdout
