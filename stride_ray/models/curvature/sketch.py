"""Sketches of sites: two-sided projections of per-example whitened gradients.

A site's whitened gradient H^-½ J = Σ_t (W_inᵀu_t) ⊗ (W_outᵀg_t) is an F×D matrix (sites.py), too large to keep for
every block. Its sketch is P_inᵀ (H^-½ J) P_out with P_in (F×a) and P_out (D×b): the leading principal axes of a layer's
inputs and output gradients (principal_axes.py), as in LoGRA's PCA form (arXiv 2405.13954) with the preconditioner
folded in, or random directions of the vocabulary, whose inner products have noise that shrinks with their number
(Johnson–Lindenstrauss). The axes are multiplied into the whitening, so tokens are projected first and the F×D gradient
is never formed: a sketch *is* a ``Site`` with rectangular matrices.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stride_ray.models.causal_lm import SplitModel
from stride_ray.models.curvature.principal_axes import Axes, SiteAxes
from stride_ray.models.linear_algebra.matrices import orthonormal
from stride_ray.models.linear_algebra.rotation import random_rotation
from stride_ray.models.sites import (
    EMBEDDING,
    HEAD,
    ORIGIN,
    Site,
    forward_with_activations,
    head_gradients,
    output_gradients,
)

# Expected squared error of inner products whose vocabulary side has a coordinates, times a.
TOKEN_NOISE = 400.0


def whole_shape(site: Site) -> tuple[int, int]:
    """Return (F, D), the shape of a site's whitened gradient."""
    tokens = len(site.tokens if site.rotation is None else site.rotation)
    inner, outer = (side.shape[-1] or tokens for side in (site.W_in, site.W_out))
    return inner, outer


def sketch_shapes(
    whole: Sequence[tuple[int, int]],
    axes: Sequence[SiteAxes],
    shares: Sequence[float],
    coordinates: int,
) -> list[tuple[int, int]]:
    """Distribute a budget of coordinates over the sites: the shape a×b of each sketch.

    A site's coordinates are proportional to its share of the pool's mean squared whitened gradient, because the noise
    of its inner products is that share over the root of its coordinates; capped at its full size.

    Args:
        whole: (F, D) by site (whole_shape).
        axes: of both sides by site.
        shares: of the mean of |H^-½ J|² over blocks, by site; they sum to 1.
        coordinates: total over all sketches; at least one per site.

    Returns:
        (a, b) by site; the products sum to ``coordinates`` at most.
    """
    full = np.array([F * D for F, D in whole], dtype=float)
    weights = np.maximum(np.array(shares, dtype=float), 1e-12)
    given, open_sites, left = np.ones(len(full)), np.ones(len(full), dtype=bool), float(coordinates - len(full))
    while open_sites.any():
        wanted = 1.0 + weights / weights[open_sites].sum() * left
        filled = open_sites & (wanted >= full)
        if not filled.any():
            given[open_sites] = wanted[open_sites]
            break
        given[filled] = full[filled]
        open_sites &= ~filled
        left = coordinates - given[~open_sites].sum() - open_sites.sum()
    return [best_shape(size, sides, int(n)) for size, sides, n in zip(whole, axes, given, strict=True)]


def best_shape(whole: tuple[int, int], axes: SiteAxes, coordinates: int) -> tuple[int, int]:
    """The shape a×b with at most ``coordinates`` coordinates whose inner products are the most accurate.

    The expected squared error, relative to that of the inner product itself, is about half the squared energy that
    the axes leave out, plus TOKEN_NOISE·(1/a − 1/n) if a of the vocabulary's n coordinates are kept (RESULTS.md).
    """
    (F, D), (inner, outer) = whole, axes
    b = np.arange(1, D + 1)
    a = np.minimum(F, coordinates // b)
    b = np.minimum(D, coordinates // np.maximum(a, 1))  # use what a's rounding leaves
    energy, noise = np.ones(D), np.zeros(D)
    for side, kept, length in ((inner, np.maximum(a, 1), F), (outer, b, D)):
        if side:
            energy *= side.energy[kept - 1]
        else:
            noise += TOKEN_NOISE * (1 / kept - 1 / length)
    best = int(np.argmin(np.where(a > 0, 0.5 * (1 - energy) ** 2 + noise, np.inf)))
    return int(a[best]), int(b[best])


def sketch_sites(
    sites: Sequence[Site],
    shapes: Sequence[tuple[int, int]],
    seed: int,
    axes: Sequence[SiteAxes] | None = None,
) -> tuple[Site, ...]:
    """Multiply projections into both sides of the sites' whitening.

    Args:
        sites: with square whitening (kfac.py).
        shapes: (a, b) by site.
        seed: of the projections; site i is seeded with [seed, i].
        axes: of both sides by site, of which the first a and b are kept; without them, projections are random.

    Returns:
        Sites with W_in (F, a) and W_out (D, b), or a rotation of the vocabulary's coordinates. Inner products over
        ``scale`` estimate those of the full gradients: ``scale`` includes the share of the coordinates that random
        projections keep, and the root of the energy that the axes hold, because what they leave out shrinks products
        (RESULTS.md).
    """
    given = zip(sites, shapes, axes or [(None, None)] * len(sites), strict=True)
    return tuple(
        _sketch_site(site, *shape, *sides, torch.Generator().manual_seed(_seed_of(seed, index)))
        for index, (site, shape, sides) in enumerate(given)
    )


def _seed_of(seed: int, index: int) -> int:
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


def _sketch_site(
    site: Site, a: int, b: int, inner: Axes | None, outer: Axes | None, generator: torch.Generator
) -> Site:
    share, sides = 1.0, dict[str, Any]()
    for side, kept, axes in (("W_in", a, inner), ("W_out", b, outer)):
        W = getattr(site, side)
        if not len(W):  # the vocabulary's
            sides["rotation"] = random_rotation(len(site.tokens), kept, generator)
            share *= sides["rotation"].share
        elif axes:
            # Rotated, because one-bit codes need coordinates of similar size.
            sides[side] = W @ axes.first(kept) @ orthonormal(kept, kept, generator)
            share *= float(axes.energy[kept - 1]) ** 0.5
        else:
            sides[side] = W @ orthonormal(len(W), kept, generator)
            share *= kept / len(W)
    return replace(site, **sides, scale=site.scale * share)


def sketched_gradients(
    model: SplitModel, sketches: Sequence[Site], ids_BT: Tensor, mask_BT: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Sketches of the per-example whitened gradients, and the sequences' losses (B,) float32.

    One forward and one backward pass. Sketches are (B, a·b) float32 by site; zeros for a sequence without targets.
    """
    z, read, wrote = forward_with_activations(model, [site.name for site in sketches], ids_BT)
    ends, losses, slope = head_gradients(model, sketches, ids_BT, mask_BT, z.detach(), whiten=True)
    written = output_gradients(z, wrote, slope)
    pieces = []
    for site in sketches:
        if site.name in (HEAD, ORIGIN):
            Z = ends.pop(site.name)
        else:
            u, g = read.pop(site.name), written.pop(site.name) @ site.W_out
            Z = site.tokens.sum_outer_products(u, g) if site.name == EMBEDDING else (u @ site.W_in).transpose(1, 2) @ g
        pieces.append((Z if site.rotation is None else site.rotation(Z)).flatten(1))
    return pieces, losses
