"""Datamodels (Ilyas et al. 2022; for choosing data DSDM, Engstrom et al. 2024): influence by regression on retraining.

Per query a Lasso from which blocks a subset holds to minus the loss after training on it. It is the only method here
that reads the retraining results, and so the only one that could be told what it is asked: subsets are cut into folds,
and a fold's sums come from weights that the other folds gave. There is no one score matrix then, but subset sums.
"""

import numpy as np
from sklearn.linear_model import Lasso

from stride_ray.evaluate.retraining.results import Truth
from stride_ray.runtime.errors import StrideError


def datamodel_sums(truth: Truth, n_blocks: int, folds: int = 8, ratio: float = 0.3, seed: int = 0) -> np.ndarray:
    """Each subset's summed weights, weights fitted to other subsets alone.

    Args:
        truth: retraining results; losses are averaged over seeds.
        n_blocks: N.
        folds: how many; more leave more subsets to learn from.
        ratio: the Lasso's penalty as a share of the smallest that gives no weight at all. With tens of subsets and
            thousands of blocks one share for all queries did better, on development queries, than cross-validation
            within the other folds, the papers' way, and Lasso did far better than ridge.
        seed: of the folds.

    Returns:
        (Q, S) float64: the sum of the weights of a subset's blocks, less what the subsets that gave the weights sum to
        on average, so that folds can be compared. No intercept: a fold's mean loss would tell of the fold left out.

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
    order = np.random.default_rng(seed).permutation(n_subsets)
    for held_out in np.array_split(order, min(folds, n_subsets)):
        known = np.setdiff1d(order, held_out)
        mean = member[known].mean(0)
        weights = _lassos(member[known] - mean, target[known] - target[known].mean(0), ratio)
        found[:, held_out] = weights @ (member[held_out] - mean).T
    return found


def _lassos(X: np.ndarray, Y: np.ndarray, ratio: float) -> np.ndarray:
    """Weights (Q, N) of a Lasso for each column of Y (S, Q) on centred X (S, N); zeros where a target is constant."""
    largest = np.abs(X.T @ Y).max(0) / len(X)
    weights = np.zeros((Y.shape[1], X.shape[1]))
    X = np.asfortranarray(X)
    for query, penalty in enumerate(ratio * largest):
        if penalty > 0:
            solver = Lasso(alpha=penalty, fit_intercept=False, max_iter=10_000, tol=1e-3)
            weights[query] = solver.fit(X, Y[:, query]).coef_
    return weights
