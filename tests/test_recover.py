import tracemalloc
import warnings

import numpy as np
import pytest
from sklearn.linear_model import Lasso

from stride_ray.attribution.lasso import recovery as lasso
from stride_ray.attribution.lasso.recovery import recover, row_scale
from stride_ray.operators.membership import Membership
from stride_ray.runtime.errors import StrideError


def planted(M, N, queries, seed, noise=0.3, sign=0):
    rng = np.random.default_rng(seed)
    matrix = M.matrix(0, N)
    responses = []
    for _ in range(queries):
        w = np.zeros(N)
        w[rng.choice(N, max(2, M.subsets // 20), replace=False)] = rng.normal(size=max(2, M.subsets // 20))
        y = matrix @ (np.abs(w) if sign else w)
        responses.append(y + noise * y.std() * rng.normal(size=M.subsets) + 3.0)
    return np.array(responses)


def dense(recovery, N):
    w = np.zeros(N)
    w[recovery.ordinals] = recovery.weights
    return w


def full_gap(X, y, recovery, nonnegative=False):
    w = dense(recovery, X.shape[1])
    target = y - y.mean()
    residual = y - recovery.intercept - X @ w
    assert abs(residual.mean()) < 1e-10 * np.abs(y).max()  # the intercept is optimal
    correlation = X.T @ residual
    largest = (correlation if nonnegative else np.abs(correlation)).max()
    s = min(residual @ target / (residual @ residual), recovery.penalty / largest)
    dual = s * residual @ target - 0.5 * s**2 * residual @ residual
    primal = 0.5 * residual @ residual + recovery.penalty * np.abs(w).sum()
    return (primal - dual) / (0.5 * target @ target)


def reference(X, y, penalty, nonnegative):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a reference that did not converge proves nothing
        model = Lasso(alpha=penalty / len(y), tol=1e-11, max_iter=200_000, positive=nonnegative).fit(X, y)
    return model.coef_, model.intercept_


CASES = [
    # K, d, N, ratio, form, nonnegative, row_scaling
    (100, 5, 2000, 0.1, "regular", False, False),
    (100, 5, 2000, 0.1, "regular", True, False),
    (100, 5, 2000, 0.1, "regular", False, True),
    (100, 5, 2000, 0.3, "regular", True, True),
    (300, 10, 5000, 0.1, "regular", False, False),
    (300, 10, 5000, 0.05, "regular", False, True),
    (60, 1, 300, 0.1, "regular", False, True),
    (200, 7, 50, 0.1, "regular", False, False),
    (120, 60, 1000, 0.2, "bernoulli", False, False),
    (120, 12, 1000, 0.1, "bernoulli", True, True),
]


@pytest.mark.parametrize(("K", "d", "N", "ratio", "form", "nonnegative", "row_scaling"), CASES)
def test_agrees_with_scikit_learn_on_the_full_problem(K, d, N, ratio, form, nonnegative, row_scaling):
    M = Membership(K, d, 17, form)
    responses = planted(M, N, 3, seed=K + N, sign=nonnegative)
    X = M.matrix(0, N)
    if row_scaling:
        sizes = M.sizes(N)
        X = (X * np.where(sizes > 0, sizes.mean() / np.maximum(sizes, 1), 1.0)[:, None]).tocsc()
    found = recover(responses, M, N, ratio=ratio, nonnegative=nonnegative, row_scaling=row_scaling)
    for y, recovery in zip(responses, found, strict=True):
        correlation = X.T @ (y - y.mean())
        largest = correlation.max() if nonnegative else np.abs(correlation).max()
        assert recovery.penalty == pytest.approx(ratio * largest, rel=1e-12)
        assert recovery.gap <= 1e-9
        assert full_gap(X, y, recovery, nonnegative) <= 1.1e-9
        assert len(recovery.weights) > 1
        assert not nonnegative or (recovery.weights > 0).all()
        if d > 1:  # at d = 1 columns repeat, so that only the fit is unique
            w, intercept = reference(X, y, recovery.penalty, nonnegative)
            assert np.abs(dense(recovery, N) - w).max() < 1e-5 * np.abs(w).max()
            assert recovery.intercept == pytest.approx(intercept, abs=1e-5 * np.abs(y).max())
    if not nonnegative:
        signs = np.concatenate([recovery.weights for recovery in found])
        assert (signs < 0).any()
        assert (signs > 0).any()


def test_result_types():
    M = Membership(80, 4, 0)
    (recovery,) = recover(planted(M, 1000, 1, 0).astype(np.float32), M, 1000)
    assert recovery.ordinals.dtype == np.int64
    assert recovery.weights.dtype == np.float64
    assert (np.diff(recovery.ordinals) > 0).all()
    assert (recovery.weights != 0).all()
    assert recovery.rounds >= 2


@pytest.mark.parametrize("options", [{}, {"nonnegative": True}, {"row_scaling": True, "ratio": 0.05}])
def test_bits_do_not_depend_on_the_batch(options):
    M = Membership(100, 7, 5)
    responses = planted(M, 3000, 70, seed=1, sign="nonnegative" in options)  # more than one batch
    together = recover(responses, M, 3000, **options)
    for q in (0, 37, 63, 64, 69):
        for subset in ([q], [5, q, 2]):
            alone = recover(responses[subset], M, 3000, **options)[subset.index(q)]
            assert np.array_equal(alone.ordinals, together[q].ordinals)
            assert alone.weights.tobytes() == together[q].weights.tobytes()
            fields = ("intercept", "penalty", "gap", "rounds")
            assert [getattr(alone, f) for f in fields] == [getattr(together[q], f) for f in fields]


@pytest.mark.parametrize("form", ["regular", "bernoulli"])
def test_bits_do_not_depend_on_the_cache_or_the_chunks(form, monkeypatch):
    M = Membership(90, 9, 5, form)
    responses = planted(M, 1500, 3, seed=2)
    cached = recover(responses, M, 1500)
    monkeypatch.setattr("stride_ray.operators.membership.CHUNK", 100)
    calls = []
    columns = Membership.columns
    monkeypatch.setattr(Membership, "columns", lambda self, a, b: calls.append(a) or columns(self, a, b))
    streamed = recover(responses, M, 1500, cache_bytes=0)
    assert len(calls) > 2 * 15  # every pass computed its columns again
    for one, other in zip(cached, streamed, strict=True):
        assert np.array_equal(one.ordinals, other.ordinals)
        assert one.weights.tobytes() == other.weights.tobytes()


def test_large_active_sets():
    M = Membership(200, 8, 3)
    responses = planted(M, 20_000, 2, seed=3)
    X = M.matrix(0, 20_000)
    for y, recovery in zip(responses, recover(responses, M, 20_000, ratio=0.001), strict=True):
        assert len(recovery.weights) > 150
        assert recovery.gap <= 1e-9
        assert full_gap(X, y, recovery) <= 1.1e-9


def test_pruning_keeps_the_answer(monkeypatch):
    M = Membership(100, 6, 3)
    responses = planted(M, 5000, 2, seed=4)
    want = recover(responses, M, 5000, ratio=0.02)
    monkeypatch.setattr(lasso, "PRUNE_ABOVE", 0.5)
    for one, other in zip(want, recover(responses, M, 5000, ratio=0.02), strict=True):
        assert other.gap <= 1e-9
        assert np.abs(dense(one, 5000) - dense(other, 5000)).max() < 1e-5 * np.abs(one.weights).max()


def test_memory_does_not_grow_with_blocks():
    M = Membership(200, 8, 0)
    responses = np.random.default_rng(0).normal(size=(4, 200))
    recover(responses, M, 1000, ratio=0.5)

    def peak(N):
        tracemalloc.start()
        recover(responses, M, N, ratio=0.5, cache_bytes=0)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    assert peak(1_500_000) < 1.2 * peak(150_000)  # the ids alone grow tenfold, to 12 MB


def test_constant_responses_are_empty_and_leave_the_others_alone():
    M = Membership(60, 4, 0)
    y = planted(M, 500, 1, 0)[0]
    constants = [np.full(60, 0.1), np.zeros(60), np.full(60, -1e8 / 3)]
    found = recover(np.array([*constants, y]), M, 500)
    for recovery, constant in zip(found, constants, strict=False):
        assert len(recovery.ordinals) == len(recovery.weights) == 0
        assert recovery.gap == 0
        assert recovery.penalty == 0
        assert recovery.intercept == pytest.approx(constant[0])
    assert len(found[3].weights) > 0


def test_nothing_to_recover():
    y = np.random.default_rng(0).normal(size=(1, 12))
    every = recover(y, Membership(12, 12, 0), 30)[0]  # every block in every subset: the intercept is all there is
    assert len(every.weights) == 0
    assert every.intercept == pytest.approx(y.mean())
    at_the_top = recover(y, Membership(12, 3, 0), 200, ratio=1.0)[0]
    assert len(at_the_top.weights) == 0
    assert at_the_top.gap == 0
    ids = Membership(12, 3, 0).columns(0, 1)[0]
    negative = np.zeros((1, 12))
    negative[0, ids] = -1.0  # the one block hurts: no nonnegative weight helps
    assert len(recover(negative, Membership(12, 3, 0), 1, nonnegative=True)[0].weights) == 0
    assert recover(negative, Membership(12, 3, 0), 1)[0].weights[0] < 0
    assert recover(np.empty((0, 12)), Membership(12, 3, 0), 5) == []


def test_scale_of_the_responses_carries_over():
    M = Membership(100, 5, 1)
    y = planted(M, 1000, 1, 7)
    base, small = recover(y, M, 1000)[0], recover(y * 2.0**-40, M, 1000)[0]
    assert np.array_equal(base.ordinals, small.ordinals)
    assert small.weights * 2.0**40 == pytest.approx(base.weights, rel=1e-9)


def test_planted_influence_is_found():
    M = Membership(400, 8, 9)
    rng = np.random.default_rng(0)
    blocks = np.sort(rng.choice(20_000, 12, replace=False))
    truth = rng.choice([-1.0, 1.0], 12) * rng.uniform(1, 2, 12)
    y = np.bincount(M.columns_at(blocks).ravel(), np.repeat(truth, 8), minlength=400) + 0.5
    recovery = recover(y[None], M, 20_000, ratio=0.01)[0]
    assert np.array_equal(recovery.ordinals, blocks)
    assert recovery.weights == pytest.approx(truth, rel=0.05)
    assert recovery.intercept == pytest.approx(0.5, abs=0.05)


def test_row_scaling_undoes_subset_means():
    M, N = Membership(400, 8, 9), 3000
    scale = row_scale(M, N)
    assert scale == pytest.approx(M.sizes(N).mean() / M.sizes(N))
    w = np.zeros(N)
    w[[10, 20, 30]] = [2.0, -1.0, 1.5]
    y = scale * (M.matrix(0, N) @ w)
    recovery = recover(y[None], M, N, ratio=1e-4, row_scaling=True)[0]
    assert recovery.ordinals.tolist() == [10, 20, 30]
    assert recovery.weights == pytest.approx([2.0, -1.0, 1.5], rel=1e-3)


def test_empty_subsets_do_no_harm():
    M = Membership(50, 1, 0)
    assert (M.sizes(10) == 0).any()
    y = np.random.default_rng(0).normal(size=(2, 50))
    for recovery in recover(y, M, 10, row_scaling=True):
        assert np.isfinite(recovery.weights).all()
        assert recovery.gap <= 1e-9


def test_bad_input_is_told_in_a_sentence():
    M = Membership(10, 2, 0)
    y = np.zeros((4, 10))
    for value in (np.nan, np.inf, -np.inf):
        bad = y.copy()
        bad[2, 3] = value
        with pytest.raises(StrideError, match="query 2"):
            recover(bad, M, 5)
    for responses in (np.zeros((4, 9)), np.zeros(10), np.full((1, 10), "x")):
        with pytest.raises(StrideError, match="shape"):
            recover(responses, M, 5)
    with pytest.raises(StrideError, match="n_blocks"):
        recover(y, M, 0)
    for ratio in (0, -1, np.nan, np.inf):
        with pytest.raises(StrideError, match="ratio"):
            recover(y, M, 5, ratio=ratio)
    for tolerance in (0, 1, np.nan):
        with pytest.raises(StrideError, match="tolerance"):
            recover(y, M, 5, tolerance=tolerance)
