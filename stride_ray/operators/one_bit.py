"""Rows of numbers in one bit a coordinate, and inner products of queries with them by counting bits.

A row is cut into sections, one a site. Of a section z only the signs are kept and one scale, c = |z|²/Σ|zⱼ|, so that
⟨z, c·sign z⟩ = |z|²: of coordinates that are about Gaussian, as those of a random sketch are, ⟨q, c·sign z⟩ is an
unbiased estimate of ⟨q, z⟩ (RaBitQ, Gao and Long 2024, arXiv 2405.12497; the scale is its 1/⟨ō, o⟩). A query keeps four
bits a coordinate, in four planes of bits in two's complement, so that a product is

    ⟨v, sign z⟩ = 2 Σ_plane weight · popcount(bits & plane) − Σⱼ vⱼ

in whole numbers: the same on every processor, whatever else is in the batch. A core does some 60 billion coordinates a
second, twice as many as with float32 matrix products (RESULTS.md, Speed).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

# Bits of a query's coordinate: their weights in two's complement.
PLANES = 4
# Steps tried for a query's section, as the largest level over the root mean square.
CLIPS = (2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 7.0)
# Rows that are gone through with one query before the next: with a section of them they stay in a core's cache.
TILE = 64


@dataclass(frozen=True)
class Rows:
    """n rows, sections side by side.

    Attributes:
        bits: (n, W) uint64, a set bit for a coordinate ≥ 0; sections begin at whole words, unused bits are 0.
        scales: (n, S) float32, c by section; 0 for a section of zeros.
    """

    bits: NDArray[np.uint64]
    scales: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.bits)


@dataclass(frozen=True)
class Queries:
    """Q queries in four bits a coordinate.

    Attributes:
        planes: (Q, 4, W) uint64.
        sums: (Q, S, 2) int64, Σ of the levels in the first half of the section's words and in the rest.
        steps: (Q, S) float32, what a level of 1 stands for.
    """

    planes: NDArray[np.uint64]
    sums: NDArray[np.int64]
    steps: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.planes)


def word_starts(sizes: Sequence[int]) -> NDArray[np.int64]:
    """Where sections of so many coordinates begin, in words of 64, and the number of words: (S + 1,)."""
    return np.concatenate([[0], np.cumsum([-(-size // 64) for size in sizes])]).astype(np.int64)


def row_bytes(sizes: Sequence[int]) -> int:
    """Bytes of a row with sections of so many coordinates."""
    return int(8 * word_starts(sizes)[-1] + 4 * len(sizes))


def packed_rows(sections: Sequence[NDArray[np.float32]]) -> Rows:
    """Rows from their sections, (n, size) each; a row that is not finite everywhere becomes zeros."""
    starts, n = word_starts([z.shape[1] for z in sections]), len(sections[0])
    bits, sums = np.zeros((n, starts[-1]), np.uint64), np.zeros((n, len(sections), 2))
    for at, z in enumerate(sections):
        _pack(np.ascontiguousarray(z, np.float32), bits[:, starts[at] : starts[at + 1]], sums[:, at])
    first, second = sums[..., 0], sums[..., 1]
    good = np.isfinite(sums.sum(axis=(1, 2), keepdims=True)[..., 0])
    scales = np.divide(second, first, out=np.zeros_like(second), where=(first > 0) & good)
    return Rows(bits, scales.astype(np.float32))


@njit(cache=True, nogil=True)
def _pack(z: NDArray, words: NDArray, sums: NDArray) -> None:
    """Signs of a section's coordinates as bits, and Σ|zⱼ| and |z|² of each row."""
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


def packed_queries(sections: Sequence[NDArray[np.float32]]) -> Queries:
    """Queries from their sections, (Q, size) each; they must be finite.

    A section's step is the one of CLIPS that loses least; products are scaled to keep a query's own length.
    """
    levels, steps = zip(*(_levels(q) for q in sections), strict=True)
    unsigned = [level.astype(np.uint8) for level in levels]  # two's complement: of −1 the low bits are all set
    planes = np.stack([_words([(level >> plane) & 1 for level in unsigned]) for plane in range(PLANES)], 1)
    return Queries(planes, np.stack([_halves(level) for level in levels], 1), np.stack(steps, 1))


def _levels(q: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Whole numbers from −7 to 7 and the step between them, a row each."""
    top = 2 ** (PLANES - 1) - 1
    size = np.sqrt(np.square(q, dtype=np.float64).mean(1, keepdims=True))
    best, lost = np.zeros(q.shape, np.int8), np.full(len(q), np.inf)
    for clip in CLIPS:
        step = np.maximum(clip * size / top, 1e-300)
        level = np.clip(np.rint(q / step), -top, top)
        error = np.square(level * step - q).sum(1)
        best[error < lost] = level[error < lost].astype(np.int8)
        lost = np.minimum(lost, error)
    kept = (best * q.astype(np.float64)).sum(1)
    length = np.square(q, dtype=np.float64).sum(1)
    return best, np.divide(length, kept, out=np.zeros_like(kept), where=kept > 0).astype(np.float32)


def _halves(levels: NDArray[np.int8]) -> NDArray[np.int64]:
    """(n, 2): sums of the levels in the first half of the words and in the rest."""
    words = -(-levels.shape[1] // 64)
    middle = 64 * (words - words // 2)
    return np.stack([levels[:, :middle].sum(1, dtype=np.int64), levels[:, middle:].sum(1, dtype=np.int64)], 1)


def _words(sections: Sequence[NDArray]) -> NDArray[np.uint64]:
    """Sections of bits (0 or 1, or bool) as words, each padded to whole ones: (n, W) uint64."""
    pieces = []
    for bits in sections:
        padded = np.zeros((len(bits), -(-bits.shape[1] // 64) * 64), np.uint8)
        padded[:, : bits.shape[1]] = bits
        pieces.append(np.packbits(padded, axis=1, bitorder="little").view("<u8"))
    return np.ascontiguousarray(np.concatenate(pieces, 1)).astype(np.uint64, copy=False)


def _popcount_instruction(typing_context: Any, word: Any) -> Any:
    """The processor's own count of the bits set in a word, which numba has no name for."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


_popcount: Any = intrinsic(_popcount_instruction)


@njit(cache=True, nogil=True)
def _counted(x: NDArray, p0: NDArray, p1: NDArray, p2: NDArray, p3: NDArray) -> Any:
    """Σ of the levels at the set bits of some words."""
    a0 = a1 = a2 = a3 = np.uint64(0)
    for at in range(len(x)):
        a0 += _popcount(x[at] & p0[at])
        a1 += _popcount(x[at] & p1[at])
        a2 += _popcount(x[at] & p2[at])
        a3 += _popcount(x[at] & p3[at])
    return np.int64(a0) + 2 * np.int64(a1) + 4 * np.int64(a2) - 8 * np.int64(a3)


@njit(cache=True, nogil=True)
def _multiply(
    bits: NDArray, scales: NDArray, planes: NDArray, sums: NDArray, steps: NDArray, starts: NDArray, out: NDArray
) -> None:
    """Add every section's products to ``out`` (Q, n, 2), the halves apart."""
    for tile in range(0, len(bits), TILE):
        end = min(tile + TILE, len(bits))
        for section in range(len(starts) - 1):
            for half in range(2):
                # The first half of the words, the longer one, or the rest.
                middle = starts[section + 1] - (starts[section + 1] - starts[section]) // 2
                first = middle if half else starts[section]
                last = starts[section + 1] if half else middle
                for query in range(len(planes)):
                    p0, p1 = planes[query, 0, first:last], planes[query, 1, first:last]
                    p2, p3 = planes[query, 2, first:last], planes[query, 3, first:last]
                    step, total = np.float64(steps[query, section]), sums[query, section, half]
                    for row in range(tile, end):
                        count = _counted(bits[row, first:last], p0, p1, p2, p3)
                        out[query, row, half] += step * np.float64(scales[row, section]) * np.float64(2 * count - total)


def products(rows: Rows, queries: Queries, starts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Estimates of the inner products of queries with rows, in two independent halves.

    Args:
        rows: n of them.
        queries: Q of them, of the same sections.
        starts: of the sections (word_starts).

    Returns:
        (Q, n, 2) float64: the parts of the product in the first half of every section's words and in the rest. Their
        sum is the estimate; how well they agree over rows tells how good it is (split-half reliability).
    """
    out = np.zeros((len(queries), len(rows), 2))
    _multiply(rows.bits, rows.scales, queries.planes, queries.sums, queries.steps, starts, out)
    return out
