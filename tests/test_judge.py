"""Does the judge tell operators that learned from those that did not, and does the command line say so?"""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import settings

from stride_ray.cli.main import main
from stride_ray.corpus.blocks import Blocks
from stride_ray.models.loading import load_run_model, measured_model_fingerprint
from stride_ray.operators import validation
from stride_ray.operators.membership import membership_of
from stride_ray.operators.stored import load_operators, save_operators
from stride_ray.operators.validation import _relative_steering, gap, validate
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run


def test_the_gap_is_members_minus_others():
    responses = np.array([[3.0, 1, 1], [5, 2, 4], [np.nan, 1, 2], [7, np.nan, np.nan]])
    inside = np.array([[1, 0, 0], [1, 0, 1], [1, 0, 0], [1, 0, 0]], dtype=bool)
    # The last two have no member, or no other, measured.
    differences = np.array([3 - 1, 4.5 - 2])
    assert gap(responses, inside) == pytest.approx((differences.mean(), differences.std(ddof=1) / np.sqrt(2)))
    assert gap(responses[:1], inside[:1]) == (0.0, 0.0)
    assert gap(np.full((3, 3), np.nan), inside[:3]) == (0.0, 0.0)


@pytest.fixture(scope="module")
def fitted(finished):
    """Everything that judge wants, of the finished run."""
    run = finished.run
    operators, _ = load_operators(run.store.child("operators"))
    model = load_run_model(run.config, "cpu")
    return model, operators, Blocks(run.stage("blocks").store), membership_of(run.config), run.config


def test_fitted_operators_are_told_from_shuffled_ones(finished, fitted):
    model, operators, blocks, membership, config = fitted
    found = validate(model, operators, blocks, membership, config)
    assert {key: finished.facts[key] for key in found} == found
    assert found["learned"]
    assert found["gap_linear"] > 4 * found["gap_linear_error"]
    for seed in range(3):
        order = torch.randperm(len(operators.A), generator=torch.Generator().manual_seed(seed))
        shuffled = validate(model, replace(operators, A=operators.A[order]), blocks, membership, config)
        assert abs(shuffled["gap_linear"]) < found["gap_linear"] / 4
    zero = validate(model, replace(operators, A=operators.A * 0), blocks, membership, config)
    assert (zero["learned"], zero["gap"], zero["gap_linear"]) == (False, 0, 0)
    negative = validate(model, replace(operators, A=-operators.A), blocks, membership, config)
    assert not negative["learned"]
    assert negative["gap_linear"] == pytest.approx(-found["gap_linear"], rel=1e-3)
    assert negative["verdict"].startswith("WARNING: ")


def test_a_model_without_any_loss_left_is_told(fitted, monkeypatch):
    monkeypatch.setattr(validation, "_steered_gap", lambda *given: (0.0, 0.0, 0.0, 0.0))
    found = validate(*fitted)
    assert found["member_response"] == 0
    trained = replace(fitted[-1], fit=replace(fitted[-1].fit, method="train"))
    found = validate(*fitted[:-1], trained)
    assert not found["learned"]
    assert found["verdict"].startswith("WARNING: the model has no loss left on its own blocks (0.0e+00 nats)")


def test_the_scale_lowers_members_losses(fitted):
    model, operators, blocks, membership, config = fitted
    found = validate(model, operators, blocks, membership, config)
    assert found["member_response"] > 0
    assert found["gap"] > 0
    trained = replace(config, fit=replace(config.fit, method="train"))
    assert validate(model, operators, blocks, membership, trained)["scale"] == operators.scale


def test_the_padding_of_bernoulli_columns_is_no_subset(fitted):
    model, operators, blocks, membership, _ = fitted
    few = np.arange(4)

    class Columns:
        subsets = membership.subsets

        def columns_at(self, ordinals):
            return found[: len(ordinals)]

    A = operators.A.clone()
    A[0] *= 1e6  # what a block without a subset must not be steered by
    given = (model, replace(operators, A=A), blocks, few)
    found = np.array([[3], [membership.subsets], [5], [membership.subsets]])
    mixed = _relative_steering(*given, Columns())
    found = np.array([[3], [5]])
    assert mixed == pytest.approx(_relative_steering(*given[:3], few[[0, 2]], Columns()))
    found = np.full((4, 1), membership.subsets)
    assert _relative_steering(*given, Columns()) == 0.0


def test_a_pool_without_targets_is_told(fitted, monkeypatch):
    model, operators, blocks, membership, config = fitted

    class Masked(Blocks):
        def batch(self, ordinals):
            return super().batch(ordinals)._replace(mask=np.zeros((len(ordinals), self.block_tokens), dtype=bool))

    with pytest.raises(StrideError, match="None of 64 blocks sampled from the pool has a target token"):
        validate(model, operators, Masked(blocks.store), membership, config)


def test_a_fit_that_learned_nothing_exits_with_3(finished, parts, tmp_path, plain, capsys):
    """A fit interrupted before it was judged, whose operators answer to anything but their members."""
    folder = tmp_path / "run"
    shutil.copytree(finished.folder / "blocks", folder / "blocks")
    run = Run(str(folder), changes=settings(parts))
    stage = run.begin(
        "operators", corpus=finished.manifest["fingerprint"], weights=measured_model_fingerprint(run.config)
    )
    operators, _ = load_operators(finished.run.store.child("operators"))
    save_operators(stage.store.child("fitted"), replace(operators, A=-operators.A, scale=1.0), {})
    for _ in range(2):
        assert main(["fit", str(folder)]) == 3
        out, err = capsys.readouterr()
        assert "WARNING: these operators do not distinguish members from non-members" in err
        assert "WARNING" not in out
    assert main(["status", str(folder)]) == 0
    assert "WARNING: learned nothing" in capsys.readouterr().out
    assert not list((folder / "operators").glob("fitted*"))
