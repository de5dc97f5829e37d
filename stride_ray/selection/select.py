"""Stage select: influence on target queries to a data set to train on, a manifest that says why, and a random arm.

Three steps, each of units that a rerun does not do again: what documents the pool holds (tasks over parts of the
blocks), the order and the choice (one process, bounded memory), the data files (tasks over parts again).
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc

from stride_ray.attribution.attribute import read_influence, table_stage
from stride_ray.corpus.splits import InputSplit
from stride_ray.runtime.config import digest
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run, Stage, claim, part_name, tolerate_concurrent_finish
from stride_ray.runtime.storage import Store, refuse_inside
from stride_ray.runtime.tasks import WorkerAllocation, allocate_workers, connected, map_tasks, progress
from stride_ray.runtime.urls import redacted, safe_url
from stride_ray.selection.choice import (
    Best,
    Drawn,
    Tally,
    check_options,
    kept_places,
    read_quotas,
    reasons,
    write_manifest,
)
from stride_ray.selection.pool import Reading, list_part, reading
from stride_ray.selection.ranking import PLAIN, Database, Target, batches, random_order, rank_documents
from stride_ray.selection.writing import marker_name, write_part

# The arm beside the selection, a folder in it; sources told of in a summary, those with the most tokens.
RANDOM, TOLD_SOURCES = "random", 50


def select(
    run: Run,
    names: Sequence[str],
    out: str,
    blocks: bool = False,
    queries: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Select training data by its influence on target queries; the run's ``select`` options say how and how much.

    ``out`` gets ``data/part-*``, a file for each part of the input with documents that were taken: Parquet rows with
    the columns of a Parquet source (of a saved data set: the same as Parquet), the very lines of JSON Lines,
    compressed as they were, and for text files JSON Lines with id, text and source; or blocks. ``manifest.parquet``
    has a row for every document of the pool (choice.MANIFEST), in the order in which they were considered, and
    ``selection.json`` the summary. ``random/`` holds the same files for documents drawn at random with the tokens of
    each source that the selection has (a little less where documents do not add up). Sources of a single document, as
    text files are, leave nothing to draw: they count as one source there.

    A document is known to influence tables by its id alone: documents of one id share its influence.

    Args:
        run: with blocks and, as ``attribute.exact`` says, estimated or exact influence of each of the names.
        names: the target query sets; each has an equal say. Failed queries do not count.
        out: a path or fsspec URL. The same command again does what is missing.
        blocks: write token blocks in the run's layout in place of the input's rows; needs no input.
        queries: per name the ids of the queries to use; all where a name is missing.

    Returns:
        selection.json: counts of the pool, the kept documents and tokens, also by source, of documents per reason, of
        those that no table names or that do harm, the same of the random arm with how many of it are ``selected`` too,
        and the files with their content hashes.

    Raises:
        StrideError: influence is not finished, no query is good, options that do not go together, a folder made with
            other settings, or input that is not what was sharded.
    """
    targets = [target_of(run, name, (queries or {}).get(name)) for name in dict.fromkeys(names)]
    if not targets:
        raise StrideError("No target is given; name query sets that were attributed with --name.")
    return select_by(run, targets, out, blocks)


def target_of(run: Run, name: str, queries: Sequence[str] | None = None) -> Target:
    """The influence tables of a query set, or of some of its queries.

    Raises:
        StrideError: they are not finished, a query is not in the set, or none of them is good.
    """
    recovery = read_influence(run, name, "recovery")
    good = recovery.filter(pc.equal(recovery["status"], "ok"))["query_id"].to_pylist()
    if queries is not None:
        unknown = sorted(set(queries) - set(recovery["query_id"].to_pylist()))
        if unknown:
            raise StrideError(f"The query set {name!r} has no query {unknown[0]!r}.")
        good = [query for query in good if query in set(queries)]
    if not good:
        raise StrideError(f"Every query of {name!r} failed; the recovery table says why.")
    store = run.stage(table_stage(run), name).store
    tables = tuple(f"documents-{part:05d}.parquet" for part in range(store.read_json("manifest.json")["parts"]))
    identity = digest([store.read_json("stage.json")["keys"], table_stage(run), good])
    return Target(name, store, tables, tuple(good), identity)


def select_by(run: Run, targets: Sequence[Target], out: str, blocks: bool = False) -> dict[str, Any]:
    """As ``select``, by any tables that look like influence's (tables.DOCUMENTS)."""
    options = run.config.select
    check_options(options)
    refuse_inside(Store(out), run.config.corpus.input, "The selection")
    how, units = reading(run, blocks)
    earlier = [_earlier(url) for url in options.earlier]
    chosen = {key: value for key, value in run.config.flat().items() if key.startswith("select.")}
    keys = {
        "corpus": run.stage("blocks").store.read_json("manifest.json")["fingerprint"],
        "targets": {target.name: target.identity for target in targets},
        "seed": run.config.seed,
        "blocks": blocks,
        **chosen,
        "select.earlier": [safe_url(url) for url in options.earlier],
        "earlier": [identity for _, _, identity in earlier],
    }
    stage = claim(Stage(Store(out), digest(keys)), "select", keys)
    if not stage.store.exists("selection.json"):
        with tolerate_concurrent_finish(stage, "selection.json"), connected(run.config.compute):
            workers = WorkerAllocation(allocate_workers(run.config.compute, len(units)).workers, "cpu")
            _list(how, stage, units, bool(options.near_duplicates), workers)
            if "choice" not in stage.done():
                _choose(run, targets, earlier, stage, len(units))
            _write(how, stage, units, workers)
            stage.store.write_json("selection.json", _summary(run, targets, stage, blocks))
    stage.store.remove("_pool")
    return stage.store.read_json("selection.json")


def _earlier(url: str) -> tuple[Store, int, str]:
    """An earlier selection's folder, its round and what identifies its choice."""
    store = Store(url)
    if not store.exists("selection.json"):
        raise StrideError(f"{store.name_of('')} is no finished selection (select.earlier): it has no selection.json.")
    found = store.read_json("selection.json")
    return store, found["round"], found["manifest_sha256"]


def _list(how: Reading, stage: Stage, units: Sequence[InputSplit], signed: bool, workers: WorkerAllocation) -> None:
    done = stage.done()
    missing = [(i, unit) for i, unit in enumerate(units) if f"pool-{i:05d}" not in done]
    results = map_tasks(list_part, (how, stage, signed), missing, workers)
    stage.remember(progress(results, "list", len(missing), "parts", lambda _: 1))


def _choose(
    run: Run, targets: Sequence[Target], earlier: Sequence[tuple[Store, int, str]], stage: Stage, parts: int
) -> None:
    """Order the documents and publish both manifests, the marker last."""
    started = time.monotonic()
    options, seed = run.config.select, run.config.seed
    done = stage.done()
    markers = [done[f"pool-{part:05d}"] for part in range(parts)]
    documents, tokens = (sum(marker[what] for marker in markers) for what in ("documents", "tokens"))
    listed = (stage.store, [f"_pool/{part_name(part)}.parquet" for part in range(parts)])
    number = 1 + max((taken for _, taken, _ in earlier), default=0)
    with tempfile.TemporaryDirectory(prefix="stride-select-") as folder, Database(folder) as database:
        before = [(store, "manifest.parquet") for store, _, _ in earlier]
        ordered = rank_documents(database, targets, listed, before, options, seed)
        _check_quotas(database, ordered, read_quotas(options), stage)
        named = database.count(f"read_parquet('{ordered}', {PLAIN}) WHERE mean_influence IS NOT NULL")
        best = Best(options, documents, tokens, named)
        kept, content = write_manifest(best, batches(ordered), reasons(options), number, stage.store, folder)
        drawn = Drawn(kept.stratum_tokens)
        order = batches(random_order(database, ordered, seed))
        words = reasons(options, drawn=True)
        random, _ = write_manifest(drawn, order, words, number, stage.store.child(RANDOM), folder)
    one, other = (dict(_kept(stage.store, arm)) for arm in ("", RANDOM))
    both = sum(len(np.intersect1d(places, other[part])) for part, places in one.items() if part in other)
    stage.mark(
        "choice",
        started,
        round=number,
        manifest_sha256=content,
        pool={"documents": documents, "tokens": tokens, "named": named},
        kept=_told(kept),
        random={**_told(random), "selected": both},
    )


def _check_quotas(database: Database, ordered: str, quotas: Mapping[str, float], stage: Stage) -> None:
    for source in quotas:
        if source != "*" and not database.count(f"read_parquet('{ordered}', {PLAIN}) WHERE source = ?", [source]):
            for name in ("_pool", "_done", "stage.json"):  # all that is there; it would refuse the corrected command
                stage.store.remove(name)
            raise StrideError(f"There is a quota for the source {source!r}, and no document of the pool has it.")


def _told(tally: Tally) -> dict[str, Any]:
    """A choice's figures for the summary."""
    most = tally.source_tokens.most_common(TOLD_SOURCES)
    sources = {name: {"documents": tally.source_documents[name], "tokens": tokens} for name, tokens in most}
    return {
        "documents": tally.documents,
        "tokens": tally.tokens,
        "harmful": tally.harmful,
        "reasons": dict(tally.reasons.most_common()),
        "sources": sources,
    }


def _write(how: Reading, stage: Stage, units: Sequence[InputSplit], workers: WorkerAllocation) -> None:
    done = stage.done()
    missing = []
    for arm in ("", RANDOM):
        for part, places in _kept(stage.store, arm):
            if marker_name(arm, part) not in done:
                missing.append((arm, part, units[part], places))
    results = map_tasks(write_part, (how, stage), missing, workers)
    stage.remember(progress(results, "write", len(missing), "files", lambda _: 1))


def _kept(store: Store, arm: str) -> list[tuple[int, np.ndarray]]:
    """The parts with an arm's documents, and where in them those are, ascending: 12 bytes a document in memory."""
    with store.open_parquet(f"{arm}/manifest.parquet" if arm else "manifest.parquet") as file:
        found = list(kept_places(file))
    parts = np.concatenate([part for part, _ in found]) if found else np.zeros(0, np.int32)
    places = np.concatenate([place for _, place in found]) if found else np.zeros(0, np.int64)
    order = np.lexsort((places, parts))
    names, first = np.unique(parts[order], return_index=True)
    return list(zip(names.tolist(), np.split(places[order], first)[1:], strict=True))


def _summary(run: Run, targets: Sequence[Target], stage: Stage, blocks: bool) -> dict[str, Any]:
    done = stage.done()
    choice = done["choice"]
    arms: dict[str, list[dict[str, Any]]] = {"selected": [], RANDOM: []}
    for name, marker in done.items():
        arm = name.rpartition("-")[0]
        if arm in arms:
            arms[arm].append({"name": marker["name"], "documents": marker["documents"], "sha256": marker["sha256"]})
    return {
        "run": redacted(run.url),
        "targets": {target.name: len(target.queries) for target in targets},
        "by": run.config.select.by,
        "form": "blocks" if blocks else "rows",
        "round": choice["round"],
        "manifest_sha256": choice["manifest_sha256"],
        "pool": choice["pool"],
        "kept": {**choice["kept"], "files": arms["selected"]},
        "random": {**choice["random"], "files": arms[RANDOM]},
    }


def describe(summary: Mapping[str, Any], out: str) -> str:
    """A selection's summary in a few lines for a person."""
    pool, kept, random = summary["pool"], summary["kept"], summary["random"]
    lines = [
        f"{kept['documents']} of {pool['documents']} documents, {kept['tokens']} of {pool['tokens']} tokens, by "
        f"{summary['by']} over {', '.join(summary['targets'])} ({sum(summary['targets'].values())} queries):"
    ]
    lines += [f"  {count:>9}  {reason}" for reason, count in kept["reasons"].items()]
    if kept["harmful"]:
        lines.append(
            f"{kept['harmful']} of those taken have a mean influence below zero; a smaller size leaves them out."
        )
    where = Store(out).name_of("")
    lines.append(
        f"At random beside it: {random['documents']} documents, {random['tokens']} tokens; {random['selected']} of "
        "these documents were selected too."
    )
    lines.append(f"Data: {where}data/ and {where}random/data/; why, for every document: {where}manifest.parquet")
    return "\n".join(lines)
