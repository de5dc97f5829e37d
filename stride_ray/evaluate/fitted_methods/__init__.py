"""Methods that are fitted to the retraining results, which no other method reads.

Subsets are cross-fitted, so these return subset sums, not a score matrix.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from stride_ray.evaluate.baselines.problem import Problem
from stride_ray.evaluate.baselines.representation import embedding
from stride_ray.evaluate.fitted_methods.airrep import airrep_sums
from stride_ray.evaluate.fitted_methods.datamodels import datamodel_sums
from stride_ray.evaluate.retraining.results import RetrainingResults


@dataclass(frozen=True)
class FittedMethod:
    """A method and its entry in the tables.

    Attributes:
        name: as printed in tables.
        run: gives (Q, S) subset sums.
        sources: files, relative to the package, that its result depends on.
        note: a one-line description.
        variable: the environment variable that may name its encoder.
    """

    name: str
    run: Callable[[Problem, RetrainingResults], np.ndarray]
    sources: tuple[str, ...]
    note: str
    variable: str = ""


FITTED_METHODS: dict[str, FittedMethod] = {
    "datamodels": FittedMethod(
        "datamodels",
        lambda problem, truth: datamodel_sums(truth, len(problem.blocks)),
        ("evaluate/fitted_methods/datamodels.py",),
        "Lasso on the retraining results themselves, cross-fitted",
    ),
    "airrep_fitted": FittedMethod(
        "AirRep, fitted here",
        airrep_sums,
        (
            "evaluate/fitted_methods/airrep.py",
            "evaluate/baselines/representation/*.py",
            "evaluate/baselines/problem.py",
        ),
        "a sentence encoder trained on the retraining results themselves, cross-fitted",
        embedding.VARIABLE,
    ),
}
