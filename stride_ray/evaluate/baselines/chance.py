"""Random scores, the baseline that any method must beat."""

import numpy as np

from stride_ray.evaluate.baselines.problem import Problem


def scores(problem: Problem) -> np.ndarray:
    """Draw (Q, N) float32 standard normal scores, fixed by the problem's seed."""
    shape = (len(problem.queries), len(problem.blocks))
    return np.random.default_rng(problem.seed).standard_normal(shape, dtype=np.float32)
