"""EK-FAC with a solve: conjugate gradients on (κG + cF) x = ∇ℓ(x), with EK-FAC's Fisher F as preconditioner.

After ASTRA (arXiv 2507.14740), which descends with momentum on fresh batches; this uses as many conjugate-gradient
steps (conjugate_gradients.py) and pool tokens as our own default. A query's gradient covers every weight matrix, as
in EK-FAC. κ is the mean of 1 / targets over blocks: F is the second moment of the gradients of blocks' mean losses, G
the Gauss–Newton matrix of the same losses.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stride_ray.evaluate.baselines.gradient import ekfac
from stride_ray.evaluate.baselines.gradient.features import Gradients
from stride_ray.evaluate.baselines.gradient.per_example import tensors
from stride_ray.evaluate.baselines.problem import Problem
from stride_ray.models.causal_lm import SplitModel
from stride_ray.models.curvature.conjugate_gradients import solve
from stride_ray.models.curvature.gauss_newton import GaussNewton
from stride_ray.models.sites import EMBEDDING, HEAD, Site
from stride_ray.models.vocabulary import TokenSide
from stride_ray.runtime.options import SolveConfig

# Damping, tuned on development queries like our own; blocks linearised at once.
DAMPING, ROWS = 25.0, 16


def scores(problem: Problem) -> np.ndarray:
    """(Q, N) float32; options as in ``ekfac``."""
    return ekfac.at_model(problem, problem.model, lambda model, fisher: Solve(model, fisher, problem))


@dataclass(frozen=True)
class _EKFAC:
    """EK-FAC's inverse at one site, which is one layer."""

    name: str
    layer: ekfac.Layer

    def precondition(self, J: Tensor) -> Tensor:
        return _turned(self.name, self.layer.solve(_turned(self.name, J), ekfac.DAMPING))


class Solve:
    """Applies the solve to a batch of queries' gradients, by layer name."""

    def __init__(self, model: SplitModel, fisher: dict[str, ekfac.Layer], problem: Problem) -> None:
        ends = {model.model.get_input_embeddings(): EMBEDDING, model.model.get_output_embeddings(): HEAD}
        self.names = {name: ends.get(module, name) for name, module in model.model.named_modules() if name in fisher}
        self.preconditioners = [_EKFAC(self.names[name], layer) for name, layer in fisher.items()]
        none, tokens = torch.empty(0), TokenSide(torch.ones(model.vocabulary))
        sites = tuple(Site(self.names[name], none, none, tokens) for name in fisher)
        ids, mask = tensors(problem.sample(-(-SolveConfig().tokens // problem.blocks.ids.shape[1]), 1))
        targets = mask[:, 1:].sum(1)
        scale = float((1 / targets[targets > 0].double()).sum()) / len(ids)
        batches = list(zip(ids.split(ROWS), mask.split(ROWS), strict=True))
        self.products = GaussNewton(model, sites, batches, scale)

    def __call__(self, found: Gradients) -> Gradients:
        """Map (Q, rows, columns) by layer to the same shapes."""
        rows = len(next(iter(found.values())))
        asked = [{self.names[n]: _turned(self.names[n], G[row]) for n, G in found.items()} for row in range(rows)]
        done = solve(asked, self.preconditioners, self.products, SolveConfig().steps, DAMPING)
        return {
            name: torch.stack([_turned(self.names[name], each.y[self.names[name]]) for each in done]) for name in found
        }


def _turned(name: str, G: Tensor) -> Tensor:
    """Transpose nn.Linear's outputs × inputs to a site's inputs × outputs, or back; embedding and head stay."""
    return G if name in (EMBEDDING, HEAD) else G.mT
