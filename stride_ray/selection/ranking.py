"""Influence tables to one ranking of all documents, best first. A document is its source and its id.

The result does not depend on threads, partitions or file order: influence is summed in fixed-point numbers, whose sum
is independent of order, and ties are broken by a hash of (seed, source, document id) rather than alphabetically.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stride_ray.corpus.failures import MAX_FAILED_BLOCKS
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.options import SelectConfig
from stride_ray.runtime.storage import Store
from stride_ray.selection.database import PLAIN, Database, pass_of

# Condition for a row whose influence is a finite number.
FINITE = "coalesce(isfinite(influence::DOUBLE), false)"
# Bits of fixed-point influence, relative to the largest: sums of 2^60 values still fit in 128 bits.
BITS = 50
# Documents grouped and joined per pass.
PASS = 500_000
# Rows per streamed batch, and per row group of a manifest.
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
    """The influence on one target query set.

    Attributes:
        name: of the set.
        store: the folder with its tables.
        tables: file names, with columns source, document_id, query_id, rank, influence (tables.DOCUMENTS).
        queries: ids of the queries to use, none of them failed; rows of other queries are ignored.
        identity: digest that changes when the tables or the queries do.
    """

    name: str
    store: Store
    tables: tuple[str, ...]
    queries: tuple[str, ...]
    identity: str


def rank_documents(
    database: Database,
    targets: Sequence[Target],
    pool: tuple[Store, Sequence[str]],
    earlier: Sequence[tuple[Store, str]],
    options: SelectConfig,
    seed: int,
) -> str:
    """Rank all documents of the pool in the order in which they are considered.

    By rank, documents that help no query have no rank and come last: first those in no table (influence 0), then those
    listed as harmful only, the most harmful last. By mean or share, documents in no table score 0. Query sets are
    weighted equally, independent of their numbers of queries.

    Args:
        database: a new one.
        targets: the query sets.
        pool: folder and names of the pool's tables (pool.POOL).
        earlier: folders and manifests of earlier selections.
        options: ``by`` and ``temperature``.
        seed: for ties and Gumbel noise.

    Returns:
        Path of a Parquet file (ORDERED) in the database's folder. ``taken_round`` is the round of the earlier selection
        that took a document; ``mean_influence`` is null for a document in no table. ``stratum``, within which documents
        are exchangeable in the random draw, is the source, or null if the source has this document alone.

    Raises:
        StrideError: no room for temporary files, or tables that cannot be read.
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
        # Gumbel top-k: the largest of n keys -ln(place) / τ + noise is place i with odds i^(-1/τ).
        uniform = f"(md5_number_lower('gumbel/{seed}/' || source || '/' || document_id) + 0.5) / 18446744073709551616.0"
        path = database.copy(
            f"""SELECT * EXCLUDE (file_row_number) FROM read_parquet('{path}', file_row_number = true, {PLAIN})
                ORDER BY -ln(file_row_number + 1) / {options.temperature!r} - ln(-ln(least({uniform}, 1 - 1e-16))) DESC,
                document_id, source, part, place""",
            "drawn.parquet",
        )
    return path


def count_not_finite(database: Database, targets: Sequence[Target]) -> int:
    """Count rows of the targets' tables whose influence is not finite; ``rank_documents`` ignores them.

    Raises:
        StrideError: they are more than MAX_FAILED_BLOCKS of a query set's rows, and more than one.
    """
    total = 0
    for target in targets:
        files = database.files(target.store, target.tables)
        rows = database.count(f"read_parquet(?, {PLAIN})", [files])
        count = rows - database.count(f"read_parquet(?, {PLAIN}) WHERE {FINITE}", [files])
        if count and (count == rows or count > max(1, MAX_FAILED_BLOCKS * rows)):
            raise StrideError(
                f"The influence in {count} of {rows} rows of {target.store.display_url('documents-*.parquet')} is not "
                f"finite, more than {MAX_FAILED_BLOCKS:.0%}; attribute {target.name!r} again."
            )
        total += count
    return total


def random_order(database: Database, ordered: str, seed: int) -> str:
    """Shuffle an ordered file by a hash of (seed, source, document id); returns the path of the result."""
    return database.copy(
        f"""SELECT * FROM read_parquet('{ordered}', {PLAIN})
            ORDER BY md5_number_lower('random/{seed}/' || source || '/' || document_id), document_id, source, part,
            place""",
        "random.parquet",
    )


def batches(path: str) -> Iterator[pa.Table]:
    """Yield a Parquet file in batches of BATCH rows, independent of its row groups."""
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
    """Partition a query set's rows by document, with influence as a whole multiple of 1 / scale."""
    files = database.files(target.store, target.tables)
    asked = pa.table({"query_id": pa.array(target.queries, pa.string())})
    database.sql.register("asked", asked)
    database.cut(
        f"""SELECT source, document_id, rank, round(influence * {scale!r})::BIGINT AS influence
            FROM read_parquet(?, {PLAIN}) SEMI JOIN asked USING (query_id) WHERE {FINITE}""",
        f"rows-{number}",
        passes,
        [files],
    )
    database.sql.unregister("asked")


def _sum_influence(database: Database, targets: Sequence[Target], index: int) -> None:
    """Write ``summed``: per query set and document of a pass, best rank where it helps, mean influence, share helped.

    The mean is in units of 1 / scale, the share in units of 2^-BITS: integers, whose sum is independent of order.
    """
    each = (
        f"""SELECT {number} AS target, source, document_id, min(rank) FILTER (influence > 0) AS best,
                   round(sum(influence)::DOUBLE / {len(target.queries)})::BIGINT AS mean,
                   round(count(*) FILTER (influence > 0) * {2.0**BITS!r} / {len(target.queries)})::BIGINT AS share
            FROM {database.piece(f"rows-{number}", index)} GROUP BY source, document_id"""
        for number, target in enumerate(targets)
    )
    database.copy(" UNION ALL ".join(each), f"summed-{index}.parquet")


def _place(database: Database, sets: int, passes: int, seed: int) -> None:
    """Write ``places``: each document's place in each query set's own ranking, if it helps any query of the set."""
    for number in range(sets):
        path = database.copy(
            f"""SELECT source, document_id FROM read_parquet('{database.folder}/summed-*.parquet', {PLAIN})
                WHERE target = {number} AND best IS NOT NULL
                ORDER BY best, mean DESC, md5_number_lower('{seed}/' || source || '/' || document_id), document_id,
                source""",
            f"places-{number}.parquet",
        )
        rows = f"read_parquet('{path}', file_row_number = true, {PLAIN})"
        numbered = f"SELECT source, document_id, file_row_number + 1 AS place FROM {rows}"
        database.cut(numbered, f"places-{number}", passes)


def _combine(database: Database, sets: int, by: tuple[str, bool], scale: float, index: int) -> None:
    """Create table ``found``: per document of a pass its score and the three statistics over all query sets."""
    way, places = by
    score = {"rank": "best_rank::DOUBLE", "mean": "mean_influence", "share": "share_helped"}[way]
    database.run(
        f"""CREATE OR REPLACE TABLE found AS SELECT source, document_id, min(best) AS best_rank,
                sum(mean)::DOUBLE / {sets * scale!r} AS mean_influence,
                sum(share)::DOUBLE / {sets * 2.0**BITS!r} AS share_helped, {score} AS score
            FROM read_parquet('{database.folder}/summed-{index}.parquet', {PLAIN}) GROUP BY source, document_id"""
    )
    if places:
        # A document's score is its best place in any set's own ranking, not its best rank: a set of a thousand queries
        # has a thousand documents of rank 1 and would crowd out the other sets.
        pieces = (f"SELECT * FROM {database.piece(f'places-{number}', index)}" for number in range(sets))
        database.run(
            f"""CREATE OR REPLACE TABLE found AS SELECT f.* REPLACE (p.place::DOUBLE AS score) FROM found f LEFT JOIN (
                    SELECT source, document_id, min(place) AS place FROM ({" UNION ALL ".join(pieces)})
                    GROUP BY source, document_id
                ) p USING (source, document_id)"""
        )


def _join(database: Database, earlier: Sequence[tuple[Store, str]], passes: int, index: int) -> None:
    """Write ``joined``: the pool's documents of a pass (ORDERED without ``stratum``)."""
    pool = database.piece("pool", index)
    stray = database.run(f"SELECT source, document_id FROM found ANTI JOIN {pool} USING (source, document_id) LIMIT 1")
    for source, document in stray.fetchall():
        raise StrideError(
            f"The influence tables name a document {document!r} of the source {source!r}, which is not in the blocks; "
            "they were made from others: attribute the queries again."
        )
    database.run("CREATE OR REPLACE TABLE taken (source VARCHAR, document_id VARCHAR, round INTEGER)")
    for store, name in earlier:
        database.run(
            f"""INSERT INTO taken SELECT source, document_id, round FROM read_parquet(?, {PLAIN})
                WHERE round IS NOT NULL AND {pass_of(passes)} = {index}""",
            [database.files(store, [name])],
        )
    database.copy(
        f"""SELECT p.document_id, p.source, p.part, p.place, p.tokens, f.score, f.best_rank, f.mean_influence,
                   f.share_helped, e.taken_round, p.signature
            FROM {pool} p LEFT JOIN found f USING (source, document_id)
            LEFT JOIN (SELECT source, document_id, min(round)::INTEGER AS taken_round FROM taken GROUP BY ALL) e
            ON e.document_id = p.document_id AND e.source = p.source""",
        f"joined-{index}.parquet",
    )


def _largest(target: Target) -> float:
    """Return the largest finite |influence| of a query set, from Parquet statistics if the files have them."""
    largest = 0.0
    for name in target.tables:
        with target.store.open_parquet(name) as file:
            column = file.schema_arrow.get_field_index("influence")
            for group in range(file.num_row_groups):
                facts = file.metadata.row_group(group).column(column).statistics
                ends = np.abs([facts.min, facts.max]) if facts is not None and facts.has_min_max else np.full(1, np.inf)
                if not np.isfinite(ends).all():
                    values = np.abs(file.read_row_group(group, columns=["influence"])["influence"].to_numpy())
                    ends = values[np.isfinite(values)]
                largest = max(largest, float(ends.max(initial=0.0)))
    return largest
