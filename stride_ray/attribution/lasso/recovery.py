"""Lasso recovery: the influence of all N blocks on a query from its K responses, exact at any N.

The paper recovers influence by coordinate descent over all N columns of M. Here M is never stored and N may be 1e9, so
the solver is a working-set method. One pass over M's columns, shared by a batch of queries, yields every query's
largest correlations |Mᵀr|. Columns that violate the optimality conditions join the query's working set, and coordinate
descent on the sparse columns solves the restricted problem. Rounds repeat until the duality gap of the full problem is
below the tolerance. Each pass computes max|Mᵀr| over all N columns, so the gap is a certificate for the full problem,
not an estimate.

Queries share passes but never arithmetic: sums run per query in a fixed order and all else is done one query at a time,
so the bits of a result do not depend on the rest of the batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

from stride_ray.attribution.lasso.coordinate_descent import descend, gap_of, gram_of, predict, scan_columns
from stride_ray.operators.membership import Membership
from stride_ray.runtime.errors import StrideError

BATCH = 64  # queries per pass: their residuals (K·64·8 bytes) should fit in a core's L2 cache
FIRST_GROWTH, LAST_GROWTH = 128, 512  # maximum columns that join a working set per round: doubles from first to last
PRUNE_ABOVE = 1.5  # times K: a larger working set drops its zero weights, which bounds the Gram matrix at any λ
MAX_ROUNDS = 500
MAX_EPOCHS = 200  # of coordinate descent per restricted problem; the next round continues from there
MAX_POLISH = 20  # linear solves after coordinate descent
POLISH_BELOW = 512  # columns: up to this size polishing is nearly free, so it is always done
POLISH_WITHIN = 1e-3  # relative gap from which larger working sets are polished too; before, they still change


@dataclass(frozen=True)
class Recovery:
    """The influence of the pool on one query: the non-zero part of ŵ(x) (method: Recovery).

    Attributes:
        ordinals: (A,) int64, ascending: the blocks with non-zero influence.
        weights: (A,) float64, their ŵ, in the unit of the responses (nats, if those are drops in cross-entropy);
            positive: training on the block lowers the query's loss. With `row_scaling`, see `recover`.
        intercept: c, in the unit of the responses.
        penalty: λ = ratio · λ_max of this query.
        gap: duality gap of the full N-column problem over ½‖y − ȳ‖². Above the tolerance only if `rounds` reached
            MAX_ROUNDS or the tolerance is finer than floating point allows.
        rounds: passes over M's columns that this query took part in.
        seconds: this query's share of the time for passes and for generating columns, the cost that grows with N.
    """

    ordinals: NDArray[np.int64]
    weights: NDArray[np.float64]
    intercept: float
    penalty: float
    gap: float
    rounds: int
    seconds: float = 0.0


@dataclass(frozen=True)
class _Problem:
    """State shared by all queries of a call; `scale` (K+1,) multiplies M's rows and is 0 for the "no subset" id K."""

    membership: Membership
    n_blocks: int
    scale: NDArray[np.float64]
    ratio: float
    nonnegative: bool
    tolerance: float


@dataclass
class _Query:
    """The state of one query between passes; ordinals and weights describe its working set."""

    mean: float
    target: NDArray[np.float64]  # y − ȳ
    half: float  # ½‖y − ȳ‖²
    residual: NDArray[np.float64]  # y − c·1 − X w; sums to 0
    ordinals: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    weights: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    shift: float = 0.0  # mean of X w
    penalty: float = -1.0  # unknown before the first pass
    gap: float = 0.0
    rounds: int = 0
    seconds: float = 0.0
    growth: int = FIRST_GROWTH
    done: bool = False


def row_scale(membership: Membership, n_blocks: int) -> NDArray[np.float64]:
    """Return the row factors of `row_scaling`: (K,) float64, mean|S| / |S_k|, 1 for an empty S_k."""
    sizes = membership.sizes(n_blocks)
    return np.where(sizes > 0, sizes.mean() / np.maximum(sizes, 1), 1.0)


def _polish(gram: NDArray, correlation: NDArray, penalty: float, weights: NDArray) -> NDArray:
    """Return the exact minimiser on the support and signs of weights, or the best point on the way there.

    Coordinate descent finds the support early but the last digits late; a few linear solves replace that tail. With
    fixed signs the objective is quadratic and decreases all the way to its minimiser. If a weight would change sign
    first, the step stops there, the weight leaves the support, and the next solve continues.
    """
    polished = weights.copy()
    for _ in range(MAX_POLISH):
        support = np.flatnonzero(polished)
        if len(support) == 0:
            break
        start = polished[support]
        signs = np.sign(start)
        try:
            factor = cho_factor(gram[np.ix_(support, support)], overwrite_a=True, check_finite=False)
            end = cho_solve(factor, correlation[support] - penalty * signs, check_finite=False)
        except np.linalg.LinAlgError:  # duplicate columns: the minimiser is not unique, so keep descent's
            break
        if not np.isfinite(end).all():
            break
        crossing = np.flatnonzero(end * signs <= 0)
        if len(crossing) == 0:
            polished[support] = end
            break
        reach = start[crossing] / (start[crossing] - end[crossing])  # in (0, 1]: step fraction to zero
        polished[support] = start + reach.min() * (end - start)
        polished[support[crossing[reach == reach.min()]]] = 0.0

    def objective(w: NDArray) -> float:
        return float(0.5 * w @ (gram @ w) - correlation @ w + penalty * np.abs(w).sum())

    return polished if objective(polished) <= objective(weights) else weights


def _solve_restricted(problem: _Problem, query: _Query, tolerance: float, polish: bool) -> None:
    """Minimise over the working set from its current weights, then update the residual."""
    scale = problem.scale
    ids = problem.membership.columns_at(query.ordinals).astype(np.int64)
    descend(ids, scale, query.target, query.weights, query.penalty, problem.nonnegative, tolerance, MAX_EPOCHS)
    if polish and len(support := np.flatnonzero(query.weights)):
        gram, correlation = gram_of(ids[support], scale, np.append(query.target, 0.0))
        query.weights[support] = _polish(gram, correlation, query.penalty, query.weights[support])
    predicted = predict(ids, query.weights, scale)
    query.shift = float(predicted.sum() / (len(scale) - 1))
    residual = query.target - (predicted - query.shift)
    query.residual = residual - residual.sum() / len(residual)


def _relative_gap(query: _Query, largest: float, nonnegative: bool) -> float:
    """Return the full problem's duality gap over ½‖y − ȳ‖², given max|Xᵀr| (nonnegative: max Xᵀr) over N columns."""
    rr, ry = float(query.residual @ query.residual), float(query.residual @ query.target)
    size = float(np.abs(query.weights).sum())
    return gap_of(rr, ry, largest, size, query.penalty, nonnegative) / query.half


def _advance(problem: _Problem, query: _Query, value: NDArray, ordinal: NDArray) -> None:
    """Advance one query by a round, given the pass's largest correlations (value) and their columns (ordinal)."""
    query.rounds += 1
    largest = float(value.max()) if len(value) else 0.0
    if query.penalty < 0:
        # Below this, correlations are rounding error: all columns are constant (d = K), or none is positive.
        noise = 1e-13 * np.sqrt(2 * query.half * problem.membership.degree) * problem.scale.max()
        query.penalty = problem.ratio * largest if largest > noise else 0.0
        query.done = query.penalty == 0.0
        if query.done:
            return
    # The pass returns only correlations above λ; if there are none, λ is the bound.
    query.gap = _relative_gap(query, max(largest, query.penalty), problem.nonnegative)
    query.done = query.gap <= problem.tolerance or query.rounds == MAX_ROUNDS
    if query.done:
        return
    if len(query.ordinals) > PRUNE_ABOVE * problem.membership.subsets:
        keep = query.weights != 0  # a column that is still needed returns as a violator
        query.ordinals, query.weights = query.ordinals[keep], query.weights[keep]
    fresh = ~np.isin(ordinal, query.ordinals) & (value > query.penalty)
    order = np.lexsort((ordinal, -value))
    joining = ordinal[order[fresh[order]]][: query.growth]
    query.ordinals = np.concatenate([query.ordinals, joining])
    query.weights = np.concatenate([query.weights, np.zeros(len(joining))])
    query.growth = min(2 * query.growth, LAST_GROWTH)
    # Early rounds need not be more precise than the full problem. If no column joins, only precision is missing.
    inner = max(0.1 * problem.tolerance, 1e-2 * query.gap if len(joining) else 0.0)
    polish = len(query.ordinals) <= POLISH_BELOW or query.gap <= POLISH_WITHIN
    _solve_restricted(problem, query, min(inner, 1e-4), polish)


def _recover_batch(problem: _Problem, queries: list[_Query], stored: Iterable[tuple[int, NDArray]] | None) -> None:
    """Run rounds until every query of the batch is done; finished queries drop out of the passes."""
    while active := [query for query in queries if not query.done]:
        began = time.monotonic()
        residual_KQ = np.stack([np.append(query.residual, 0.0) * problem.scale for query in active], axis=1)
        floor = np.array([max(query.penalty, 0.0) for query in active])
        capacity = np.array([len(query.ordinals) + query.growth for query in active])
        value = np.empty((len(active), capacity.max()))
        ordinal = np.empty(value.shape, np.int64)
        count = np.zeros(len(active), np.int64)
        for first, ids in problem.membership.ranges(problem.n_blocks) if stored is None else stored:
            scan_columns(ids, first, residual_KQ, not problem.nonnegative, floor, capacity, value, ordinal, count)
        share = (time.monotonic() - began) / len(active)
        for q, query in enumerate(active):
            query.seconds += share
            _advance(problem, query, value[q, : count[q]], ordinal[q, : count[q]])


def _initial_state(responses: NDArray) -> _Query:
    """Return the state of a query before its first pass."""
    y = np.ascontiguousarray(responses)
    mean = float(y.mean())
    target = y - mean
    # Centring a constant vector leaves rounding error, not signal; set the residual, and so the gap, to zero.
    constant = float(np.abs(target).max()) <= 1e-14 * abs(mean)
    target = np.zeros_like(target) if constant else target - target.mean()
    query = _Query(mean=mean, target=target, half=0.5 * float(target @ target), residual=target)
    if query.half == 0.0:
        query.done, query.penalty = True, 0.0
    return query


def recover(
    responses_QK: NDArray,
    membership: Membership,
    n_blocks: int,
    *,
    ratio: float = 0.1,
    nonnegative: bool = False,
    row_scaling: bool = False,
    tolerance: float = 1e-9,
    cache_bytes: int = 256 << 20,
) -> list[Recovery]:
    """Recover each query's influence vector from its responses (method: Recovery; the paper's Section 4 and Table 6).

    Solves, per query, min over c and w of ½‖y − c·1 − M w‖² + λ‖w‖₁ with λ = ratio · λ_max and
    λ_max = ‖Mᵀ(y − ȳ)‖_∞, to the given duality gap of the full problem. Memory beyond the cache does not grow with N.

    Args:
        responses_QK: (Q, K) integer or float, a row of responses y(x) per query; solved in float64.
        membership: M.
        n_blocks: N, the columns of M.
        ratio: λ/λ_max, above 0. At 1 and above every w is empty.
        nonnegative: w ≥ 0; λ_max is then max Mᵀ(y − ȳ).
        row_scaling: for operators that are subset means. The model is y = c·1 + diag(mean|S| / |S_k|) M w, and λ_max
            and λ are of the scaled matrix. The factor mean|S| keeps the problem well-conditioned and w in the unit of
            the responses; v = mean|S|·w is the influence in y = c·1 + diag(1/|S_k|) M v.
        tolerance: duality gap to reach, relative to ½‖y − ȳ‖², from 1e-14 to below 1.
        cache_bytes: the columns' ids are kept between passes if they fit in this, else recomputed in every pass.

    Returns:
        One `Recovery` per query, in order; empty with gap 0 if all of a query's responses are equal. The bits of a
        result do not depend on the other queries.

    Raises:
        StrideError: a response is not finite (the message names the query), the shape is not (Q, K), or an option is
            out of range.
    """
    responses = np.asarray(responses_QK)
    K = membership.subsets
    if responses.ndim != 2 or responses.shape[1] != K or responses.dtype.kind not in "fiu":
        raise StrideError(
            f"recovery: responses must be numbers of shape (queries, {K}); got {responses.dtype} {responses.shape}."
        )
    if n_blocks < 1:
        raise StrideError(f"recovery: n_blocks is {n_blocks}; it must be at least 1.")
    if not (np.isfinite(ratio) and ratio > 0):
        raise StrideError(f"recovery: ratio is {ratio}; it must be finite and above 0.")
    if not 1e-14 <= tolerance < 1:
        raise StrideError(f"recovery: tolerance is {tolerance}; it must be from 1e-14 to below 1.")
    responses = np.asarray(responses, dtype=np.float64)
    finite = (np.abs(responses) < 1e100).all(axis=1)  # beyond, squares overflow
    if not finite.all():
        raise StrideError(
            f"recovery: query {int(np.argmin(finite))} has a response that is NaN, infinite or above 1e100."
        )

    began = time.monotonic()
    scale = np.append(row_scale(membership, n_blocks) if row_scaling else np.ones(K), 0.0)
    width = membership.degree if membership.form == "regular" else K
    fits = n_blocks * width * membership.dtype.itemsize <= cache_bytes
    stored = list(membership.ranges(n_blocks)) if fits else None
    problem = _Problem(membership, n_blocks, scale, ratio, nonnegative, tolerance)
    share = (time.monotonic() - began) / max(1, len(responses))
    results: list[Recovery] = []
    for start in range(0, len(responses), BATCH):
        queries = [_initial_state(row) for row in responses[start : start + BATCH]]
        _recover_batch(problem, queries, stored)
        for query in queries:
            order = np.argsort(query.ordinals)
            order = order[query.weights[order] != 0]
            found = (query.ordinals[order], query.weights[order], query.mean - query.shift, query.penalty, query.gap)
            results.append(Recovery(*found, query.rounds, share + query.seconds))
    return results
