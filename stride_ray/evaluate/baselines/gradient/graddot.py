"""GradDot: the inner product of a block's and a query's loss gradients at the trained model.

To first order, this is the effect of one step of plain gradient descent on the block on the query's loss (Charpiat et
al. 2019; TracIn with one checkpoint). All weight matrices; whole gradients if they fit into memory.
"""

import numpy as np

from stride_ray.evaluate.baselines.gradient.features import batches, concatenate, products, whole_or_projected
from stride_ray.evaluate.baselines.problem import Problem
from stride_ray.models.causal_lm import load_model


def scores(problem: Problem, rank: int = 64) -> np.ndarray:
    """(Q, N) float32: gradient inner products at ``problem.model``; ``rank`` per side if they must be projected."""
    return at_model(problem, problem.model, rank)


def at_model(problem: Problem, folder: str, rank: int) -> np.ndarray:
    """GradDot scores at any model folder."""
    model = load_model(folder)
    drawn = whole_or_projected(model, len(problem.queries), rank, problem.seed)
    queries = concatenate(batches(model, problem.queries, problem.batch_tokens, drawn), len(problem.queries))
    stream = batches(model, problem.blocks, problem.batch_tokens, drawn)
    return products(queries, stream, len(problem.blocks))
