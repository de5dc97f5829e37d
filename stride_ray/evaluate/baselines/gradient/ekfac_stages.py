"""EK-FAC at two moments of training: where it began, or its first checkpoint, and where it ended.

Influence functions look at the end alone; SOURCE (Bae et al. 2024) and TracIn take several moments into account. Here
the EK-FAC scores of both, each divided by its standard deviation, are added: a rival that sees what this project's own
methods may see.
"""

import numpy as np

from stride_ray.evaluate.baselines.gradient.ekfac import at_model
from stride_ray.evaluate.baselines.problem import Problem


def scores(problem: Problem) -> np.ndarray:
    """(Q, N) float32; options as in ``ekfac``; EK-FAC at the end alone where nothing earlier is known."""
    earlier = problem.checkpoints[:1] if problem.start is None else (problem.start,)
    found = [at_model(problem, folder) for folder in (*earlier, problem.model)]
    return np.stack([each / max(float(each.std()), 1e-30) for each in found]).sum(0)
