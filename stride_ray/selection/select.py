"""Stage select: training data chosen by influence on target queries, a manifest of reasons, and a random baseline.

Three steps, each in work units that a rerun skips once done: list the pool's documents (tasks over parts of the
blocks), rank and choose (one process, bounded memory), write the data files (tasks over parts).
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow.compute as pc

from stride_ray.attribution.attribute import read_influence, table_stage
from stride_ray.corpus.splits import InputSplit
from stride_ray.runtime.config import digest
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.progress import run_missing
from stride_ray.runtime.run import Run, Stage, claim, part_name, refuse_inside
from stride_ray.runtime.storage import Store
from stride_ray.runtime.tasks import WorkerAllocation, allocate_workers, connected, map_tasks
from stride_ray.runtime.urls import redact_url
from stride_ray.selection.choice import (
    GreedyChooser,
    RandomChooser,
    Tally,
    check_options,
    kept_places,
    read_quotas,
    reasons,
    write_manifest,
)
from stride_ray.selection.database import PLAIN, Database
from stride_ray.selection.pool import Reading, list_part, reading
from stride_ray.selection.ranking import (
    Target,
    batches,
    count_not_finite,
    random_order,
    rank_documents,
)
from stride_ray.selection.writing import marker_name, write_part

# Folder of the random arm.
RANDOM = "random"


def select(
    run: Run,
    names: Sequence[str],
    out: str,
    blocks: bool = False,
    queries: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Select training data by influence on target queries, according to the run's ``select`` options.

    ``out`` gets ``data/part-*``, a file for each input part with selected documents: rows of a Parquet source with all
    columns (a saved data set becomes Parquet), unchanged lines of JSON Lines in the same compression, JSON Lines with
    id, text and source for text files; or token blocks. ``manifest.parquet`` has a row per document of the pool
    (choice.MANIFEST) in the order of consideration, ``selection.json`` the summary. ``random/`` holds the same files
    for a random baseline that matches the selection's tokens per source (slightly fewer if documents do not add up).
    Sources with a single document, such as text files, are pooled into one for this draw.

    Example:
        >>> from stride_ray import Run, select
        >>> chosen = select(Run("mine", changes={"select.documents": 10}), ["asked"], "chosen")
        >>> chosen["kept"]["documents"], chosen["pool"]["documents"]
        (10, 60)

    Args:
        run: with blocks and with influence on each query set, exact or estimated as ``attribute.exact`` says.
        names: the target query sets, weighted equally. Failed queries do not count.
        out: a path or fsspec URL. Running the same command again does only what is missing.
        blocks: write token blocks in the run's layout instead of input rows; does not need the input.
        queries: per name the ids of the queries to use; all if a name is missing.

    Returns:
        selection.json. ``not_finite``: rows of the tables that were ignored, since their influence is not finite.
        ``pool``: documents, tokens, and documents that appear in a table. ``kept``: documents and
        tokens, in total and by source, documents per reason, harmful ones, and files with content hashes. ``random``:
        the same for the random arm, plus ``selected``, how many of its documents were also selected.

    Raises:
        StrideError: influence is not finished, all queries of a set failed, options contradict each other, the folder
            was made with other settings, or the input was changed since it was sharded.
    """
    targets = [target_of(run, name, (queries or {}).get(name)) for name in dict.fromkeys(names)]
    if not targets:
        raise StrideError("No target is given; name query sets that were attributed with --name.")
    return select_by(run, targets, out, blocks)


def target_of(run: Run, name: str, queries: Sequence[str] | None = None) -> Target:
    """Return the influence tables of a query set, or of some of its queries.

    Raises:
        StrideError: the tables are not finished, a query is not in the set, or all of the queries failed.
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
    """Like ``select``, for any tables with the columns of tables.DOCUMENTS."""
    options = run.config.select
    check_options(options)
    refuse_inside(Store(out), run.config.corpus.input, "The selection")
    how, units = reading(run, blocks)
    earlier = [_earlier(url) for url in options.earlier]
    chosen = {
        key: value for key, value in run.config.flat().items() if key.startswith("select.") and key != "select.earlier"
    }
    keys = {
        "corpus": run.stage("blocks").store.read_json("manifest.json")["fingerprint"],
        "targets": {target.name: target.identity for target in targets},
        "seed": run.config.seed,
        "blocks": blocks,
        **chosen,
        "earlier": [identity for _, _, identity in earlier],
    }
    stage = claim(Store(out), "select", keys, "selection.json")
    if not stage.is_finished():
        with stage.ignore_errors_if_finished(), connected(run.config.compute):
            workers = WorkerAllocation(allocate_workers(run.config.compute, len(units)).workers, "cpu")
            _list(how, stage, units, bool(options.near_duplicates), workers)
            if "choice" not in stage.done():
                _choose(run, targets, earlier, stage, len(units))
            _write(how, stage, units, workers)
            stage.finish(_summary(run, targets, stage, blocks))
    stage.store.remove("_pool")
    return stage.manifest()


def _earlier(url: str) -> tuple[Store, int, str]:
    """Return an earlier selection's folder, its round and its manifest's SHA-256."""
    store = Store(url)
    if not store.exists("selection.json"):
        raise StrideError(
            f"{store.display_url('')} is not a finished selection (select.earlier): it has no selection.json."
        )
    found = store.read_json("selection.json")
    return store, found["round"], found["manifest_sha256"]


def _list(how: Reading, stage: Stage, units: Sequence[InputSplit], signed: bool, workers: WorkerAllocation) -> None:
    parts = {f"pool-{i:05d}": (i, unit) for i, unit in enumerate(units)}
    run_missing(stage, parts, partial(map_tasks, list_part, (how, stage, signed), allocation=workers), "list", "parts")


def _choose(
    run: Run, targets: Sequence[Target], earlier: Sequence[tuple[Store, int, str]], stage: Stage, parts: int
) -> None:
    """Rank the documents and write both manifests, then the done marker."""
    started = time.monotonic()
    options, seed = run.config.select, run.config.seed
    done = stage.done()
    markers = [done[f"pool-{part:05d}"] for part in range(parts)]
    documents, tokens = (sum(marker[what] for marker in markers) for what in ("documents", "tokens"))
    listed = (stage.store, [f"_pool/{part_name(part)}.parquet" for part in range(parts)])
    number = 1 + max((taken for _, taken, _ in earlier), default=0)
    with tempfile.TemporaryDirectory(prefix="stride-select-") as folder, Database(folder) as database:
        before = [(store, "manifest.parquet") for store, _, _ in earlier]
        not_finite = count_not_finite(database, targets)
        ordered = rank_documents(database, targets, listed, before, options, seed)
        _check_quotas(database, ordered, read_quotas(options), stage)
        named = database.count(f"read_parquet('{ordered}', {PLAIN}) WHERE mean_influence IS NOT NULL")
        best = GreedyChooser(options, documents, tokens, named, folder)
        kept, content = write_manifest(best, batches(ordered), reasons(options), number, stage.store, database)
        drawn = RandomChooser(kept.stratum_tokens)
        order = batches(random_order(database, ordered, seed))
        words = reasons(options, drawn=True)
        random, _ = write_manifest(drawn, order, words, number, stage.store.child(RANDOM), database)
    one, other = (dict(_kept(stage.store, arm)) for arm in ("", RANDOM))
    both = sum(len(np.intersect1d(places, other[part])) for part, places in one.items() if part in other)
    stage.mark(
        "choice",
        started,
        round=number,
        manifest_sha256=content,
        pool={"documents": documents, "tokens": tokens, "named": named},
        not_finite=not_finite,
        kept=_totals(kept),
        random={**_totals(random), "selected": both},
    )


def _check_quotas(database: Database, ordered: str, quotas: Mapping[str, float], stage: Stage) -> None:
    for source in quotas:
        if source != "*" and not database.count(f"read_parquet('{ordered}', {PLAIN}) WHERE source = ?", [source]):
            for name in ("_pool", "_done", "stage.json"):  # would block the corrected command
                stage.store.remove(name)
            raise StrideError(f"There is a quota for the source {source!r}, and no document of the pool has it.")


def _totals(tally: Tally) -> dict[str, Any]:
    """Return a selection's totals for the summary."""
    return {
        "documents": tally.documents,
        "tokens": tally.tokens,
        "harmful": tally.harmful,
        "reasons": dict(tally.reasons.most_common()),
        "sources": tally.sources,
    }


def _write(how: Reading, stage: Stage, units: Sequence[InputSplit], workers: WorkerAllocation) -> None:
    files = {
        marker_name(arm, part): (arm, part, units[part], places)
        for arm in ("", RANDOM)
        for part, places in _kept(stage.store, arm)
    }
    run_missing(stage, files, partial(map_tasks, write_part, (how, stage), allocation=workers), "write", "files")


def _kept(store: Store, arm: str) -> list[tuple[int, np.ndarray]]:
    """Return an arm's parts with the ascending places of their documents; 12 bytes of memory per document."""
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
        "run": redact_url(run.url),
        "targets": {target.name: len(target.queries) for target in targets},
        "by": run.config.select.by,
        "form": "blocks" if blocks else "rows",
        "round": choice["round"],
        "manifest_sha256": choice["manifest_sha256"],
        "not_finite": choice["not_finite"],
        "pool": choice["pool"],
        "kept": {**choice["kept"], "files": arms["selected"]},
        "random": {**choice["random"], "files": arms[RANDOM]},
    }


def describe(summary: Mapping[str, Any], out: str) -> str:
    """Format a selection's summary for the console."""
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
    if ignored := summary.get("not_finite", 0):
        lines.append(f"{ignored} rows of the influence tables were ignored: their influence is not finite.")
    where = Store(out).display_url("")
    lines.append(
        f"Random baseline: {random['documents']} documents, {random['tokens']} tokens; {random['selected']} of "
        "these documents were selected too."
    )
    lines.append(f"Data: {where}data/ and {where}random/data/; why, for every document: {where}manifest.parquet")
    return "\n".join(lines)
