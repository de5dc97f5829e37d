"""One-bit row codes and a RaBitQ-like estimator of inner products, computed with popcounts.

A row is divided into sections, one per site. A section z is stored as its signs and one scale, c = |z|²/Σ|zⱼ|, so that
⟨z, c·sign z⟩ = |z|². For approximately Gaussian coordinates, as a randomly rotated sketch has them, ⟨q, c·sign z⟩ is an
unbiased estimate of ⟨q, z⟩ (RaBitQ, Gao and Long 2024, arXiv 2405.12497; c is its 1/⟨ō, o⟩, and the sketch replaces its
random rotation). Queries are quantised to four bits per coordinate, stored as four bit planes in two's complement, so a
product is

    ⟨v, sign z⟩ = 2 Σ_plane weight · popcount(bits & plane) − Σⱼ vⱼ

in integers: identical on every processor and for every batch. A core processes some 60 billion coordinates per second,
twice as many as with float32 matrix products (RESULTS.md, Speed).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from stride_ray.models.linear_algebra.matrices import compiled

# Bits per coordinate of a query, in two's complement.
QUERY_BITS = 4
# Clipping points tried for a query's section, in units of its root mean square.
CLIP_RATIOS = (2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 7.0)
# Rows per tile: a section of that many rows stays in a core's cache while all queries pass over it.
TILE = 64


@dataclass(frozen=True)
class Rows:
    """n rows; their sections are concatenated.

    Attributes:
        bits: (n, W) uint64; a bit is set for a coordinate ≥ 0. Sections start at word boundaries; unused bits are 0.
        scales: (n, S) float32, c by section; 0 for a section of zeros.
    """

    bits: NDArray[np.uint64]
    scales: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.bits)


@dataclass(frozen=True)
class Queries:
    """Q queries with four bits per coordinate.

    Attributes:
        planes: (Q, 4, W) uint64.
        sums: (Q, S, 2) int64, Σ of the levels in the first half of the section's words and in the second.
        steps: (Q, S) float32, quantisation step: the value of level 1.
    """

    planes: NDArray[np.uint64]
    sums: NDArray[np.int64]
    steps: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.planes)


def word_starts(sizes: Sequence[int]) -> NDArray[np.int64]:
    """Return each section's start in 64-bit words, then the total: (S + 1,); ``sizes`` are in coordinates."""
    return np.concatenate([[0], np.cumsum([-(-size // 64) for size in sizes])]).astype(np.int64)


def row_bytes(sizes: Sequence[int]) -> int:
    """Bytes per row; ``sizes`` are the coordinates of each section."""
    return int(8 * word_starts(sizes)[-1] + 4 * len(sizes))


def pack_rows(sections: Sequence[NDArray[np.float32]]) -> Rows:
    """Encode rows given their sections, (n, size) each; a row with a non-finite value gets zero scales."""
    starts, n = word_starts([z.shape[1] for z in sections]), len(sections[0])
    bits, sums = np.zeros((n, starts[-1]), np.uint64), np.zeros((n, len(sections), 2))
    for at, z in enumerate(sections):
        _pack_signs(np.ascontiguousarray(z, np.float32), bits[:, starts[at] : starts[at + 1]], sums[:, at])
    first, second = sums[..., 0], sums[..., 1]
    good = np.isfinite(sums.sum(axis=(1, 2), keepdims=True)[..., 0])
    scales = np.divide(second, first, out=np.zeros_like(second), where=(first > 0) & good)
    return Rows(bits, scales.astype(np.float32))


@compiled
def _pack_signs(z: NDArray, words: NDArray, sums: NDArray) -> None:
    """Pack the signs of a section's coordinates into bits; also Σ|zⱼ| and |z|² of each row."""
    for row in range(len(z)):
        size = squares = 0.0
        for word in range(words.shape[1]):
            bits = np.uint64(0)
            for place in range(min(64, z.shape[1] - 64 * word)):
                x = np.float64(z[row, 64 * word + place])
                if x >= 0:
                    bits |= np.uint64(1) << np.uint64(place)
                size += abs(x)
                squares += x * x
            words[row, word] = bits
        sums[row, 0], sums[row, 1] = size, squares


def quantise_queries(sections: Sequence[NDArray[np.float32]]) -> Queries:
    """Quantise queries given their sections, (Q, size) each, which must be finite.

    Per section, the clipping point with the least squared error is used; the step is then rescaled so that
    ⟨q, quantised q⟩ = |q|².
    """
    levels, steps = zip(*(_quantise(q) for q in sections), strict=True)
    unsigned = [level.astype(np.uint8) for level in levels]  # two's complement: −1 has all low bits set
    planes = np.stack([_pack_bits([(level >> plane) & 1 for level in unsigned]) for plane in range(QUERY_BITS)], 1)
    return Queries(planes, np.stack([_half_sums(level) for level in levels], 1), np.stack(steps, 1))


def _quantise(q: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return integer levels from −7 to 7, (n, size) int8, and the quantisation step of each row, (n,) float32."""
    top = 2 ** (QUERY_BITS - 1) - 1
    size = np.sqrt(np.square(q, dtype=np.float64).mean(1, keepdims=True))
    best, lost = np.zeros(q.shape, np.int8), np.full(len(q), np.inf)
    for clip in CLIP_RATIOS:
        step = np.maximum(clip * size / top, 1e-300)
        level = np.clip(np.rint(q / step), -top, top)
        error = np.square(level * step - q).sum(1)
        best[error < lost] = level[error < lost].astype(np.int8)
        lost = np.minimum(lost, error)
    kept = (best * q.astype(np.float64)).sum(1)
    length = np.square(q, dtype=np.float64).sum(1)
    return best, np.divide(length, kept, out=np.zeros_like(kept), where=kept > 0).astype(np.float32)


def _half_sums(levels: NDArray[np.int8]) -> NDArray[np.int64]:
    """Sum the levels in the first half of the words and in the second: (n, 2) int64."""
    words = -(-levels.shape[1] // 64)
    middle = 64 * (words - words // 2)
    return np.stack([levels[:, :middle].sum(1, dtype=np.int64), levels[:, middle:].sum(1, dtype=np.int64)], 1)


def _pack_bits(sections: Sequence[NDArray]) -> NDArray[np.uint64]:
    """Pack sections of bits (0 or 1, or bool), each padded to whole words: (n, W) uint64."""
    pieces = []
    for bits in sections:
        padded = np.zeros((len(bits), -(-bits.shape[1] // 64) * 64), np.uint8)
        padded[:, : bits.shape[1]] = bits
        pieces.append(np.packbits(padded, axis=1, bitorder="little").view("<u8"))
    return np.ascontiguousarray(np.concatenate(pieces, 1)).astype(np.uint64, copy=False)


def _popcount_instruction(typing_context: Any, word: Any) -> Any:
    """The processor's popcount instruction, which numba does not expose."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


_popcount: Any = intrinsic(_popcount_instruction)


@compiled
def _level_sum(x: NDArray, p0: NDArray, p1: NDArray, p2: NDArray, p3: NDArray) -> Any:
    """Σ of the levels at the set bits."""
    a0 = a1 = a2 = a3 = np.uint64(0)
    for at in range(len(x)):
        a0 += _popcount(x[at] & p0[at])
        a1 += _popcount(x[at] & p1[at])
        a2 += _popcount(x[at] & p2[at])
        a3 += _popcount(x[at] & p3[at])
    return np.int64(a0) + 2 * np.int64(a1) + 4 * np.int64(a2) - 8 * np.int64(a3)


@compiled
def _multiply(
    bits: NDArray, scales: NDArray, planes: NDArray, sums: NDArray, steps: NDArray, starts: NDArray, out: NDArray
) -> None:
    """Add every section's products to ``out`` (Q, n, 2), the two halves separately."""
    for tile in range(0, len(bits), TILE):
        end = min(tile + TILE, len(bits))
        for section in range(len(starts) - 1):
            for half in range(2):
                # An odd number of words gives the first half one more.
                middle = starts[section + 1] - (starts[section + 1] - starts[section]) // 2
                first = middle if half else starts[section]
                last = starts[section + 1] if half else middle
                for query in range(len(planes)):
                    p0, p1 = planes[query, 0, first:last], planes[query, 1, first:last]
                    p2, p3 = planes[query, 2, first:last], planes[query, 3, first:last]
                    step, total = np.float64(steps[query, section]), sums[query, section, half]
                    for row in range(tile, end):
                        count = _level_sum(bits[row, first:last], p0, p1, p2, p3)
                        out[query, row, half] += step * np.float64(scales[row, section]) * np.float64(2 * count - total)


def estimate_inner_products(rows: Rows, queries: Queries, starts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Estimate the inner products of queries with rows, in two independent halves.

    Args:
        rows: n rows.
        queries: Q queries with the same sections.
        starts: (S + 1,) starts of the sections (word_starts).

    Returns:
        (Q, n, 2) float64: the product over the first half of every section's words, and over the second. Their sum is
        the estimate; their agreement over rows measures its quality (split-half reliability).
    """
    out = np.zeros((len(queries), len(rows), 2))
    _multiply(rows.bits, rows.scales, queries.planes, queries.sums, queries.steps, starts, out)
    return out
