"""Sketches of sites: against the whitened gradients that they are sketches of."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_sites import B, D, V, made, site_moments, texts  # noqa: F401 -- fixtures

from stride_ray.models.curvature.moments import KroneckerFactors, kfac_site
from stride_ray.models.curvature.sketch import (
    sketch_shapes,
    sketch_sites,
    sketched_gradients,
    whole_shape,
)
from stride_ray.models.sites import ORIGIN, site_gradients


@pytest.fixture
def sites(made, texts):  # noqa: F811
    """All of the model's sites, the origin too, whitened by the texts' own moments."""
    model, names = made
    ids, mask = texts
    sums, count = site_moments(model, names, ids, mask)
    counts = torch.bincount(ids.flatten(), minlength=V)
    found = [replace(kfac_site(name, m / count, counts, 0), scale=2.0) for name, m in sums.items()]
    return (*found, kfac_site(ORIGIN, KroneckerFactors(np.eye(D), np.eye(1) / 4), counts, 0))


def test_whole_sketches_have_the_inner_products_of_whitened_gradients(made, texts, sites):  # noqa: F811
    model, _ = made
    whole = [whole_shape(site) for site in sites]
    sketches = sketch_sites(sites, whole, seed=3)
    pieces, losses = sketched_gradients(model, sketches, *texts)
    each, expected_losses = site_gradients(model, sites, *texts)
    torch.testing.assert_close(losses, expected_losses, equal_nan=True)
    for Z, sketch, (site, J) in zip(pieces, sketches, each, strict=True):
        W = site.whiten(J).flatten(1)
        assert Z.shape == W.shape
        assert sketch.scale == site.scale
        torch.testing.assert_close(Z @ Z.T, W @ W.T, atol=1e-3, rtol=1e-3)
        assert not torch.allclose(Z, W)  # rotated, so that coordinates are of like size


def test_small_sketches_estimate_inner_products(made, texts, sites):  # noqa: F811
    model, _ = made
    for site in sites:
        ((_, J),) = site_gradients(model, (site,), *texts)[0]
        W = site.whiten(J).flatten(1)
        true, found = W @ W.T / site.scale, torch.zeros(B, B)
        draws = 200
        for seed in range(draws):
            small = sketch_sites((site,), [(6, 5)], seed)
            (Z,), _ = sketched_gradients(model, small, *texts)
            assert Z.shape == (B, 30)
            found += Z @ Z.T / small[0].scale / draws
        assert float((found - true).norm() / true.norm()) < 0.15, site.name


def site_tensors(site):
    """What is drawn of a sketch: both sides."""
    drawn = () if site.rotation is None else (site.rotation.order, site.rotation.left)
    return [each for each in (site.W_in, site.W_out, *drawn) if each.numel()]


def test_sites_draw_their_own_directions(sites):
    one, two = (sketch_sites(sites, [(4, 4)] * len(sites), seed) for seed in (0, 0))
    other = sketch_sites(sites, [(4, 4)] * len(sites), 1)
    for a, b, c in zip(one, two, other, strict=True):
        for mine, same, others in zip(*(site_tensors(each) for each in (a, b, c)), strict=True):
            assert torch.equal(mine, same)
            assert not torch.equal(mine, others)


@given(
    st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90), st.floats(0, 1)), min_size=1, max_size=8),
    st.integers(1, 20_000),
)
def test_shapes_use_up_the_budget_and_no_more(given, coordinates):
    whole, shares = [each[:2] for each in given], [each[2] for each in given]
    coordinates = max(coordinates, len(whole))
    shapes = sketch_shapes(whole, shares, coordinates)
    assert all(1 <= a <= most[0] and 1 <= b <= most[1] for (a, b), most in zip(shapes, whole, strict=True))
    used, room = (sum(a * b for a, b in each) for each in (shapes, whole))
    assert used <= coordinates
    if coordinates >= room:
        assert used == room


def test_a_larger_share_gets_more_coordinates():
    (a, b), (c, d) = sketch_shapes([(100, 100)] * 2, [0.8, 0.2], 1000)
    assert a * b == pytest.approx(800, rel=0.05)
    assert c * d == pytest.approx(200, rel=0.1)
    assert abs(a - b) <= 2
