"""Verification of an attribution by retraining: without the blocks ranked first, do the queries cost more?

The counterfactual that influence estimates (evaluate/retraining/removal.py): training is repeated without the top share
of the pool, and without as many random blocks. The blocks are removed for the whole query set, ranked by their
influence summed over its queries, as ``select`` with ``--by mean`` ranks documents. Or, as in the paper's Figure 5,
they are removed for one query at a time, which takes as many trainings for each query.
"""

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stride_ray.attribution.attribute import mode_of, read_influence, stored_queries, table_stage
from stride_ray.corpus.blocks import Blocks
from stride_ray.corpus.queries import fingerprint
from stride_ray.evaluate.retraining.benchmark import Benchmark, pool_texts, unretrained_benchmark
from stride_ray.evaluate.retraining.recipe import DEFAULT, Recipe, load_recipe, recipe_identity
from stride_ray.evaluate.retraining.removal import (
    SHARE,
    Ranking,
    Removal,
    Retraining,
    blocks_removed,
    measure_removals,
    ranking_of,
)
from stride_ray.evaluate.tailpatch import successful_queries
from stride_ray.models.loading import measured_model_fingerprint
from stride_ray.models.query_batches import refuse_contrasts
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run, Stage, claim
from stride_ray.runtime.storage import Store
from stride_ray.runtime.urls import redact_url

# The folder in a run; one folder per query set in it.
FOLDER = "verify"


@dataclass(frozen=True)
class Verification:
    """What retraining says about a query set's ranking.

    Attributes:
        name: of the query set. ``mode``: exact or estimated.
        failed: how many of its queries failed, and are not measured.
        per_query: for how many queries blocks were removed one at a time; 0: for the whole set at once.
        recipe, start: what trained, and the checkpoint that it began from (empty: random weights).
        attributed: mean loss of the measured queries under the attributed model, nats per token.
        removal: the effect.
    """

    name: str
    mode: str
    failed: int
    per_query: int
    recipe: str
    start: str
    attributed: float
    removal: Removal

    def as_text(self) -> str:
        """A sentence, a table, a verdict, and what they rest on."""
        found = self.removal
        whom = "first for it, a query costs" if self.per_query else f"first, the queries of {self.name!r} cost"
        lines = [
            f"Without the {found.blocks} blocks ranked {whom} {found.first:.4f} nats per token more; without "
            f"{found.blocks} random blocks, {found.random:.4f}.",
            "",
            "| training on | blocks | loss, nats per token | rise |",
            "|---|---|---|---|",
            f"| the whole pool | {found.pool} | {found.whole:.4f} | |",
        ]
        for what, rise in (("those ranked first", found.first), ("random ones", found.random)):
            row = f"| all but {what} | {found.pool - found.blocks} | {found.whole.value + rise.value:.4f} |"
            lines.append(f"{row} {rise:+.4f} |")
        return "\n".join([*lines, "", found.verdict, self._basis()])

    def _basis(self) -> str:
        found = self.removal
        failed = f" ({self.failed} failed)" if self.failed else ""
        seeds = "1 training" if found.seeds == 1 else f"{found.seeds} trainings"
        start = self.start or "random weights (model.start is empty)"
        return (
            f"Measured on {found.queries} queries{failed} with {seeds} each by {self.recipe}, from {start}; 95 % "
            f"intervals over queries and trainings. The removed blocks are {found.share:.2%} of the pool and have "
            f"{found.concentration:.1%} of the positive influence. The attributed model's loss is "
            f"{self.attributed:.4f}: the further from that of the whole pool, the less the recipe resembles its "
            "training."
        )


def verify(
    run: Run, name: str, share: float = SHARE, seeds: int = 3, recipe: str = DEFAULT, per_query: int = 0
) -> Verification:
    """Retrain without the blocks ranked first and without random ones, and compare what the queries cost.

    There are 3 × ``seeds`` trainings (2 + ``per_query`` for each seed, if that is given), in the folder
    ``verify/NAME`` of the run: interrupted, it resumes there; with another share it reuses what it can. Training begins
    from ``model.start``, or from random weights of the model's shape (evaluate.retraining.finetune.FineTune), unless
    another recipe is given.

    Example:
        A tenth of the pool is removed, with one training on each choice of blocks:

        >>> from stride_ray import Run
        >>> from stride_ray.evaluate.verify import verify
        >>> found = verify(Run("mine"), "asked", share=0.1, seeds=1)
        >>> found.removal.queries, found.removal.blocks == round(0.1 * found.removal.pool)
        (2, True)
        >>> found.removal.first.value > found.removal.random.value
        True

    Args:
        run: with finished influence for ``name``, estimated or exact as set by ``attribute.exact``.
        name: the query set.
        share: of the pool to remove.
        seeds: trainings on each choice of blocks.
        recipe: see ``evaluate.retraining.recipe.load_recipe``.
        per_query: if positive, remove blocks for each of the first so many queries, by its own influence.

    Raises:
        StrideError: influence is not finished or of other blocks than are in the pool now, every query failed, or as
            measure_removals.
    """
    if per_query < 0:
        raise StrideError(f"per_query is {per_query}; it must be the number of queries, or 0 for the whole set.")
    blocks = Blocks(run.require("blocks").store)
    queries = successful_queries(run, name)
    refuse_contrasts(queries, "verify")
    run.require(table_stage(run), name, corpus=blocks.manifest["fingerprint"])
    blocks_removed(share, len(blocks))  # fails here, before a folder is made
    ids = [row["query_id"] for row in queries]
    rankings = _rankings(read_influence(run, name), ids, len(blocks), per_query)
    asked = stored_queries(run, name).take([row["place"] for row in queries])
    stage = _begin(run, name, asked, blocks, recipe)
    given = (blocks.store.anchored_url, blocks.manifest["fingerprint"], stage.store.anchored_url)
    load = functools.partial(load_pool_and_recipe, *given, run.config.model.path, run.config.model.start, recipe)
    load()  # fails here with a clear error rather than in a worker
    retraining = Retraining(load, stage, len(blocks), seeds, run.config.compute)
    (removal,) = measure_removals(retraining, rankings, [share])
    losses = {row["query_id"]: row["base_loss"] for row in read_influence(run, name, "recovery").to_pylist()}
    measured = [ids[place] for ranking in rankings for place in ranking.queries]
    found = Verification(
        name=name,
        mode=mode_of(run),
        failed=len(losses) - len(ids),
        per_query=len(rankings) if per_query else 0,
        recipe=recipe,
        start=redact_url(run.config.model.start),
        attributed=float(np.mean([losses[query] for query in measured])),
        removal=removal,
    )
    stage.store.write_json("verification.json", asdict(found))
    return found


@functools.lru_cache(maxsize=1)
def load_pool_and_recipe(
    blocks_url: str, corpus: str, folder: str, model: str, start: str, recipe: str
) -> tuple[Benchmark, Recipe]:
    """Load a run's blocks, the queries in ``folder`` and the recipe, once per process; masked tokens carry no loss.

    Raises:
        StrideError: if the blocks are not those with the fingerprint ``corpus``.
    """
    blocks = Blocks(Store(blocks_url))
    if blocks.manifest["fingerprint"] != corpus:
        raise StrideError(f"{blocks.store.display_url('')} changed meanwhile; run the command again.")
    queries = Store(folder).read_table("queries.parquet").to_pylist()
    benchmark = unretrained_benchmark(blocks_url, pool_texts(blocks), queries, model, start, corpus)
    return benchmark, load_recipe(recipe, benchmark)


def _begin(run: Run, name: str, queries: pa.Table, blocks: Blocks, recipe: str) -> Stage:
    """Claim the folder of a query set's trainings, and write the queries that they are measured on."""
    keys = {
        "corpus": blocks.manifest["fingerprint"],
        "queries": fingerprint(queries),
        "weights": measured_model_fingerprint(run.config),
        "recipe": recipe_identity(recipe),
    }
    stage = claim(run.store.child(f"{FOLDER}/{name}"), FOLDER, keys)
    stage.store.write_table("queries.parquet", queries)
    return stage


def _rankings(table: pa.Table, ids: Sequence[str], n_blocks: int, per_query: int) -> list[Ranking]:
    """The ranking of a whole set by summed influence, or of each of its first queries; ``table`` is of INFLUENCE."""
    columns = {column: table[column].to_numpy() for column in ("ordinal", "influence")}
    places = {query: place for place, query in enumerate(ids)}
    of_row = np.array([places[query] for query in table["query_id"].to_pylist()], np.int64)

    def summed(rows: NDArray[np.bool_]) -> NDArray[np.float64]:
        return np.bincount(columns["ordinal"][rows], columns["influence"][rows], minlength=n_blocks).astype(np.float64)

    if not per_query:
        return [ranking_of(summed(np.ones(len(of_row), bool)), np.arange(len(ids)), "the queries together")]
    return [
        ranking_of(summed(of_row == place), [place], f"the query {ids[place]!r}")
        for place in range(min(per_query, len(ids)))
    ]
