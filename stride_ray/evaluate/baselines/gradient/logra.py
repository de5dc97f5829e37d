"""LoGRA (Choe et al. 2024): influence functions on low-rank projections of each linear layer's gradients.

Each layer's gradient is projected from both sides to ``rank`` × ``rank``; the damped inverse second moment of the
pool's projected gradients ("raw" in LogIX) stands between query and block, one per layer. LogIX itself asks for a
Python before 3.11, so it is written out here; with its default of rank 64.
"""

import numpy as np
import torch

from stride_ray.evaluate.baselines.gradient.features import batches, gathered, projections, ridge
from stride_ray.evaluate.baselines.gradient.per_example import weight_shapes
from stride_ray.evaluate.baselines.problem import Problem
from stride_ray.models.causal_lm import load_model


def scores(problem: Problem, rank: int = 64, damping: float = 1.0, embedding: bool = False) -> np.ndarray:
    """LoGRA's influence.

    Args:
        problem: what to score.
        rank: rows and columns of a projected gradient.
        damping: as a share of the mean eigenvalue of each layer's second moment.
        embedding: whether the token embedding's gradient counts too.

    Returns:
        (Q, N) float32.
    """
    model = load_model(problem.model)
    drawn = projections(weight_shapes(model, embedding), rank, problem.seed, model.device)

    queries, blocks = (
        gathered(batches(model, texts, problem.batch_tokens, drawn, embedding=embedding), len(texts))
        for texts in (problem.queries, problem.blocks)
    )
    found = torch.zeros(len(problem.queries), len(problem.blocks), dtype=torch.float64)
    for name in blocks:
        found += ridge([queries[name]], [blocks[name]], damping).cpu()
    return found.float().numpy()
