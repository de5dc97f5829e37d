"""Batches of the paper's training loop: blocks, subsets, and the (block, subset) pairs of each loss.

Everything is a function of (seed, step) and the pool, so that a resumed loop needs no history and every rank computes
the whole step without communication.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stride_ray.corpus.blocks import Batch, Blocks
from stride_ray.operators.membership import Membership
from stride_ray.runtime.errors import StrideError

# Fidelity pairs per block.
FIDELITY_PAIRS_PER_BLOCK = 2
# Shuffling: blocks per slice of consecutive blocks, and slices that are held in memory and shuffled together.
SLICE, HELD_SLICES = 512, 64


class SeededShuffle:
    """A seeded shuffle of the pool, epoch after epoch, with random access to the blocks of any step.

    A pool of up to 32,768 blocks is shuffled in full. A larger one is processed in chapters of that size, each made of
    64 random slices of the pool: memory is bounded and reads are sequential within a slice.
    """

    def __init__(self, blocks: Blocks, seed: int, per_step: int) -> None:
        self.blocks, self.seed = blocks, seed
        self.per_step = min(per_step, len(blocks))
        self._cached_slices = functools.lru_cache(2)(self._slices)
        self._cached_chapter = functools.lru_cache(2)(self._chapter)

    def batch(self, step: int) -> Batch:
        """The blocks of a step, (per_step, …); at the end of an epoch a block may occur twice."""
        parts: dict[tuple[int, int], list[int]] = {}
        for position in range(step * self.per_step, (step + 1) * self.per_step):
            epoch, index = divmod(position, len(self.blocks))
            before = self._cached_slices(epoch)[1]
            chapter = (int(np.searchsorted(before, index, side="right")) - 1) // HELD_SLICES
            parts.setdefault((epoch, chapter), []).append(index - int(before[chapter * HELD_SLICES]))
        found = [[array[rows] for array in self._cached_chapter(*key)] for key, rows in parts.items()]
        ordinals, ids, mask = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        return Batch(ordinals, ids.astype(np.int64), mask)

    def _slices(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return an epoch's slices in order: each one's start in the pool, and the number of blocks before it."""
        starts = np.arange(0, len(self.blocks), SLICE)
        starts = np.random.default_rng([self.seed, epoch]).permutation(starts)
        lengths = np.minimum(SLICE, len(self.blocks) - starts)
        return starts, np.concatenate([[0], np.cumsum(lengths)])

    def _chapter(self, epoch: int, chapter: int) -> Batch:
        """Read the HELD_SLICES slices of a chapter and shuffle their blocks."""
        starts = self._cached_slices(epoch)[0][chapter * HELD_SLICES : (chapter + 1) * HELD_SLICES]
        read = [batch for s in starts.tolist() for batch in self.blocks.batches(s, s + SLICE, SLICE)]
        order = np.random.default_rng([self.seed, epoch, chapter]).permutation(sum(len(b.ordinals) for b in read))
        ordinals, ids, mask = (np.concatenate([getattr(b, name) for b in read])[order] for name in Batch._fields)
        return Batch(ordinals, ids.astype(np.int32), mask)


class Step(NamedTuple):
    """One training step: its blocks, its subsets, and for each loss (pairs, 2) indices into the two."""

    batch: Batch
    subsets: np.ndarray
    fidelity: np.ndarray
    stability: np.ndarray
    linearity: np.ndarray


class BatchStates(NamedTuple):
    """Blocks with their streams after the split layer, shared by the pairs."""

    places: np.ndarray  # ascending indices into the batch
    h: Tensor  # (B, T, D)
    ids: Tensor
    mask: Tensor

    def of(self, pairs: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Stream, ids and mask of each pair's block."""
        at = torch.from_numpy(np.searchsorted(self.places, pairs[:, 0])).to(self.h.device)
        return self.h[at], self.ids[at], self.mask[at]


def plan_step(shuffle: SeededShuffle, membership: Membership, seed: int, step: int) -> Step:
    """Return a step's blocks and pairs, a function of (seed, step); blocks without a target get no pairs.

    Raises:
        StrideError: no block of the step has a target in its loss mask.
    """
    batch = shuffle.batch(step)
    rng = np.random.default_rng([seed, step, 1])
    useful = np.flatnonzero(batch.mask[:, 1:].any(1))
    if not len(useful):
        raise StrideError(
            f"None of the {len(batch.mask)} blocks of step {step} has a target token; shard with longer blocks "
            "(corpus.block_tokens) or raise fit.blocks_per_step."
        )
    columns = membership.columns_at(batch.ordinals).astype(np.int64)
    own = [rng.permutation(row[row < membership.subsets])[:FIDELITY_PAIRS_PER_BLOCK] for row in columns[useful]]
    subsets = np.unique(np.concatenate(own))
    block = np.repeat(useful, [len(chosen) for chosen in own])
    fidelity = np.stack([block, np.searchsorted(subsets, np.concatenate(own))], 1)
    strangers = [(b, np.flatnonzero(~np.isin(subsets, columns[b]))) for b in useful]
    stability = np.array([(b, rng.choice(rows)) for b, rows in strangers if len(rows)], dtype=np.int64).reshape(-1, 2)
    few = useful[: max(1, shuffle.per_step // 16)]
    everyone = np.stack([np.repeat(few, len(subsets)), np.tile(np.arange(len(subsets)), len(few))], 1)
    return Step(batch, subsets, fidelity, stability, everyone)


def without_blocks(step: Step, places: np.ndarray) -> Step:
    """Return the step without the pairs of some blocks, given by their indices into the batch."""
    kept = (pairs[~np.isin(pairs[:, 0], places)] for pairs in (step.fidelity, step.stability, step.linearity))
    return Step(step.batch, step.subsets, *kept)


def sample_pairs(membership: Membership, ordinals: np.ndarray, seed: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw up to ``most`` of each block's own subsets, and as many other subsets.

    Returns:
        Member and non-member pairs, two (pairs, 2) int64 arrays of (index into ``ordinals``, subset).
    """
    members, others = [np.empty((0, 2), np.int64)], [np.empty((0, 2), np.int64)]
    for row, (ordinal, column) in enumerate(zip(ordinals.tolist(), membership.columns_at(ordinals), strict=True)):
        order = np.random.default_rng([seed, ordinal, 2]).permutation(membership.subsets)
        own = np.isin(order, column)
        for kept, some in ((members, order[own][:most]), (others, order[~own][: min(most, own.sum())])):
            kept.append(np.stack([np.full(len(some), row), some], 1))
    return np.concatenate(members), np.concatenate(others)
