"""Split-half reliability: agreement of the influence recovered from two halves of the subsets, compared with chance.

Chance is estimated by recovering the same responses with membership matrices that they were not made with.
"""

from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from stride_ray.attribution.lasso.recovery import Recovery, recover
from stride_ray.attribution.recover import lasso_options
from stride_ray.attribution.responses import read_responses
from stride_ray.operators.membership import Membership, membership_of
from stride_ray.runtime.config import Config
from stride_ray.runtime.progress import progress
from stride_ray.runtime.run import Run
from stride_ray.runtime.tasks import WorkerAllocation, allocate_workers, connected, map_tasks

# Top blocks compared; maximum queries recovered; control matrices (with 19, the smallest p is 0.05).
TOP, QUERIES, CONTROLS = 10, 20, 19
# Relative duality gap, sufficient for ranks; influence itself is solved more accurately.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Halves:
    """Split-half agreement, averaged over queries.

    Attributes:
        queries: number of queries recovered.
        spearman: rank correlation between the halves over all blocks.
        overlap: share of the top TOP blocks (positive influence) that both halves have.
        control_spearman, control_overlap: the same under control membership matrices, means over CONTROLS of them.
        p: share of matrices, including the right one, with a Spearman correlation at least as high as the right one's.
    """

    queries: int
    spearman: float
    overlap: float
    control_spearman: float
    control_overlap: float
    p: float


@dataclass(frozen=True, kw_only=True)
class RowSubset(Membership):
    """Selected rows of a membership matrix, renumbered; ``subsets`` is their number.

    Attributes:
        whole: the full matrix.
        number: (whole.subsets + 1,) each subset's new number; ``subsets`` for those left out and for "no subset".
    """

    whole: Membership
    number: NDArray

    def columns_at(self, ordinals: NDArray) -> NDArray:
        """As in Membership, except that "no subset" may appear anywhere in a column."""
        return self.number[self.whole.columns_at(ordinals)]


def some_rows(whole: Membership, rows: NDArray) -> RowSubset:
    """Select rows of a membership matrix, in the form that ``recover`` accepts."""
    number = np.full(whole.subsets + 1, len(rows), np.min_scalar_type(len(rows)))
    number[rows] = np.arange(len(rows))
    degree = min(whole.degree, len(rows))
    return RowSubset(len(rows), degree, whole.seed, whole.form, whole=whole, number=number)


def halves_agreement(run: Run, name: str, n_blocks: int) -> Halves | None:
    """Measure split-half agreement under the right matrix and CONTROLS others, one Ray task each.

    Args:
        run: with finished responses for ``name``.
        name: the query set; up to QUERIES of its successful queries are sampled.
        n_blocks: N of the operators.

    Returns:
        None for fewer than two subsets.

    Raises:
        StrideError: for a missing stage or other settings.
    """
    K = membership_of(run.config).subsets
    stage = run.require("responses", name)
    read = [read_responses(stage.store, part) for part in range(stage.manifest()["parts"])]
    good = [row["status"] == "ok" for row in chain.from_iterable(rows for rows, _ in read)]
    responses = np.concatenate([found for _, found in read])[good]
    chosen = np.random.default_rng(run.config.seed).permutation(len(responses))[:QUERIES]
    if K < 2:
        return None
    with connected(run.config.compute):
        workers = WorkerAllocation(allocate_workers(run.config.compute, CONTROLS + 1).workers, "cpu")
        units = list(range(CONTROLS + 1))
        results = map_tasks(agreement, (run.config, responses[np.sort(chosen)], n_blocks), units, workers)
        done = sorted(progress(results, "trust", len(units), "matrices"), key=lambda each: each["unit"])
    right, others = done[0], done[1:]
    means = {key: float(np.mean([each[key] for each in others])) for key in ("spearman", "overlap")}
    p = (1 + sum(each["spearman"] >= right["spearman"] for each in others)) / (1 + len(others))
    return Halves(len(chosen), right["spearman"], right["overlap"], means["spearman"], means["overlap"], p)


def agreement(config: Config, responses: NDArray, n_blocks: int, unit: int) -> dict[str, Any]:
    """Mean agreement of halves over queries under matrix ``unit``: 0 is the run's own, others have other seeds."""
    whole = membership_of(config)
    whole = replace(whole, seed=(whole.seed + 1_000_003 * unit) % 2**64)
    found, options = [], {**lasso_options(config.recover), "tolerance": TOLERANCE}
    order = np.random.default_rng([config.seed, whole.subsets]).permutation(whole.subsets)
    for rows in np.array_split(order, 2):
        half = np.sort(rows)
        found.append(recover(responses[:, half], some_rows(whole, half), n_blocks, **options))
    pairs = list(zip(*found, strict=True))
    spearman = [sparse_spearman(one, two, n_blocks) for one, two in pairs]
    shared = [len(np.intersect1d(most_helpful(one), most_helpful(two))) for one, two in pairs]
    overlap = [each / min(TOP, n_blocks) for each in shared]
    return {"unit": unit, "spearman": float(np.mean(spearman)), "overlap": float(np.mean(overlap))}


def most_helpful(found: Recovery) -> NDArray:
    """Ordinals of the TOP largest positive influences."""
    order = np.argsort(-found.weights, kind="stable")[:TOP]
    return found.ordinals[order[found.weights[order] > 0]]


def sparse_spearman(one: Recovery, two: Recovery, n_blocks: int) -> float:
    """Spearman correlation of two sparse vectors over all blocks, zeros tied; 0 if either is all zeros."""
    union = np.union1d(one.ordinals, two.ordinals)
    zeros = n_blocks - len(union)
    ranks = []
    for each in (one, two):
        dense = np.zeros(len(union))
        dense[np.searchsorted(union, each.ordinals)] = each.weights
        below = int((dense < 0).sum())
        tied = zeros + int((dense == 0).sum())
        # Ranks within the union: positive values move up by the zeros outside it, and all zeros share one rank.
        rank = rankdata(dense) + np.where(dense > 0, zeros, 0)
        middle = below + (tied + 1) / 2
        rank = np.where(dense == 0, middle, rank) - (n_blocks + 1) / 2
        ranks.append((rank, middle - (n_blocks + 1) / 2))
    (a, a0), (b, b0) = ranks
    squares = (a @ a + zeros * a0 * a0) * (b @ b + zeros * b0 * b0)
    return float((a @ b + zeros * a0 * b0) / np.sqrt(squares)) if squares > 0 else 0.0
