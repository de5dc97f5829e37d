"""The gradient of a query with the whole curvature taken into account: conjugate gradients on (κG + cH) x = J(x).

Influence is J(x)ᵀ H⁻¹ J_i with H the damped Kronecker factors of every site by itself (sites.py). The Gauss–Newton
matrix G (gauss_newton.py) is what H approximates; a few steps of conjugate gradients from H⁻¹J(x), with H as
preconditioner, bring in what it leaves out (after ASTRA, arXiv 2507.14740). A solution lies in H⁻¹ times the span of
the residuals, x = H⁻¹ y, so y takes the place of J(x): nothing else of the pipeline knows that there was a solve.

A step needs a product with G for its length, so the first product alone would change nothing but the length of x. But
what the products so far told bounds the length of the step after them, since no eigenvalue of H⁻¹A = H⁻¹(κG + cH) is
below c: by Gauss–Radau quadrature (Meurant and Tichý 2013, "On computing quadrature-based bounds for the A-norm of the
error in conjugate gradients"). One more step is taken, of half the bound.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stride_ray.models.sites import ORIGIN

# Share of the bound that the step without a product takes: the whole one was too far where G is of few blocks.
UNMEASURED = 0.5

Gradient = dict[str, Tensor]
Products = Callable[[list[Gradient]], list[Gradient]]


class Preconditioner(Protocol):
    """H⁻¹ at one site, as sites.Site has it."""

    @property
    def name(self) -> str:
        """The site's."""

    def solved(self, J: Tensor) -> Tensor:
        """H⁻¹ J."""


@dataclass
class Solved:
    """A query's solve.

    Attributes:
        y: what takes the place of J(x), by site's name.
        steps: with a product that it took; 0 where it came to nothing and y is J(x).
    """

    y: Gradient
    steps: int


def curvature_scale(masks: Sequence[Tensor]) -> float:
    """κ, which brings G to the scale of H.

    H is of gradients of mean losses at single positions, so a token's weight ω counts twice in it, and once in G:
    κ = Σ_t ω_t² / positions, over blocks. For whole blocks of T targets it is 1/T².
    """
    weights = positions = 0.0
    for mask in masks:
        targets = mask[:, 1:].sum(1)
        weights += float((1 / targets[targets > 0].double()).sum())
        positions += float(mask[:, 1:].flip(1).cumsum(1).gt(0).sum())
    return weights / max(1.0, positions)


def solve(
    queries: list[Gradient], sites: Sequence[Preconditioner], products: Products, steps: int, damping: float
) -> list[Solved]:
    """Conjugate gradients for several queries, each by itself, in steps together so that they share what G costs.

    Args:
        queries: J(x) by site's name, without a batch; a site that G does not know (the origin) keeps its own.
        sites: whose H⁻¹ preconditions.
        products: κG times directions.
        steps: with a product each; one more goes without.
        damping: c, above zero.

    Returns:
        In order; y of the length that keeps what H⁻¹ alone gives where κG = H.
    """
    known = [site for site in sites if site.name != ORIGIN]
    states = [_State({site.name: query[site.name] for site in known}, known, damping) for query in queries]
    for _ in range(steps):
        going = [state for state in states if state.going]
        for state, product in zip(going, products([state.p for state in going]) if going else [], strict=True):
            state.step(product)
    return [Solved({**query, **state.found()}, state.steps) for query, state in zip(queries, states, strict=True)]


class _State:
    """Conjugate gradients of one query, between steps: x = H⁻¹y, p = H⁻¹s the direction, r the residual.

    Seven times the size of J at most, J and the product with G among them. ``bound``: no step along p that minimises
    the error is longer.
    """

    def __init__(self, J: Gradient, sites: Sequence[Preconditioner], damping: float) -> None:
        self.sites, self.damping, self.steps, self.bound = sites, damping, 0, 1 / damping
        self.y = {name: torch.zeros_like(x) for name, x in J.items()}
        self.r, self.s = ({name: x.clone() for name, x in J.items()} for _ in range(2))
        self.p = self._solved(J)
        self.size = inner(J, self.p)
        self.going = self.size > 0 and math.isfinite(self.size)

    def found(self) -> Gradient:
        """y; nothing where no step was taken."""
        if not self.steps:
            return {}
        if self.going and self.bound > 0:
            add(self.y, self.s, UNMEASURED * self.bound)
        return {name: (1 + self.damping) * y for name, y in self.y.items()}

    def _solved(self, x: Gradient) -> Gradient:
        return {site.name: site.solved(x[site.name]) for site in self.sites}

    def step(self, product: Gradient) -> None:
        """One step along p, whose product with κG is given; stops for good where that is not positive or not finite."""
        add(product, self.s, self.damping)
        curvature = inner(self.p, product)
        if not (curvature > 0 and math.isfinite(curvature)):
            self.going = False
            return
        self.steps += 1
        length = self.size / curvature
        add(self.y, self.s, length)
        add(self.r, product, -length)
        solved = self._solved(self.r)
        size = inner(self.r, solved)
        ratio = size / self.size
        for direction, change in ((self.s, self.r), (self.p, solved)):
            for name, x in direction.items():
                x.mul_(ratio).add_(change[name])
        self.size, self.going = size, size > 0 and math.isfinite(size)
        if self.going:
            excess = self.bound - length
            self.bound = excess / (self.damping * excess + ratio)


def add(x: Mapping[str, Tensor], y: Mapping[str, Tensor], times: float = 1.0) -> None:
    """x += times · y, site by site."""
    for name, each in x.items():
        each.add_(y[name], alpha=times)


def inner(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> float:
    """⟨x, y⟩ over all sites, summed in float64."""
    return float(sum((each.double() * y[name].double()).sum() for name, each in x.items()))
