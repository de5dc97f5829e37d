"""The input and output of an attribution method: the interface shared by all baselines.

A baseline is a plain function ``scores(problem) -> (Q, N) float32``. Entry (q, i) estimates how much training on block
i lowers query q's loss, in any unit: only the order of a query's subset sums is used. Retraining results are not part
of a problem, so no method can read them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from stride_ray.evaluate.word_counts import words


@dataclass(frozen=True)
class Texts:
    """Token sequences, padded to one length.

    Attributes:
        ids: (n, T) int32, padded with 0 on the right.
        mask: (n, T) bool, True for real tokens that count as targets (the first token is never one).
        lengths: (n,) int, number of real tokens, prompts included; None: all real tokens are targets.
    """

    ids: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray | None = None

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.ids)

    def tokens(self, row: int) -> np.ndarray:
        """One sequence's real tokens, prompts included."""
        return self.ids[row][self.mask[row]] if self.lengths is None else self.ids[row, : self.lengths[row]]

    def take(self, rows: np.ndarray) -> "Texts":
        """Some of the sequences, in the order of ``rows``."""
        return Texts(self.ids[rows], self.mask[rows], None if self.lengths is None else self.lengths[rows])

    def words(self) -> list[str]:
        """Each sequence's real tokens in the format of word_counts.words."""
        return [words(self.tokens(row).tolist()) for row in range(len(self))]


@dataclass(frozen=True)
class Problem:
    """Blocks, queries and the model that was trained on the blocks.

    Attributes:
        blocks: the pool, N sequences.
        queries: Q sequences.
        model: a model folder for ``load_model``, trained on the whole pool.
        start: the checkpoint that training on the pool began from, or the random weights; None if unknown.
        checkpoints: models during training on the whole pool, in order (reproduced by the recipe); each folder may hold
            ``optimizer.safetensors`` with AdamW's ``exp_avg_sq`` under each parameter's name.
        learning_rates: one per checkpoint, of the steps that it represents.
        seed: for all random draws of a method.
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
        """Draw ``count`` blocks (or all) at random, in the pool's order; each ``draw`` gives another sample."""
        order = np.random.default_rng([self.seed, *draw]).permutation(len(self.blocks))
        return self.blocks.take(np.sort(order[:count]))


Method = Callable[[Problem], np.ndarray]
# How many checkpoints of training scores are averaged over, by ours and by EK-FAC.
AVERAGED = 10


def spaced(folders: Sequence[str], count: int = AVERAGED) -> list[str]:
    """``count`` of the checkpoints, evenly spaced and with the last; all if there are fewer."""
    count = min(count, len(folders))
    return [folders[(number + 1) * len(folders) // count - 1] for number in range(count)]


def standardised(scores: np.ndarray) -> np.ndarray:
    """Scores over their standard deviation, so that several methods' or models' can be added."""
    return scores / max(float(scores.std()), 1e-30)
