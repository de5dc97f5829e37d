"""The K×N membership matrix M of blocks in subsets, computed from a seed and never stored.

The fit sums over subsets and the recovery scans columns, on many workers and for up to 1e9 blocks. A column is a pure
function of (seed, ordinal), computed by integer hashing and Floyd's sampling, without state or floating point: every
worker gets bit-identical columns for any range.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from stride_ray.models.linear_algebra.matrices import compiled
from stride_ray.runtime.config import Config
from stride_ray.runtime.errors import StrideError

FORMS = ("regular", "bernoulli")
CHUNK = 1 << 16  # columns in memory during a pass over the pool
EXPANDER_EPSILON = 1 / 6  # Lemma 1 and Remark 1 of the paper

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_TILE = 64
_ONE, _S27, _S30, _S31, _S32 = (np.uint64(n) for n in (1, 27, 30, 31, 32))


@compiled
def _mix(z: np.uint64) -> np.uint64:
    """Return splitmix64's finaliser of z (Steele, Lea and Flood 2014)."""
    z = (z ^ (z >> _S30)) * _MIX_1
    z = (z ^ (z >> _S27)) * _MIX_2
    return z ^ (z >> _S31)


@compiled
def _key(seed: np.uint64, ordinal: np.uint64) -> np.uint64:
    """Return the hash state of a column; mixing the seed first keeps seed+1 from being a shifted copy of seed."""
    return _mix(_mix(seed + _GAMMA) + (ordinal + _ONE) * _GAMMA)


@compiled
def _fill_regular(seed: np.uint64, ordinals: NDArray, subsets: int, out: NDArray) -> None:
    """Write d distinct ids, ascending, into each row of out: Floyd's algorithm on hashed draws.

    A tile of columns is processed together, one lane each, and sorted by a branchless network: every inner loop runs
    over lanes, so the compiler vectorises it. This is several times as fast as one column at a time.
    """
    degree = out.shape[1]
    key = np.empty(_TILE, np.uint64)
    chosen = np.empty((degree, _TILE), np.int32)
    taken = np.empty(_TILE, np.bool_)
    for first in range(0, len(ordinals), _TILE):
        lanes = min(_TILE, len(ordinals) - first)
        for lane in range(lanes):
            key[lane] = _key(seed, np.uint64(ordinals[first + lane]))
        for draw in range(degree):
            top = subsets - degree + draw
            step, bound = np.uint64(draw + 1) * _GAMMA, np.uint64(top + 1)
            pick = chosen[draw]
            for lane in range(lanes):
                # Multiply and shift maps 32 bits onto 0..top; its bias, below 2^-32 (top+1), is below sampling noise.
                pick[lane] = np.int32(((_mix(key[lane] + step) >> _S32) * bound) >> _S32)
                taken[lane] = False
            for earlier in range(draw):
                other = chosen[earlier]
                for lane in range(lanes):
                    taken[lane] |= other[lane] == pick[lane]
            for lane in range(lanes):  # Floyd: `top` exceeds every id so far, so it is free
                pick[lane] = top if taken[lane] else pick[lane]
        for sweep in range(degree):
            for i in range(sweep & 1, degree - 1, 2):
                low, high = chosen[i], chosen[i + 1]
                for lane in range(lanes):
                    a, b = low[lane], high[lane]
                    low[lane], high[lane] = min(a, b), max(a, b)
        for lane in range(lanes):
            for i in range(degree):
                out[first + lane, i] = chosen[i, lane]


@compiled
def _bernoulli_width(seed: np.uint64, ordinals: NDArray, subsets: int, threshold: np.uint64) -> int:
    """Return the maximum number of subsets over these columns."""
    widest = 0
    for row in range(len(ordinals)):
        key = _key(seed, np.uint64(ordinals[row]))
        count = 0
        for k in range(subsets):
            if (_mix(key + np.uint64(k + 1) * _GAMMA) >> _S32) < threshold:
                count += 1
        widest = max(widest, count)
    return widest


@compiled
def _fill_bernoulli(seed: np.uint64, ordinals: NDArray, subsets: int, threshold: np.uint64, out: NDArray) -> None:
    """Write the ids of each column into its row of out, padded with K."""
    for row in range(len(ordinals)):
        key = _key(seed, np.uint64(ordinals[row]))
        at = 0
        for k in range(subsets):
            if (_mix(key + np.uint64(k + 1) * _GAMMA) >> _S32) < threshold:
                out[row, at] = k
                at += 1
        for i in range(at, out.shape[1]):
            out[row, i] = subsets


@dataclass(frozen=True)
class MembershipCheck:
    """The result of `Membership.check`.

    Sizes are |S_k| in blocks. Overlap is the number of subsets that two different blocks share, over `pairs` sampled
    pairs. `overlap_bound` is 2εd with ε = 1/6, that is d/3, which holds for every pair of a (2s, d, ε)-expander (paper,
    Remark 1); `overlap_above` is the share of pairs above it. `columns_valid` is true if every column holds distinct
    ids, and in the regular form exactly d ids below K.
    """

    size_min: int
    size_mean: float
    size_max: int
    size_sd: float
    size_sd_expected: float
    pairs: int
    overlap_mean: float
    overlap_mean_expected: float
    overlap_max: int
    overlap_bound: float
    overlap_above: float
    columns_valid: bool


@dataclass(frozen=True)
class Membership:
    """The membership matrix M ∈ {0,1}^{K×N} (method: Symbols); column i holds the subsets of block i.

    Attributes:
        subsets: K.
        degree: d, subsets per block: exactly (`regular`) or on average (`bernoulli`).
        seed: an integer from 0 to 2^64 − 1; different seeds give independent matrices.
        form: `regular` (left-d-regular, the paper's), or `bernoulli`: entries are independently 1 with probability d/K.
            The latter is for comparison only; d = K/2 is the paper's ablation (Table 11, Remark 1).

    Raises:
        StrideError: K, d, seed or form is out of range.
    """

    subsets: int
    degree: int
    seed: int
    form: str = "regular"

    def __post_init__(self) -> None:
        for name in ("subsets", "degree", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise StrideError(f"membership: {name} is {value!r}; it must be an integer.")
            object.__setattr__(self, name, int(value))
        if not 1 <= self.subsets < 2**31:
            raise StrideError(f"membership: subsets is {self.subsets}; it must be from 1 to 2^31 - 1.")
        if not 1 <= self.degree <= self.subsets:
            raise StrideError(
                f"membership: degree is {self.degree} with {self.subsets} subsets; it must be from 1 to the number of "
                "subsets."
            )
        if not 0 <= self.seed < 2**64:
            raise StrideError(f"membership: seed is {self.seed}; it must be from 0 to 2^64 - 1.")
        if self.form not in FORMS:
            raise StrideError(f"membership: form is {self.form!r}; it must be one of {', '.join(FORMS)}.")

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned integer type that holds K (ids 0…K−1, and K for "no subset")."""
        return np.min_scalar_type(self.subsets)

    def columns(self, start: int, stop: int) -> NDArray:
        """Return the subsets of blocks start…stop−1.

        Args:
            start: first block, ≥ 0.
            stop: one past the last block, ≥ start.

        Returns:
            (stop−start, width) ids of `dtype`, ascending in each row. `regular`: width is d and the ids are distinct.
            `bernoulli`: width is that of the range's fullest column; shorter ones are padded with K.

        Raises:
            StrideError: the range is invalid.
        """
        if not 0 <= start <= stop:
            raise StrideError(f"membership: columns {start} to {stop} are not a range; 0 <= start <= stop is needed.")
        return self.columns_at(np.arange(start, stop, dtype=np.int64))

    def columns_at(self, ordinals: NDArray) -> NDArray:
        """Return the subsets of arbitrary blocks, in the given order; see `columns`.

        Args:
            ordinals: (n,) non-negative integers.

        Raises:
            StrideError: an ordinal is negative, or the array is not one-dimensional or not of integers.
        """
        ordinals = np.asarray(ordinals)
        if ordinals.ndim != 1 or (ordinals.size and ordinals.dtype.kind not in "iu"):
            raise StrideError("membership: ordinals must be a one-dimensional array of integers.")
        if ordinals.size and ordinals.min() < 0:
            raise StrideError(f"membership: ordinal {ordinals.min()} is negative; ordinals count from 0.")
        ordinals = np.ascontiguousarray(ordinals, dtype=np.int64)
        seed = np.uint64(self.seed)
        if self.form == "regular":
            out = np.empty((len(ordinals), self.degree), self.dtype)
            _fill_regular(seed, ordinals, self.subsets, out)
        else:
            threshold = np.uint64((self.degree << 32) // self.subsets)  # d/K of 2^32, in integers
            width = _bernoulli_width(seed, ordinals, self.subsets, threshold)
            out = np.empty((len(ordinals), width), self.dtype)
            _fill_bernoulli(seed, ordinals, self.subsets, threshold, out)
        return out

    def ranges(self, n_blocks: int) -> Iterator[tuple[int, NDArray]]:
        """Yield (start, columns from start on) over blocks 0…n_blocks−1 in order, with a bounded number of ids each."""
        if n_blocks < 0:
            raise StrideError(f"membership: n_blocks is {n_blocks}; it must not be negative.")
        step = max(1, CHUNK * 16 // max(16, self.degree))
        for start in range(0, n_blocks, step):
            yield start, self.columns(start, min(start + step, n_blocks))

    def matrix(self, start: int, stop: int) -> scipy.sparse.csc_array:
        """Return columns start…stop−1 of M as a (K, stop−start) sparse matrix: float64 ones, int32 indices.

        int32, because scikit-learn rejects 64-bit indices.

        Raises:
            StrideError: the range is invalid, or holds more than 2^31 − 1 entries.
        """
        ids = self.columns(start, stop)
        present = ids < self.subsets
        indptr = np.concatenate([[0], np.cumsum(present.sum(axis=1))])
        if indptr[-1] >= 2**31:
            raise StrideError(f"membership: {indptr[-1]} entries do not fit 32-bit indices; take a shorter range.")
        indices = ids[present].astype(np.int32)
        shape = (self.subsets, stop - start)
        return scipy.sparse.csc_array((np.ones(len(indices)), indices, indptr.astype(np.int32)), shape=shape)

    def sizes(self, n_blocks: int) -> NDArray[np.int64]:
        """Return |S_k| among blocks 0…n_blocks−1: (K,) int64, counted in one streaming pass."""
        total = np.zeros(self.subsets + 1, np.int64)
        for _, ids in self.ranges(n_blocks):
            total += np.bincount(ids.ravel(), minlength=self.subsets + 1)
        return total[:-1]

    def check(self, n_blocks: int, pairs: int = 100_000) -> MembershipCheck:
        """Compare balance and overlap of the first n_blocks columns with what chance and Remark 1 predict.

        Args:
            n_blocks: N, at least 2. Every column is computed once, in bounded memory.
            pairs: number of random pairs of different blocks to compare.

        Raises:
            StrideError: n_blocks or pairs is too small.
        """
        if n_blocks < 2 or pairs < 1:
            raise StrideError(f"membership: checking needs 2 blocks and 1 pair; got {n_blocks} and {pairs}.")
        K, d = self.subsets, self.degree
        sizes = np.zeros(K + 1, np.int64)
        valid = True
        for _, ids in self.ranges(n_blocks):
            sizes += np.bincount(ids.ravel(), minlength=K + 1)[: K + 1]
            present = ids < K
            ascending = (ids[:, :-1] < ids[:, 1:]) | ~present[:, 1:]
            valid = valid and bool(ascending.all()) and (self.form != "regular" or bool(present.all()))
        sizes = sizes[:-1]
        if self.form == "regular":
            valid = valid and int(sizes.sum()) == n_blocks * d
        overlaps = self._overlaps(n_blocks, pairs)
        bound = 2 * EXPANDER_EPSILON * d
        return MembershipCheck(
            size_min=int(sizes.min()),
            size_mean=float(sizes.mean()),
            size_max=int(sizes.max()),
            size_sd=float(sizes.std()),
            size_sd_expected=float(np.sqrt(n_blocks * (d / K) * (1 - d / K))),
            pairs=pairs,
            overlap_mean=float(overlaps.mean()),
            overlap_mean_expected=d * d / K,
            overlap_max=int(overlaps.max()),
            overlap_bound=bound,
            overlap_above=float((overlaps > bound).mean()),
            columns_valid=valid,
        )

    def _overlaps(self, n_blocks: int, pairs: int) -> NDArray[np.int64]:
        """Return how many subsets each of `pairs` random pairs of different blocks share: (pairs,) int64."""
        rng = np.random.default_rng(self.seed)
        overlaps = np.empty(pairs, np.int64)
        step = max(1, (1 << 22) // self.subsets)  # bounds the 0/1 rows below
        for at in range(0, pairs, step):
            n = min(step, pairs - at)
            left = rng.integers(0, n_blocks, n)
            right = (left + rng.integers(1, n_blocks, n)) % n_blocks
            member = np.zeros((n, self.subsets + 1), bool)
            np.put_along_axis(member, self.columns_at(left).astype(np.int64), True, axis=1)
            member[:, -1] = False  # padding is not shared
            other = self.columns_at(right).astype(np.int64)
            overlaps[at : at + n] = np.take_along_axis(member, other, axis=1).sum(axis=1)
        return overlaps


def membership_of(config: Config) -> Membership:
    """Return the run's membership matrix."""
    wanted = config.membership
    return Membership(wanted.subsets, wanted.degree, config.seed, wanted.form)
