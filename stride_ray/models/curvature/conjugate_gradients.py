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

# A gradient, or anything of its shapes, by site name.
Gradient = dict[str, Tensor]
# Multiplies several directions by κG, in order.
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

    Example with a single coordinate, H = 1, κG = 3, c = 1 and J(x) = 4: the first step finds x = 4 / (3 + 1) = 1, and
    y is (1 + c) H x = 2. The curvature is thrice what H assumes, so the query's gradient counts half.

    Args:
        queries: J(x) by site name, without a batch dimension; the origin, which is not part of G, is left unchanged.
        sites: provide the preconditioner H⁻¹.
        products: multiplies directions by κG.
        steps: steps with a product; one more is taken without.
        damping: c, above zero.

    Returns:
        One result per query, in order; y is scaled by 1 + c, so that it equals J(x) if κG = H.
    """
    sites = [site for site in sites if site.name != ORIGIN]
    states = [_State({site.name: query[site.name] for site in sites}, sites, damping) for query in queries]
    for _ in range(steps):
        active = [state for state in states if state.active]
        directions = [state.direction() for state in active]
        for state, p, product in zip(active, directions, products(directions) if active else [], strict=True):
            state.step(p, product)
    return [
        SolveResult({**query, **state.solution()}, state.steps) for query, state in zip(queries, states, strict=True)
    ]


class _State:
    """Conjugate-gradient state of one query: x = H⁻¹y, direction p = H⁻¹s, residual r.

    Peak memory is four times that of J in the first step and six times in later ones, including J, p and the product
    with G: r and s begin as J itself, and p is computed from s when it is needed.

    Attributes:
        active: whether further steps are possible.
        residual_norm_sq: rᵀ H⁻¹ r.
        bound: an upper bound on the length of the optimal step along p.
    """

    def __init__(self, J: Gradient, sites: Sequence[Preconditioner], damping: float) -> None:
        self.sites, self.damping, self.steps, self.bound = sites, damping, 0, 1 / damping
        self.y = {name: torch.zeros_like(x) for name, x in J.items()}
        self.r, self.s = dict(J), dict(J)
        self.residual_norm_sq = self._compute_residual_norm_sq()
        self.active = self.residual_norm_sq > 0 and math.isfinite(self.residual_norm_sq)

    def direction(self) -> Gradient:
        """p = H⁻¹ s."""
        return {site.name: site.precondition(self.s[site.name]) for site in self.sites}

    def step(self, p: Gradient, product: Gradient) -> None:
        """Take a step along p, given the product κG p; stop if the curvature along p is not positive and finite."""
        _add_in_place(product, self.s, self.damping)  # now (κG + cH) p, since H p = s
        curvature = sum(_inner(p[name], x) for name, x in product.items())
        if not (curvature > 0 and math.isfinite(curvature)):
            self.active = False
            return
        self.steps += 1
        alpha = self.residual_norm_sq / curvature
        _add_in_place(self.y, self.s, alpha)
        # Not in place: r and s may be the caller's J.
        self.r = {name: r.sub(product.pop(name), alpha=alpha) for name, r in self.r.items()}
        before, self.residual_norm_sq = self.residual_norm_sq, self._compute_residual_norm_sq()
        beta = self.residual_norm_sq / before
        self.s = {name: r.add(self.s.pop(name), alpha=beta) for name, r in self.r.items()}
        self.active = self.residual_norm_sq > 0 and math.isfinite(self.residual_norm_sq)
        if self.active:
            # Gauss–Radau: the bound on the next α, from this one's.
            excess = self.bound - alpha
            self.bound = excess / (self.damping * excess + beta)

    def solution(self) -> Gradient:
        """Return y by site name, after the step without a product; empty if no step was taken."""
        if not self.steps:
            return {}
        if self.active and self.bound > 0:
            _add_in_place(self.y, self.s, UNMEASURED_STEP_SHARE * self.bound)
        for y in self.y.values():
            y.mul_(1 + self.damping)
        return self.y

    def _compute_residual_norm_sq(self) -> float:
        return sum(_inner(self.r[site.name], site.precondition(self.r[site.name])) for site in self.sites)


def _add_in_place(x: Mapping[str, Tensor], y: Mapping[str, Tensor], factor: float) -> None:
    """x += factor · y, site by site."""
    for name, at_site in x.items():
        at_site.add_(y[name], alpha=factor)


def _inner(x: Tensor, y: Tensor) -> float:
    """⟨x, y⟩, summed in float64."""
    return float((x.double() * y.double()).sum())
