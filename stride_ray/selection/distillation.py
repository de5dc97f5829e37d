"""Distillation of influence into a scorer (scorer.py), and scores of another corpus as the influence table of a target.

Scores take the place of influence in a selection: sizes, quotas, duplicates, manifest and random baseline stay.
"""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from stride_ray.attribution.tables import DOCUMENTS
from stride_ray.corpus.tokenization.tokenizer import load_saved_tokenizer
from stride_ray.runtime.config import digest
from stride_ray.runtime.progress import run_missing
from stride_ray.runtime.run import Run, Stage, claim, part_name
from stride_ray.runtime.storage import Store
from stride_ray.runtime.tasks import allocate_workers, connected, map_tasks
from stride_ray.selection.pool import Reading, pieces, reading
from stride_ray.selection.ranking import Target
from stride_ray.selection.scorer import Scorer, fit_scorer, read_scorer

# Maximum number of documents that a scorer is fitted to, about 4 KB of memory each; documents scored at once.
MOST, BATCH = 100_000, 4096
# The one query of a scorer's target.
QUERY = "scorer"


def distill(run: Run, targets: Sequence[Target], out: str) -> Scorer:
    """Fit a scorer to the influence of a run's documents on target queries, and write it.

    A document's value is its influence per token, on each query in units of the query's root mean square, averaged over
    queries, each set with the same weight. Documents in no table have influence 0.

    Args:
        run: with blocks.
        targets: influence tables of the query sets (select.target_of); exact ones teach most.
        out: folder of the scorer.

    Raises:
        StrideError: as scorer.fit_scorer.
    """
    how, units = reading(run, as_blocks=True)
    tokenizer = load_saved_tokenizer(run.stage("blocks").store)
    influence = _mean_influence(targets)
    texts, values = list[str](), list[float]()
    for each in _sampled(how, len(units), run.config.seed):
        texts.append(tokenizer.decode(each.ids))
        values.append(influence.get((each.source, each.document_id), 0.0) / each.tokens)
    found = fit_scorer(texts, np.array(values), run.config.seed)
    facts = {"targets": {target.name: len(target.queries) for target in targets}, "seed": run.config.seed}
    scorer = Scorer(found.coefficients, {**found.facts, **facts})
    scorer.write(Store(out))
    return scorer


def _mean_influence(targets: Sequence[Target]) -> dict[tuple[str, str], float]:
    """Influence of documents (source, id), averaged as ``distill`` says."""
    found: dict[tuple[str, str], float] = {}
    for target in targets:
        for name in target.tables:
            table = target.store.read_table(name, ["query_id", "source", "document_id", "influence"]).to_pandas()
            table = table[table["query_id"].isin(target.queries) & np.isfinite(table["influence"])]
            for _, rows in table.groupby("query_id"):
                size = float(np.sqrt(np.mean(np.square(rows["influence"])))) * len(target.queries) * len(targets)
                for source, document, value in zip(rows["source"], rows["document_id"], rows["influence"], strict=True):
                    key = (source, document)
                    found[key] = found.get(key, 0.0) + (value / size if size else 0.0)
    return found


def _sampled(how: Reading, parts: int, seed: int) -> Iterator[Any]:
    """Yield at most MOST documents of the pool, spread evenly over it."""
    total = sum(1 for part in range(parts) for _ in pieces(how, part, tokens=False))
    wanted = np.ones(total, bool)
    if total > MOST:
        wanted[np.random.default_rng(seed).choice(total, total - MOST, replace=False)] = False
    places = iter(wanted.tolist())
    for part in range(parts):
        yield from (piece for piece in pieces(how, part, tokens=True) if next(places) and piece.tokens)


def scored_target(run: Run, scorer: str) -> Target:
    """Score the documents of a sharded run; returns them as a target of ``select_by``, with one query.

    ``scores/<digest>/documents-*.parquet`` have the columns of tables.DOCUMENTS; ``influence`` is the score. Each part
    of the blocks is a task; a rerun goes on.

    Args:
        run: with blocks; needs no model.
        scorer: folder of the scorer.

    Raises:
        StrideError: there is no scorer, or it is damaged.
    """
    facts = read_scorer(Store(scorer)).facts
    how, units = reading(run, as_blocks=True)
    corpus = run.stage("blocks").store.read_json("manifest.json")["fingerprint"]
    keys = {"corpus": corpus, "scorer": digest(facts)}
    identity = digest(keys)
    stage = claim(run.store.child(f"scores/{identity}"), "scores", keys)
    if not stage.is_finished():
        with connected(run.config.compute):
            allocation = allocate_workers(run.config.compute, len(units))
            parts = {part_name(part): part for part in range(len(units))}
            work = partial(map_tasks, _score_part, (how, stage, scorer), allocation=allocation)
            run_missing(stage, parts, work, "score", "parts")
        _rank(stage, len(units))
        stage.finish({"parts": len(units), "scorer": facts})
    stage.store.remove("_scores")
    tables = tuple(f"documents-{part:05d}.parquet" for part in range(len(units)))
    return Target(QUERY, stage.store, tables, (QUERY,), identity)


def _score_part(how: Reading, stage: Stage, scorer: str, part: int) -> dict[str, Any]:
    """Write the scores of a part's documents; returns the done marker."""
    started = time.monotonic()
    found, tokenizer = read_scorer(Store(scorer)), load_saved_tokenizer(how.blocks)
    names, texts, scores = list[tuple[str, str]](), list[str](), list[np.ndarray]()
    for piece in pieces(how, part, tokens=True):
        names.append((piece.document_id, piece.source))
        texts.append(tokenizer.decode(piece.ids))
        if len(texts) == BATCH:
            scores.append(found.scores(texts))
            texts = []
    scores += [found.scores(texts)] if texts else []
    columns = {
        "document_id": [document for document, _ in names],
        "source": [source for _, source in names],
        "score": np.concatenate([np.zeros(0), *scores]),
    }
    stage.store.write_table(f"_scores/{part_name(part)}.parquet", pa.table(columns))
    return stage.mark(part_name(part), started, documents=len(names))


def _rank(stage: Stage, parts: int) -> None:
    """Write the parts again as rows of DOCUMENTS, with ranks over all of them; ties by place."""
    scores = [stage.store.read_table(f"_scores/{part_name(part)}.parquet", ["score"])["score"] for part in range(parts)]
    flat = np.concatenate([np.zeros(0), *(each.to_numpy() for each in scores)])
    ranks = np.empty(len(flat), np.int32)
    ranks[np.argsort(-flat, kind="stable")] = np.arange(1, len(flat) + 1)
    start = 0
    for part in range(parts):
        table = stage.store.read_table(f"_scores/{part_name(part)}.parquet")
        columns = {
            "query_id": [QUERY] * len(table),
            "rank": ranks[start : start + len(table)],
            "document_id": table["document_id"],
            "source": table["source"],
            "blocks": np.ones(len(table), np.int32),
            "influence": table["score"],
        }
        stage.store.write_table(f"documents-{part:05d}.parquet", pa.table(columns).cast(DOCUMENTS))
        start += len(table)
