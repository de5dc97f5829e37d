"""Datamodels from retrained subsets: they find what is linear, and nothing leaks from the subsets asked about."""

import numpy as np
import pytest

from stride_ray.evaluate.fitted_methods.datamodels import datamodel_sums
from stride_ray.evaluate.retraining.lds import evaluate
from stride_ray.evaluate.retraining.results import RetrainingResults
from stride_ray.runtime.errors import StrideError

N, Q = 40, 10
KINDS = ["all"] * Q


def truth_of(make, n_subsets, n_queries=Q, seed=0):
    """Random halves, and losses that ``make`` gives from membership and random numbers."""
    rng = np.random.default_rng(seed)
    subsets = tuple(np.sort(rng.choice(N, N // 2, replace=False)) for _ in range(n_subsets))
    member = np.zeros((n_subsets, N))
    for row, chosen in zip(member, subsets, strict=True):
        row[chosen] = 1
    losses = [make(member, n_queries, rng) for _ in range(2)]
    return RetrainingResults(subsets, np.array(losses, dtype=np.float32), ("seed0", "seed1"))


def linear(member, n_queries, rng):
    """Three blocks help a query, the same in every seed; a little noise."""
    weights = np.zeros((n_queries, N))
    for query, row in enumerate(weights):
        row[[query, query + 11, query + 23]] = 1.0, 0.7, 0.4
    return 4 - member @ weights.T + 0.1 * rng.normal(size=(len(member), n_queries))


def noise(member, n_queries, rng):
    return rng.normal(size=(len(member), n_queries))


def test_linear_losses_are_foretold():
    truth = truth_of(linear, 96)
    sums = datamodel_sums(truth, N)
    assert (sums.shape, sums.dtype) == ((Q, 96), np.float64)
    found = evaluate({"datamodels": sums}, truth, KINDS, KINDS).figure("datamodels")
    assert found.lds.low > 0.8
    fewer = truth_of(linear, 12)
    assert evaluate({"few": datamodel_sums(fewer, N)}, fewer, KINDS, KINDS).figure("few").lds.value < found.lds.value


def test_random_losses_are_not():
    truth = truth_of(noise, 64)
    lds = evaluate({"it": datamodel_sums(truth, N)}, truth, KINDS, KINDS).figure("it").lds
    assert lds.low < 0 < lds.high


def test_few_subsets_in_many_folds_do_not_lean_either_way():
    """An intercept would: the mean of the others' losses is low where the one left out is high."""
    truth = truth_of(noise, 12, n_queries=400)
    kinds = ["all"] * 400
    lds = evaluate({"it": datamodel_sums(truth, N, folds=12)}, truth, kinds, kinds, draws=0).figure("it")
    assert abs(lds.lds.value) < 4 * lds.std / np.sqrt(400)


def test_a_folds_own_losses_do_not_matter_to_it():
    truth = truth_of(linear, 16)
    before = datamodel_sums(truth, N, folds=4)
    order = np.random.default_rng(0).permutation(16)
    for fold in np.array_split(order, 4):
        losses = truth.losses.copy()
        losses[:, fold] += 10 * np.random.default_rng(1).normal(size=losses[:, fold].shape)
        after = datamodel_sums(RetrainingResults(truth.subsets, losses, truth.names), N, folds=4)
        np.testing.assert_array_equal(after[:, fold], before[:, fold])
        others = np.setdiff1d(order, fold)
        assert (after[:, others] != before[:, others]).any(axis=0).all()


def test_constant_losses_and_too_few_subsets():
    constant = truth_of(lambda member, n_queries, rng: np.full((len(member), n_queries), 3.0), 8)
    assert not datamodel_sums(constant, N).any()
    with pytest.raises(StrideError, match="three subsets and two folds at the least; there are 2 and 8"):
        datamodel_sums(truth_of(noise, 2), N)
