"""Selections by other attribution methods: their scores of blocks as the document tables that ``select`` ranks.

A document's score for a query is the sum of its blocks' scores, each by the document's share of the block, or, for
similarities, which do not add up, its best block's. Documents are then ranked and chosen as ``select`` does it.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from stride_ray.attribution.tables import DOCUMENTS
from stride_ray.corpus.blocks import Blocks, document_shares
from stride_ray.evaluate.baselines import METHODS, variable_set
from stride_ray.evaluate.retraining.benchmark import Benchmark, pool_texts, unretrained_benchmark
from stride_ray.evaluate.retraining.finetune import checkpoints
from stride_ray.evaluate.retraining.results import read_scores, write_scores
from stride_ray.models.query_batches import refuse_contrasts
from stride_ray.runtime.config import digest
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.progress import run_missing
from stride_ray.runtime.run import Run, Stage, claim
from stride_ray.runtime.storage import Store
from stride_ray.runtime.tasks import allocate_workers, connected, hide_gpus, map_tasks
from stride_ray.selection.ranking import Target

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Rival:
    """A method of selection.

    Attributes:
        name: as printed in tables.
        method: of ``METHODS``, which scores blocks.
        by: ``select.by``, how queries are combined.
        similarity: a document has its best block's score, not the sum of its blocks'.
    """

    name: str
    method: str
    by: str = "rank"
    similarity: bool = False


# DsDm (Engstrom et al. 2024, arXiv 2401.12926) takes the examples that TRAK's datamodels say lower the mean loss on
# the target most; DSIR and LESS likewise score a target as a whole. The others rank greedily, as ours does.
RIVALS = {
    "tfidf": Rival("TF-IDF", "tfidf", similarity=True),
    "bm25": Rival("BM25", "bm25", similarity=True),
    "embedding": Rival("embedding", "embedding", similarity=True),
    "airrep": Rival("AirRep", "airrep", similarity=True),
    "rds": Rival("RDS", "rds", similarity=True),
    "dsir": Rival("DSIR", "dsir", by="mean"),
    "less": Rival("LESS", "less", by="mean"),
    "dsdm": Rival("DsDm", "trak", by="mean"),
    "ekfac": Rival("EK-FAC", "ekfac"),
    "logra": Rival("LoGRA", "logra"),
}
USUAL = ("tfidf",)


def chosen_rivals(names: Sequence[str]) -> dict[str, Rival]:
    """Rivals by the names of RIVALS, each once.

    Raises:
        StrideError: for an unknown name.
    """
    if unknown := [each for each in names if each not in RIVALS]:
        raise StrideError(f"Unknown rival {unknown[0]!r}; known are {', '.join(RIVALS)}.")
    return {name: RIVALS[name] for name in dict.fromkeys(names)}


def rival_targets(
    run: Run, questions: Mapping[str, pa.Table], store: Store, rivals: Mapping[str, Rival]
) -> dict[str, list[Target]]:
    """Score the pool by each method and publish the document tables.

    Args:
        run: with blocks; checkpoints that a method needs are made by the built-in recipe, on the whole pool.
        questions: by query set, its queries (queries.SCHEMA).
        store: gets the scores, the tables and the checkpoints.
        rivals: by slug.

    Returns:
        By slug, a target for each query set.

    Raises:
        StrideError: as the methods.
    """
    if not rivals:
        return {}
    asked = pa.concat_tables(questions.values())
    refuse_contrasts(asked.to_pylist(), "a rival")
    blocks = Blocks(run.stage("blocks").store)
    benchmark = _benchmark(run, blocks, asked, store)
    stage = claim(store, "rivals", {"pool": benchmark.fingerprint})

    def each(function: Callable[..., dict[str, Any]], missing: list[Any]) -> Iterator[dict[str, Any]]:
        with connected(run.config.compute):
            workers = allocate_workers(run.config.compute, len(missing))
            yield from map_tasks(function, (stage, benchmark, workers.device), missing, workers)

    if any(METHODS[rival.method].checkpoints for rival in rivals.values()):
        run_missing(stage, {CHECKPOINTS: CHECKPOINTS}, partial(each, make_checkpoints), "train", "models")
    work = {slug: _unit(slug, rival) for slug, rival in rivals.items()}
    run_missing(stage, {unit[0]: unit for unit in work.values()}, partial(each, score_rival), "score", "methods")
    documents = _Documents(blocks)
    found = dict[str, list[Target]]()
    for slug, rival in rivals.items():
        scores, targets, first = read_scores(stage.store, f"{work[slug][0]}.npz"), [], 0
        for name, table in questions.items():
            mine = scores[first : first + table.num_rows]
            first += table.num_rows
            ids = table["query_id"].to_pylist()
            file = f"{slug}/{name}.parquet"
            content = stage.store.write_table(file, documents.table(ids, mine, rival.similarity))
            targets.append(Target(name, stage.store, (file,), tuple(ids), content))
        found[slug] = targets
    return found


def _unit(slug: str, rival: Rival) -> tuple[str, str, dict[str, str]]:
    """A unit of work: its name, the method, and the variables that name an encoder; another encoder, another unit."""
    variables = variable_set(METHODS[rival.method].variable)
    return f"scores-{slug}" + (f"-{digest([variables])}" if variables else ""), rival.method, variables


def make_checkpoints(stage: Stage, benchmark: Benchmark, device: str, unit: str) -> dict[str, Any]:
    """Train once on the whole pool in a worker, for the methods that follow training."""
    started = time.monotonic()
    hide_gpus(device)
    folders, rates = checkpoints(benchmark, f"{stage.store.url}/{unit}")
    return stage.mark(unit, started, folders=folders, rates=rates)


def score_rival(
    stage: Stage, benchmark: Benchmark, device: str, unit: tuple[str, str, dict[str, str]]
) -> dict[str, Any]:
    """Score the pool by one method in a worker; publishes the scores, then the marker."""
    started = time.monotonic()
    hide_gpus(device)
    name, method, variables = unit
    os.environ.update(variables)
    given: dict[str, Any] = {}
    if METHODS[method].checkpoints:
        made = stage.done()[CHECKPOINTS]
        given = {"checkpoints": tuple(made["folders"]), "learning_rates": tuple(made["rates"])}
    scores = METHODS[method].run(benchmark.problem(**given))
    if not np.isfinite(scores).all():
        raise StrideError(f"{METHODS[method].name} gives scores that are not finite numbers; leave it out.")
    write_scores(stage.store, f"{name}.npz", scores)
    return stage.mark(name, started)


def _benchmark(run: Run, blocks: Blocks, asked: pa.Table, store: Store) -> Benchmark:
    """The run's pool and some queries as the input of methods."""
    model, start = run.config.model.path, run.config.model.start
    identity = digest([blocks.manifest["fingerprint"], asked["token_ids"].to_pylist(), model, start or None])
    return unretrained_benchmark(store.url, pool_texts(blocks), asked.to_pylist(), model, start, identity)


class _Documents:
    """A pool's documents, and scores of its blocks as scores of documents."""

    def __init__(self, blocks: Blocks) -> None:
        self.rows, names, self.shares = document_shares(blocks.take(np.arange(len(blocks)), ["spans"]))
        self.names = sorted(set(names))
        number = {document: i for i, document in enumerate(self.names)}
        self.codes = np.array([number[document] for document in names])

    def table(self, ids: Sequence[str], scores: np.ndarray, similarity: bool) -> pa.Table:
        """Tables of the queries (tables.DOCUMENTS): documents with another score than 0, best first."""
        tables = []
        for query, row in zip(ids, scores, strict=True):
            each = np.zeros(len(self.names))
            if similarity:
                np.maximum.at(each, self.codes, row[self.rows])
            else:
                np.add.at(each, self.codes, row[self.rows] * self.shares)
            order = np.argsort(-each, kind="stable")
            order = order[each[order] != 0]
            columns = {
                "query_id": [query] * len(order),
                "rank": np.arange(1, len(order) + 1, dtype=np.int32),
                "document_id": [self.names[i][1] for i in order],
                "source": [self.names[i][0] for i in order],
                "blocks": np.zeros(len(order), np.int32),
                "influence": each[order],
            }
            tables.append(pa.Table.from_pydict(columns, DOCUMENTS))
        return pa.concat_tables(tables)
