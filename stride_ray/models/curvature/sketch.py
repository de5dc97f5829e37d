"""Sketches of sites: two-sided random projections of per-example whitened gradients.

A site's whitened gradient H^-½ J = Σ_t (W_inᵀu_t) ⊗ (W_outᵀg_t) is an F×D matrix (sites.py), too large to keep for
every block. Its sketch is P_inᵀ (H^-½ J) P_out with fixed random orthonormal P_in (F×a) and P_out (D×b). Inner products
of sketches, times F·D/(a·b), estimate those of the whitened gradients with noise that shrinks with a·b
(Johnson–Lindenstrauss; the two-sided form is LoGRA's, arXiv 2405.13954, with the preconditioner folded in). P_in and
P_out are multiplied into the whitening, so tokens are projected first and the F×D gradient is never formed: a sketch
*is* a ``Site`` with rectangular matrices.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stride_ray.models.causal_lm import SplitModel
from stride_ray.models.matrices import orthonormal
from stride_ray.models.rotation import random_rotation
from stride_ray.models.sites import (
    EMBEDDING,
    HEAD,
    ORIGIN,
    Site,
    forward_with_activations,
    head_gradients,
    output_gradients,
)


def whole_shape(site: Site) -> tuple[int, int]:
    """Return (F, D), the shape of a site's whitened gradient."""
    tokens = len(site.tokens if site.rotation is None else site.rotation)
    inner, outer = (side.shape[-1] or tokens for side in (site.W_in, site.W_out))
    return inner, outer


def sketch_shapes(whole: Sequence[tuple[int, int]], shares: Sequence[float], coordinates: int) -> list[tuple[int, int]]:
    """Distribute a budget of coordinates over the sites: the shape a×b of each sketch.

    A site's coordinates are proportional to its share of the pool's mean squared whitened gradient, because the noise
    of its inner products is that share over the root of its coordinates; capped at its full size. Within a site, a and
    b are as equal as F and D allow.

    Args:
        whole: (F, D) by site (whole_shape).
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
    shapes = []
    for (F, D), n in zip(whole, given, strict=True):
        b = max(1, min(D, round(math.sqrt(n)))) if n <= F * F else max(1, min(D, math.ceil(n / F)))
        a = max(1, min(F, int(n // b)))
        shapes.append((a, max(1, min(D, int(n // a)))))
    return shapes


def sketch_sites(sites: Sequence[Site], shapes: Sequence[tuple[int, int]], seed: int) -> tuple[Site, ...]:
    """Multiply random projections into both sides of the sites' whitening.

    Args:
        sites: with square whitening (kfac.py).
        shapes: (a, b) by site.
        seed: of the projections; site i is seeded with [seed, i].

    Returns:
        Sites with W_in (F, a) and W_out (D, b); vocabulary sides are projected likewise. ``scale`` includes the factor
        a·b/(F·D), so that inner products over ``scale`` estimate those of the full gradients.
    """
    found = []
    for index, (site, shape) in enumerate(zip(sites, shapes, strict=True)):
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, index]).generate_state(1)[0]))
        found.append(_sketch_site(site, *shape, generator))
    return tuple(found)


def _sketch_site(site: Site, a: int, b: int, generator: torch.Generator) -> Site:
    # Full-size sides are rotated too: one-bit codes need coordinates of similar size, not mostly absent tokens.
    (F, D), share, sides = whole_shape(site), 1.0, dict[str, Any]()
    for side, length, kept, of_tokens in (
        ("W_in", F, a, site.name == EMBEDDING),
        ("W_out", D, b, site.name in (HEAD, ORIGIN)),
    ):
        if of_tokens:
            sides["rotation"] = random_rotation(length, kept, generator)
            share *= sides["rotation"].share
        else:
            sides[side] = getattr(site, side) @ orthonormal(length, kept, generator)
            share *= kept / length
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
