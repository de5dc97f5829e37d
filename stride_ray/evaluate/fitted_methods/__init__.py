"""Methods that are fitted to the retraining results, which no other method reads.

Subsets are cross-fitted, so these give subset sums and no score matrix.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from stride_ray.evaluate.baselines.problem import Problem
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
    """

    name: str
    run: Callable[[Problem, RetrainingResults], np.ndarray]
    sources: tuple[str, ...]
    note: str


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
        ("evaluate/fitted_methods/airrep.py", "evaluate/baselines/representation/*.py"),
        "a sentence encoder trained on the retraining results themselves, cross-fitted",
    ),
}
