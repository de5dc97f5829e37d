"""Rows in one bit a coordinate: the products against plain arithmetic, and what they estimate."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stride_ray.operators import one_bit
from stride_ray.operators.one_bit import (
    Queries,
    Rows,
    estimate_inner_products,
    pack_rows,
    quantise_queries,
    row_bytes,
    word_starts,
)


def sections(rng, rows, sizes):
    return [rng.standard_normal((rows, size)).astype(np.float32) for size in sizes]


def plainly(z, q, starts):
    """Products of quantised queries with signs times scales, section by section, in float64."""
    total = np.zeros((len(q[0]), len(z[0])))
    for row, query in zip(z, q, strict=True):
        scale = np.square(row, dtype=np.float64).sum(1) / np.abs(row).sum(1, dtype=np.float64)
        level, step = one_bit._quantise(query)
        signs = np.where(row >= 0, 1.0, -1.0) * scale.astype(np.float32)[:, None]
        total += (level * step.astype(np.float64)[:, None]) @ signs.T
    return total


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=5), st.integers(1, 70), st.integers(1, 5), st.integers(0, 99))
def test_products_count_bits_as_plain_arithmetic_adds(sizes, n, asked, seed):
    rng = np.random.default_rng(seed)
    z, q, starts = sections(rng, n, sizes), sections(rng, asked, sizes), word_starts(sizes)
    rows, queries = pack_rows(z), quantise_queries(q)
    found = estimate_inner_products(rows, queries, starts)
    assert found.shape == (asked, n, 2)
    np.testing.assert_allclose(found.sum(2), plainly(z, q, starts), rtol=1e-5, atol=1e-4)
    assert rows.bits.shape == (n, starts[-1])
    assert rows.bits[0].nbytes + rows.scales[0].nbytes == row_bytes(sizes)
    # A query's and a row's product have the same bits whatever stands beside them.
    one = Queries(queries.planes[-1:], queries.sums[-1:], queries.steps[-1:])
    alone = estimate_inner_products(Rows(rows.bits[-1:], rows.scales[-1:]), one, starts)
    assert np.array_equal(alone[0, 0], found[-1, -1])


def test_estimates_are_unbiased_and_halves_tell_how_good_they_are():
    rng = np.random.default_rng(0)
    sizes = (4000, 2000)
    z = sections(rng, 300, sizes)
    q = [0.1 * part[:20] + other for part, other in zip(z, sections(rng, 20, sizes), strict=True)]
    true = sum(a @ b.T for a, b in zip(q, z, strict=True))
    halves = estimate_inner_products(pack_rows(z), quantise_queries(q), word_starts(sizes))
    found = halves.sum(2)
    own = np.eye(20, 300, dtype=bool)
    assert found[own].mean() == pytest.approx(true[own].mean(), rel=0.02)
    assert abs((found - true)[~own].mean()) < 4 * (found - true)[~own].std() / np.sqrt((~own).sum())
    slope = (found * true).sum() / (true * true).sum()
    assert slope == pytest.approx(1, abs=0.03)


def test_four_bits_of_a_query_cost_next_to_nothing():
    rng = np.random.default_rng(1)
    (z,), (q,) = sections(rng, 200, [3000]), sections(rng, 10, [3000])
    whole = q @ (np.where(z >= 0, 1, -1) * (np.square(z).sum(1) / np.abs(z).sum(1))[:, None]).T
    found = estimate_inner_products(pack_rows([z]), quantise_queries([q]), word_starts([3000])).sum(2)
    assert np.corrcoef(whole.ravel(), found.ravel())[0, 1] > 0.99
    assert len(quantise_queries([q]).planes[0]) == 4


def test_zeros_and_what_is_not_finite_have_no_influence():
    z = np.ones((4, 100), np.float32)
    z[1], z[2, 3], z[3, 4] = 0, np.nan, np.inf
    rows = pack_rows([z])
    assert rows.scales.ravel().tolist() == [1, 0, 0, 0]
    queries = quantise_queries([np.ones((1, 100), np.float32) * [[1]]])
    assert estimate_inner_products(rows, queries, word_starts([100])).sum(2).ravel() == pytest.approx([100, 0, 0, 0])
    none = quantise_queries([np.zeros((1, 100), np.float32)])
    assert not estimate_inner_products(rows, none, word_starts([100])).any()
    assert estimate_inner_products(
        rows, quantise_queries([np.zeros((0, 100), np.float32)]), word_starts([100])
    ).shape == (0, 4, 2)
