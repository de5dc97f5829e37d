"""The linear datamodeling score against scipy, query by query and draw by draw, and on cases whose answer is known."""

import numpy as np
import pytest
import scipy.sparse
from scipy.stats import kendalltau, pearsonr, spearmanr

from stride_ray.evaluate.comparison.score_statistics import score_statistics
from stride_ray.evaluate.retraining.lds import evaluate, resampled, subset_sums
from stride_ray.evaluate.retraining.results import RetrainingResults
from stride_ray.runtime.errors import StrideError

N, S, Q = 60, 48, 12
KINDS = np.array(["near"] * 7 + ["far"] * 5)
PARTS = np.array(["development", "report"] * 6)


def linear_truth(noise=0.05, seeds=2):
    """Losses that are a constant minus the weights of a subset's members, and these weights."""
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(Q, N)) * (rng.random((Q, N)) < 0.3)
    subsets = tuple(np.sort(rng.choice(N, N // 2, replace=False)) for _ in range(S))
    truth = RetrainingResults(subsets, np.zeros((seeds, S, Q), np.float32), tuple(f"seed{i}" for i in range(seeds)))
    exact = 4 - truth.membership(N) @ weights.T
    losses = exact + noise * rng.normal(size=(seeds, S, Q))
    return RetrainingResults(subsets, losses.astype(np.float32), truth.names), weights


@pytest.fixture(scope="module")
def measured():
    truth, weights = linear_truth(noise=2.0)
    rng = np.random.default_rng(2)
    scores = {
        "noisy": weights + rng.normal(size=weights.shape),
        "tied": np.round(weights),
        "nothing": np.zeros((Q, N)),
    }
    sums = {name: subset_sums(each, truth.subsets) for name, each in scores.items()}
    return truth, sums, evaluate(sums, truth, KINDS, PARTS)


@pytest.mark.parametrize("target", ["raw", "centred"])
@pytest.mark.parametrize("method", ["noisy", "tied"])
def test_figures_are_scipys(measured, method, target):
    truth, sums, found = measured
    losses = truth.losses.astype(np.float64).mean(0)
    if target == "centred":
        losses = losses - losses.mean(1)[:, None]
    for kind, part in found.cells:
        rows = [q for q in range(Q) if kind in ("all", KINDS[q]) and part in ("all", PARTS[q])]
        figure = found.figure(method, kind, part, target)
        ranks = [spearmanr(sums[method][q], -losses[:, q])[0] for q in rows]
        assert figure.lds.value == pytest.approx(np.mean(ranks), abs=1e-12)
        assert figure.std == pytest.approx(np.std(ranks), abs=1e-12)
        assert figure.queries == len(rows)
        expected = {
            name: np.mean([function(sums[method][q], -losses[:, q])[0] for q in rows])
            for name, function in (("pearson", pearsonr), ("kendall", kendalltau))
        }
        assert figure.pearson == pytest.approx(expected["pearson"], abs=1e-12)
        assert figure.kendall == pytest.approx(expected["kendall"], abs=1e-12)
    assert len(found.cells) == 9


def test_every_draw_ranks_again(measured):
    """A sample of subsets with repeats: the same as scipy on the repeated columns, ties and all."""
    truth, sums, _ = measured
    counts = np.random.default_rng(3).multinomial(S, np.full(S, 1 / S), size=5).T.astype(float)
    target = -truth.losses[0].T.astype(np.float64)
    for method in ("noisy", "tied"):
        mine = resampled(sums, target, counts)[method]
        for draw in range(5):
            columns = np.repeat(np.arange(S), counts[:, draw].astype(int))
            theirs = [spearmanr(sums[method][q, columns], target[q, columns])[0] for q in range(Q)]
            np.testing.assert_allclose(mine[:, draw], theirs, atol=1e-12)


def test_intervals_are_those_of_a_plain_bootstrap(measured):
    """The referee's way, a loop that draws rows and columns and ranks again: the same ends up to the draws' noise."""
    truth, sums, found = measured
    target = -truth.losses.astype(np.float64).mean(0).T
    rng, rows = np.random.default_rng(4), np.flatnonzero(KINDS == "far")
    values = []
    for _ in range(400):
        r, c = rng.choice(rows, len(rows)), rng.choice(S, S)
        values.append(np.mean([spearmanr(sums["noisy"][q, c], target[q, c])[0] for q in r]))
    interval = found.figure("noisy", "far").lds
    assert (interval.low, interval.high) == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=0.03)
    assert interval.low < interval.value < interval.high


def test_paired_comparisons_are_narrower_than_their_parts(measured):
    truth, sums, _ = measured
    close = {"one": sums["noisy"], "other": sums["noisy"] + 0.01 * sums["tied"]}
    found = evaluate(close, truth, KINDS, PARTS)
    paired, alone = found.paired("one", "other"), found.figure("one").lds
    assert paired.difference.value == found.figure("one").lds.value - found.figure("other").lds.value
    assert paired.ratio.value == pytest.approx(found.figure("one").lds.value / found.figure("other").lds.value)
    assert paired.difference.high - paired.difference.low < 0.1 * (alone.high - alone.low)
    assert paired.ratio.low < paired.ratio.value < paired.ratio.high
    same = found.paired("one", "one")
    assert (same.difference.low, same.difference.high, same.ratio.low) == (0, 0, 1)


def test_ratio_to_nothing_has_no_interval(measured):
    _, _, found = measured
    assert found.figure("nothing").lds.value == 0
    assert found.figure("nothing").pearson == found.figure("nothing").kendall == 0
    ratio = found.paired("noisy", "nothing").ratio
    assert np.isnan([ratio.value, ratio.low, ratio.high]).all()


def test_true_weights_of_linear_losses_score_high_and_shuffled_ones_nothing():
    truth, weights = linear_truth()
    shuffled = np.random.default_rng(5).permuted(weights, axis=1)
    sums = {"true": subset_sums(weights, truth.subsets), "shuffled": subset_sums(shuffled, truth.subsets)}
    found = evaluate(sums, truth, KINDS, PARTS)
    assert found.figure("true").lds.value >= 0.95
    assert found.figure("true").lds.low >= 0.9
    nothing = found.figure("shuffled").lds
    assert nothing.low < 0 < nothing.high


def test_centred_takes_a_runs_common_shift_away():
    truth, weights = linear_truth()
    shift = 50 * np.random.default_rng(6).normal(size=(1, S, 1))
    shifted = RetrainingResults(truth.subsets, (truth.losses + shift).astype(np.float32), truth.names)
    found = evaluate({"true": subset_sums(weights, truth.subsets)}, shifted, KINDS, PARTS)
    assert abs(found.figure("true").lds.value) < 0.4
    assert found.figure("true", target="centred").lds.value > 0.8


def test_ceiling_is_one_seed_against_another():
    truth, _ = linear_truth(noise=1.0, seeds=3)
    found = evaluate({}, truth, KINDS, PARTS)
    losses = truth.losses.astype(np.float64)
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = np.mean([[spearmanr(losses[a, :, q], losses[b, :, q])[0] for q in range(Q)] for a, b in pairs])
    ceiling = found.ceiling()
    assert ceiling.value == pytest.approx(expected, abs=1e-12)
    assert ceiling.low < ceiling.value < ceiling.high
    one_seed = RetrainingResults(truth.subsets, truth.losses[:1], truth.names[:1])
    assert evaluate({}, one_seed, KINDS, PARTS).ceiling() is None


def test_sums_of_dense_and_sparse_scores_agree():
    truth, weights = linear_truth()
    expected = np.array([[row[rows].sum() for rows in truth.subsets] for row in weights])
    for form in (weights, scipy.sparse.csr_array(weights), scipy.sparse.coo_matrix(weights)):
        np.testing.assert_allclose(subset_sums(form, truth.subsets), expected, atol=1e-12)
    many = np.tile(weights, (20, 1))
    np.testing.assert_allclose(subset_sums(many, truth.subsets), np.tile(expected, (20, 1)), atol=1e-12)
    with pytest.raises(StrideError, match="scores have 30 columns, and a subset holds pool row"):
        subset_sums(weights[:, :30], truth.subsets)


def test_wrong_sums_are_told(measured):
    truth, sums, _ = measured
    with pytest.raises(StrideError, match=r"short: needs finite sums of shape \(12, 48\)"):
        evaluate({"short": sums["noisy"][:, 1:]}, truth, KINDS, PARTS)
    with pytest.raises(StrideError, match="broken: needs finite sums"):
        evaluate({"broken": np.full((Q, S), np.nan)}, truth, KINDS, PARTS)


def test_a_benchmark_without_kinds_and_parts_has_one_cell(measured):
    truth, sums, _ = measured
    found = evaluate(sums, truth, ["all"] * Q, ["all"] * Q, draws=10)
    assert found.cells == (("all", "all"),)
    assert len(found.draws["noisy", "all", "all", "raw"]) == 11


def test_score_statistics():
    scores = np.zeros((4, 20))
    scores[0, :] = -1.0  # all alike
    scores[1, 7] = 5.0  # one holds everything
    scores[2, :4] = [1, -2, 3, -4]
    for form in (scores, scipy.sparse.csr_array(scores)):
        found = score_statistics(form)
        assert found.sparsity == pytest.approx(1 - 25 / 80)
        assert (found.active_mean, found.active_p50, found.active_p90) == pytest.approx((6.25, 2.5, 15.2))
        # The definition: mean absolute difference of all pairs over twice the mean.
        x = np.abs(scores[2])
        third = np.abs(x[:, None] - x).mean() / (2 * x.mean())
        assert found.gini == pytest.approx(np.mean([0, 1 - 1 / 20, third]))
        assert found.top_share == pytest.approx(np.mean([2 / 20, 1, 7 / 10]))
    assert np.isnan(score_statistics(np.zeros((2, 5))).gini)
