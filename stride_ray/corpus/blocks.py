"""Read access to the pool: N blocks by ordinal, in batches or individually, and fixed shards of it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stride_ray.runtime.config import digest
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.storage import ROW_GROUP, Store


class Batch(NamedTuple):
    """Consecutive blocks: ordinals (n,), token ids (n, T) int64, loss mask (n, T) bool."""

    ordinals: np.ndarray
    ids: np.ndarray
    mask: np.ndarray


def fixed_lists(column: pa.ChunkedArray | pa.Array, width: int, missing: Any) -> np.ndarray:
    """A list column with ``width`` values per row as an (n, width) array; null rows are filled with ``missing``."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    valid = np.asarray(array.is_valid())
    values = array.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    if valid.all():
        return values
    filled = np.full((len(array), width), missing, dtype=np.asarray(missing).dtype if not len(values) else values.dtype)
    filled[valid] = values
    return filled


def shard_count(n_blocks: int) -> int:
    """Number of shards for sums over a pool: one per 1,024 blocks, between 4 and 64, at most one per block."""
    return min(n_blocks, min(max(4, -(-n_blocks // 1024)), 64))


def unit_count(n_blocks: int) -> int:
    """Number of work units of a pass over the pool, a function of N alone.

    A unit has up to 1,024 blocks, and there are at least eight units (or N, if fewer). Beyond 8,192 units, units grow
    instead, to at most 8,192 blocks.
    """
    if n_blocks <= 8:
        return max(1, n_blocks)
    return max(8, -(-n_blocks // min(8192, max(1024, n_blocks // 8192))))


class Blocks:
    """The blocks of a finished ``blocks/`` folder.

    Args:
        store: the folder.

    Attributes:
        manifest: counts, parts and fingerprint.
        block_tokens: T, tokens in a block.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.manifest: dict[str, Any] = store.read_json("manifest.json")
        self.block_tokens: int = self.manifest["block_tokens"]
        counts = [part["blocks"] for part in self.manifest["parts"]]
        self._first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def beginning(self, n_blocks: int) -> str:
        """The fingerprint that the pool had with its first ``n_blocks`` blocks; empty if no part ends there."""
        parts = int(np.searchsorted(self._first, n_blocks))
        if parts == len(self._first) or self._first[parts] != n_blocks:
            return ""
        return digest([part["sha256"] for part in self.manifest["parts"][:parts]])

    def batches(self, start: int, stop: int, rows: int) -> Iterator[Batch]:
        """Blocks ``start`` to ``stop`` (exclusive) in batches of at most ``rows``, none across row groups."""
        for table, first in self._groups(start, stop, ["token_ids", "loss_mask"]):
            for offset in range(0, table.num_rows, rows):
                piece = table.slice(offset, rows)
                ordinals = np.arange(first + offset, first + offset + piece.num_rows)
                yield Batch(ordinals, *self._arrays(piece))

    def take(self, ordinals: Sequence[int] | np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Columns of arbitrary blocks in the order of ``ordinals`` (repeats allowed).

        Opens each file and reads each row group once.

        Raises:
            StrideError: an ordinal is outside the pool, or a part has fewer rows than the manifest says.
        """
        wanted = np.asarray(ordinals, dtype=np.int64)
        distinct, positions = np.unique(wanted, return_inverse=True)
        if not len(distinct):
            return self._empty(columns)
        if distinct[0] < 0 or distinct[-1] >= len(self):
            outside = int(distinct[0] if distinct[0] < 0 else distinct[-1])
            raise StrideError(
                f"Block {outside} is not in {self.store.display_url('')}, which has blocks 0 to {len(self) - 1}; the "
                "tables that name it were made from another pool."
            )
        parts = np.searchsorted(self._first, distinct, side="right") - 1
        tables = [self._rows(int(part), distinct[parts == part], list(columns)) for part in np.unique(parts)]
        return pa.concat_tables(tables).take(pa.array(positions))

    def _rows(self, index: int, ordinals: np.ndarray, columns: list[str]) -> pa.Table:
        """Columns of some blocks of one part, given their ascending ordinals."""
        rows = ordinals - int(self._first[index])
        tables = []
        with self._open(index) as file:
            for group in np.unique(rows // ROW_GROUP):
                inside = rows[rows // ROW_GROUP == group] - group * ROW_GROUP
                table = file.read_row_group(int(group), columns=columns) if group < file.num_row_groups else None
                if table is None or inside[-1] >= table.num_rows:
                    raise StrideError(
                        f"{self.store.display_url('')} has fewer blocks than its manifest says; restore the part with "
                        f"block {int(self._first[index] + group * ROW_GROUP + inside[-1])}."
                    )
                tables.append(table.take(pa.array(inside)))
        return pa.concat_tables(tables)

    @contextmanager
    def _open(self, index: int) -> Iterator[pq.ParquetFile]:
        """A part, checked by the ordinal of its first block, which its footer has: parts may have been swapped."""
        name = self.manifest["parts"][index]["name"]
        with self.store.open_parquet(name) as file:
            first = _first_ordinal(file.metadata)
            if first not in (None, self._first[index]):
                raise StrideError(
                    f"{self.store.display_url(name)} begins with block {first}, and by the manifest with block "
                    f"{self._first[index]}: it is another part, or of another run; restore it."
                )
            yield file

    def batch(self, ordinals: Sequence[int] | np.ndarray) -> Batch:
        """Arbitrary blocks as one batch."""
        return Batch(np.asarray(ordinals), *self._arrays(self.take(ordinals, ["token_ids", "loss_mask"])))

    def shards(self) -> list[tuple[int, int]]:
        """The pool as 4 to 64 ordinal ranges (fewer if it has under 4 blocks), a function of N alone.

        Sums over the pool are taken per shard and then over shards in order, so they do not depend on the number of
        workers.
        """
        return self.cut(shard_count(len(self)))

    def cut(self, count: int, first: int = 0) -> list[tuple[int, int]]:
        """The pool from block ``first`` on as ``count`` ordinal ranges of nearly equal size."""
        edges = np.linspace(first, len(self), count + 1).astype(int)
        return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))

    def sample(self, count: int, seed: int, among: int | None = None) -> np.ndarray:
        """Sorted ordinals of at most ``count`` blocks, drawn without replacement from the first ``among`` (or all)."""
        n = len(self) if among is None else among
        return np.sort(np.random.default_rng([seed, n]).choice(n, min(count, n), replace=False))

    def _arrays(self, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        ids = fixed_lists(table["token_ids"], self.block_tokens, 0)
        return ids.astype(np.int64), fixed_lists(table["loss_mask"], self.block_tokens, True)

    def _groups(self, start: int, stop: int, columns: list[str]) -> Iterator[tuple[pa.Table, int]]:
        """Row groups restricted to ordinals start…stop, each with the ordinal of its first row."""
        for index in range(len(self.manifest["parts"])):
            low, high = int(self._first[index]), int(self._first[index + 1])
            if high <= start or low >= stop:
                continue
            with self._open(index) as file:
                for group in range(file.num_row_groups):
                    first = low + group * ROW_GROUP
                    last = min(first + ROW_GROUP, high)
                    if last <= start or first >= stop:
                        continue
                    table = file.read_row_group(group, columns=columns)
                    begin = max(start - first, 0)
                    yield table.slice(begin, min(stop, last) - first - begin), first + begin

    def _empty(self, columns: Sequence[str]) -> pa.Table:
        with self.store.open_parquet(self.manifest["parts"][0]["name"]) as file:
            return file.schema_arrow.empty_table().select(list(columns))


def _first_ordinal(footer: pq.FileMetaData) -> int | None:
    """The ordinal of a part's first block, the smallest of its first row group; None without blocks."""
    if not footer.num_row_groups:
        return None
    group = footer.row_group(0)
    columns = map(group.column, range(group.num_columns))
    found = next(column for column in columns if column.path_in_schema == "ordinal").statistics
    return int(found.min) if found is not None and found.has_min_max else None


def document_shares(table: pa.Table) -> tuple[np.ndarray, list[tuple[str, str]], np.ndarray]:
    """The documents in each block and their shares of it.

    Args:
        table: blocks with a ``spans`` column.

    Returns:
        For every span: row (int64), document as (source, id), share of the block's tokens without padding (float64).
    """
    spans = table["spans"].combine_chunks()
    rows = np.repeat(np.arange(len(spans)), pc.list_value_length(spans).to_numpy(zero_copy_only=False))
    flat = spans.flatten()
    documents = list(zip(flat.field("source").to_pylist(), flat.field("document_id").to_pylist(), strict=True))
    lengths = flat.field("length").to_numpy(zero_copy_only=False).astype(np.float64)
    totals = np.bincount(rows, lengths, minlength=len(spans))
    return rows, documents, lengths / totals[rows]
