"""The benchmarks of speed: what is timed beside ours computes the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.speed import SHAPES, Setting, measure_passes, measure_solve, random_model, whole_model_losses
from stride_ray.operators.forms import Operators, random_basis

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("form", ["gate", "matrix"])
def test_the_loop_through_the_whole_model_gives_what_exact_mode_gives(form):
    model = random_model(SHAPES["small"], "cpu", "float32")
    basis = random_basis(form, model.width, model.vocabulary, 4, 0, 0, "linear")
    operators = Operators(basis, 3 * torch.randn(5, *basis.shape))
    ids, subsets = torch.arange(24), torch.arange(5)
    mask = ids > 6
    base, found = operators.exact(model, ids, mask, subsets, 48)
    assert found.abs().min() > 1e-3
    torch.testing.assert_close(
        base - whole_model_losses(model, operators, ids, mask, subsets), found, atol=1e-5, rtol=0
    )


def test_respond_prints_its_ratios_as_json():
    options = ["--subsets", "8", "--tokens", "32", "--queries", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "respond", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ratio_flops"] == pytest.approx(2.2)
    assert 0.3 < found["response_correlation"] <= 1
    assert found["seconds_exact"] > found["seconds_linear"] > 0


def test_every_pass_over_blocks_is_measured_beside_a_forward():
    found = measure_passes(Setting(device="cpu", subsets=10, tokens=16, queries=2, blocks=4))
    speeds = {name: each["blocks_per_second"] for name, each in found["passes"].items()}
    assert set(speeds) == {"forward", "gate", "matrix", "logit", "exact", "exact_last_quarter"}
    assert found["ratio_exact"] == pytest.approx(speeds["forward"] / speeds["exact"])


def test_a_solve_is_measured_beside_a_forward():
    found = measure_solve(Setting(device="cpu", tokens=16, blocks=4))
    assert found["ratio_product"] == pytest.approx(found["seconds_product"] / found["seconds_forward"])
    assert found["seconds_forward"] > 0
    assert np.isfinite([found["seconds_linearise"], found["seconds_product"]]).all()
