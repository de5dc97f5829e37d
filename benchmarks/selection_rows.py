"""Synthetic influence tables of any size, to measure memory and time of selection from many rows."""

import numpy as np
import pyarrow as pa

from stride_ray.attribution.tables import DOCUMENTS
from stride_ray.runtime.storage import Store
from stride_ray.selection.pool import POOL
from stride_ray.selection.ranking import Target

# Documents per query; queries per file; documents per part of the pool; sources.
NAMED, QUERIES_PER_FILE, PART, SOURCES = 100_000, 10, 100_000, 20


def make_tables(store: Store, rows: int, documents: int, seed: int = 0) -> tuple[Target, list[str]]:
    """Write a query set's tables with about ``rows`` rows, and the table of the pool's documents, unless they exist.

    Each query has NAMED random documents with normally distributed influence.

    Returns:
        The target, and the names of the pool's files.
    """
    queries = -(-rows // NAMED)
    names = []
    for first in range(0, queries, QUERIES_PER_FILE):
        name = f"documents-{first:05d}.parquet"
        names.append(name)
        if not store.exists(name):
            ids = [f"q{query}" for query in range(first, min(first + QUERIES_PER_FILE, queries))]
            tables = [_table(each, documents, [seed, first + i]) for i, each in enumerate(ids)]
            store.write_table(name, pa.concat_tables(tables))
    pool = []
    for part, start in enumerate(range(0, documents, PART)):
        pool.append(f"pool-{part:05d}.parquet")
        if not store.exists(pool[-1]):
            store.write_table(pool[-1], _pool(part, np.arange(start, min(start + PART, documents)), seed))
    return Target("made", store, tuple(names), tuple(f"q{query}" for query in range(queries)), "made"), pool


def _names(numbers: np.ndarray) -> pa.Array:
    return pa.array(np.char.add("corpus/file.jsonl#", numbers.astype(str)).tolist(), pa.string())


def _table(query: str, documents: int, seed: list[int]) -> pa.Table:
    rng = np.random.default_rng(seed)
    count = min(NAMED, documents)
    chosen = np.unique(rng.integers(0, documents, 2 * count))
    chosen = rng.choice(chosen, min(count, len(chosen)), replace=False)
    values = np.sort(rng.standard_normal(len(chosen)))[::-1]
    columns = [
        pa.array([query]).take(pa.array(np.zeros(len(chosen), np.int32))),
        pa.array(np.arange(1, len(chosen) + 1, dtype=np.int32)),
        _names(chosen),
        pa.array([f"source-{i}" for i in range(SOURCES)]).take(pa.array(chosen % SOURCES)),
        pa.array(np.ones(len(chosen), np.int32)),
        pa.array(values),
    ]
    return pa.Table.from_arrays(columns, schema=DOCUMENTS)


def _pool(part: int, numbers: np.ndarray, seed: int) -> pa.Table:
    rng = np.random.default_rng([seed, part, 1])
    columns = [
        _names(numbers),
        pa.array([f"source-{i}" for i in range(SOURCES)]).take(pa.array(numbers % SOURCES)),
        pa.array(np.full(len(numbers), part, np.int32)),
        pa.array(numbers),
        pa.array(rng.integers(50, 2000, len(numbers))),
        pa.nulls(len(numbers), POOL.field("signature").type),
    ]
    return pa.Table.from_arrays(columns, schema=POOL)
