"""FeatSim (Hanawa et al. 2021, arXiv 2006.04528): cosine of the features that the model's head reads.

Of a classifier, its penultimate layer; of a language model, the mean over the positions that predict a target.
"""

import numpy as np

from stride_ray.evaluate.baselines.problem import Problem
from stride_ray.evaluate.baselines.representation import rds


def scores(problem: Problem) -> np.ndarray:
    """(Q, N) float32 cosines."""
    return rds.scores(problem, predicting=True)
