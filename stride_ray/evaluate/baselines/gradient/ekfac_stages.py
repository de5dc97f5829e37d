"""EK-FAC at two stages of training: its start, or else its first checkpoint, and its end.

Influence functions use the end only; SOURCE (Bae et al. 2024) and TracIn use several stages. Here the EK-FAC scores at
both stages are divided by their standard deviation and added: a rival with access to the same models as this project's
own methods.
"""

import numpy as np

from stride_ray.evaluate.baselines.gradient.ekfac import at_model
from stride_ray.evaluate.baselines.problem import Problem, standardised


def scores(problem: Problem) -> np.ndarray:
    """(Q, N) float32; options as in ``ekfac``; EK-FAC at the end alone if no earlier model is known."""
    earlier = problem.checkpoints[:1] if problem.start is None else (problem.start,)
    return np.stack([standardised(at_model(problem, folder)) for folder in (*earlier, problem.model)]).sum(0)
