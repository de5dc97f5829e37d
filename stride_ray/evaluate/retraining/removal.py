"""Counterfactuals by retraining: what do queries cost a model trained without the blocks ranked first?

Training is repeated with a recipe's two functions (recipe.Recipe) on the whole pool, without the first blocks of a
ranking, and without as many blocks drawn at random (the paper's Figure 5; docs/method.md, Metrics). What queries cost
more than after training on the whole pool is the effect of the removal. Models are paired by seed.

A work unit is one training, named by its seed and a hash of the blocks left out. Shares and rankings therefore have the
trainings on the whole pool and those of random removals in common, and a rerun trains only what is missing.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stride_ray.evaluate.retraining.benchmark import Benchmark
from stride_ray.evaluate.retraining.lds import Interval, mean_interval
from stride_ray.evaluate.retraining.recipe import Recipe
from stride_ray.evaluate.retraining.retrain import checked_losses, read_array, write_array
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.options import ComputeConfig
from stride_ray.runtime.progress import run_missing
from stride_ray.runtime.run import Stage
from stride_ray.runtime.tasks import allocate_workers, connected, hide_gpus, map_tasks

# The share of the pool that is removed unless another is asked for.
SHARE = 0.01
NOTHING: NDArray[np.int64] = np.zeros(0, np.int64)
# A training: the blocks to leave out (int64, ascending) and the seed.
Training = tuple[NDArray[np.int64], int]


@dataclass(frozen=True)
class Ranking:
    """Blocks in the order of their removal, for the queries whose loss is then measured.

    Attributes:
        queries: (q,) int64, the queries' places among those of the recipe.
        blocks: (n,) int64, the blocks of positive influence, best first.
        influence: (n,) float64, theirs, descending.
        name: what the ranking is of, for messages.
    """

    queries: NDArray[np.int64]
    blocks: NDArray[np.int64]
    influence: NDArray[np.float64]
    name: str

    def first(self, count: int) -> NDArray[np.int64]:
        """The first ``count`` blocks, ascending.

        Raises:
            StrideError: if fewer have a positive influence.
        """
        if count > len(self.blocks):
            raise StrideError(
                f"{count} blocks are to be removed, and {len(self.blocks)} have a positive influence on {self.name}; "
                "remove a smaller share."
            )
        return np.sort(self.blocks[:count])


@dataclass(frozen=True)
class Removal:
    """The effect of removing the blocks ranked first, beside blocks drawn at random; losses in nats per token.

    Attributes:
        share: of the pool that is removed. ``blocks``: how many of its ``pool`` blocks these are.
        queries: how many are measured. ``seeds``: trainings on each choice of blocks.
        concentration: share of the summed positive influence that the removed blocks have, mean over rankings.
        whole: the queries' mean loss after training on the whole pool.
        first: rise of the loss over ``whole`` after training without the blocks ranked first.
        random: the same without blocks drawn at random, others for each seed.
        difference: ``first`` − ``random``, paired by query and seed.

    Intervals are a bootstrap over queries and seeds. Two or three seeds show little of the noise of training, so with
    few queries the intervals are too narrow; with one seed they are over queries alone.
    """

    share: float
    blocks: int
    pool: int
    queries: int
    seeds: int
    concentration: float
    whole: Interval
    first: Interval
    random: Interval
    difference: Interval

    @property
    def verdict(self) -> str:
        """What the difference says about the ranking, in a sentence."""
        shown = f"{self.difference:.4f}"
        if self.seeds == 1:
            return f"The difference is {shown}; one training each does not show the noise of training: use more seeds."
        if self.difference.low > 0:
            return f"The difference is {shown}, above zero: retraining confirms the ranking."
        if self.difference.high < 0:
            return f"The difference is {shown}, below zero: retraining contradicts the ranking."
        return f"The difference is {shown}, which includes zero: retraining does not confirm the ranking."


@dataclass(frozen=True)
class Retraining:
    """Trainings of one recipe on a pool without some of its blocks.

    Attributes:
        load: gives benchmark and recipe, in a worker; a module's function, or a ``partial`` of one.
        stage: the claimed folder; gets a file of losses and a done marker for each training.
        pool: N, the number of blocks.
        seeds: trainings on each choice of blocks.
        compute: where to run.
    """

    load: Callable[[], tuple[Benchmark, Recipe]]
    stage: Stage
    pool: int
    seeds: int
    compute: ComputeConfig

    def train(self, trainings: Iterable[Training]) -> None:
        """Do the trainings that are not done yet."""
        units = {_name(removed, seed): (removed, seed) for removed, seed in trainings}

        def work(missing: list[Training]) -> Iterator[dict[str, Any]]:
            with connected(self.compute):
                workers = allocate_workers(self.compute, len(missing))
                yield from map_tasks(_train_without, (self.load, self.stage, workers.device), missing, workers)

        run_missing(self.stage, units, work, "train", "models")

    def losses(self, removed: NDArray[np.int64], seed: int) -> NDArray[np.float32]:
        """The loss of every query after a training that is done, (Q,)."""
        return read_array(self.stage.store, f"losses/{_name(removed, seed)}.npy")


def ranking_of(scores: NDArray[np.float64], queries: Sequence[int] | NDArray[np.int64], name: str) -> Ranking:
    """Rank the blocks of positive influence.

    Example: scores of 0.2, −1, 0 and 0.7 rank block 3 before block 0, and no other.

    Args:
        scores: (N,) influence of every block, summed over the queries. Ties are broken by ordinal.
        queries: their places among those of the recipe.
        name: see ``Ranking``.
    """
    order = np.argsort(-scores, kind="stable")[: int((scores > 0).sum())]
    return Ranking(np.asarray(queries, np.int64), order.astype(np.int64), scores[order].astype(np.float64), name)


def measure_removals(retraining: Retraining, rankings: Sequence[Ranking], shares: Sequence[float]) -> list[Removal]:
    """Train without each share's first blocks of each ranking, and without random ones, and compare the losses.

    Random removals are nested: a larger share's contains a smaller one's.

    Args:
        retraining: how to train.
        rankings: one for each choice of blocks to remove: one in all for a query set, or one for each query.
        shares: of the pool, each between 0 and 1.

    Raises:
        StrideError: for a share that removes no block or all, or more than have a positive influence; no seeds.
    """
    retraining.train(trainings_for(retraining, rankings, shares))
    return [_compare(retraining, rankings, share, blocks_removed(share, retraining.pool)) for share in shares]


def trainings_for(retraining: Retraining, rankings: Sequence[Ranking], shares: Sequence[float]) -> list[Training]:
    """List the trainings of measure_removals, with the same arguments and errors."""
    if retraining.seeds < 1:
        raise StrideError(f"{retraining.seeds} seeds make no model; there must be at least 1.")
    counts = [blocks_removed(share, retraining.pool) for share in shares]
    trainings: list[Training] = []
    for seed in range(retraining.seeds):
        removed = [_random_blocks(retraining.pool, count, seed) for count in counts]
        removed += [ranking.first(count) for count in counts for ranking in rankings]
        trainings += [(each, seed) for each in (NOTHING, *removed)]
    return trainings


def blocks_removed(share: float, pool: int) -> int:
    """How many blocks a share of a pool is.

    Raises:
        StrideError: for a share that is not between 0 and 1, or that removes no block or all.
    """
    if not 0 < share < 1:
        raise StrideError(f"The share of the pool to remove is {share:g}; it must lie between 0 and 1.")
    count = round(share * pool)
    if not 0 < count < pool:
        what = "no block" if not count else "every block"
        raise StrideError(
            f"A share of {share:g} removes {what} of a pool of {pool}; it must lie between {1 / pool:.2g} and "
            f"{1 - 1 / pool:.2g}."
        )
    return count


def _compare(retraining: Retraining, rankings: Sequence[Ranking], share: float, count: int) -> Removal:
    """Read the losses of a share's trainings, (seeds, queries) each, and average what they rose."""
    seeds = range(retraining.seeds)
    everyone = np.concatenate([ranking.queries for ranking in rankings])
    whole = np.stack([retraining.losses(NOTHING, seed)[everyone] for seed in seeds])
    drawn = [retraining.losses(_random_blocks(retraining.pool, count, seed), seed)[everyone] for seed in seeds]
    first = [
        np.concatenate([retraining.losses(each.first(count), seed)[each.queries] for each in rankings])
        for seed in seeds
    ]
    mass = [each.influence[:count].sum() / each.influence.sum() for each in rankings]
    return Removal(
        share=share,
        blocks=count,
        pool=retraining.pool,
        queries=len(everyone),
        seeds=retraining.seeds,
        concentration=float(np.mean(mass)),
        whole=mean_interval(whole),
        first=mean_interval(np.stack(first) - whole),
        random=mean_interval(np.stack(drawn) - whole),
        difference=mean_interval(np.stack(first) - np.stack(drawn)),
    )


def _random_blocks(pool: int, count: int, seed: int) -> NDArray[np.int64]:
    """Blocks drawn at random for a seed, ascending; a larger count's contain a smaller one's."""
    return np.sort(np.random.default_rng([seed, pool]).permutation(pool)[:count])


def _name(removed: NDArray[np.int64], seed: int) -> str:
    """The name of a training: what it leaves out, and its seed."""
    if not len(removed):
        return f"whole-seed-{seed}"
    return f"without-{len(removed)}-{hashlib.sha256(removed.tobytes()).hexdigest()[:16]}-seed-{seed}"


def _train_without(
    load: Callable[[], tuple[Benchmark, Recipe]], stage: Stage, device: str, training: Training
) -> dict[str, Any]:
    """Run one training in a worker; publish the losses first, the done marker last."""
    started = time.monotonic()
    hide_gpus(device)
    removed, seed = training
    name = _name(removed, seed)
    benchmark, recipe = load()
    rows = np.setdiff1d(np.arange(len(benchmark.blocks)), removed)
    losses = checked_losses(recipe.losses(recipe.train(rows, seed)), len(benchmark.queries), f"The recipe, {name}")
    write_array(stage.store, f"losses/{name}.npy", losses)
    return stage.mark(name, started, mean_loss=float(losses.mean()))
