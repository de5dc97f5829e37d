"""LESS (Xia et al. 2024): cosine of a query's gradient and Adam's step on a block, summed over checkpoints.

A block's gradient is divided by the root of Adam's second moments, updated with that gradient as the optimiser would; a
query's gradient is unchanged. Cosines are summed over checkpoints, weighted by learning rate. The first moment is the
same for all blocks and is left out. All weights of the model count (LESS trains adapters). Gradients are whole if they
fit into memory, whereas the paper projects them all.
"""

import os

import numpy as np
from safetensors.torch import load_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from stride_ray.evaluate.baselines.gradient.features import batches, concatenate, products, whole_or_projected
from stride_ray.evaluate.baselines.gradient.per_example import layers, weight_names
from stride_ray.evaluate.baselines.problem import Problem
from stride_ray.models.causal_lm import SplitModel, load_model
from stride_ray.runtime.errors import StrideError

BETA2 = 0.95
EPSILON = 1e-8  # inside the root, as in the paper's release


def scores(problem: Problem, rank: int = 64, beta2: float = BETA2) -> np.ndarray:
    """LESS's scores over ``problem.checkpoints``.

    Args:
        problem: what to score.
        rank: per side, if gradients must be projected.
        beta2: Adam's decay of second moments in training.

    Returns:
        (Q, N) float32.

    Raises:
        StrideError: if there are no checkpoints, or one lacks its optimizer state.
    """
    if not problem.checkpoints:
        raise StrideError("LESS needs checkpoints of the training with Adam's state beside them, and was given none")
    rates = zip(problem.checkpoints, problem.learning_rates, strict=True)
    found = [np.float32(rate) * _at(problem, folder, rank, beta2) for folder, rate in rates]
    return np.stack(found).sum(0)


def _at(problem: Problem, folder: str, rank: int, beta2: float) -> np.ndarray:
    """Cosines at one checkpoint, (Q, N)."""
    model = load_model(folder)
    moments = _second_moments(model, folder)
    drawn = whole_or_projected(model, len(problem.queries), rank, problem.seed)

    def adam(weight: str, G: Tensor) -> Tensor:
        return G / (beta2 * moments[weight] + (1 - beta2) * G.square() + EPSILON).sqrt()

    queries = concatenate(batches(model, problem.queries, problem.batch_tokens, drawn), len(problem.queries))
    stream = batches(model, problem.blocks, problem.batch_tokens, drawn, change=adam)
    return products(queries, stream, len(problem.blocks), unit=True)


def _second_moments(model: SplitModel, folder: str) -> dict[str, Tensor]:
    """Adam's ``exp_avg_sq`` of each weight matrix, laid out like the gradients of ``per_example.Use``."""
    path = os.path.join(folder, "optimizer.safetensors")
    if not os.path.isfile(path):
        raise StrideError(f"LESS needs Adam's second moments: checkpoint {folder} has no optimizer.safetensors")
    state = load_file(path)
    chosen = layers(model, embedding=True)
    found: dict[str, Tensor] = {}
    for name, weight in weight_names(model, chosen).items():
        if weight not in state or state[weight].shape != chosen[name].weight.shape:
            raise StrideError(f"{path} holds no second moments of {weight}; save AdamW's exp_avg_sq under its name")
        moment = state[weight].to(model.device).float()
        found[weight] = moment.T if isinstance(chosen[name], Conv1D) else moment
    return found
