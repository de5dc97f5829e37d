"""The gradient of a query with the whole curvature taken into account: conjugate gradients on (κG + cH) x = J(x).

Influence is J(x)ᵀ H⁻¹ J_i with H the damped Kronecker factors of every site by itself (sites.py). The Gauss–Newton
matrix G (gauss_newton.py) is what H approximates; a few steps of conjugate gradients from H⁻¹J(x), with H as
preconditioner, bring in what it leaves out (after ASTRA, arXiv 2507.14740). A solution lies in H⁻¹ times the span of
the residuals, x = H⁻¹ y, so y takes the place of J(x): nothing else of the pipeline knows that there was a solve.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stride_ray.sites import ORIGIN, Site

Gradient = dict[str, Tensor]
Products = Callable[[list[Gradient]], list[Gradient]]


@dataclass
class Solved:
    """A query's solve.

    Attributes:
        y: what takes the place of J(x), by site's name.
        steps: of conjugate gradients that it took; 0 where it came to nothing and y is J(x).
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
    queries: list[Gradient], sites: Sequence[Site], products: Products, steps: int, damping: float
) -> list[Solved]:
    """Conjugate gradients for several queries, each by itself, in steps together so that they share what G costs.

    Args:
        queries: J(x) by site's name, without a batch; a site that G does not know (the origin) keeps its own.
        sites: whose H⁻¹ preconditions.
        products: κG times directions.
        steps: how many; each takes a product a query.
        damping: c.

    Returns:
        In order; y of the length that keeps what H⁻¹ alone gives where κG = H.
    """
    known = [site for site in sites if site.name != ORIGIN]
    states = [_State({site.name: query[site.name] for site in known}, known) for query in queries]
    for _ in range(steps):
        going = [state for state in states if state.going]
        for state, product in zip(going, products([state.p for state in going]) if going else [], strict=True):
            state.step(product, damping)
    return [
        Solved({**query, **state.found(damping)}, state.steps) for query, state in zip(queries, states, strict=True)
    ]


class _State:
    """Conjugate gradients of one query, between steps: x = H⁻¹y, p = H⁻¹s the direction, r the residual."""

    def __init__(self, J: Gradient, sites: Sequence[Site]) -> None:
        self.sites, self.r, self.steps = sites, J, 0
        self.y = {name: torch.zeros_like(x) for name, x in J.items()}
        self.s, self.p = J, self._solved(J)
        self.size = inner(J, self.p)
        self.going = self.size > 0 and math.isfinite(self.size)

    def found(self, damping: float) -> Gradient:
        """y; nothing where no step was taken."""
        return {name: (1 + damping) * y for name, y in self.y.items()} if self.steps else {}

    def _solved(self, x: Gradient) -> Gradient:
        return {site.name: site.solved(x[site.name]) for site in self.sites}

    def step(self, product: Gradient, damping: float) -> None:
        """One step along p, whose product with κG is given; stops for good where that is not positive or not finite."""
        Ap = added(product, self.s, damping)
        curvature = inner(self.p, Ap)
        if not (curvature > 0 and math.isfinite(curvature)):
            self.going = False
            return
        self.steps += 1
        length = self.size / curvature
        self.y, self.r = added(self.y, self.s, length), added(self.r, Ap, -length)
        solved = self._solved(self.r)
        size = inner(self.r, solved)
        self.s, self.p = added(self.r, self.s, size / self.size), added(solved, self.p, size / self.size)
        self.size, self.going = size, size > 0 and math.isfinite(size)


def added(x: Mapping[str, Tensor], y: Mapping[str, Tensor], times: float = 1.0) -> Gradient:
    """x + times · y, site by site."""
    return {name: each + times * y[name] for name, each in x.items()}


def inner(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> float:
    """⟨x, y⟩ over all sites, summed in float64."""
    return float(sum((each.double() * y[name].double()).sum() for name, each in x.items()))
