"""DuckDB in fixed memory, spilling to disk.

Paths are taken literally: DuckDB would read ``[`` as a glob pattern and a folder ``tokens=0.2`` as a Hive partition
column.
"""

import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import duckdb
from fsspec.utils import get_protocol

from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.storage import Store
from stride_ray.runtime.urls import first_line

# DuckDB's memory limit and threads; with Python and Arrow the process stays within 2 GiB.
MEMORY, THREADS = "900MB", 2
# For every file that is read: no partition columns from folder names.
PLAIN = "hive_partitioning = false"
# Rows buffered per pass while tables are partitioned.
FLUSH = 20_000


class Database:
    """A DuckDB database for the duration of a ``with`` block, spilling to a folder.

    Args:
        folder: an empty local folder, for what does not fit in memory.

    Raises:
        StrideError: the folder's name contains a glob character; from every method, if the disk or memory is full or a
            file cannot be read.
    """

    def __init__(self, folder: str) -> None:
        if set(folder) & set("'*?["):
            raise StrideError(
                f"Temporary files cannot lie in {folder}, of whose name DuckDB makes a pattern; set TMPDIR."
            )
        self.folder = folder
        spill = os.path.join(folder, "spill")
        with _translated_errors():
            self.sql = duckdb.connect(
                os.path.join(folder, "select.duckdb"),
                config={"memory_limit": MEMORY, "threads": THREADS, "temp_directory": spill},
            )
        self.sql.execute("SET enable_progress_bar = false")
        self.sql.execute(f"SET partitioned_write_flush_threshold = {FLUSH}")
        self._known: set[str] = set()
        self._verified: set[str] = set()

    def __enter__(self) -> "Database":
        return self

    def __exit__(self, *_: object) -> None:
        with _translated_errors():
            self.sql.close()

    def files(self, store: Store, names: Sequence[str]) -> list[str]:
        """Return Parquet paths for DuckDB, which does not verify them: local ones, or of their fsspec file system."""
        for name in names:
            if store.display_url(name) not in self._verified:
                with store.open_parquet(name, whole=True):
                    self._verified.add(store.display_url(name))
        if store.local:
            return [glob.escape(store.path(name)) for name in names]
        protocol = get_protocol(store.url)
        if protocol not in self._known:
            self.sql.register_filesystem(store.fs)
            self._known.add(protocol)
        return [f"{protocol}://{glob.escape(store.path(name).removeprefix(protocol + '://'))}" for name in names]

    def copy(self, query: str, name: str, parameters: Sequence[object] = ()) -> str:
        """Write a query's rows, in order, to a Parquet file in the folder; returns its path."""
        path = os.path.join(self.folder, name)
        with _translated_errors():
            self.sql.execute(f"COPY ({query}) TO '{path}' (FORMAT parquet, COMPRESSION zstd)", parameters)
        return path

    def cut(self, query: str, name: str, passes: int, parameters: Sequence[object] = ()) -> None:
        """Partition a query's rows into passes by document, so that a pass's groups and joins fit in memory."""
        if passes == 1:
            self.copy(query, f"{name}-0.parquet", parameters)
            return
        path = os.path.join(self.folder, name)
        with _translated_errors():
            self.sql.execute(
                f"COPY (SELECT *, {pass_of(passes)} AS pass FROM ({query})) TO '{path}' "
                "(FORMAT parquet, COMPRESSION zstd, PARTITION_BY (pass))",
                parameters,
            )
        if not glob.glob(f"{path}/*/*.parquet"):
            self.copy(query, f"{name}-0.parquet", parameters)  # no rows; keeps the columns

    def piece(self, name: str, index: int) -> str:
        """Return a SQL table expression for one pass of what ``cut`` wrote; it has no rows if the pass is empty."""
        path = os.path.join(self.folder, name)
        if os.path.exists(f"{path}-0.parquet"):
            return f"read_parquet('{path}-0.parquet', {PLAIN})"
        if os.path.isdir(f"{path}/pass={index}"):
            return f"read_parquet('{path}/pass={index}/*.parquet', {PLAIN})"
        return f"(SELECT * FROM read_parquet('{path}/*/*.parquet', {PLAIN}) LIMIT 0)"

    def count(self, what: str, parameters: Sequence[object] = ()) -> int:
        """Return the number of rows of ``SELECT … FROM what``."""
        return int(self.run(f"SELECT count(*) FROM {what}", parameters).fetchall()[0][0])

    def run(self, query: str, parameters: Sequence[object] = ()) -> "duckdb.DuckDBPyConnection":
        """Execute a statement."""
        with _translated_errors():
            return self.sql.execute(query, parameters)


@contextmanager
def _translated_errors() -> Iterator[None]:
    try:
        yield
    except (duckdb.IOException, duckdb.OutOfMemoryException) as error:
        raise StrideError(
            f"Ranking the documents failed ({first_line(error)}); it needs room for its temporary files (set TMPDIR), "
            "and tables that can be read."
        ) from None


def pass_of(passes: int) -> str:
    """Return the SQL expression for the pass that a document belongs to."""
    return f"(hash(source || '/' || document_id) % {passes})"
