"""Tail-patch: does a gradient step on a query's top blocks lower its loss more than a step on random blocks?

The metric is of Chang et al. 2024 (arXiv 2410.17413; docs/method.md, Metrics). It needs no retraining but favours
blocks that resemble the query, hence the lexical baseline beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from stride_ray.attribution.attribute import read_influence, stored_queries
from stride_ray.corpus.blocks import Blocks
from stride_ray.evaluate.retraining.lds import Interval, mean_interval
from stride_ray.evaluate.word_counts import similar_blocks
from stride_ray.models.pool_worker import ModelWorker
from stride_ray.models.query_batches import padded, texts_of
from stride_ray.runtime.actor_pool import map_actors
from stride_ray.runtime.config import Config
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.progress import progress
from stride_ray.runtime.run import Run
from stride_ray.runtime.tasks import allocate_workers, connected

# Queries per work unit; steps on random blocks per query, for comparison.
UNIT, DRAWS = 4, 4
INFLUENCE, LEXICAL = "influence", "TF-IDF"


@dataclass(frozen=True)
class Lift:
    """Tail-patch results of one method.

    Attributes:
        method: INFLUENCE or LEXICAL.
        changes: per query, change of its masked mean token loss after a step on the method's top blocks, nats; nan if
            the method has no blocks for it.
        values: per query, the lift: that change minus the mean change after steps on random blocks; negative is good.
        queries: number of queries with a lift.
        mean: mean lift with its 95 % bootstrap interval over queries; nan if there are none.
    """

    method: str
    changes: tuple[float, ...]
    values: tuple[float, ...]
    queries: int
    mean: Interval


@dataclass(frozen=True)
class TailPatch:
    """Tail-patch results of a query set.

    Attributes:
        k: blocks per step. ``learning_rate``: of the step. ``seed``: for the random blocks.
        query_ids: the measured queries, i.e. those that did not fail.
        base: their loss before any step, nats per token.
        random: each query's mean change in loss over DRAWS steps on k random blocks.
        lifts: by method.
    """

    k: int
    learning_rate: float
    seed: int
    query_ids: tuple[str, ...]
    base: tuple[float, ...]
    random: tuple[float, ...]
    lifts: tuple[Lift, ...]

    def as_table(self) -> str:
        """Format the lifts as Markdown, followed by the mean change after random steps."""
        lines = ["| top blocks by | lift, nats per token | 95 % interval | queries |", "|---|---|---|---|"]
        for each in self.lifts:
            mean, low, high = each.mean.value, each.mean.low, each.mean.high
            row = f"| {each.method} | {mean:+.4g} | {low:+.4g} to {high:+.4g} | {each.queries} |"
            lines.append(row.replace("+nan to +nan", "").replace("+nan", ""))
        told = f"One SGD step of {self.learning_rate:g} on {self.k} blocks; negative is good."
        return "\n".join([*lines, "", f"{told} Mean change after {DRAWS} random steps: {np.mean(self.random):+.4g}."])


def tail_patch(run: Run, name: str, k: int = 10, learning_rate: float = 0.01, seed: int = 0) -> TailPatch:
    """Take one gradient step per query and set of blocks, on Ray workers, and measure the change in the query's loss.

    Each step is plain SGD on the mean token loss of the blocks, over all parameters, starting from the unmodified
    model. It runs in float32 regardless of ``model.dtype``, since bfloat16 would round it away, and needs three times
    the model's memory.

    Args:
        run: with finished influence for ``name``, estimated or exact as set by ``attribute.exact``.
        name: the query set.
        k: blocks per step: a query's largest positive influences, possibly fewer than k.
        learning_rate: of the step, small enough for the loss to be nearly linear in it; lifts grow with it.
        seed: for the random blocks, which also depend on the query's position in the set.

    Returns:
        Lifts by INFLUENCE and LEXICAL.

    Raises:
        StrideError: influence is not finished, k or the learning rate is not positive, or every query failed.
    """
    if k < 1 or not 0 < learning_rate < np.inf:
        raise StrideError(f"tail-patch: k is {k} and the learning rate {learning_rate}; both must be positive.")
    blocks = Blocks(run.require("blocks").store)
    queries = successful_queries(run, name)
    tops = {INFLUENCE: top_blocks(run, name, k), LEXICAL: lexical_top(blocks, queries, k)}
    for query in queries:
        draws = [np.random.default_rng([seed, query["place"], i]) for i in range(DRAWS)]
        query["steps"] = {method: top.get(query["query_id"], np.zeros(0, int)) for method, top in tops.items()}
        query["draws"] = [np.sort(rng.choice(len(blocks), min(k, len(blocks)), replace=False)) for rng in draws]
    units = [queries[start : start + UNIT] for start in range(0, len(queries), UNIT)]
    config = run.config.updated({"model.dtype": "float32"})
    with connected(config.compute):
        workers = allocate_workers(config.compute, len(units))
        given = (config, blocks, workers.device, learning_rate)
        results = map_actors(TailPatchWorker, given, units, workers)
        done = progress(results, "tail-patch", len(queries), "queries", lambda found: len(found["queries"]))
    found = sorted((each for unit in done for each in unit["queries"]), key=lambda each: each["place"])
    random = np.array([np.mean(each["random"]) for each in found])
    lifts = [_lift(method, np.array([each[method] for each in found]), random) for method in tops]
    base = [each["base"] for each in found]
    ids = [each["query_id"] for each in found]
    return TailPatch(k, learning_rate, seed, tuple(ids), tuple(base), tuple(random.tolist()), tuple(lifts))


def successful_queries(run: Run, name: str) -> list[dict[str, Any]]:
    """Return a set's queries (rows of queries.SCHEMA) that did not fail, each with its ``place`` in the set.

    Raises:
        StrideError: influence is not finished, or every query failed.
    """
    recovery = read_influence(run, name, "recovery").to_pylist()
    good = {row["query_id"] for row in recovery if row["status"] == "ok"}
    asked = stored_queries(run, name).to_pylist()
    found = [{**row, "place": place} for place, row in enumerate(asked) if row["query_id"] in good]
    if not found:
        raise StrideError(f"Every query of {name!r} failed; the recovery table says why.")
    return found


def top_blocks(run: Run, name: str, k: int) -> dict[str, np.ndarray]:
    """Ordinals of each query's k largest positive influences, by query id."""
    tops = top_rows(run, name, k)
    return {query: np.array([row["ordinal"] for row in rows]) for query, rows in tops.items()}


def top_rows(run: Run, name: str, k: int) -> dict[str, list[dict[str, Any]]]:
    """The rows of each query's k largest positive influences (tables.INFLUENCE), by query id."""
    table = read_influence(run, name)
    table = table.filter(pc.and_(pc.less_equal(table["rank"], k), pc.greater(table["influence"], 0)))
    tops: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        tops.setdefault(row["query_id"], []).append(row)
    return tops


def lexical_top(blocks: Blocks, queries: Sequence[dict[str, Any]], k: int) -> dict[str, np.ndarray]:
    """Ordinals of each query's k most similar blocks by TF-IDF (word_counts.similar_blocks), by query id."""
    tops = similar_blocks(blocks, (query["token_ids"] for query in queries), k)
    return {query["query_id"]: top for query, top in zip(queries, tops, strict=True)}


class TailPatchWorker(ModelWorker):
    """Takes steps for units of queries, restoring the parameters bit for bit after each."""

    def __init__(self, config: Config, blocks: Blocks, device: str, learning_rate: float) -> None:
        super().__init__(config, blocks, device)
        self.learning_rate = learning_rate
        self.kept = [parameter.detach().clone() for parameter in self.model.model.parameters()]

    def __call__(self, unit: list[dict[str, Any]]) -> dict[str, Any]:
        """Process one unit; returns each query's base loss and its change by method."""
        return {"queries": [self._query(query) for query in unit]}

    def _query(self, query: dict[str, Any]) -> dict[str, Any]:
        base = self._loss(query)
        changes = {method: self._change(query, base, ordinals) for method, ordinals in query["steps"].items()}
        random = [self._change(query, base, ordinals) for ordinals in query["draws"]]
        return {"query_id": query["query_id"], "place": query["place"], "base": base, "random": random, **changes}

    @torch.no_grad()
    def _loss(self, query: dict[str, Any]) -> float:
        total = 0.0
        for text, sign in texts_of(query):
            ids, mask = padded([text], self.model.device)
            losses = self.model.token_losses(self.model.read(ids), ids, mask)
            total += sign * float(losses.double().sum() / mask[:, 1:].sum())
        return total

    def _change(self, query: dict[str, Any], base: float, ordinals: np.ndarray) -> float:
        """Change of the query's loss after a step on the given blocks; nan if they have no targets."""
        batch = self.blocks.batch(ordinals) if len(ordinals) else None
        if batch is None or not batch.mask[:, 1:].any():
            return float("nan")
        ids, mask = self.trimmed(batch)
        model, targets = self.model, mask[:, 1:].sum()
        model.model.requires_grad_(True)
        try:
            with torch.enable_grad():
                for some, counts in zip(ids.split(self.rows), mask.split(self.rows), strict=True):
                    if counts[:, 1:].any():
                        (model.token_losses(model.read(some), some, counts).sum() / targets).backward()
            with torch.no_grad():
                for parameter in model.model.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad, alpha=self.learning_rate)
            return self._loss(query) - base
        finally:
            model.model.requires_grad_(False)
            for parameter, kept in zip(model.model.parameters(), self.kept, strict=True):
                parameter.grad = None
                parameter.copy_(kept)


def _lift(method: str, changes: np.ndarray, random: np.ndarray) -> Lift:
    values = changes - random
    given = values[np.isfinite(values)]
    return Lift(method, tuple(changes.tolist()), tuple(values.tolist()), len(given), mean_interval(given))
