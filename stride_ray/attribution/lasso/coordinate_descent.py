"""Compiled loops over columns of the membership matrix M, where recovery spends most of its time.

A column is a row of ``ids``: the ids of the subsets that its block belongs to, padded with K for "no subset". Sums are
taken per query and in a fixed order, so the bits of one query's result do not depend on the others.
"""

import numpy as np
from numpy.typing import NDArray

from stride_ray.models.linear_algebra.matrices import compiled

# Epochs of ``descend`` between computations of the duality gap, since one computation costs about an epoch.
GAP_EPOCHS = 10


@compiled
def _sift_down(value: NDArray, ordinal: NDArray, at: int, size: int) -> None:
    """Restore the min-heap below a position whose value has changed."""
    while 2 * at + 1 < size:
        child = 2 * at + 1
        if child + 1 < size and value[child + 1] < value[child]:
            child += 1
        if value[at] <= value[child]:
            break
        value[at], value[child] = value[child], value[at]
        ordinal[at], ordinal[child] = ordinal[child], ordinal[at]
        at = child


@compiled
def scan_columns(
    ids: NDArray,
    first: int,
    residual_KQ: NDArray,
    both_signs: bool,
    floor_Q: NDArray,
    capacity_Q: NDArray,
    value_QC: NDArray,
    ordinal_QC: NDArray,
    count_Q: NDArray,
) -> None:
    """Keep, per query, the columns whose correlation with the query's residual is largest, in a min-heap.

    ids (n, width) are columns first…first+n−1 of M; residual_KQ (K+1, Q) has a zero row for the id K. Only values above
    floor_Q are pushed, and floor_Q rises once the heap of capacity_Q entries is full, so nearly all columns cost one
    comparison. Updates value_QC, ordinal_QC, count_Q and floor_Q in place.
    """
    width, queries = ids.shape[1], residual_KQ.shape[1]
    total = np.empty(queries)
    for row in range(len(ids)):
        total[:] = 0.0
        # Each query is a SIMD lane and adds its terms in the same order for any number of lanes.
        for i in range(0, width - 1, 2):
            a, b = residual_KQ[np.int64(ids[row, i])], residual_KQ[np.int64(ids[row, i + 1])]
            for q in range(queries):
                total[q] += a[q] + b[q]
        if width & 1:
            a = residual_KQ[np.int64(ids[row, width - 1])]
            for q in range(queries):
                total[q] += a[q]
        found = False
        for q in range(queries):
            total[q] = abs(total[q]) if both_signs else total[q]
            found |= total[q] > floor_Q[q]
        if not found:
            continue
        for q in range(queries):
            if total[q] <= floor_Q[q]:
                continue
            value, ordinal, size = value_QC[q], ordinal_QC[q], count_Q[q]
            if size < capacity_Q[q]:  # an unordered list until it is full
                value[size], ordinal[size] = total[q], first + row
                count_Q[q] = size = size + 1
                lowest = size // 2 if size == capacity_Q[q] else -1
            else:
                value[0], ordinal[0] = total[q], first + row
                lowest = 0
            for at in range(lowest, -1, -1):
                _sift_down(value, ordinal, at, size)
            if lowest >= 0:
                floor_Q[q] = max(floor_Q[q], value[0])


@compiled
def gram_of(ids: NDArray, scale: NDArray, target: NDArray) -> tuple[NDArray, NDArray]:
    """Return XᵀX (n, n) and Xᵀy (n,) of the centred, row-scaled columns; scale and target are (K+1,), 0 at K.

    The target y must be centred.
    """
    n, width = ids.shape
    K = len(scale) - 1
    gram, correlation, mean = np.empty((n, n)), np.zeros(n), np.zeros(n)
    for a in range(n):
        for i in range(width):
            mean[a] += scale[ids[a, i]] / K
            correlation[a] += scale[ids[a, i]] * target[ids[a, i]]
    member = np.zeros(K + 1)
    for a in range(n):
        for i in range(width):
            member[ids[a, i]] = scale[ids[a, i]] ** 2
        for b in range(a, n):
            shared = 0.0
            for i in range(width):
                shared += member[ids[b, i]]
            gram[a, b] = gram[b, a] = shared - K * mean[a] * mean[b]
        for i in range(width):
            member[ids[a, i]] = 0.0
    return gram, correlation


@compiled
def predict(ids: NDArray, weights: NDArray, scale: NDArray) -> NDArray:
    """Return X w for the row-scaled, uncentred columns: (K,) float64."""
    total = np.zeros(len(scale))
    for a in range(len(ids)):
        for i in range(ids.shape[1]):
            total[ids[a, i]] += weights[a]
    return (total * scale)[:-1]


@compiled
def descend(
    ids: NDArray,
    scale: NDArray,
    target: NDArray,
    weights: NDArray,
    penalty: float,
    nonnegative: bool,
    tolerance: float,
    epochs: int,
) -> None:
    """Coordinate descent on ½‖target − X w‖² + penalty·‖w‖₁, in place, over the centred, row-scaled columns.

    A step costs O(width), not O(K): the residual is stored as an uncentred vector plus a scalar shift, so a sparse
    column changes only a few entries. Stops when the duality gap over ½‖target‖² is within the tolerance (checked
    every GAP_EPOCHS epochs), or after ``epochs`` epochs.
    """
    n, width = ids.shape
    K = len(scale) - 1
    sums, norms, residual = np.zeros(n), np.zeros(n), np.zeros(K + 1)
    for a in range(n):
        for i in range(width):
            sums[a] += scale[ids[a, i]]
            norms[a] += scale[ids[a, i]] ** 2
        norms[a] -= sums[a] ** 2 / K
    half = 0.0
    for k in range(K):
        half += 0.5 * target[k] ** 2
    shift = 0.0
    for epoch in range(epochs + 1):
        if epoch % GAP_EPOCHS == 0 or epoch == epochs:
            residual[:K] = target
            shift = 0.0
            for a in range(n):
                if weights[a] != 0.0:
                    for i in range(width):
                        residual[ids[a, i]] -= weights[a] * scale[ids[a, i]]
                    shift += weights[a] * sums[a] / K
            if _gap(ids, scale, target, weights, residual, shift, sums, penalty, nonnegative) <= tolerance * half:
                return
        for a in range(n):
            if norms[a] <= 1e-12 * abs(sums[a]):  # in all subsets or in none: zero after centring
                continue
            slope = shift * sums[a] + norms[a] * weights[a]
            for i in range(width):
                slope += scale[ids[a, i]] * residual[ids[a, i]]
            if slope > penalty:
                step = (slope - penalty) / norms[a] - weights[a]
            elif slope < -penalty and not nonnegative:
                step = (slope + penalty) / norms[a] - weights[a]
            else:
                step = -weights[a]
            if step != 0.0:
                weights[a] += step
                for i in range(width):
                    residual[ids[a, i]] -= step * scale[ids[a, i]]
                shift += step * sums[a] / K


@compiled
def _gap(
    ids: NDArray,
    scale: NDArray,
    target: NDArray,
    weights: NDArray,
    residual: NDArray,
    shift: float,
    sums: NDArray,
    penalty: float,
    nonnegative: bool,
) -> float:
    """Duality gap of descend's problem at the residual (K+1,) plus the shift."""
    n, width = ids.shape
    largest, size, rr, ry = penalty, 0.0, 0.0, 0.0
    for a in range(n):
        slope = shift * sums[a]
        for i in range(width):
            slope += scale[ids[a, i]] * residual[ids[a, i]]
        largest = max(largest, slope if nonnegative else abs(slope))
        size += abs(weights[a])
    for k in range(len(scale) - 1):
        rr += (residual[k] + shift) ** 2
        ry += (residual[k] + shift) * target[k]
    return gap_of(rr, ry, largest, size, penalty, nonnegative)


@compiled
def gap_of(rr: float, ry: float, largest: float, size: float, penalty: float, nonnegative: bool) -> float:
    """Duality gap of ½‖y − Xw‖² + penalty·‖w‖₁, from ‖r‖², rᵀy, max|Xᵀr| (nonnegative: max Xᵀr) and ‖w‖₁.

    The dual point is s·r, with the s that maximises the dual −½s²‖r‖² + s·yᵀr subject to s·Xᵀr within the penalty.
    """
    bound = penalty / largest if largest > 0.0 else np.inf
    dual = max(min(ry / rr, bound) if rr > 0.0 else 0.0, 0.0 if nonnegative else -bound)
    return max(0.5 * rr + penalty * size - (dual * ry - 0.5 * dual * dual * rr), 0.0)
