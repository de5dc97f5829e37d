"""Sketches of sites: against the whitened gradients that they are sketches of."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_sites import B, D, V, made, site_moments, texts  # noqa: F401 -- fixtures

from stride_ray.corpus.failures import finite_rows
from stride_ray.models.curvature.eigenvalues import kronecker_eigenbasis
from stride_ray.models.curvature.moments import KroneckerFactors, kfac_site
from stride_ray.models.curvature.principal_axes import Axes, principal_axes
from stride_ray.models.curvature.sketch import (
    best_shape,
    sketch_shapes,
    sketch_sites,
    sketched_gradients,
    whole_shape,
)
from stride_ray.models.linear_algebra.matrices import orthonormal
from stride_ray.models.sites import EMBEDDING, HEAD, ORIGIN, site_gradients


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


def random_axes(length, seed):
    """Axes of a random moment with eigenvalues that halve."""
    energy = 0.5 ** np.arange(length)
    vectors = orthonormal(length, length, torch.Generator().manual_seed(seed))
    return Axes(vectors, torch.arange(length).flip(0), np.cumsum(energy) / energy.sum())


def test_sketches_of_all_axes_have_the_inner_products_of_whitened_gradients(made, texts, sites):  # noqa: F811
    model, _ = made
    for site in sites:
        F, D = whole_shape(site)
        sides = [None if n == V else random_axes(n, n) for n in (F, D)]
        sketches = sketch_sites((site,), [(F, D)], 3, [sides])
        (Z,), _ = sketched_gradients(model, sketches, *texts)
        ((_, J),) = site_gradients(model, (site,), *texts)[0]
        W = site.whiten(J).flatten(1)
        assert sketches[0].scale == pytest.approx(site.scale)
        torch.testing.assert_close(Z @ Z.T, W @ W.T, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(sketches[0].whiten(J).flatten(1), Z, atol=1e-3, rtol=1e-3)


def test_sketches_keep_the_first_axes(made, texts, sites):  # noqa: F811
    model, _ = made
    site = next(site for site in sites if site.name not in (EMBEDDING, HEAD, ORIGIN))
    inner, outer = (random_axes(n, n) for n in whole_shape(site))
    sketches = sketch_sites((site,), [(3, 2)], 0, [(inner, outer)])
    (Z,), _ = sketched_gradients(model, sketches, *texts)
    ((_, J),) = site_gradients(model, (site,), *texts)[0]
    kept = (inner.vectors[:, -3:].T @ site.whiten(J) @ outer.vectors[:, -2:]).flatten(1)
    torch.testing.assert_close(Z @ Z.T, kept @ kept.T, atol=1e-4, rtol=1e-4)
    expected = site.scale * (inner.energy[2] * outer.energy[1]) ** 0.5
    assert sketches[0].scale == pytest.approx(expected)


def test_axes_have_the_blocks_mean_squares_as_energy(made, texts, sites):  # noqa: F811
    model, _ = made
    measured, energies = [], {}
    sums, count = site_moments(model, [site.name for site in sites if site.name != ORIGIN], *texts)
    for site in sites:
        if site.name != ORIGIN:
            basis = kronecker_eigenbasis(site.name, sums[site.name] / count)
            ((_, J),) = site_gradients(model, (site,), *texts)[0]
            J = J[finite_rows([J])]
            measured.append(replace(basis, eigenvalues=basis.rotate(J).square().mean(0)))
            energies[site.name] = site.whiten(J)
    for site, sides in zip(sites, principal_axes(sites, measured), strict=True):
        W = energies[HEAD if site.name == ORIGIN else site.name]
        for side, axes in enumerate(sides):
            if axes is None:
                assert W.shape[1] == V
                continue
            along = W @ axes.first(len(axes.order)) if W.shape[1] == V or side else axes.first(len(axes.order)).T @ W
            squares = along.square().sum((0, 1) if W.shape[1] == V or side else (0, 2)).double().cumsum(0)
            assert (np.diff(axes.energy, n=2) < 1e-9).all()  # by decreasing energy
            np.testing.assert_allclose(axes.energy, squares / squares[-1], rtol=1e-3)


def test_a_site_without_gradients_has_axes(sites):
    basis = kronecker_eigenbasis(HEAD, KroneckerFactors(np.eye(D), np.eye(1)))
    ((inner, outer),) = principal_axes([sites[-1]], [replace(basis, eigenvalues=torch.zeros(V, D))])
    assert outer is None
    assert inner.energy.tolist() == [1.0] * D
    assert np.isfinite(sketch_sites([sites[-1]], [(4, 4)], 0, [(inner, outer)])[0].scale)


sides = st.tuples(st.integers(1, 90), st.booleans()).map(lambda each: (each[0], each[1] and random_axes(each[0], 0)))


@given(st.lists(st.tuples(sides, sides, st.floats(0, 1)), min_size=1, max_size=8), st.integers(1, 20_000))
def test_shapes_use_up_the_budget_and_no_more(given, coordinates):
    whole = [(inner[0], outer[0]) for inner, outer, _ in given]
    axes = [(inner[1] or None, outer[1] or None) for inner, outer, _ in given]
    coordinates = max(coordinates, len(whole))
    shapes = sketch_shapes(whole, axes, [each[2] for each in given], coordinates)
    assert all(1 <= a <= most[0] and 1 <= b <= most[1] for (a, b), most in zip(shapes, whole, strict=True))
    used, room = (sum(a * b for a, b in each) for each in (shapes, whole))
    assert used <= coordinates
    if coordinates >= room:
        assert used == room


def test_a_larger_share_gets_more_coordinates():
    even = Axes(torch.eye(100), torch.arange(100), np.arange(1, 101) / 100)
    (a, b), (c, d) = sketch_shapes([(100, 100)] * 2, [(even, even)] * 2, [0.8, 0.2], 1000)
    assert a * b == pytest.approx(800, rel=0.05)
    assert c * d == pytest.approx(200, rel=0.1)


def test_sides_keep_what_holds_the_energy():
    few, even = (Axes(torch.eye(64), torch.arange(64), np.minimum(1.0, np.arange(1, 65) / n)) for n in (8, 64))
    assert best_shape((64, 64), (few, even), 512) == (8, 64)
    assert best_shape((64, 64), (even, few), 512) == (64, 8)
    # The vocabulary: more of its random directions pay more than axes that hold little.
    assert best_shape((4096, 64), (None, few), 4096 * 8) == (4096, 8)
    assert best_shape((64, 4096), (few, None), 4096 * 8) == (8, 4096)
