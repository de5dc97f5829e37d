"""Preconditioned conjugate gradients on (κG + cH) x = J(x): influence with the Gauss–Newton matrix.

Influence is J(x)ᵀ H⁻¹ J_i with H block-diagonal, the damped Kronecker factors of each site (K-FAC, sites.py). H
approximates the Gauss–Newton matrix G (gauss_newton.py); a few steps of conjugate gradients with H as preconditioner
recover part of what it neglects (after ASTRA, arXiv 2507.14740). The iterates lie in H⁻¹ times the span of the
residuals, x = H⁻¹ y, so y replaces J(x) and the rest of the pipeline is unchanged.

A step's length needs a product with G, so a single product would only rescale x. But the products so far bound the
length of the next step, since no eigenvalue of H⁻¹A = H⁻¹(κG + cH) is below c: Gauss–Radau quadrature (Meurant and
Tichý 2013, "On computing quadrature-based bounds for the A-norm of the error in conjugate gradients"). One more step,
of half the bound, is therefore taken without a product.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stride_ray.models.sites import ORIGIN

# Length of the step without a product, as a share of its bound: the full bound overshoots if G has few blocks.
UNMEASURED_STEP_SHARE = 0.5

Gradient = dict[str, Tensor]
Products = Callable[[list[Gradient]], list[Gradient]]


class Preconditioner(Protocol):
    """H⁻¹ at one site; implemented by sites.Site and eigenvalues.EKFACSite."""

    @property
    def name(self) -> str:
        """The site's name."""

    def precondition(self, J: Tensor) -> Tensor:
        """H⁻¹ J."""


@dataclass
class SolveResult:
    """The result of a query's solve.

    Attributes:
        y: replaces J(x), by site name.
        steps: number of steps with a product; 0 if the solve failed and y is J(x).
    """

    y: Gradient
    steps: int


def curvature_scale(masks: Sequence[Tensor]) -> float:
    """κ, which scales G to H.

    H averages outer products of gradients of mean losses over positions, so it is quadratic in a token's weight ω,
    whereas G is linear in ω: κ = Σ_t ω_t² / positions, over blocks. For full blocks of T targets it is 1/T².
    """
    weights = positions = 0.0
    for mask in masks:
        targets = mask[:, 1:].sum(1)
        weights += float((1 / targets[targets > 0].double()).sum())
        positions += float(mask[:, 1:].flip(1).cumsum(1).gt(0).sum())
    return weights / max(1.0, positions)


def solve(
    queries: list[Gradient], sites: Sequence[Preconditioner], products: Products, steps: int, damping: float
) -> list[SolveResult]:
    """Independent conjugate gradients for several queries, in lockstep so that they share the cost of G.

    Args:
        queries: J(x) by site name, without a batch dimension; the origin, which is not part of G, is left unchanged.
        sites: provide the preconditioner H⁻¹.
        products: multiplies directions by κG.
        steps: steps with a product; one more is taken without.
        damping: c, above zero.

    Returns:
        One result per query, in order; y is scaled by 1 + c, so that it equals J(x) if κG = H.
    """
    known = [site for site in sites if site.name != ORIGIN]
    states = [_State({site.name: query[site.name] for site in known}, known, damping) for query in queries]
    for _ in range(steps):
        going = [state for state in states if state.going]
        directions = [state.direction() for state in going]
        for state, p, product in zip(going, directions, products(directions) if going else [], strict=True):
            state.step(p, product)
    return [
        SolveResult({**query, **state.solution()}, state.steps) for query, state in zip(queries, states, strict=True)
    ]


class _State:
    """Conjugate-gradient state of one query: x = H⁻¹y, direction p = H⁻¹s, residual r.

    Peak memory is four times that of J in the first step and six times in later ones, including J, p and the product
    with G: r and s begin as J itself, and p is computed from s when it is needed. ``bound`` is an upper bound on the
    length of the optimal step along p.
    """

    def __init__(self, J: Gradient, sites: Sequence[Preconditioner], damping: float) -> None:
        self.sites, self.damping, self.steps, self.bound = sites, damping, 0, 1 / damping
        self.y = {name: torch.zeros_like(x) for name, x in J.items()}
        self.r, self.s = dict(J), dict(J)
        self.size = self._residual_size()
        self.going = self.size > 0 and math.isfinite(self.size)

    def solution(self) -> Gradient:
        """Return y by site name; empty if no step was taken."""
        if not self.steps:
            return {}
        if self.going and self.bound > 0:
            add(self.y, self.s, UNMEASURED_STEP_SHARE * self.bound)
        for y in self.y.values():
            y.mul_(1 + self.damping)
        return self.y

    def direction(self) -> Gradient:
        """p = H⁻¹ s."""
        return {site.name: site.precondition(self.s[site.name]) for site in self.sites}

    def _residual_size(self) -> float:
        """rᵀ H⁻¹ r."""
        return sum(_inner(self.r[site.name], site.precondition(self.r[site.name])) for site in self.sites)

    def step(self, p: Gradient, product: Gradient) -> None:
        """Take a step along p, given the product κG p; stop if the curvature along p is not positive and finite."""
        add(product, self.s, self.damping)
        curvature = sum(_inner(p[name], x) for name, x in product.items())
        if not (curvature > 0 and math.isfinite(curvature)):
            self.going = False
            return
        self.steps += 1
        length = self.size / curvature
        add(self.y, self.s, length)
        # Not in place: r and s may be the caller's J.
        self.r = {name: r.sub(product.pop(name), alpha=length) for name, r in self.r.items()}
        size = self._residual_size()
        ratio = size / self.size
        self.s = {name: r.add(self.s.pop(name), alpha=ratio) for name, r in self.r.items()}
        self.size, self.going = size, size > 0 and math.isfinite(size)
        if self.going:
            excess = self.bound - length
            self.bound = excess / (self.damping * excess + ratio)


def add(x: Mapping[str, Tensor], y: Mapping[str, Tensor], times: float = 1.0) -> None:
    """x += times · y, site by site."""
    for name, each in x.items():
        each.add_(y[name], alpha=times)


def _inner(x: Tensor, y: Tensor) -> float:
    """⟨x, y⟩, summed in float64."""
    return float((x.double() * y.double()).sum())
