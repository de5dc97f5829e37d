"""Two things that our exact influence does, lent to another method: where it is measured, and harm counted half.

They are no part of the other's paper and say how much of a difference is due to them alone. The model lies three
quarters of the way from where training began to its end (fitted.load_measured_model); where the start is not known it
is the trained one.
"""

import tempfile
from dataclasses import replace

import numpy as np
import torch

from stride_ray.evaluate.baselines.problem import Method, Problem
from stride_ray.models.loading import interpolated_model
from stride_ray.models.sites import harm_halved


def with_our_postprocessing(method: Method) -> Method:
    """The method at that model, its negative scores halved."""

    def scores(problem: Problem) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            if problem.start is not None:
                interpolated_model(problem.start, problem.model, "float32", "cpu").model.save_pretrained(folder)
                problem = replace(problem, model=folder)
            found = method(problem)
        return harm_halved(torch.from_numpy(found)).numpy()

    return scores
