"""Influence tables to one order of all documents, best first: SQL by DuckDB, within a fixed memory, spilling to disk.

Folders' names are names, though DuckDB takes ``[`` for a pattern and ``tokens=0.2`` for a column of every file in it.

Nothing depends on threads, partitions or the order of files: influence is summed in fixed-point numbers, whose sums
do not depend on their order, and ties fall by a draw from (seed, source, document id), not by the alphabet.
"""

import glob
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.utils import get_protocol

from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.options import SelectConfig
from stride_ray.runtime.storage import Store
from stride_ray.runtime.urls import first_line

# DuckDB's own memory; with Python and Arrow beside it the process stays within 2 GiB.
MEMORY, THREADS = "900MB", 2
# Of every file that is read: no columns from the folders' names.
PLAIN = "hive_partitioning = false"
# Bits of a fixed-point influence, relative to the largest: sums of 2^60 of them still fit in 128 bits.
BITS = 50
# Documents whose rows are grouped and joined at once; rows held of each pass while they are cut.
PASS, FLUSH = 500_000, 20_000
# Rows of a batch that is streamed, and of a row group of a manifest.
BATCH = 65536

ORDERED = pa.schema(
    [
        pa.field("document_id", pa.string()),
        pa.field("source", pa.string()),
        pa.field("part", pa.int32()),
        pa.field("place", pa.int64()),
        pa.field("tokens", pa.int64()),
        pa.field("score", pa.float64()),
        pa.field("best_rank", pa.int32()),
        pa.field("mean_influence", pa.float64()),
        pa.field("share_helped", pa.float64()),
        pa.field("taken_round", pa.int32()),
        pa.field("signature", pa.binary()),
        pa.field("stratum", pa.string()),
    ]
)


@dataclass(frozen=True)
class Target:
    """The influence of one target query set.

    Attributes:
        name: the set's.
        store: the folder with its tables.
        tables: their names: document_id, query_id, rank, influence (influence.DOCUMENTS).
        queries: the ids that count, those that did not fail; rows of others are left out.
        identity: changes when the tables or the queries do.
    """

    name: str
    store: Store
    tables: tuple[str, ...]
    queries: tuple[str, ...]
    identity: str


class Database:
    """A DuckDB for the length of a ``with`` block, spilling into a folder.

    Args:
        folder: an empty local folder, for what does not fit in memory.

    Raises (every method): StrideError where there is no room, or the folder's name is one that DuckDB cannot read from.
    """

    def __init__(self, folder: str) -> None:
        if set(folder) & set("'*?["):
            raise StrideError(
                f"Temporary files cannot lie in {folder}, of whose name DuckDB makes a pattern; set TMPDIR."
            )
        self.folder = folder
        spill = os.path.join(folder, "spill")
        with _told():
            self.sql = duckdb.connect(
                os.path.join(folder, "select.duckdb"),
                config={"memory_limit": MEMORY, "threads": THREADS, "temp_directory": spill},
            )
        self.sql.execute("SET enable_progress_bar = false")
        self.sql.execute(f"SET partitioned_write_flush_threshold = {FLUSH}")
        self._known: set[str] = set()

    def __enter__(self) -> "Database":
        return self

    def __exit__(self, *_: object) -> None:
        with _told():
            self.sql.close()

    def files(self, store: Store, names: Sequence[str]) -> list[str]:
        """Parquet files of a store as DuckDB reads them: local ones itself, others by their fsspec file system."""
        if store.local:
            return [glob.escape(store.path(name)) for name in names]
        protocol = get_protocol(store.url)
        if protocol not in self._known:
            self.sql.register_filesystem(store.fs)
            self._known.add(protocol)
        return [f"{protocol}://{glob.escape(store.path(name).removeprefix(protocol + '://'))}" for name in names]

    def copy(self, query: str, name: str, parameters: Sequence[object] = ()) -> str:
        """The rows of a query, in its order, as a Parquet file in the folder; returns its path."""
        path = os.path.join(self.folder, name)
        with _told():
            self.sql.execute(f"COPY ({query}) TO '{path}' (FORMAT parquet, COMPRESSION zstd)", parameters)
        return path

    def cut(self, query: str, name: str, passes: int, parameters: Sequence[object] = ()) -> None:
        """Keep the rows of a query in one file per pass, by their document: a pass's groups and joins fit in memory."""
        if passes == 1:
            self.copy(query, f"{name}-0.parquet", parameters)
            return
        path = os.path.join(self.folder, name)
        with _told():
            self.sql.execute(
                f"COPY (SELECT *, {_pass_of(passes)} AS pass FROM ({query})) TO '{path}' "
                "(FORMAT parquet, COMPRESSION zstd, PARTITION_BY (pass))",
                parameters,
            )
        if not glob.glob(f"{path}/*/*.parquet"):
            self.copy(query, f"{name}-0.parquet", parameters)  # no rows, but their columns

    def piece(self, name: str, index: int) -> str:
        """What ``cut`` kept for a pass, as a table to select from; a table without rows where there is nothing."""
        path = os.path.join(self.folder, name)
        if os.path.exists(f"{path}-0.parquet"):
            return f"read_parquet('{path}-0.parquet', {PLAIN})"
        if os.path.isdir(f"{path}/pass={index}"):
            return f"read_parquet('{path}/pass={index}/*.parquet', {PLAIN})"
        return f"(SELECT * FROM read_parquet('{path}/*/*.parquet', {PLAIN}) LIMIT 0)"

    def count(self, what: str, parameters: Sequence[object] = ()) -> int:
        """How many rows ``SELECT … FROM what`` has."""
        return int(self.run(f"SELECT count(*) FROM {what}", parameters).fetchall()[0][0])

    def run(self, query: str, parameters: Sequence[object] = ()) -> "duckdb.DuckDBPyConnection":
        """Execute a statement."""
        with _told():
            return self.sql.execute(query, parameters)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except (duckdb.IOException, duckdb.OutOfMemoryException) as error:
        raise StrideError(
            f"Ranking the documents failed ({first_line(error)}); it needs room for its temporary files (set TMPDIR), "
            "and tables that can be read."
        ) from None


def rank_documents(
    database: Database,
    targets: Sequence[Target],
    pool: tuple[Store, Sequence[str]],
    earlier: Sequence[tuple[Store, str]],
    options: SelectConfig,
    seed: int,
) -> str:
    """All documents of the pool in the order in which they are to be considered.

    A document that helps no query has no rank, and comes after those that help one: first the documents that no table
    names (their influence counts as nothing), then those that are named as harmful only, the most harmful last.
    Several sets have an equal say, whatever their numbers of queries.

    Args:
        database: a new one.
        targets: the query sets.
        pool: folder and names of the pool's tables (pool.POOL).
        earlier: folders and manifests of earlier selections.
        options: ``by`` and ``temperature``.
        seed: of the ties and the Gumbel noise.

    Returns:
        Path of a Parquet file (ORDERED) in the database's folder. ``taken_round`` is the round of the earlier selection
        that took a document; mean_influence is null for a document that no table names. ``stratum`` is what a document
        may be drawn at random in place of another in: its source, null where that has this one document alone.

    Raises:
        StrideError: no room for temporary files.
    """
    passes = max(1, -(-database.count(f"read_parquet(?, {PLAIN})", [database.files(*pool)]) // PASS))
    scale = 2.0 ** (BITS - math.ceil(math.log2(max(map(_largest, targets), default=0.0) or 1.0)))
    for number, target in enumerate(targets):
        _cut_rows(database, number, target, scale, passes)
    listed = f"SELECT document_id, source, part, place, tokens, signature FROM read_parquet(?, {PLAIN})"
    database.cut(listed, "pool", passes, [database.files(*pool)])
    for index in range(passes):
        _sum_influence(database, targets, index)
    places = options.by == "rank" and len(targets) > 1
    if places:
        _place(database, len(targets), passes, seed)
    for index in range(passes):
        _combine(database, len(targets), (options.by, places), scale, index)
        _join(database, earlier, passes, index)
    draw = f"md5_number_lower('{seed}/' || source || '/' || document_id)"
    ways = {
        "rank": "score ASC NULLS LAST, coalesce(mean_influence, 0) DESC",
        "mean": "coalesce(score, 0) DESC",
        "share": "coalesce(score, 0) DESC, coalesce(mean_influence, 0) DESC",
    }
    path = database.copy(
        f"""WITH joined AS (SELECT * FROM read_parquet('{database.folder}/joined-*.parquet', {PLAIN})),
                 many AS (SELECT source, source AS stratum FROM joined GROUP BY source HAVING count(*) > 1)
            SELECT * FROM joined LEFT JOIN many USING (source)
            ORDER BY {ways[options.by]}, {draw}, document_id, source, part, place""",
        "ordered.parquet",
    )
    if options.temperature:
        # The largest of n keys -ln(place) / τ + Gumbel noise is place i with odds i^(-1/τ).
        uniform = f"(md5_number_lower('gumbel/{seed}/' || source || '/' || document_id) + 0.5) / 18446744073709551616.0"
        path = database.copy(
            f"""SELECT * EXCLUDE (file_row_number) FROM read_parquet('{path}', file_row_number = true, {PLAIN})
                ORDER BY -ln(file_row_number + 1) / {options.temperature!r} - ln(-ln(least({uniform}, 1 - 1e-16))) DESC,
                document_id, source, part, place""",
            "drawn.parquet",
        )
    return path


def random_order(database: Database, ordered: str, seed: int) -> str:
    """The documents of an ordered file in a random order that follows from (seed, source, document id)."""
    return database.copy(
        f"""SELECT * FROM read_parquet('{ordered}', {PLAIN})
            ORDER BY md5_number_lower('random/{seed}/' || source || '/' || document_id), document_id, source, part,
            place""",
        "random.parquet",
    )


def batches(path: str) -> Iterator[pa.Table]:
    """An ordered file in batches of BATCH rows, whatever its row groups."""
    held: list[pa.RecordBatch] = []
    rows = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH):
            while rows + batch.num_rows >= BATCH:
                yield pa.Table.from_batches([*held, batch.slice(0, BATCH - rows)])
                batch, held, rows = batch.slice(BATCH - rows), [], 0
            if batch.num_rows:
                held.append(batch)
                rows += batch.num_rows
    if held:
        yield pa.Table.from_batches(held)


def _cut_rows(database: Database, number: int, target: Target, scale: float, passes: int) -> None:
    """A set's rows, cut by document, with influence as a whole number of 1 / scale."""
    files = database.files(target.store, target.tables)
    asked = pa.table({"query_id": pa.array(target.queries, pa.string())})
    database.sql.register("asked", asked)
    database.cut(
        f"""SELECT document_id, rank, round(influence * {scale!r})::BIGINT AS influence
            FROM read_parquet(?, {PLAIN}) SEMI JOIN asked USING (query_id)""",
        f"rows-{number}",
        passes,
        [files],
    )
    database.sql.unregister("asked")


def _sum_influence(database: Database, targets: Sequence[Target], index: int) -> None:
    """Files ``summed``: per set and document of a pass, best rank where it helps, mean influence, share helped.

    The mean is in units of 1 / scale, the share in units of 2^-BITS: whole numbers, whose sums have no order.
    """
    each = (
        f"""SELECT {number} AS target, document_id, min(rank) FILTER (influence > 0) AS best,
                   round(sum(influence)::DOUBLE / {len(target.queries)})::BIGINT AS mean,
                   round(count(*) FILTER (influence > 0) * {2.0**BITS!r} / {len(target.queries)})::BIGINT AS share
            FROM {database.piece(f"rows-{number}", index)} GROUP BY document_id"""
        for number, target in enumerate(targets)
    )
    database.copy(" UNION ALL ".join(each), f"summed-{index}.parquet")


def _place(database: Database, sets: int, passes: int, seed: int) -> None:
    """Cut ``places``: the place of each document in each set's own ranking, where it helps any of its queries."""
    for number in range(sets):
        path = database.copy(
            f"""SELECT document_id FROM read_parquet('{database.folder}/summed-*.parquet', {PLAIN})
                WHERE target = {number} AND best IS NOT NULL
                ORDER BY best, mean DESC, md5_number_lower('{seed}/' || document_id), document_id""",
            f"places-{number}.parquet",
        )
        rows = f"read_parquet('{path}', file_row_number = true, {PLAIN})"
        numbered = f"SELECT document_id, file_row_number + 1 AS place FROM {rows}"
        database.cut(numbered, f"places-{number}", passes)


def _combine(database: Database, sets: int, by: tuple[str, bool], scale: float, index: int) -> None:
    """Table ``found``: per document of a pass its score and the three figures over all sets."""
    way, places = by
    score = {"rank": "best_rank::DOUBLE", "mean": "mean_influence", "share": "share_helped"}[way]
    database.run(
        f"""CREATE OR REPLACE TABLE found AS SELECT document_id, min(best) AS best_rank,
                sum(mean)::DOUBLE / {sets * scale!r} AS mean_influence,
                sum(share)::DOUBLE / {sets * 2.0**BITS!r} AS share_helped, {score} AS score
            FROM read_parquet('{database.folder}/summed-{index}.parquet', {PLAIN}) GROUP BY document_id"""
    )
    if places:
        # Each set ranks the documents on its own, and a document's score is its best place, not its best rank: a set
        # of a thousand queries has a thousand documents of rank 1 and would leave no room for the others'.
        pieces = (f"SELECT * FROM {database.piece(f'places-{number}', index)}" for number in range(sets))
        database.run(
            f"""CREATE OR REPLACE TABLE found AS SELECT f.* REPLACE (p.place::DOUBLE AS score) FROM found f LEFT JOIN (
                    SELECT document_id, min(place) AS place FROM ({" UNION ALL ".join(pieces)}) GROUP BY document_id
                ) p USING (document_id)"""
        )


def _join(database: Database, earlier: Sequence[tuple[Store, str]], passes: int, index: int) -> None:
    """Files ``joined``: the pool's documents of a pass (ORDERED)."""
    database.run("CREATE OR REPLACE TABLE taken (source VARCHAR, document_id VARCHAR, round INTEGER)")
    for store, name in earlier:
        database.run(
            f"""INSERT INTO taken SELECT source, document_id, round FROM read_parquet(?, {PLAIN})
                WHERE round IS NOT NULL AND {_pass_of(passes)} = {index}""",
            [database.files(store, [name])],
        )
    database.copy(
        f"""SELECT p.document_id, p.source, p.part, p.place, p.tokens, f.score, f.best_rank, f.mean_influence,
                   f.share_helped, e.taken_round, p.signature
            FROM {database.piece("pool", index)} p LEFT JOIN found f USING (document_id)
            LEFT JOIN (SELECT source, document_id, min(round)::INTEGER AS taken_round FROM taken GROUP BY ALL) e
            ON e.document_id = p.document_id AND e.source = p.source""",
        f"joined-{index}.parquet",
    )


def _pass_of(passes: int) -> str:
    return f"(hash(document_id) % {passes})"


def _largest(target: Target) -> float:
    """The largest |influence| of a set, from the footers of its files where they tell."""
    largest = 0.0
    for name in target.tables:
        with target.store.open_parquet(name) as file:
            column = file.schema_arrow.get_field_index("influence")
            for group in range(file.num_row_groups):
                facts = file.metadata.row_group(group).column(column).statistics
                if facts is not None and facts.has_min_max:
                    ends = np.abs([facts.min, facts.max])
                else:
                    values = file.read_row_group(group, columns=["influence"])["influence"].to_numpy()
                    ends = np.abs(values) if len(values) else np.zeros(1)
                largest = max(largest, float(ends.max()))
    return largest
