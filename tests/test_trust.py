"""The trust panel: halves of real operators agree, of noise they do not, and the verdict says so."""

import dataclasses
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import SUBJECTS, run_plainly, settings, write_lines

from stride_ray.attribution.attribute import attribute
from stride_ray.attribution.lasso.recovery import Recovery, recover
from stride_ray.evaluate.split_halves import some_rows, sparse_spearman
from stride_ray.evaluate.trust import Trust, _judged, _mean_query_overlap, trust
from stride_ray.operators.fit import fit
from stride_ray.operators.membership import Membership
from stride_ray.operators.stored import load_operators, save_operators
from stride_ray.runtime.run import Run

sys.path.insert(0, str(Path(__file__).parents[1] / "jobs"))
import trust as job


@pytest.fixture(scope="module")
def queries(tmp_path_factory):
    rows = []
    for subject, words in SUBJECTS.items():
        each = words.split()
        rows += [
            {"id": f"{subject}{i}", "text": f"the {each[i]} met the {each[i + 1]} and the {each[i + 2]}."}
            for i in range(3)
        ]
    return write_lines(tmp_path_factory.mktemp("trust") / "queries.jsonl", rows)


@pytest.fixture(scope="module")
def estimated(parts, queries, sharded):
    """A run of enough subsets for its halves to be worth something."""
    with pytest.MonkeyPatch.context() as patch:
        run_plainly(patch)
        run = Run(str(sharded("many")), changes=settings(parts, membership__subsets=96, membership__degree=12))
        fit(run)
        attribute(run, queries, "asked", io.StringIO())
    return run


def test_halves_of_real_operators_agree_and_shuffled_ones_do_not(estimated):
    found = trust(Run(estimated.url, changes={"compute.workers": 1}), "asked")  # through Ray
    assert found.halves.spearman > found.halves.control_spearman + 0.05
    assert found.halves.overlap > found.halves.control_overlap
    assert found.halves.p == pytest.approx(0.05)
    assert found.level in ("good", "weak")
    assert found.as_table().endswith(found.verdict)
    assert "WARNING" not in found.fit


def test_noise_is_called_none(estimated, queries, tmp_path, monkeypatch):
    run_plainly(monkeypatch)
    for stage in ("blocks", "operators"):
        shutil.copytree(Path(estimated.url) / stage, tmp_path / "noise" / stage)
    shutil.copy(Path(estimated.url) / "run.toml", tmp_path / "noise")
    run = Run(str(tmp_path / "noise"), changes={"attribute.exact": False})
    store = run.stage("operators").store
    operators, facts = load_operators(store)
    noise = torch.randn(operators.A.shape, generator=torch.Generator().manual_seed(3)) * operators.A.std()
    kept = {key: value for key, value in facts.items() if key not in ("basis", "subsets", "scale")}
    save_operators(store, dataclasses.replace(operators, A=noise), kept)
    attribute(run, queries, "asked", io.StringIO())
    found = trust(run, "asked")
    assert found.learned  # says the fit; the halves know better
    assert found.level == "none"
    assert "by chance" in found.verdict


def test_the_exact_answer_is_held_against_lexical_search_and_the_estimated_one(
    estimated, parts, queries, monkeypatch, capsys
):
    run_plainly(monkeypatch)
    run = Run(estimated.url, changes={"attribute.exact": True})
    attribute(run, queries, "asked", io.StringIO())
    found = trust(run, "asked")
    assert found.halves is None
    assert found.other_mode > 2 * found.chance
    assert trust(estimated, "asked").other_mode > 2 * found.chance
    assert found.lexical > found.chance
    assert found.level == "plausible"
    assert job.main([estimated.url, "--name", "asked", "--exact"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["level"] == "plausible"
    assert lines[-2].startswith("Trust: plausible, because")
    assert job.main([estimated.url, "--name", "nothing"]) == 1
    assert "is not finished" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["regular", "bernoulli"])
def test_some_rows_are_those_rows(form):
    whole = Membership(40, 6, 5, form)
    rows = np.sort(np.random.default_rng(0).permutation(40)[:19])
    half = some_rows(whole, rows)
    M = whole.matrix(0, 30).toarray()[rows]
    assert np.array_equal(half.sizes(30), M.sum(axis=1))
    y = M @ np.eye(30)[7] * 2.0 + 1.0
    (found,) = recover(y[None], half, 30, ratio=1e-3)
    assert found.gap <= 1e-9
    assert found.ordinals[np.argmax(found.weights)] == 7
    assert found.weights.max() == pytest.approx(2.0, rel=0.02)


def test_sparse_spearman_is_scipy_s():
    rng = np.random.default_rng(1)
    for size in (1, 5, 20):
        dense = np.zeros((2, 30))
        for row in dense:
            row[rng.permutation(30)[:size]] = np.round(rng.normal(0, 2, size), 1) + 0.01
        one, two = (Recovery(np.flatnonzero(row), row[row != 0], 0.0, 0.0, 0.0, 1) for row in dense)
        assert sparse_spearman(one, two, 30) == pytest.approx(scipy.stats.spearmanr(*dense).statistic)
    nothing = Recovery(np.zeros(0, int), np.zeros(0), 0.0, 0.0, 0.0, 1)
    assert sparse_spearman(nothing, two, 30) == 0.0


def test_the_verdict_s_other_branches():
    tops = {"a": np.array([1, 2]), "b": np.array([2, 3]), "c": np.array([4, 5])}
    assert _mean_query_overlap(tops) == pytest.approx(1 / 6)
    assert np.isnan(_mean_query_overlap({"a": np.array([1])}))
    panel = Trust("exact", 10, 0, 1000, "", True, None, None, 0.5, 0.001, 0.01, 0.1, 0.1)
    assert _judged(panel, True)[0] == "plausible"
    assert _judged(panel, False)[0] == "none"
    assert _judged(dataclasses.replace(panel, learned=False), True)[0] == "none"
    for change in ({"failed": 6}, {"lexical_p": 0.4}, {"between": 0.9}, {"lexical": 1.0}):
        assert _judged(dataclasses.replace(panel, **change), True)[0] == "weak"
    assert _judged(dataclasses.replace(panel, between=0.9, lexical_between=0.8), True)[0] == "plausible"
