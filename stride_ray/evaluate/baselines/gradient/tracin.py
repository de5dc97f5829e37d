"""TracIn (Pruthi et al. 2020): gradient inner products summed over training checkpoints, weighted by learning rate.

A step's gradient is taken at the model before the step. If ``start`` is known, the steps up to a checkpoint are
therefore evaluated at the previous checkpoint, otherwise at that checkpoint itself. Without checkpoints, the start of
training, if known, and the trained model get equal weight.
"""

import numpy as np

from stride_ray.evaluate.baselines.gradient.graddot import at_model
from stride_ray.evaluate.baselines.problem import Problem


def stages(problem: Problem) -> list[tuple[str, float]]:
    """Model folders in the course of training, with their learning rates."""
    if not problem.checkpoints:
        return [(folder, 1.0) for folder in (problem.start, problem.model) if folder is not None]
    at = problem.checkpoints if problem.start is None else (problem.start, *problem.checkpoints[:-1])
    return list(zip(at, problem.learning_rates, strict=True))


def scores(problem: Problem, rank: int = 64) -> np.ndarray:
    """(Q, N) float32; ``rank`` per side if gradients must be projected."""
    found = [np.float32(rate) * at_model(problem, folder, rank) for folder, rate in stages(problem)]
    return np.stack(found).sum(0)
