"""Closed loops on a benchmark with domains, or instruction tasks: for each, data is selected, trained on and measured.

The benchmark's pool becomes a run, and the queries of each domain are a target set. Selection does not see the labels.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stride_ray.attribution.attribute import write_tables
from stride_ray.corpus.shard import shard
from stride_ray.evaluate.closed_loop.arms import MEASURES, SELECTED, ClosedLoop, read_measured
from stride_ray.evaluate.comparison.stride_variants import query_table
from stride_ray.evaluate.retraining.benchmark import read_benchmark
from stride_ray.evaluate.retraining.lds import DEVELOPMENT, REPORT, Interval, mean_interval
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run
from stride_ray.runtime.storage import Store

# Name of the run's only query set.
SET = "queries"
_POOL, _QUERIES = ("token_ids", "domain", "document", "position"), ("token_ids", "domain", "part")


def attribute_domains(folder: str, out: str, sources: bool, changes: Mapping[str, Any]) -> tuple[Run, pa.Table]:
    """Attribute all queries of a benchmark on its pool.

    Args:
        folder: with pool.parquet (token_ids, domain, document, position), queries.parquet (token_ids, domain, part),
            both perhaps with loss_mask, model/ and, if training started from a checkpoint, start/.
        out: a path or fsspec URL; gets the pool's documents and the run.
        sources: make the domains the documents' sources, which a random selection matches.
        changes: further options of the run.

    Returns:
        The run, and the queries' query_id, domain and part.

    Raises:
        StrideError: for a missing column, or as the stages.
    """
    given, store = Store(folder), Store(out)
    pool, queries = (_with_columns(given, name, needed) for name, needed in (("pool", _POOL), ("queries", _QUERIES)))
    if not store.exists("pool.parquet"):
        store.write_table("pool.parquet", joined(pool))
    start = {"model.start": f"{folder}/start"} if given.exists("start/config.json") else {}
    masks = {"loss_mask": "loss_mask"} if "loss_mask" in pool.column_names else {}
    columns = {"token_ids": "token_ids", "id": "document", **masks} | ({"source": "domain"} if sources else {})
    settings = {
        "corpus.input": [f"{out}/pool.parquet"],
        "corpus.columns": columns,
        "corpus.layout": "split",
        "corpus.block_tokens": max(2, pc.max(pc.list_value_length(pool["token_ids"])).as_py()),
        "model.path": f"{folder}/model",
        **start,
        **changes,
    }
    run = Run(f"{out}/run", changes=settings)
    shard(run)
    asked = query_table(read_benchmark(folder).queries)
    write_tables(run, asked, SET)
    return run, queries.select(["domain", "part"]).append_column("query_id", asked["query_id"])


def joined(pool: pa.Table) -> pa.Table:
    """A benchmark's rows joined into documents, in order of their positions."""
    lists = [name for name in ("token_ids", "loss_mask") if name in pool.column_names]
    documents: dict[str, dict[str, Any]] = {}
    for each in pool.sort_by([("document", "ascending"), ("position", "ascending")]).to_pylist():
        name = each["document"]
        fresh = {"document": name, "domain": each["domain"], **{key: [] for key in lists}}
        document = documents.setdefault(name, fresh)
        for key in lists:
            document[key] += each[key]
    return pa.Table.from_pylist(list(documents.values()))


def halves(queries: pa.Table, domain: str, development: bool = False) -> tuple[list[str], list[str]]:
    """Ids of a domain's queries that select and that measure: its development and its report part.

    With ``development``, every other query of the development part selects and the rest measure.

    Raises:
        StrideError: if either is empty.
    """
    mine = queries.filter(pc.equal(queries["domain"], domain))
    first, second = (
        mine.filter(pc.equal(mine["part"], part))["query_id"].to_pylist() for part in (DEVELOPMENT, REPORT)
    )
    if development:
        first, second = first[::2], first[1::2]
    if not first or not second:
        raise StrideError(f"The domain {domain!r} has too few queries: some must select and others measure.")
    return first, second


def over_domains(found: Mapping[str, ClosedLoop], out: str) -> dict[str, dict[str, Interval]]:
    """Mean difference of the selected arm to each other arm over all domains' queries and seeds, by measure and arm.

    A measure that a domain lacks, F1 where prompts are missing, is left out.
    """
    differences: dict[str, dict[str, Interval]] = {}
    for measure in (name for name in MEASURES if all(name in each.arms for each in found.values())):
        pieces: dict[str, list[np.ndarray]] = {}
        for domain, each in found.items():
            values = read_measured(Store(f"{out}/{domain}"), measure, each.trainings)
            for arm in (arm for arm in values if arm != SELECTED):
                pieces.setdefault(arm, []).append(values[SELECTED] - values[arm])
        differences[measure] = {arm: mean_interval(np.concatenate(both, axis=1)) for arm, both in pieces.items()}
    return differences


def _with_columns(store: Store, name: str, needed: tuple[str, ...]) -> pa.Table:
    """Read a table of a benchmark that must have these columns."""
    table = store.read_table(f"{name}.parquet")
    if missing := [column for column in needed if column not in table.column_names]:
        raise StrideError(
            f"{store.display_url(f'{name}.parquet')} has no column {missing[0]!r}; selection by domains needs "
            f"{', '.join(needed)}."
        )
    return table
