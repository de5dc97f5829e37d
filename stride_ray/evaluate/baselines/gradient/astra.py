"""EK-FAC with a solve: conjugate gradients on (κG + cΓ) d = ∇ℓ(x), preconditioned by EK-FAC's Fisher F and the damping.

After ASTRA (arXiv 2507.14740), which descends with momentum on fresh batches and damps all weights alike. This uses our
own solve (conjugate_gradients.py), damping and sample size, because they do better. A query's gradient covers every
weight matrix, as in EK-FAC; F and Γ use labels sampled from the model. κ is the mean of 1 / targets over blocks: F is
the second moment of the gradients of blocks' mean losses, G the Gauss–Newton matrix of the same losses.
"""

import numpy as np
import torch
from torch import Tensor

from stride_ray.evaluate.baselines.gradient import ekfac
from stride_ray.evaluate.baselines.gradient.features import Gradients
from stride_ray.evaluate.baselines.gradient.per_example import tensors
from stride_ray.evaluate.baselines.problem import Problem
from stride_ray.models.causal_lm import SplitModel
from stride_ray.models.curvature.conjugate_gradients import solve
from stride_ray.models.curvature.damping import optimiser_damping, token_rows
from stride_ray.models.curvature.eigenvalues import DampedSite, EKFACSite
from stride_ray.models.curvature.gauss_newton import GaussNewton
from stride_ray.models.curvature.moments import UNIGRAM_DAMPING, distribution
from stride_ray.models.linear_algebra.vocabulary import TokenSide
from stride_ray.models.pool_worker import counts_of_logits
from stride_ray.models.sites import EMBEDDING, HEAD, Site
from stride_ray.runtime.options import SolveConfig

# Blocks linearised at once.
ROWS = 16
# The longer solve that the tables have too, for this method and for ours.
FURTHER: SolveConfig = SolveConfig(steps=4, tokens=18_432)


def scores(problem: Problem, options: SolveConfig | None = None) -> np.ndarray:
    """(Q, N) float32; ``options`` of the solve, None: our defaults."""
    given = options or SolveConfig()
    return ekfac.at_model(problem, problem.model, lambda model, fisher: Solve(model, fisher, problem, given))


class Solve:
    """Applies the solve to a batch of queries' gradients, by layer name."""

    def __init__(
        self, model: SplitModel, fisher: dict[str, ekfac.Layer], problem: Problem, options: SolveConfig
    ) -> None:
        ends = {model.model.get_input_embeddings(): EMBEDDING, model.model.get_output_embeddings(): HEAD}
        self.names = {name: ends.get(module, name) for name, module in model.model.named_modules() if name in fisher}
        self.steps = options.steps
        counts = counts_of_logits(np.bincount(problem.blocks.ids[problem.blocks.mask]), model.vocabulary)
        unigram = distribution(torch.from_numpy(counts)).to(model.device).double() + UNIGRAM_DAMPING
        self.damped = self._damped(fisher, unigram, options.damping)
        none, tokens = torch.empty(0), TokenSide(torch.ones(model.vocabulary, device=model.device))
        sites = tuple(Site(self.names[name], none, none, tokens) for name in fisher)
        ids, mask = tensors(problem.sample(-(-options.tokens // problem.blocks.ids.shape[1]), 1))
        targets = mask[:, 1:].sum(1)
        scale = float((1 / targets[targets > 0].double()).sum()) / len(ids)
        batches = list(zip(ids.split(ROWS), mask.split(ROWS), strict=True))
        self.curvature = GaussNewton(model, sites, batches, scale)

    def _damped(self, fisher: dict[str, ekfac.Layer], unigram: Tensor, factor: float) -> list[DampedSite]:
        """Each layer's damping and preconditioner, laid out as the sites' J."""
        rows, columns = dict[str, Tensor](), dict[str, Tensor]()
        for name, layer in fisher.items():
            site = self.names[name]
            rows[site], columns[site] = layer.row_squares.double(), layer.column_squares.double()
            if site in (EMBEDDING, HEAD):
                rows[site] = token_rows(rows[site].sum(), unigram)
            else:
                rows[site], columns[site] = columns[site], rows[site]
        damping = optimiser_damping(rows, columns, sum(float(each.sum()) for each in rows.values()))
        found, none = list[DampedSite](), torch.empty(0)
        for name, layer in fisher.items():
            site = self.names[name]
            first, second = (each.float() for each in damping[site])
            Q_first, Q_second = layer.Q_columns, layer.Q_rows
            if Q_second is None:  # embedding and head
                Q_first, Q_second = none, layer.Q_columns
            values = _turned(site, layer.eigenvalues)
            found.append(DampedSite(EKFACSite(site, Q_first, Q_second, none, none, values, first, second), factor))
        return found

    def __call__(self, found: Gradients) -> Gradients:
        """Map (Q, rows, columns) by layer to the same shapes."""
        queries = len(next(iter(found.values())))
        asked = [{self.names[n]: _turned(self.names[n], G[row]) for n, G in found.items()} for row in range(queries)]
        done = solve(asked, self.damped, self.curvature, self.steps)
        return {
            name: torch.stack([_turned(self.names[name], each.direction[self.names[name]]) for each in done])
            for name in found
        }


def _turned(name: str, G: Tensor) -> Tensor:
    """Transpose nn.Linear's outputs × inputs to a site's inputs × outputs, or back; embedding and head stay."""
    return G if name in (EMBEDDING, HEAD) else G.mT
