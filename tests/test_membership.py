import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stride_ray.operators.membership import Membership
from stride_ray.runtime.errors import StrideError


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_regular_columns_hold_d_distinct_ascending_ids(data):
    K = data.draw(st.integers(1, 300))
    d = data.draw(st.integers(1, min(K, 40)))
    start = data.draw(st.integers(0, 2**40))
    ids = Membership(K, d, data.draw(st.integers(0, 2**64 - 1))).columns(start, start + 150).astype(np.int64)
    assert ids.shape == (150, d)
    assert (np.diff(ids, axis=1) > 0).all()
    assert ids.min() >= 0
    assert ids.max() < K


@pytest.mark.parametrize("form", ["regular", "bernoulli"])
def test_any_range_gives_the_same_columns(form):
    M = Membership(50, 7, 3, form)
    whole = M.matrix(0, 500).toarray()
    parts = [M.matrix(a, b).toarray() for a, b in [(0, 1), (1, 130), (130, 130), (130, 500)]]
    assert np.array_equal(np.hstack(parts), whole)
    ordinals = np.array([499, 3, 3, 64, 0])
    dense = np.zeros((5, 51))
    np.put_along_axis(dense, M.columns_at(ordinals).astype(np.int64), 1.0, axis=1)
    assert np.array_equal(dense[:, :50].T, whole[:, ordinals])


def test_bits_are_pinned():
    # A run's artefacts outlive the release that made them: these may never change.
    assert Membership(1000, 10, 0).columns(0, 2).tolist() == [
        [137, 172, 184, 275, 313, 645, 654, 867, 897, 963],
        [142, 182, 343, 388, 452, 594, 620, 624, 793, 984],
    ]
    far = Membership(4000, 4, 2**64 - 1).columns_at(np.array([10**12]))
    assert far.tolist() == [[2, 2934, 3308, 3327]]
    assert Membership(12, 3, 5, "bernoulli").columns(7, 9).tolist() == [[7, 11, 12], [4, 6, 8]]


def test_seeds_are_independent():
    first, second = Membership(100, 5, 0).columns(0, 2000), Membership(100, 5, 1).columns(0, 2000)
    assert not np.array_equal(first, second)
    # seed + 1 must not be the same matrix moved along
    assert not any(np.array_equal(first[i : i + 1000], second[:1000]) for i in range(1000))
    assert not any(np.array_equal(second[i : i + 1000], first[:1000]) for i in range(1000))


@pytest.mark.parametrize(("K", "dtype"), [(255, np.uint8), (256, np.uint16), (65535, np.uint16), (65536, np.uint32)])
def test_dtype_is_the_smallest_that_holds_K(K, dtype):  # noqa: N802
    assert Membership(K, 2, 0).columns(0, 3).dtype == dtype


def test_every_subset_is_equally_likely():
    N, K, d = 200_000, 40, 6
    sizes = Membership(K, d, 11).sizes(N)
    assert sizes.sum() == N * d
    sd = np.sqrt(N * d / K * (1 - d / K))
    assert np.abs(sizes - N * d / K).max() < 4.5 * sd
    assert 0.6 * sd < sizes.std() < 1.5 * sd


def test_degree_K_is_every_subset():  # noqa: N802
    assert Membership(6, 6, 0).columns(0, 4).tolist() == [list(range(6))] * 4


def test_bernoulli_pads_with_K_and_has_the_right_density():  # noqa: N802
    M = Membership(60, 30, 2, "bernoulli")
    ids = M.columns(0, 3000).astype(np.int64)
    assert (np.diff(ids, axis=1) >= 0).all()
    assert ids.max() == 60  # some row is shorter than the widest
    degrees = (ids < 60).sum(axis=1)
    assert ids.shape[1] == degrees.max()
    assert abs(degrees.mean() - 30) < 0.4
    assert 0.8 < degrees.std() / np.sqrt(15) < 1.2


def test_matrix_is_what_scikit_learn_takes():
    M = Membership(20, 3, 1)
    matrix = M.matrix(5, 45)
    assert matrix.shape == (20, 40)
    assert matrix.dtype == np.float64
    assert matrix.indices.dtype == matrix.indptr.dtype == np.int32
    assert (matrix.toarray().sum(axis=0) == 3).all()
    assert np.array_equal(Membership(20, 3, 1).sizes(45), M.matrix(0, 45).sum(axis=1))


def test_sizes_are_streamed_over_chunks(monkeypatch):
    whole = Membership(30, 4, 0).sizes(1000)
    monkeypatch.setattr("stride_ray.operators.membership.CHUNK", 64)
    assert len(list(Membership(30, 4, 0).ranges(1000))) == 16
    assert np.array_equal(Membership(30, 4, 0).sizes(1000), whole)


def test_check_agrees_with_theory_for_the_regular_form():
    check = Membership(1000, 10, 4).check(100_000, pairs=50_000)
    assert check.columns_valid
    assert check.size_mean == 1000
    assert check.size_min < 1000 < check.size_max
    assert abs(check.size_sd / check.size_sd_expected - 1) < 0.1
    assert check.overlap_mean_expected == pytest.approx(0.1)
    assert abs(check.overlap_mean - 0.1) < 0.01
    assert check.overlap_bound == pytest.approx(10 / 3)
    assert check.overlap_above < 0.001


def test_check_shows_the_bernoulli_form_outside_the_expander_regime():
    check = Membership(200, 100, 4, "bernoulli").check(3000, pairs=3000)
    assert check.columns_valid
    assert check.overlap_above > 0.99  # Remark 1: overlap about d/2, the bound d/3
    assert abs(check.overlap_mean - 50) < 1


def test_check_sees_broken_columns(monkeypatch):
    def broken(self, ordinals):
        ids = np.tile(np.array([1, 4, 9], np.uint8), (len(ordinals), 1))
        ids[-1] = [4, 4, 9]
        return ids

    monkeypatch.setattr(Membership, "columns_at", broken)
    assert not Membership(10, 3, 0).check(100, pairs=10).columns_valid


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((0, 1, 0), "subsets"),
        ((5, 6, 0), "degree"),
        ((5, 0, 0), "degree"),
        ((5, 2, -1), "seed"),
        ((5, 2, 2**64), "seed"),
        ((5, 2.5, 0), "degree"),
        ((5, True, 0), "degree"),
        ((5, 2, 0, "dense"), "form"),
    ],
)
def test_bad_arguments_are_told_in_a_sentence(arguments, word):
    with pytest.raises(StrideError, match=word):
        Membership(*arguments)


def test_bad_ranges_are_told_in_a_sentence():
    M = Membership(5, 2, 0)
    for start, stop in [(-1, 3), (4, 3)]:
        with pytest.raises(StrideError, match="range"):
            M.columns(start, stop)
    with pytest.raises(StrideError, match="-2"):
        M.columns_at(np.array([1, -2]))
    with pytest.raises(StrideError, match="integers"):
        M.columns_at(np.array([1.0]))
    with pytest.raises(StrideError, match="2 blocks"):
        M.check(1)
    assert M.columns(3, 3).shape == (0, 2)
