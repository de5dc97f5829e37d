"""Datamodels (Ilyas et al. 2022; DSDM for data selection, Engstrom et al. 2024): influence by regression on retraining.

For each query, a Lasso regresses minus the loss after training on a subset on the subset's membership vector. This is
the only method that reads the retraining results, so it could leak the quantity it predicts. Subsets are therefore
cross-fitted: a fold's sums use weights fitted on the other folds. The result is subset sums, not one score matrix.
"""

import numpy as np
from sklearn.linear_model import Lasso

from stride_ray.evaluate.fitted_methods.folds import cross_fitting_folds
from stride_ray.evaluate.retraining.results import RetrainingResults
from stride_ray.runtime.errors import StrideError


def datamodel_sums(
    truth: RetrainingResults, n_blocks: int, folds: int = 8, ratio: float = 0.3, seed: int = 0
) -> np.ndarray:
    """Sum each subset's datamodel weights, fitted on other subsets only.

    Args:
        truth: retraining results; losses are averaged over seeds.
        n_blocks: N.
        folds: number of folds; more folds leave more subsets to fit on.
        ratio: the Lasso penalty as a share of the smallest penalty that zeroes all weights. With tens of subsets and
            thousands of blocks, one share for all queries did better on development queries than cross-validation
            within the other folds (the papers' choice), and Lasso did far better than ridge.
        seed: for assigning subsets to folds.

    Returns:
        (Q, S) float64: the sum of the weights of a subset's blocks minus the mean of that sum over the fitting subsets,
        which makes folds comparable. There is no intercept: a fold's mean loss would leak the held-out fold.

    Raises:
        StrideError: for fewer than three subsets or two folds.
    """
    member, target = truth.membership(n_blocks).astype(np.float64), -truth.losses.mean(0, dtype=np.float64)
    n_subsets = len(member)
    if n_subsets < 3 or folds < 2:
        raise StrideError(
            f"datamodels need three subsets and two folds at the least; there are {n_subsets} and {folds}."
        )
    found = np.zeros((target.shape[1], n_subsets))
    for known, held_out in cross_fitting_folds(n_subsets, folds, seed):
        mean = member[known].mean(0)
        weights = _lassos(member[known] - mean, target[known] - target[known].mean(0), ratio)
        found[:, held_out] = weights @ (member[held_out] - mean).T
    return found


def _lassos(X: np.ndarray, Y: np.ndarray, ratio: float) -> np.ndarray:
    """Fit a Lasso for each column of Y (S, Q) on centred X (S, N): weights (Q, N), zeros if a target is constant."""
    largest = np.abs(X.T @ Y).max(0) / len(X)
    weights = np.zeros((Y.shape[1], X.shape[1]))
    X = np.asfortranarray(X)
    for query, penalty in enumerate(ratio * largest):
        if penalty > 0:
            solver = Lasso(alpha=penalty, fit_intercept=False, max_iter=10_000, tol=1e-3)
            weights[query] = solver.fit(X, Y[:, query]).coef_
    return weights
