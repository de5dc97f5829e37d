"""FeatSim (Hanawa et al. 2021, arXiv 2006.04528): cosine of the features that the model's head reads.

Of a classifier, its penultimate layer; of a language model, the mean over the positions that predict a target.
"""

import numpy as np

from stride_ray.evaluate.baselines.problem import Problem
from stride_ray.evaluate.baselines.representation.rds import mean_states
from stride_ray.models.causal_lm import load_model


def scores(problem: Problem) -> np.ndarray:
    """(Q, N) float32 cosines."""
    model = load_model(problem.model)
    queries, blocks = (
        mean_states(model, texts, problem.batch_tokens, predicting=True) for texts in (problem.queries, problem.blocks)
    )
    return (queries @ blocks.T).cpu().numpy()
