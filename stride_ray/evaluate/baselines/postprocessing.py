"""Parts of our exact influence applied to another method: checkpoint interpolation, halved negative scores, an average.

The average is over checkpoints of training, as "STRIDE exact, over checkpoints" has it. None belongs to the other
method's paper; they show how much of a difference is due to them alone. The interpolated model lies three quarters of
the way from the start of training to its end (loading.interpolated_model); without a known start the trained model is
used.
"""

import tempfile
from dataclasses import replace

import numpy as np
import torch

from stride_ray.evaluate.baselines.problem import Method, Problem, spaced, standardised
from stride_ray.models.loading import interpolated_model
from stride_ray.models.sites import scale_negative
from stride_ray.runtime.options import AttributeConfig


def with_our_postprocessing(method: Method, negative_scale: float = AttributeConfig.negative_scale) -> Method:
    """Return the method at the interpolated model, with its negative scores scaled (halved)."""

    def scores(problem: Problem) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            if problem.start is not None:
                interpolated_model(problem.start, problem.model, "float32", "cpu").model.save_pretrained(folder)
                problem = replace(problem, model=folder)
            found = method(problem)
        return scale_negative(torch.from_numpy(found), negative_scale).numpy()

    return scores


def over_checkpoints(method: Method) -> Method:
    """Return the sum of the method's standardised scores at AVERAGED evenly spaced checkpoints."""

    def scores(problem: Problem) -> np.ndarray:
        models = [replace(problem, model=folder, start=None) for folder in spaced(problem.checkpoints)]
        return np.stack([standardised(method(each)) for each in models]).sum(0)

    return scores
