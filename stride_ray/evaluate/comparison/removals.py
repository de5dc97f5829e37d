"""Removal curves of several methods on one benchmark, and how concentrated their scores are (the paper's Figures 5, 6).

For each method, training is repeated without the blocks that it ranks first (evaluate/retraining/removal.py), for
several shares of the pool. Trainings without random blocks are common to all methods.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stride_ray.evaluate.comparison.figures import image_bytes, new_figure
from stride_ray.evaluate.comparison.table import interval_text
from stride_ray.evaluate.retraining.benchmark import Benchmark
from stride_ray.evaluate.retraining.lds import REPORT, Interval
from stride_ray.evaluate.retraining.recipe import DEFAULT, recipe_identity
from stride_ray.evaluate.retraining.removal import (
    Ranking,
    Removal,
    Retraining,
    Training,
    blocks_removed,
    measure_removals,
    ranking_of,
    trainings_for,
)
from stride_ray.evaluate.retraining.results import read_scores
from stride_ray.evaluate.retraining.retrain import load_benchmark_and_recipe
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.options import ComputeConfig
from stride_ray.runtime.run import claim
from stride_ray.runtime.storage import Store

FOLDER = "removal"
# Shares of the pool at which concentration is drawn.
TOP = np.geomspace(0.001, 1, 61)
INTERVALS = ("whole", "first", "random", "difference")
SCHEMA = pa.schema(
    [
        ("method", pa.string()),
        *((each.name, pa.int32() if each.type in ("int", int) else pa.float64()) for each in fields(Removal)),
        *((f"{name}_{end}", pa.float64()) for name in INTERVALS for end in ("low", "high")),
    ]
)


@dataclass(frozen=True)
class RemovalCurve:
    """What to remove.

    Attributes:
        shares: of the pool. The first is the table's.
        per_query: if positive, remove blocks for each of the first so many queries, by its own scores; otherwise for
            all together, by summed scores.
        seeds: trainings on each choice of blocks.
    """

    shares: tuple[float, ...]
    per_query: int = 0
    seeds: int = 3


@dataclass(frozen=True)
class Removals:
    """Results.

    Attributes:
        curves: by method, a Removal for each share.
        failed: by method, why it has none.
        concentration: by method (len(TOP),), see ``concentration``.
    """

    curves: dict[str, list[Removal]]
    failed: dict[str, str]
    concentration: dict[str, NDArray[np.float64]]

    def as_markdown(self) -> str:
        """The curves as a table, in the order of the first share's difference."""
        lines = ["| removed | method | rise of the loss | of random blocks | difference | positive influence |"]
        lines += ["|---" * 6 + "|"]
        for rows in zip(*self.curves.values(), strict=True):
            for method, each in sorted(zip(self.curves, rows, strict=True), key=lambda pair: -pair[1].difference.value):
                shown = " | ".join(
                    interval_text(figure, "+", 4) for figure in (each.first, each.random, each.difference)
                )
                lines.append(f"| {each.share:.3g} | {method} | {shown} | {each.concentration:.1%} |")
        return "\n".join([*lines, *(f"\n{method}: {why}" for method, why in self.failed.items())]) + "\n"


def compare_removals(
    benchmark: Benchmark, store: Store, files: Mapping[str, str], wanted: RemovalCurve, compute: ComputeConfig
) -> Removals:
    """Measure every method's removals on the report queries (all, if there are no parts), and publish them.

    Args:
        benchmark: trained on by the built-in recipe with the benchmark's hyperparameters.
        store: the comparison's folder; gets ``removal.parquet``, ``removal.md``, ``removal.svg`` and the trainings'
            losses in ``removal/``.
        files: by method, the name of its scores there.
        wanted: what to remove.
        compute: where to run.

    Raises:
        StrideError: as measure_removals, but for a method that has too few blocks of positive influence.
    """
    keys = {"benchmark": benchmark.fingerprint, "recipe": recipe_identity(DEFAULT)}
    stage = claim(store.child(FOLDER), FOLDER, keys)
    load = functools.partial(load_benchmark_and_recipe, benchmark.url, benchmark.fingerprint, DEFAULT)
    retraining = Retraining(load, stage, len(benchmark.blocks), wanted.seeds, compute)
    queries = np.flatnonzero(benchmark.parts == REPORT)
    queries = queries if len(queries) else np.arange(len(benchmark.queries))
    queries = queries[: wanted.per_query or None]
    found = Removals({}, {}, {})
    for share in wanted.shares:
        blocks_removed(share, retraining.pool)  # a bad share is no method's failure
    rankings, trainings = dict[str, list[Ranking]](), list[Training]()
    for method, name in files.items():
        scores = read_scores(store, name)
        found.concentration[method] = concentration(scores, queries)
        ranked = _rankings(scores, queries, wanted.per_query)
        try:
            trainings += trainings_for(retraining, ranked, wanted.shares)
            rankings[method] = ranked
        except StrideError as error:
            found.failed[method] = str(error)
    retraining.train(trainings)
    found.curves.update({each: measure_removals(retraining, rankings[each], wanted.shares) for each in rankings})
    store.write_table("removal.parquet", as_table(found))
    store.write("removal.md", found.as_markdown().encode())
    store.write("removal.svg", plot(found))
    return found


def concentration(scores: Any, queries: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float64]:
    """Share of a query's summed positive influence that its top blocks have, mean over queries, at each share in TOP.

    Example: with influence of 3, 1, 0 and −2, the top quarter of the blocks has 3/4, and the top half everything.

    Args:
        scores: (Q, N), dense or sparse.
        queries: which of them count; those without positive influence do not.
    """
    curves = []
    for query in queries:
        row = _summed(scores, [query])
        mass = np.cumsum(np.sort(np.maximum(row, 0))[::-1])
        if mass[-1] > 0:
            curves.append(mass[np.ceil(TOP * len(row)).astype(int).clip(1, len(row)) - 1] / mass[-1])
    return np.mean(curves, axis=0) if curves else np.full(len(TOP), np.nan)


def as_table(found: Removals) -> pa.Table:
    """One row per method and share (SCHEMA)."""
    rows = []
    for method, curve in found.curves.items():
        for each in curve:
            row: dict[str, Any] = {"method": method, **vars(each)}
            for name in INTERVALS:
                figure: Interval = row[name]
                row |= {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
            rows.append(row)
    return pa.Table.from_pylist(rows, SCHEMA)


def plot(found: Removals) -> bytes:
    """Rise of the loss against the share removed, and concentration against the top share, as SVG.

    Raises:
        StrideError: matplotlib is not installed.
    """
    figure = new_figure(11, 4, kept="the trainings")
    left, right = figure.subplots(1, 2)
    curves = list(found.curves.items())
    for method, curve in curves:
        _errorbars(left, curve, [each.first for each in curve], label=method)
    if curves:
        drawn = [each.random for each in curves[0][1]]
        _errorbars(left, curves[0][1], drawn, "blocks drawn at random", color="black", linestyle="--")
    for method, mass in found.concentration.items():
        right.plot(100 * TOP, 100 * mass, label=method)
    right.plot(100 * TOP, 100 * TOP, color="black", linestyle="--", label="uniform")
    left.set(xlabel="share of the pool removed, %", ylabel="rise of the queries' loss, nats")
    right.set(xlabel="top share of the pool, %", ylabel="share of the positive influence, %", xscale="log")
    for axes in (left, right):
        axes.legend(fontsize=8)
    return image_bytes(figure, "svg")


def _errorbars(axes: Any, curve: Sequence[Removal], rises: Sequence[Interval], label: str, **style: Any) -> None:
    values = [each.value for each in rises]
    ends = [[max(0, each.value - each.low) for each in rises], [max(0, each.high - each.value) for each in rises]]
    shares = [100 * each.share for each in curve]
    axes.errorbar(shares, values, yerr=ends, marker="o", markersize=4, capsize=2, label=label, **style)


def _rankings(scores: Any, queries: NDArray[np.int64], per_query: int) -> list[Ranking]:
    if not per_query:
        return [ranking_of(_summed(scores, queries), queries, "the queries together")]
    return [ranking_of(_summed(scores, [query]), [query], f"query {query}") for query in queries.tolist()]


def _summed(scores: Any, queries: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float64]:
    """Scores (Q, N), dense or sparse, summed over some of the queries: (N,)."""
    return np.asarray(scores[np.asarray(queries)].sum(axis=0), np.float64).ravel()
