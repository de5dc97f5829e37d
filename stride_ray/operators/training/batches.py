"""What a step of the paper's loop works on: its blocks, its subsets, and which pairs of them serve which loss.

All of it is a function of (seed, step) and the pool alone, so that a loop which was stopped goes on without history,
and every rank knows the whole step without being told.
"""

import functools
from typing import NamedTuple

import numpy as np

from stride_ray.corpus.blocks import Batch, Blocks
from stride_ray.operators.membership import Membership
from stride_ray.runtime.errors import StrideError

# The step's subsets that a block serves fidelity for.
OWN = 2
# The order of blocks: slices of neighbours, so many of which are held and shuffled together.
SLICE, HELD_SLICES = 512, 64


class SeededShuffle:
    """The pool in a seeded order, epoch after epoch, of which a step takes the next blocks; any step, in any order.

    A pool of up to 32,768 blocks is shuffled whole. A larger one is walked in chapters of that size, each made of 64
    slices from anywhere in the pool: bounded memory, and reads of neighbours.
    """

    def __init__(self, blocks: Blocks, seed: int, per_step: int) -> None:
        self.blocks, self.seed = blocks, seed
        self.per_step = min(per_step, len(blocks))
        self._order = functools.lru_cache(2)(self._slices)
        self._held = functools.lru_cache(2)(self._chapter)

    def batch(self, step: int) -> Batch:
        """The blocks of a step, (per_step, …); one may come twice where an epoch ends."""
        parts: dict[tuple[int, int], list[int]] = {}
        for position in range(step * self.per_step, (step + 1) * self.per_step):
            epoch, index = divmod(position, len(self.blocks))
            before = self._order(epoch)[1]
            chapter = (int(np.searchsorted(before, index, side="right")) - 1) // HELD_SLICES
            parts.setdefault((epoch, chapter), []).append(index - int(before[chapter * HELD_SLICES]))
        found = [[array[rows] for array in self._held(*key)] for key, rows in parts.items()]
        ordinals, ids, mask = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        return Batch(ordinals, ids.astype(np.int64), mask)

    def _slices(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """An epoch's slices in order: where each starts in the pool, and how many blocks come before it."""
        starts = np.arange(0, len(self.blocks), SLICE)
        starts = np.random.default_rng([self.seed, epoch]).permutation(starts)
        lengths = np.minimum(SLICE, len(self.blocks) - starts)
        return starts, np.concatenate([[0], np.cumsum(lengths)])

    def _chapter(self, epoch: int, chapter: int) -> Batch:
        starts = self._order(epoch)[0][chapter * HELD_SLICES : (chapter + 1) * HELD_SLICES]
        read = [batch for s in starts.tolist() for batch in self.blocks.batches(s, s + SLICE, SLICE)]
        order = np.random.default_rng([self.seed, epoch, chapter]).permutation(sum(len(b.ordinals) for b in read))
        ordinals, ids, mask = (np.concatenate([getattr(b, name) for b in read])[order] for name in Batch._fields)
        return Batch(ordinals, ids.astype(np.int32), mask)


class Step(NamedTuple):
    """What one step computes: its blocks, its subsets, and (pairs, 2) indices into the two for each loss."""

    batch: Batch
    subsets: np.ndarray
    fidelity: np.ndarray
    stability: np.ndarray
    linearity: np.ndarray


def plan_step(walk: SeededShuffle, membership: Membership, seed: int, step: int) -> Step:
    """The pairs of a step, from (seed, step) alone; blocks without a target serve nothing.

    Raises:
        StrideError: where no block of the step has a target in its loss mask.
    """
    batch = walk.batch(step)
    rng = np.random.default_rng([seed, step, 1])
    useful = np.flatnonzero(batch.mask[:, 1:].any(1))
    if not len(useful):
        raise StrideError(f"None of the {len(batch.mask)} blocks of step {step} has a token that counts as a target.")
    columns = membership.columns_at(batch.ordinals).astype(np.int64)
    own = [rng.permutation(row[row < membership.subsets])[:OWN] for row in columns[useful]]
    subsets = np.unique(np.concatenate(own))
    block = np.repeat(useful, [len(chosen) for chosen in own])
    fidelity = np.stack([block, np.searchsorted(subsets, np.concatenate(own))], 1)
    strangers = [(b, np.flatnonzero(~np.isin(subsets, columns[b]))) for b in useful]
    stability = np.array([(b, rng.choice(rows)) for b, rows in strangers if len(rows)], dtype=np.int64).reshape(-1, 2)
    few = useful[: max(1, walk.per_step // 16)]
    everyone = np.stack([np.repeat(few, len(subsets)), np.tile(np.arange(len(subsets)), len(few))], 1)
    return Step(batch, subsets, fidelity, stability, everyone)


def own_and_other(membership: Membership, ordinals: np.ndarray, seed: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """For each block some of its own subsets, at most ``most``, and as many others.

    Returns:
        Two (pairs, 2) int64 arrays of a row of ``ordinals`` and a subset.
    """
    members, others = [np.empty((0, 2), np.int64)], [np.empty((0, 2), np.int64)]
    for row, (ordinal, column) in enumerate(zip(ordinals.tolist(), membership.columns_at(ordinals), strict=True)):
        order = np.random.default_rng([seed, ordinal, 2]).permutation(membership.subsets)
        own = np.isin(order, column)
        for kept, some in ((members, order[own][:most]), (others, order[~own][: min(most, own.sum())])):
            kept.append(np.stack([np.full(len(some), row), some], 1))
    return np.concatenate(members), np.concatenate(others)
