"""Random scores: what any method must beat."""

import numpy as np

from stride_ray.evaluate.baselines.problem import Problem


def scores(problem: Problem) -> np.ndarray:
    """(Q, N) float32 standard normal, the same for a seed."""
    shape = (len(problem.queries), len(problem.blocks))
    return np.random.default_rng(problem.seed).standard_normal(shape, dtype=np.float32)
