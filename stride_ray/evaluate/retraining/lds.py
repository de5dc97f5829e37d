"""The linear datamodeling score (LDS): how well do summed scores predict a query's loss after training on a subset?

Per query, LDS is the correlation over held-out subsets between the subset's summed influence and minus the query's loss
after training on it (losses averaged over seeds); mean and standard deviation are then taken over queries
(docs/method.md, Metrics). "centred" first subtracts each retraining's mean loss over all queries: a common shift is not
query-specific.

Intervals are the 2.5 and 97.5 % quantiles of a bootstrap that resamples subsets and queries together and recomputes
ranks in each draw. All methods share the draws, so differences and ratios are paired. Numpy and scipy only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
import scipy.stats
from scipy.stats import rankdata

from stride_ray.evaluate.retraining.results import RetrainingResults
from stride_ray.runtime.errors import StrideError

RAW, CENTRED = TARGETS = ("raw", "centred")
ALL = "all"
# The parts of a benchmark's queries: to choose on, and to report once.
DEVELOPMENT, REPORT = "development", "report"
# Key of the ceiling (agreement between seeds) in ``Evaluation.draws``; not a method's name.
_CEILING = ""
_TINY = 1e-12
# Bootstrap draws in ``mean_interval``.
_DRAWS = 4000


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval; nan if undefined."""

    value: float
    low: float
    high: float

    def __format__(self, form: str) -> str:
        """As f"{figure:+.2f}": "+0.12 (+0.05 to +0.20)"."""
        return f"{self.value:{form}} ({self.low:{form}} to {self.high:{form}})"


@dataclass(frozen=True)
class LdsFigure:
    """One method's results for one kind of query, part and target.

    Attributes:
        lds: mean Spearman correlation over the queries, with its interval.
        std: standard deviation of the correlations over queries.
        pearson, kendall: mean Pearson and Kendall (τ-b) correlations.
        queries: number of queries.
    """

    lds: Interval
    std: float
    pearson: float
    kendall: float
    queries: int


@dataclass(frozen=True)
class Paired:
    """Paired comparison of two methods on the same draws: one − other, and one ÷ other.

    The ratio's ends are nan unless the other's LDS is clearly above zero.
    """

    difference: Interval
    ratio: Interval


Cell = tuple[str, str, str, str]  # method, kind, part, target


@dataclass(frozen=True)
class Evaluation:
    """All results of several methods on one benchmark.

    Attributes:
        methods: their names, in the given order.
        cells: (kind, part) pairs with at least one query; ``all`` stands for all kinds or parts.
        figures: by (method, kind, part, target).
        draws: (draws + 1,) LDS by cell: the measured one, then one per draw; the ceiling has an empty method name.
    """

    methods: tuple[str, ...]
    cells: tuple[tuple[str, str], ...]
    figures: dict[Cell, LdsFigure]
    draws: dict[Cell, np.ndarray]

    def figure(self, method: str, kind: str = ALL, part: str = ALL, target: str = RAW) -> LdsFigure:
        """Return a method's figures; KeyError for an unknown cell."""
        return self.figures[method, kind, part, target]

    def paired(self, one: str, other: str, kind: str = ALL, part: str = ALL, target: str = RAW) -> Paired:
        """Compare ``one`` with ``other``; KeyError for an unknown cell."""
        mine, theirs = self.draws[one, kind, part, target], self.draws[other, kind, part, target]
        difference = _interval(mine - theirs)
        if theirs[0] <= 0 or np.quantile(theirs[1:], 0.025) <= 0:
            point = mine[0] / theirs[0] if theirs[0] > 0 else np.nan
            return Paired(difference, Interval(float(point), np.nan, np.nan))
        return Paired(difference, _interval(mine / theirs))

    def ceiling(self, kind: str = ALL, part: str = ALL, target: str = RAW) -> Interval | None:
        """LDS of one seed's losses as predictor of another's, mean over pairs of seeds; None with a single seed.

        No method can exceed it by much, but it is not a bound: an average over many seeds is less noisy than one seed.
        """
        draws = self.draws.get((_CEILING, kind, part, target))
        return None if draws is None else _interval(draws)


def mean_interval(values: np.ndarray) -> Interval:
    """Mean of (queries,) or (seeds, queries) values, with its bootstrap interval over both axes; nan if empty."""
    if not values.size:
        return Interval(np.nan, np.nan, np.nan)
    values = np.atleast_2d(values)
    rng = np.random.default_rng(0)
    rows, columns = (rng.integers(0, size, (_DRAWS, size)) for size in values.shape)
    means = [float(values[np.ix_(row, column)].mean()) for row, column in zip(rows, columns, strict=True)]
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high))


def subset_sums(scores: Any, subsets: Sequence[np.ndarray]) -> np.ndarray:
    """Sum each subset's influence: (Q, S) float64 from scores (Q, N), dense or scipy sparse."""
    rows = np.repeat(np.arange(len(subsets)), [len(each) for each in subsets])
    columns = np.concatenate([np.zeros(0, np.int64), *subsets])
    n_blocks = scores.shape[1]
    if len(columns) and columns.max() >= n_blocks:
        raise StrideError(f"scores have {n_blocks} columns, and a subset holds pool row {columns.max()}.")
    member = scipy.sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(subsets), n_blocks))
    sums = np.empty((scores.shape[0], len(subsets)))
    sparse = scipy.sparse.csr_array(scores) if scipy.sparse.issparse(scores) else None
    for start in range(0, len(sums), 64):  # a few queries at a time: the product needs a float64 copy
        if sparse is not None:
            sums[start : start + 64] = (sparse[start : start + 64].astype(np.float64) @ member.T).toarray()
        else:
            sums[start : start + 64] = (member @ np.asarray(scores[start : start + 64], np.float64).T).T
    return sums


def targets_of(losses_SQ: np.ndarray) -> dict[str, np.ndarray]:
    """Minus the losses, (Q, S) float64, raw and centred, from losses (S, Q)."""
    losses = np.asarray(losses_SQ, dtype=np.float64)
    return {RAW: -losses.T, CENTRED: -(losses - losses.mean(1, keepdims=True)).T}


def spearman(one_QS: np.ndarray, other_QS: np.ndarray) -> np.ndarray:
    """Row-wise Spearman correlation with mid-ranks for ties, (Q,); 0 for a constant row."""
    return pearson(rankdata(one_QS, axis=1), rankdata(other_QS, axis=1))


def pearson(one_QS: np.ndarray, other_QS: np.ndarray) -> np.ndarray:
    """Row-wise Pearson correlation, (Q,); 0 for a constant row."""
    a, b = (x - x.mean(1, keepdims=True) for x in (one_QS, other_QS))
    # Rounding errors in a constant row must not count as variation.
    for x, given in ((a, one_QS), (b, other_QS)):
        x[np.ptp(given, axis=1) == 0] = 0
    scale = np.sqrt((a**2).sum(1)) * np.sqrt((b**2).sum(1))
    return np.divide((a * b).sum(1), scale, out=np.zeros(len(a)), where=scale > 0)


def kendall(one_QS: np.ndarray, other_QS: np.ndarray) -> np.ndarray:
    """Row-wise Kendall's τ-b, (Q,); 0 for a constant row."""
    pairs = zip(one_QS, other_QS, strict=True)
    return np.nan_to_num([scipy.stats.kendalltau(one, other).statistic for one, other in pairs])


def evaluate(
    sums: Mapping[str, np.ndarray],
    truth: RetrainingResults,
    kinds: Sequence[str] | np.ndarray,
    parts: Sequence[str] | np.ndarray,
    draws: int = 400,
    seed: int = 0,
) -> Evaluation:
    """Evaluate every method for every kind, part and target.

    Args:
        sums: per method the (Q, S) summed influence, see ``subset_sums``.
        truth: the retraining results.
        kinds: (Q,) each query's kind.
        parts: (Q,) each query's part.
        draws: number of bootstrap draws.
        seed: for the draws.

    Raises:
        StrideError: if a method's sums are not finite or not (Q, S).
    """
    n_seeds, S, Q = truth.losses.shape
    for method, each in sums.items():
        if each.shape != (Q, S) or not np.isfinite(each).all():
            raise StrideError(f"{method}: needs finite sums of shape {(Q, S)} (queries, subsets), has {each.shape}.")
    rng = np.random.default_rng(seed)
    # Column 0 is the measured figure: every subset once.
    counts_SD = np.ones((S, draws + 1))
    counts_SD[:, 1:] = rng.multinomial(S, np.full(S, 1 / S), size=draws).T
    weights = {cell: _query_weights(rows, Q, draws, rng) for cell, rows in _cells(kinds, parts).items()}
    figures: dict[Cell, LdsFigure] = {}
    found: dict[Cell, np.ndarray] = {}
    targets = targets_of(truth.losses.mean(0, dtype=np.float64))
    for target, target_QS in targets.items():
        for method, correlations_QD in resampled(sums, target_QS, counts_SD).items():
            linear_Q, pairwise_Q = pearson(sums[method], target_QS), kendall(sums[method], target_QS)
            for (kind, part), weights_DQ in weights.items():
                cell, chosen = (method, kind, part, target), weights_DQ[0] > 0
                found[cell] = np.einsum("dq,qd->d", weights_DQ, correlations_QD)
                figures[cell] = LdsFigure(
                    _interval(found[cell]),
                    float(correlations_QD[chosen, 0].std()),
                    float(linear_Q[chosen].mean()),
                    float(pairwise_Q[chosen].mean()),
                    int(chosen.sum()),
                )
        one_by_one = [targets_of(each)[target] for each in truth.losses]
        pairs = [(a, b) for a in range(n_seeds) for b in range(a)]
        if pairs:
            agreement = sum(resampled({_CEILING: one_by_one[a]}, one_by_one[b], counts_SD)[_CEILING] for a, b in pairs)
            for (kind, part), weights_DQ in weights.items():
                found[_CEILING, kind, part, target] = np.einsum("dq,qd->d", weights_DQ, agreement / len(pairs))
    return Evaluation(tuple(sums), tuple(weights), figures, found)


def _cells(kinds: Sequence[str] | np.ndarray, parts: Sequence[str] | np.ndarray) -> dict[tuple[str, str], np.ndarray]:
    """Query rows of each non-empty (kind, part), ``all`` included."""
    kind_Q, part_Q = np.asarray(kinds, dtype=str), np.asarray(parts, dtype=str)
    found = {}
    for kind in dict.fromkeys([*sorted(set(kind_Q.tolist())), ALL]):
        for part in dict.fromkeys([*sorted(set(part_Q.tolist())), ALL]):
            rows = np.flatnonzero(((kind_Q == kind) | (kind == ALL)) & ((part_Q == part) | (part == ALL)))
            if len(rows):
                found[kind, part] = rows
    return found


def _query_weights(rows: np.ndarray, n_queries: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Weights (draws + 1, Q) of the queries in each mean: first uniform over ``rows``, then drawn with replacement."""
    weights = np.zeros((draws + 1, n_queries))
    weights[0, rows] = 1
    weights[1:, rows] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=draws)
    return weights / len(rows)


def resampled(sums: Mapping[str, np.ndarray], target_QS: np.ndarray, counts_SD: np.ndarray) -> dict[str, np.ndarray]:
    """Spearman correlations (Q, D) of each method with the target in D resamples of the subsets, each ranked anew.

    Args:
        sums: per method (Q, S).
        target_QS: (Q, S).
        counts_SD: (S, D) how often each resample holds each subset; columns sum to S.
    """
    found = {method: np.empty((len(target_QS), counts_SD.shape[1])) for method in sums}
    for query, target_S in enumerate(target_QS):
        b_SD = _ranks(target_S, counts_SD)
        weighted_SD = b_SD * counts_SD
        spread_D = np.einsum("sd,sd->d", b_SD, weighted_SD)
        for method, each in sums.items():
            a_SD = _ranks(each[query], counts_SD)
            both_D = np.einsum("sd,sd->d", a_SD, weighted_SD)
            mine_D = np.einsum("sd,sd,sd->d", a_SD, a_SD, counts_SD)
            found[method][query] = both_D / np.maximum(np.sqrt(mine_D * spread_D), _TINY)
    return found


def _ranks(values_S: np.ndarray, counts_SD: np.ndarray) -> np.ndarray:
    """Twice the centred mid-ranks of the values in resamples that hold value s ``counts[s]`` times.

    Counting in sorted order avoids sorting each resample: with C the cumulative count, the copies of a value hold the
    ranks C(below) + 1 … C(up to and including it), and the mean of all ranks is (S + 1) / 2 in every resample.
    """
    order = np.argsort(values_S, kind="stable")
    ascending = values_S[order]
    running_SD = np.zeros((len(counts_SD) + 1, counts_SD.shape[1]))
    np.cumsum(counts_SD[order], axis=0, out=running_SD[1:])
    below, up_to = (np.searchsorted(ascending, values_S, side) for side in ("left", "right"))
    return running_SD[below] + running_SD[up_to] - len(counts_SD)


def _interval(draws: np.ndarray) -> Interval:
    """Return the measured figure with the quantiles of the draws that follow it."""
    if len(draws) < 2:
        return Interval(float(draws[0]), np.nan, np.nan)
    low, high = np.quantile(draws[1:], [0.025, 0.975])
    return Interval(float(draws[0]), float(low), float(high))
