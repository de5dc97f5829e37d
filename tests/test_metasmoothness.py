"""How straight a model moves with the data's weights: formula, built-in recipe, resuming, and what is refused."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from test_benchmark import write_benchmark

from stride_ray.evaluate.retraining.benchmark import read_benchmark
from stride_ray.evaluate.retraining.finetune import FineTune
from stride_ray.evaluate.retraining.metasmoothness import metasmoothness, smoothness
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.storage import Store

RECIPE = """
import numpy as np
import torch

from stride_ray.evaluate.retraining.finetune import FineTune


class Straight(FineTune):
    def train(self, rows, seed, weights=None):
        model = torch.nn.Linear(len(rows), 1, bias=False)
        model.weight.data = torch.tensor(weights).float().unsqueeze(0)
        return model


class Chaotic(FineTune):
    def train(self, rows, seed, weights=None):
        model = torch.nn.Linear(4000, 1, bias=False)
        rng = np.random.default_rng(int(1e9 * abs(weights.sum())) % 2**32)
        model.weight.data = torch.tensor(rng.standard_normal((1, 4000))).float()
        return model


class Spoilt(Straight):
    def train(self, rows, seed, weights=None):
        return super().train(rows, seed, weights / 0)


class Without(FineTune):
    def train(self, rows, seed):
        return None


class Short(FineTune):
    def __init__(self, benchmark):
        super().__init__(benchmark, epochs=2, batch=4, warmup_steps=2, learning_rate=0.003, bfloat16=False)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny benchmark, and a function that names a recipe."""
    root = tmp_path_factory.mktemp("metasmoothness")
    folder = write_benchmark(root / "made")
    (root / "recipe.py").write_text(RECIPE)
    return read_benchmark(folder), lambda name: f"{root / 'recipe.py'}:{name}"


def test_the_formula_counts_parameters_by_how_far_they_went():
    start, one, two = np.zeros(3), np.array([1.0, -1.0, 1.0]), np.array([2.0, -2.0, 0.5])
    assert smoothness(start, one, two) == pytest.approx((2 + 2 - 0.5) / 4.5)
    assert smoothness(start, one, one) == 0.0  # stopped
    assert np.isnan(smoothness(start, start, start))


def test_a_straight_recipe_has_one_and_a_chaotic_one_about_none(made, one_ray, tmp_path):
    benchmark, recipe = made
    straight = metasmoothness(benchmark, recipe("Straight"), str(tmp_path / "straight"), draws=2)
    assert straight["smoothness"] > 0.999
    assert "Metasmoothness 1.000 (2 draw(s) of weights, from 1.000 to 1.000; h = 0.1)" in straight["summary"]
    chaotic = metasmoothness(benchmark, recipe("Chaotic"), str(tmp_path / "chaotic"), draws=2)
    assert abs(chaotic["smoothness"]) < 0.2  # a step back is as likely as one on, longer ones are more often back


def test_the_built_in_recipe_takes_weights_and_a_rerun_trains_nothing(made, one_ray, tmp_path, monkeypatch):
    benchmark, recipe = made
    first = metasmoothness(benchmark, recipe("Short"), str(tmp_path / "out"), draws=1)
    assert 0.2 < first["smoothness"] <= 1.0
    store = Store(str(tmp_path / "out"))
    before = {name: store.read(name) for name in store.names(ending=".npy")}
    assert sorted(before) == ["draw-000-step-1.npy", "draw-000-step-2.npy", "start.npy"]
    store.remove("_done/draw-000-step-2.json")
    assert metasmoothness(benchmark, recipe("Short"), str(tmp_path / "out"), draws=1) == first
    assert {name: store.read(name) for name in store.names(ending=".npy")} == before
    monkeypatch.setattr(
        "stride_ray.evaluate.retraining.metasmoothness.map_tasks", lambda *_: pytest.fail("trained again")
    )
    assert metasmoothness(benchmark, recipe("Short"), str(tmp_path / "out"), draws=1) == first


def test_weights_of_one_are_no_weights_and_others_change_the_model(made):
    benchmark, _ = made
    short = FineTune(benchmark, epochs=1, batch=4, warmup_steps=2, bfloat16=False)
    rows = np.arange(1, 9)
    plain, ones, twos = (
        torch.cat([p.flatten() for p in short.train(rows, 0, weights).parameters()])
        for weights in (None, np.ones(8), np.where(np.arange(8) < 4, 2.0, 0.0))
    )
    assert torch.equal(plain, ones)
    assert not torch.allclose(plain, twos, atol=1e-4)


@pytest.mark.parametrize(
    ("recipe", "options", "told"),
    [
        ("Without", {}, r"takes no weights; add weights=None"),
        ("Spoilt", {}, "draw-000-step-1: the trained parameters are not finite|start: the trained"),
        ("Straight", {"draws": 0}, "0 draws of steps of 0.1 measure nothing"),
        ("Straight", {"step": -1.0}, "3 draws of steps of -1.0 measure nothing"),
    ],
)
def test_what_cannot_be_measured_is_told(recipe, options, told, made, one_ray, tmp_path):
    benchmark, named = made
    with pytest.raises(StrideError, match=told):
        metasmoothness(benchmark, named(recipe), str(tmp_path / "out"), **options)


def test_another_recipe_s_folder_is_refused(made, one_ray, tmp_path):
    benchmark, recipe = made
    metasmoothness(benchmark, recipe("Straight"), str(tmp_path / "out"), draws=1)
    with pytest.raises(StrideError, match=r"was made with step = 0\.1, and this command has 0\.2"):
        metasmoothness(benchmark, recipe("Straight"), str(tmp_path / "out"), draws=1, step=0.2)


def test_the_job_prints_a_sentence(made, one_ray, tmp_path, capsys):
    benchmark, recipe = made
    path = Path(__file__).parent.parent / "jobs" / "metasmoothness.py"
    spec = importlib.util.spec_from_file_location("metasmoothness_job", path)
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    given = ["--benchmark", benchmark.url, "--out", str(tmp_path / "job"), "--recipe", recipe("Straight")]
    assert job.main([*given, "--draws", "1"]) == 0
    assert (
        capsys.readouterr().out == "Metasmoothness 1.000 (1 draw(s) of weights; h = 0.1): 1 is straight, 0 is noise.\n"
    )
