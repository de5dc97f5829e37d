"""Retraining for real: the built-in recipe, a recipe from a file, Ray tasks, and what killing them leaves."""

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_benchmark import LENGTHS, QUERY_LENGTHS, VOCABULARY, sequences, write_benchmark
from test_faults import await_markers, kill_family
from transformers import AutoModelForCausalLM

from stride_ray.evaluate.retraining.benchmark import read_benchmark
from stride_ray.evaluate.retraining.finetune import FineTune, checkpoints
from stride_ray.evaluate.retraining.recipe import load_recipe, recipe_identity
from stride_ray.evaluate.retraining.results import read_truth
from stride_ray.evaluate.retraining.retrain import read_array, retrain, subset_rows, write_array
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.options import ComputeConfig
from stride_ray.runtime.storage import Store

RECIPE = """
import time

from stride_ray.evaluate.retraining.finetune import FineTune


class Slow(FineTune):
    def train(self, rows, seed):
        time.sleep(0.5)
        return super().train(rows, seed)


def make(benchmark):
    return Slow(benchmark, epochs=2, batch=4, warmup_steps=2, learning_rate=0.01)


def broken(benchmark):
    return object()


class Short(FineTune):
    def losses(self, trained):
        return super().losses(trained)[1:]
"""
DRIVER = """
import sys
import ray
from stride_ray.evaluate.retraining.benchmark import read_benchmark
from stride_ray.evaluate.retraining.retrain import retrain

ray.init("local", num_cpus=1, include_dashboard=False, logging_level="ERROR")
folder, recipe, out = sys.argv[1:]
retrain(read_benchmark(folder), recipe, out, subsets=2, seeds=2)
"""
JOB = Path(__file__).parent.parent / "jobs" / "retrain.py"
SHORT = {"epochs": 2, "batch": 4, "warmup_steps": 2, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny benchmark and the recipe's file."""
    root = tmp_path_factory.mktemp("retrain")
    folder = write_benchmark(root / "made")
    (root / "recipe.py").write_text(RECIPE)
    return SimpleNamespace(folder=folder, benchmark=read_benchmark(folder), recipe=f"{root / 'recipe.py'}:make")


@pytest.fixture(scope="module")
def retrained(made, one_ray, tmp_path_factory):
    """Two subsets and two seeds, undisturbed."""
    out = tmp_path_factory.mktemp("retrained") / "out"
    return out, retrain(made.benchmark, made.recipe, str(out), subsets=2, seeds=2)


def data_of(out):
    """Name and bytes of everything but markers, which hold seconds."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and "_done" not in path.parts]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def test_losses_are_the_models_own_mean_over_real_tokens(made):
    recipe = FineTune(made.benchmark, batch=2)
    model = AutoModelForCausalLM.from_pretrained(made.benchmark.model).eval()
    found = recipe.losses(model)
    assert (found.shape, found.dtype) == ((len(QUERY_LENGTHS),), np.float32)
    for row, ids in zip(found, sequences(QUERY_LENGTHS, 1), strict=True):
        tokens = torch.tensor([ids])
        with torch.no_grad():
            assert row == pytest.approx(float(model(input_ids=tokens, labels=tokens).loss), abs=1e-5)


def test_training_learns_its_rows_from_start_and_follows_the_seed(made):
    recipe = FineTune(made.benchmark, **{**SHORT, "epochs": 6})
    rows = np.arange(0, len(LENGTHS), 2)
    before = recipe.losses(AutoModelForCausalLM.from_pretrained(made.benchmark.start)).mean()
    torch.manual_seed(5)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    one, again, other = (recipe.losses(recipe.train(rows, seed)) for seed in (0, 0, 1))
    assert torch.rand(1) == drawn  # the caller's random numbers are its own
    assert one.mean() < before - 0.1
    np.testing.assert_array_equal(one, again)
    assert (one != other).all()
    exact = FineTune(made.benchmark, **{**SHORT, "epochs": 6, "bfloat16": False})
    assert 0 < abs(exact.losses(exact.train(rows, 0)) - one).mean() < 0.1


def test_the_seed_orders_the_blocks(made, tmp_path):
    """Without dropout the order is all that a seed decides."""
    still = shutil.copytree(made.folder, tmp_path / "still")
    config = json.loads((still / "start/config.json").read_text())
    config |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    (still / "start/config.json").write_text(json.dumps(config))
    recipe = FineTune(read_benchmark(str(still)), **SHORT)
    one, other = (recipe.losses(recipe.train(np.arange(8), seed)) for seed in (0, 1))
    assert abs(one - other).max() > 1e-4
    in_one_batch = FineTune(read_benchmark(str(still)), **{**SHORT, "batch": 8, "bfloat16": False})
    one, other = (in_one_batch.losses(in_one_batch.train(np.arange(8), seed)) for seed in (0, 1))
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_from_scratch_the_seed_makes_the_weights(made, tmp_path):
    benchmark = read_benchmark(write_benchmark(tmp_path / "scratch", start=False))
    recipe = FineTune(benchmark, epochs=1, learning_rate=1e-9)
    one, other = (recipe.losses(recipe.train(np.arange(8), seed)) for seed in (0, 1))
    assert abs(one - other).max() > 1e-3
    assert abs(one.mean() - np.log(VOCABULARY)) < 0.3  # knows nothing: not the weights of model/


def test_the_learning_rate_rises_then_falls(made):
    recipe = FineTune(made.benchmark, batch=8, epochs=10)
    rates = recipe.rates(80)
    assert len(rates) == 100
    assert rates[:3] == pytest.approx([1e-3 / 20, 2e-3 / 20, 3e-3 / 20])
    assert max(rates) == pytest.approx(0.84e-3)  # where they meet: 17 / 20 and 84 / 100
    assert rates[-1] == pytest.approx(0.05e-3)
    assert len(recipe.rates(81)) == 110  # the last, smaller batch counts


def test_texts_that_the_model_cannot_take_are_told(made, tmp_path):
    large = made.benchmark.blocks.ids.copy()
    large[3, 1] = VOCABULARY
    texts = type(made.benchmark.blocks)(large, made.benchmark.blocks.mask)
    wrong = type(made.benchmark)(**{**vars(made.benchmark), "blocks": texts})
    with pytest.raises(StrideError, match=r"pool.parquet, row 3, has token id 50, and the model knows 50 ids"):
        FineTune(wrong).train(np.arange(4), 0)
    wide = np.pad(large, ((0, 0), (0, 1))) % VOCABULARY
    wrong = type(made.benchmark)(**{**vars(made.benchmark), "queries": type(texts)(wide, wide >= 0)})
    with pytest.raises(StrideError, match=r"queries.parquet, row 0, has 25 tokens, and the model takes 24"):
        FineTune(wrong).train(np.arange(4), 0)
    with pytest.raises(StrideError, match="no block to train on"):
        FineTune(made.benchmark).train(np.arange(0), 0)


def test_checkpoints_are_whole_and_made_once(made, tmp_path, monkeypatch):
    out = tmp_path / "checkpoints"
    folders, rates = checkpoints(made.benchmark, str(out), 0, SHORT)
    recipe = FineTune(made.benchmark, **SHORT)
    assert folders == (str(out / "epoch-1"), str(out / "epoch-2"))
    steps = np.array(recipe.rates(len(LENGTHS)))
    assert rates == pytest.approx([steps[:6].mean(), steps[6:].mean()])
    trained = recipe.train(np.arange(len(LENGTHS)), 0)
    last = AutoModelForCausalLM.from_pretrained(folders[1])
    np.testing.assert_array_equal(recipe.losses(last), recipe.losses(trained))
    moments = load_file(Path(folders[0]) / "optimizer.safetensors")
    shapes = {name: value.shape for name, value in trained.named_parameters()}
    assert {name: value.shape for name, value in moments.items()} == shapes
    assert "lm_head.weight" not in moments  # tied
    assert all((value >= 0).all() and value.any() for value in moments.values())
    assert sorted(path.name for path in out.iterdir()) == ["epoch-1", "epoch-2", "stage.json"]
    before = data_of(out)
    for path in Path(folders[1]).iterdir():
        path.unlink()
    Path(folders[1]).rmdir()
    assert checkpoints(made.benchmark, str(out), 0, SHORT) == (folders, rates)
    assert data_of(out) == before
    monkeypatch.setattr(FineTune, "run", None)  # nothing is trained again
    assert checkpoints(made.benchmark, str(out), 0, SHORT) == (folders, rates)
    with pytest.raises(StrideError, match="was made with batch = 4, and this command has 8"):
        checkpoints(made.benchmark, str(out), 0, {**SHORT, "batch": 8})
    with pytest.raises(StrideError, match="'size' is not a hyperparameter of FineTune"):
        checkpoints(made.benchmark, str(out), 0, {"size": 8})
    settings = (out / "stage.json").read_text()
    (out / "stage.json").write_text(settings.replace('"batch": 4', '"batch": 6'))
    with pytest.raises(StrideError, match=r"stage\.json was damaged or edited: its checksum differs"):
        checkpoints(made.benchmark, str(out), 0, SHORT)


def test_an_array_that_was_damaged_is_refused(tmp_path):
    store, values = Store(str(tmp_path)), np.arange(6, dtype=np.float32)
    write_array(store, "losses/a-1.npy", values)
    path = tmp_path / "losses/a-1.npy"
    np.testing.assert_array_equal(read_array(store, "losses/a-1.npy"), values)
    np.testing.assert_array_equal(np.load(path), values)
    whole = path.read_bytes()
    for damaged in (whole[:-20] + b"\xff" + whole[-19:], whole[:-3], whole[:9], b""):
        path.write_bytes(damaged)
        with pytest.raises(
            StrideError, match=r"a-1\.npy was damaged or changed: .*delete it and its marker, _done/a-1"
        ):
            read_array(store, "losses/a-1.npy")


def test_results_are_those_of_the_recipe_in_a_plain_loop(made, retrained):
    out, done = retrained
    truth = read_truth(Store(str(out)))
    assert truth.names == ("seed0", "seed1")
    recipe = load_recipe(made.recipe, made.benchmark)
    for number, rows in enumerate(truth.subsets):
        assert len(rows) == len(LENGTHS) // 2
        np.testing.assert_array_equal(rows, subset_rows(made.benchmark, number, 0.5, 0))
    torch.set_num_threads(1)
    np.testing.assert_allclose(truth.losses[1, 0], recipe.losses(recipe.train(truth.subsets[0], 1)), atol=1e-6)
    assert not np.array_equal(*truth.subsets)
    assert (truth.losses[0] != truth.losses[1]).all()
    assert (done["trained"], done["models"]) == (4, 4)
    for fact in ("2 subsets of 12 of 24 blocks, 2 seed(s) each: 4 models", "correlation", "nats"):
        assert fact in done["summary"]
    assert done["agreement"] == pytest.approx(read_agreement(truth))
    for name in ("lds_seed0.jsonl", "lds_seed1.jsonl"):
        assert len((out / name).read_text().splitlines()) == 3


def read_agreement(truth):
    """With two subsets a query's ranks agree, or are opposed."""
    signs = np.sign(truth.losses[:, 0] - truth.losses[:, 1])
    return float((signs[0] * signs[1]).mean())


@pytest.mark.cluster
def test_killed_anywhere_and_run_again_gives_the_same_bytes(made, retrained, tmp_path):
    undisturbed, _ = retrained
    out, log = tmp_path / "out", tmp_path / "log"
    with open(log, "w") as file:
        command = [sys.executable, "-c", DRIVER, made.folder, made.recipe, str(out)]
        driver = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        await_markers(out / "_retrain" / "_done", 1, driver, log)
        driver.send_signal(signal.SIGKILL)
    finally:
        kill_family(driver)
    there = len(list((out / "_retrain" / "_done").glob("*.json")))
    assert 0 < there < 4
    assert not list(out.glob("*.npz"))
    done = retrain(made.benchmark, made.recipe, str(out), subsets=2, seeds=2)
    assert done["trained"] == 4 - there
    assert data_of(out) == data_of(undisturbed)
    assert retrain(made.benchmark, made.recipe, str(out), subsets=2, seeds=2)["trained"] == 0
    assert data_of(out) == data_of(undisturbed)


def test_more_is_added_and_other_settings_are_refused(made, retrained, tmp_path):
    out = str(tmp_path / "out")
    first, again, fewer = (
        retrain(made.benchmark, made.recipe, out, subsets=subsets, seeds=seeds)
        for subsets, seeds in ((1, 2), (2, 2), (2, 1))
    )
    assert (first["trained"], again["trained"], fewer["trained"]) == (2, 2, 0)
    assert fewer["agreement"] is None
    assert sorted(path.name for path in Path(out).glob("*seed*")) == ["lds_seed0.jsonl", "retraining_seed0.npz"]
    for changes, told in (
        ({"fraction": 0.25}, "fraction = 0.5, and this command has 0.25"),
        ({"seed": 1}, "seed = 0, and this command has 1"),
        ({"recipe_name": "stride_ray.evaluate.retraining.finetune:FineTune"}, "made with recipe = 'recipe.py:make "),
    ):
        with pytest.raises(StrideError, match=told):
            retrain(made.benchmark, **{"recipe_name": made.recipe, "out": out, "subsets": 1, **changes})


def test_like_takes_the_subsets_that_are_there(made, retrained, tmp_path):
    folder = tmp_path / "made"
    write_benchmark(folder)
    existing, _ = retrained
    for name in ("retraining_seed0.npz", "retraining_seed1.npz"):
        (folder / name).write_bytes((existing / name).read_bytes())
    benchmark = read_benchmark(str(folder))
    done = retrain(benchmark, made.recipe, str(tmp_path / "out"), subsets=2, seeds=1, seed=9, like=True)
    found = read_truth(Store(str(tmp_path / "out")))
    assert done["trained"] == 2
    np.testing.assert_array_equal(found.losses[0], benchmark.retrained().losses[0])
    with pytest.raises(StrideError, match="3 subsets were requested, and the results in made have 2"):
        retrain(benchmark, made.recipe, str(tmp_path / "more"), subsets=3, like=True)
    with pytest.raises(StrideError, match=r"retraining_seed0.npz is there already and was not made by this command"):
        retrain(benchmark, made.recipe, str(folder), subsets=2, like=True)


def test_wrong_recipes_and_numbers_are_told(made, one_ray, tmp_path):
    (tmp_path / "bad.py").write_text("import nothing_of_that_name")
    file = made.recipe.removesuffix(":make")
    for name, told in (
        ("recipe", "is not package.module:attribute"),
        ("nothing.of_that_name:make", r"cannot be loaded \(ModuleNotFoundError"),
        (f"{tmp_path / 'absent.py'}:make", "absent.py does not exist"),
        (f"{tmp_path / 'bad.py'}:make", "No module named 'nothing_of_that_name'"),
        (f"{file}:nothing", "has no callable 'nothing'"),
        (f"{file}:broken", r"gave a object, which lacks train\(rows, seed\)"),
        (f"{file}:Short", r"subset 0, seed 0: losses\(\) must give 5 finite numbers, .* it gave shape \(4,\)"),
    ):
        with pytest.raises(StrideError, match=told):
            retrain(made.benchmark, name, str(tmp_path / "out"), subsets=1, seeds=1)
    for changes, told in (
        ({"fraction": 1.0}, "fraction of the pool in a subset is 1.0"),
        ({"subsets": 0}, "0 subsets and 3 seeds make no model"),
        ({"like": True}, "holds no retraining_"),
    ):
        with pytest.raises(StrideError, match=told):
            retrain(made.benchmark, made.recipe, str(tmp_path / "other"), **changes)
    changed = tmp_path / "recipe.py"
    changed.write_text(RECIPE + "# other\n")
    assert recipe_identity(f"{changed}:make") != recipe_identity(made.recipe)


def test_the_job(made, retrained, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("retrain_job", JOB)
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    command = ["--benchmark", made.folder, "--recipe", made.recipe, "--subsets", "2", "--seeds", "1", "--workers", "1"]
    assert job.main([*command, "--out", str(tmp_path / "out")]) == 0
    assert "2 models trained now" in capsys.readouterr().out
    name = "_retrain/losses/subset-00001-seed-0.npy"
    assert (tmp_path / "out" / name).read_bytes() == (retrained[0] / name).read_bytes()
    marker = json.loads((tmp_path / "out/_retrain/_done/subset-00001-seed-0.json").read_text())
    assert marker["peak_mb"] > 0
    assert job.main([*command, "--out", str(tmp_path / "out"), "--fraction", "2"]) == 1
    assert capsys.readouterr().err == (
        "retrain: The fraction of the pool in a subset is 2.0; it must lie between 0 and 1.\n"
    )
    assert job.main(["--benchmark", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert ComputeConfig().workers == 0
