"""Cross-fitting: each subset is predicted by a method that was fitted to the other folds."""

from collections.abc import Iterator

import numpy as np


def cross_fitting_folds(n_subsets: int, folds: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the subsets to fit on and the subsets to predict, for each of at most ``n_subsets`` random folds."""
    order = np.random.default_rng(seed).permutation(n_subsets)
    for held_out in np.array_split(order, min(folds, n_subsets)):
        yield np.setdiff1d(order, held_out), held_out
