"""Preconditioned conjugate gradients on (κG + cΓ) d = J(x): influence with the Gauss–Newton matrix.

Influence is J(x)ᵀ H⁻¹ J_i with H block-diagonal, the damped Kronecker factors of each site (K-FAC, sites.py). H
approximates the Gauss–Newton matrix G (gauss_newton.py), without the interactions of sites; a few steps of conjugate
gradients recover part of what it neglects (after ASTRA, arXiv 2507.14740). Γ is the optimiser's damping (damping.py);
the preconditioner P has EK-FAC's eigenvalues (eigenvalues.py).

The first step only rescales P⁻¹ J(x), the direction by EK-FAC's eigenvalues and the damping alone; what G adds begins
with the second. The last step needs its length alone, thus pᵀGp and not Gp, at less than half of the cost.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# A gradient, or anything of its shapes, by site name.
Gradient = dict[str, Tensor]


class Damped(Protocol):
    """A site's damping and preconditioner (eigenvalues.DampedSite)."""

    name: str

    def damp(self, direction: Tensor) -> Tensor:
        """Multiply a direction by cΓ."""

    def precondition(self, J: Tensor) -> Tensor:
        """P⁻¹ J with P near κG + cΓ."""


class Curvature(Protocol):
    """κG (gauss_newton.GaussNewton)."""

    def products(self, directions: list[Gradient]) -> list[Gradient]:
        """κG times each direction, in order."""

    def quadratic_forms(self, directions: list[Gradient]) -> list[float]:
        """vᵀ κG v of each direction v, in order."""


@dataclass
class SolveResult:
    """The result of a query's solve.

    Attributes:
        direction: d by site name; P⁻¹ J(x) if no step was taken.
        steps: number of steps.
    """

    direction: Gradient
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
    queries: list[Gradient], sites: Sequence[Damped], curvature: Curvature | None, steps: int
) -> list[SolveResult]:
    """Independent conjugate gradients for several queries, in lockstep so that they share the cost of G.

    Example with a single coordinate, κG = 3, cΓ = 1 and J(x) = 4: the first step finds d = 4 / (3 + 1) = 1.

    Args:
        queries: J(x) by site name, without a batch dimension. The sites' are taken out, to free them after the first
            step; the origin, which is not part of G, stays.
        sites: all sites but the origin.
        curvature: κG; None if no step is to be taken.
        steps: number of steps, each with a product or, the last, with a quadratic form.

    Returns:
        One result per query, in order.
    """
    states = [_State({site.name: query.pop(site.name) for site in sites}, sites) for query in queries]
    for step in range(1, steps + 1):
        active = [state for state in states if state.active]
        if curvature is None or not active:
            break
        directions = [state.direction() for state in active]
        if step < steps:
            for state, p, product in zip(active, directions, curvature.products(directions), strict=True):
                state.step(p, product)
        else:
            for state, p, form in zip(active, directions, curvature.quadratic_forms(directions), strict=True):
                state.last_step(p, form)
    return [SolveResult(state.solution(), state.steps) for state in states]


class _State:
    """Conjugate-gradient state of one query: d = P⁻¹y, step direction p = P⁻¹s, residual r.

    Peak memory is four times that of J in the first step and the last, and five times in those between, with p and the
    product with G: r and s begin as J itself, and p is computed from s when it is needed.

    Attributes:
        active: whether further steps are possible.
        residual_norm_sq: rᵀ P⁻¹ r.
    """

    def __init__(self, J: Gradient, sites: Sequence[Damped]) -> None:
        self.sites, self.steps = sites, 0
        self.y = {name: torch.zeros_like(x) for name, x in J.items()}
        self.r, self.s = dict(J), dict(J)
        self.residual_norm_sq = self._compute_residual_norm_sq()
        self.active = self.residual_norm_sq > 0 and math.isfinite(self.residual_norm_sq)

    def direction(self) -> Gradient:
        """p = P⁻¹ s."""
        return {site.name: site.precondition(self.s[site.name]) for site in self.sites}

    def step(self, p: Gradient, product: Gradient) -> None:
        """Take a step along p, given the product κG p."""
        for site in self.sites:
            product[site.name].add_(site.damp(p[site.name]))  # now (κG + cΓ) p
        alpha = self._move(sum(_inner(p[name], x) for name, x in product.items()))
        if not self.active:
            return
        # Not in place: r and s begin as one tensor.
        self.r = {name: r.sub(product.pop(name), alpha=alpha) for name, r in self.r.items()}
        before, self.residual_norm_sq = self.residual_norm_sq, self._compute_residual_norm_sq()
        beta = self.residual_norm_sq / before
        self.s = {name: r.add(self.s.pop(name), alpha=beta) for name, r in self.r.items()}
        self.active = self.residual_norm_sq > 0 and math.isfinite(self.residual_norm_sq)

    def last_step(self, p: Gradient, form: float) -> None:
        """Take a step along p, given pᵀ κG p, after which there is no further one."""
        self._move(form + sum(_inner(p[site.name], site.damp(p[site.name])) for site in self.sites))

    def _move(self, curvature: float) -> float:
        """Move y along p and return how far; stop if the curvature along p is not positive and finite."""
        self.active = curvature > 0 and math.isfinite(curvature)
        if not self.active:
            return 0.0
        self.steps += 1
        alpha = self.residual_norm_sq / curvature
        _add_in_place(self.y, self.s, alpha)
        return alpha

    def solution(self) -> Gradient:
        """Return d by site name."""
        y = self.y if self.steps else self.s
        return {site.name: site.precondition(y.pop(site.name)) for site in self.sites}

    def _compute_residual_norm_sq(self) -> float:
        return sum(_inner(self.r[site.name], site.precondition(self.r[site.name])) for site in self.sites)


def _add_in_place(x: Mapping[str, Tensor], y: Mapping[str, Tensor], factor: float) -> None:
    """x += factor · y, site by site."""
    for name, at_site in x.items():
        at_site.add_(y[name], alpha=factor)


def _inner(x: Tensor, y: Tensor) -> float:
    """⟨x, y⟩, summed in float64."""
    return float((x.double() * y.double()).sum())
