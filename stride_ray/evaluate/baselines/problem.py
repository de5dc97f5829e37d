"""What an attribution method is given, and what it returns: the one interface of every baseline.

A baseline is a plain function ``scores(problem) -> (Q, N) float32``; entry (q, i) says how much training on block i
lowers query q's loss, in any unit: only the order within a query's subset sums is ever used. Retraining results are
not part of a problem, so no method can read them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from stride_ray.corpus.word_counts import words


@dataclass(frozen=True)
class Texts:
    """Token sequences, padded to one length.

    Attributes:
        ids: (n, T) int32, padding is 0.
        mask: (n, T) bool, True where a token is real and counts as a target (the first never is one).
    """

    ids: np.ndarray
    mask: np.ndarray

    def __len__(self) -> int:
        """How many sequences."""
        return len(self.ids)

    def tokens(self, row: int) -> np.ndarray:
        """One sequence without its padding."""
        return self.ids[row][self.mask[row]]

    def words(self) -> list[str]:
        """Each sequence as word_counts.words has it, without its padding."""
        return [words(self.tokens(row).tolist()) for row in range(len(self))]


@dataclass(frozen=True)
class Problem:
    """Blocks, queries and the model that was trained on the blocks.

    Attributes:
        blocks: the pool, N sequences.
        queries: Q sequences.
        model: a model folder as ``load_model`` takes it, trained on the whole pool.
        start: the model that training on the pool began from; None where it began from random weights.
        checkpoints: models in the course of training on the whole pool, in order (the recipe makes them again); each
            folder may hold ``optimizer.safetensors`` with AdamW's ``exp_avg_sq`` under each parameter's name.
        learning_rates: of the steps that each checkpoint stands for; as long as checkpoints.
        seed: of whatever a method draws.
        batch_tokens: tokens in one forward pass.
    """

    blocks: Texts
    queries: Texts
    model: str
    start: str | None = None
    checkpoints: tuple[str, ...] = ()
    learning_rates: tuple[float, ...] = ()
    seed: int = 0
    batch_tokens: int = 8192

    def sample(self, count: int, *draw: int) -> Texts:
        """So many blocks (or all) drawn at random, in the pool's order; another ``draw`` gives others."""
        order = np.random.default_rng([self.seed, *draw]).permutation(len(self.blocks))
        drawn = np.sort(order[:count])
        return Texts(self.blocks.ids[drawn], self.blocks.mask[drawn])


Method = Callable[[Problem], np.ndarray]
