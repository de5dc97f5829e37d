"""Descriptive statistics of a method's scores: how many are zero, and how concentrated the weight is.

See docs/method.md, Metrics. Each is computed per query over the pool, then averaged over queries.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse

TOP = 0.1


@dataclass(frozen=True)
class ScoreStatistics:
    """Statistics of one method's scores; only exact zeros count as zero.

    Attributes:
        sparsity: share of zeros.
        gini: Gini coefficient of |w| over the pool: 0 if all are equal, near 1 if one holds everything.
        top_share: share of Σ|w| in the tenth of the pool with the largest |w|.
        active_mean, active_p50, active_p90: nonzero scores per query: mean, median, 90th percentile.

    Queries with only zeros count in sparsity and the active sets; gini and top_share are over the others, nan if there
    are none.
    """

    sparsity: float
    gini: float
    top_share: float
    active_mean: float
    active_p50: float
    active_p90: float


def score_statistics(scores: Any) -> ScoreStatistics:
    """Compute the statistics of scores (Q, N), dense or any scipy sparse matrix, with one query at a time in memory."""
    sparse = scipy.sparse.csr_array(scores) if scipy.sparse.issparse(scores) else None
    n_queries, n_blocks = scores.shape
    active, ginis, shares = [], [], []
    for query in range(n_queries):
        if sparse is not None:
            row = sparse.data[sparse.indptr[query] : sparse.indptr[query + 1]]
        else:
            row = np.asarray(scores[query])
        weights = np.sort(np.abs(row[row != 0]).astype(np.float64))
        active.append(len(weights))
        if len(weights):
            ginis.append(_gini(weights, n_blocks))
            shares.append(float(weights[-max(1, math.ceil(TOP * n_blocks)) :].sum() / weights.sum()))
    sizes = np.array(active)
    return ScoreStatistics(
        sparsity=float(1 - sizes.mean() / n_blocks),
        gini=float(np.mean(ginis)) if ginis else math.nan,
        top_share=float(np.mean(shares)) if shares else math.nan,
        active_mean=float(sizes.mean()),
        active_p50=float(np.quantile(sizes, 0.5)),
        active_p90=float(np.quantile(sizes, 0.9)),
    )


def _gini(ascending: np.ndarray, n: int) -> float:
    """Gini coefficient of n numbers ≥ 0, given the positive ones in ascending order."""
    ranks = np.arange(n - len(ascending) + 1, n + 1)
    return float(2 * (ranks @ ascending) / (n * ascending.sum()) - (n + 1) / n)
