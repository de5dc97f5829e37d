"""LoGRA (Choe et al. 2024): influence functions on low-rank projections of each linear layer's gradients.

Each layer's gradient is projected from both sides to ``rank`` × ``rank`` and preconditioned per layer with the damped
inverse second moment of the pool's projected gradients ("raw" in LogIX). LogIX itself requires Python < 3.11, so the
method is reimplemented here, with LogIX's default rank of 64.
"""

import numpy as np
import torch

from stride_ray.evaluate.baselines.gradient.features import batches, concatenate, damped_products, projections
from stride_ray.evaluate.baselines.gradient.per_example import weight_shapes
from stride_ray.evaluate.baselines.problem import Problem
from stride_ray.models.causal_lm import load_model

# Damping, as a share of a mean eigenvalue.
DAMPING = 1.0


def scores(problem: Problem, rank: int = 64, damping: float = DAMPING, embedding: bool = False) -> np.ndarray:
    """LoGRA's influence.

    Args:
        problem: what to score.
        rank: rows and columns of a projected gradient.
        damping: as a share of the mean eigenvalue of each layer's second moment.
        embedding: whether to include the token embedding's gradient.

    Returns:
        (Q, N) float32.
    """
    model = load_model(problem.model)
    drawn = projections(weight_shapes(model, embedding), rank, problem.seed, model.device)

    queries, blocks = (
        concatenate(batches(model, texts, problem.batch_tokens, drawn, embedding=embedding), len(texts))
        for texts in (problem.queries, problem.blocks)
    )
    found = torch.zeros(len(problem.queries), len(problem.blocks), dtype=torch.float64)
    for name in blocks:
        found += damped_products([queries[name]], [blocks[name]], damping).cpu()
    return found.float().numpy()
