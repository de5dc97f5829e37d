"""Influence distilled into a scorer: what it learns, how it is cross-validated, and what it selects elsewhere."""

import json
import runpy
import sys

import numpy as np
import pytest
from conftest import documents, run_plainly, settings, write_lines

from stride_ray.corpus.shard import shard
from stride_ray.corpus.tokenization.tokenizer import load_saved_tokenizer
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run
from stride_ray.runtime.storage import Store
from stride_ray.selection import distillation
from stride_ray.selection.distillation import QUERY, distill, scored_target
from stride_ray.selection.pool import pieces, reading
from stride_ray.selection.scorer import FEATURES, fit_scorer, read_scorer
from stride_ray.selection.select import select_by, target_of


def texts_with(counts, rng):
    """Texts of twenty words in which "sea" stands as often as told."""
    words = np.array(["mill", "corn", "barn", "hill", "goat", "milk"])
    return [" ".join(rng.permutation(["sea"] * n + rng.choice(words, 20 - n).tolist())) for n in counts]


def test_it_learns_a_word_and_says_how_well_on_documents_left_out():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 8, 200)
    found = fit_scorer(texts_with(counts, rng), counts * 0.1, 0)
    assert found.facts["correlation"] > 0.9
    assert len(found.facts["folds"]) == 5
    assert found.coefficients.shape == (FEATURES,)
    scores = found.scores(texts_with([0, 3, 7], rng))
    assert scores[0] < scores[1] < scores[2]
    noise = fit_scorer(texts_with(counts, rng), rng.normal(size=200), 0)
    assert abs(noise.facts["correlation"]) < 0.3


def test_what_cannot_be_learnt_from_is_refused():
    with pytest.raises(StrideError, match="A scorer needs 20 documents with influence or more, and there are 3"):
        fit_scorer(["a", "b", "c"], np.arange(3.0), 0)
    with pytest.raises(StrideError, match="All documents have the same influence"):
        fit_scorer(["a"] * 60, np.zeros(60), 0)
    with pytest.raises(StrideError, match=r"is not a scorer: it has no scorer\.json"):
        read_scorer(Store("nowhere"))


@pytest.fixture(scope="module")
def fitted(exactly, tmp_path_factory):
    """A scorer of the exact answer's influence: its folder, and itself."""
    folder = tmp_path_factory.mktemp("distilled") / "scorer"
    return folder, distill(exactly.run, [target_of(exactly.run, "asked")], str(folder))


@pytest.fixture(scope="module")
def elsewhere(parts, tmp_path_factory):
    """A run with other documents in several parts, which no model has read; tests only add scores."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for name, seed in (("a", 7), ("b", 8)):
        write_lines(folder / f"corpus/{name}.jsonl", [{"text": text} for text in documents(15, seed=seed)])
    run = Run(str(folder / "run"), changes=settings(parts, corpus__input=[str(folder / "corpus")]))
    with pytest.MonkeyPatch.context() as patch:
        run_plainly(patch)
        shard(run)
    return run


def test_it_is_read_as_it_was_written_and_the_same_each_time(exactly, fitted, tmp_path):
    folder, scorer = fitted
    again = read_scorer(Store(str(folder)))
    assert again.facts == json.loads(json.dumps(scorer.facts))
    assert np.array_equal(again.coefficients, scorer.coefficients)
    distill(exactly.run, [target_of(exactly.run, "asked")], str(tmp_path / "twice"))
    for name in ("scorer.json", "coefficients.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()
    assert scorer.facts["targets"] == {"asked": 3}


def test_another_corpus_is_scored_ranked_and_selected_from(fitted, elsewhere, tmp_path, plain):
    folder, scorer = fitted
    target = scored_target(elsewhere, str(folder))
    how, units = reading(elsewhere, as_blocks=True)
    tokenizer = load_saved_tokenizer(elsewhere.stage("blocks").store)
    found = [piece for part in range(len(units)) for piece in pieces(how, part, tokens=True)]
    expected = scorer.scores([tokenizer.decode(piece.ids) for piece in found])
    rows = [row for name in target.tables for row in target.store.read_table(name).to_pylist()]
    assert len(units) == len(target.tables) > 1
    assert [row["document_id"] for row in rows] == [piece.document_id for piece in found]
    assert [row["influence"] for row in rows] == pytest.approx(expected)
    best = [rows[i]["document_id"] for i in np.argsort(-expected, kind="stable")]
    assert [row["document_id"] for row in sorted(rows, key=lambda row: row["rank"])] == best
    options = Run(elsewhere.url, changes={"select.documents": 5})
    chosen = select_by(options, [target], str(tmp_path / "chosen"))
    assert chosen["kept"]["documents"] == 5
    manifest = Store(str(tmp_path / "chosen")).read_table("manifest.parquet").to_pylist()
    assert {row["document_id"] for row in manifest if row["kept"]} == set(best[:5])


def test_killed_and_run_again_it_ends_with_the_same_bytes(fitted, elsewhere, monkeypatch, plain):
    folder, _ = fitted
    target = scored_target(elsewhere, str(folder))
    whole = {name: target.store.read(name) for name in target.tables}
    for step in ("_score_part", "_rank"):
        target.store.remove("")
        work, calls = getattr(distillation, step), []

        def dying(*given, work=work, calls=calls):
            if calls:
                raise KeyboardInterrupt
            calls.append(1)
            return work(*given) if work.__name__ == "_score_part" else dying(*given)

        with monkeypatch.context() as patch:
            patch.setattr(distillation, step, dying)
            with pytest.raises(KeyboardInterrupt):
                scored_target(elsewhere, str(folder))
        assert {name: scored_target(elsewhere, str(folder)).store.read(name) for name in target.tables} == whole
    assert not target.store.names("_scores")


def test_by_its_job(exactly, elsewhere, tmp_path, capsys, monkeypatch):
    run_plainly(monkeypatch)

    def job(*arguments):
        monkeypatch.setattr(sys, "argv", ["distill.py", *arguments])
        with pytest.raises(SystemExit) as done:
            runpy.run_path("jobs/distill.py", run_name="__main__")
        return done.value.code, capsys.readouterr()

    scorer = str(tmp_path / "scorer")
    code, said = job("fit", str(exactly.folder), "--name", "asked", "--out", scorer)
    assert (code, json.loads(said.out.splitlines()[-1])["documents"]) == (0, 49)
    assert "Rank correlation with influence on documents left out: " in said.out
    chosen = str(tmp_path / "chosen")
    code, said = job("select", elsewhere.url, "--scorer", scorer, "--out", chosen, "--documents", "4")
    assert (code, json.loads(said.out.splitlines()[-1])["kept"]["documents"]) == (0, 4)
    assert QUERY in said.out
    code, said = job("select", elsewhere.url, "--scorer", str(tmp_path), "--out", chosen, "--documents", "4")
    assert (code, "is not a scorer" in said.err) == (1, True)
