"""The data files of a selection: the selected input rows, unchanged, or token blocks ready for training."""

import gzip
import json
import os
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from stride_ray.corpus.documents import TokenizedDocument
from stride_ray.corpus.files import END, compression
from stride_ray.corpus.packing import PADDING, Counts, block_schema, iter_blocks
from stride_ray.corpus.readers import Row, raw_lines, rows
from stride_ray.corpus.rows.columnar import arrow_batches
from stride_ray.corpus.splits import InputSplit
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Stage, part_name
from stride_ray.runtime.urls import filesystem, first_line, redact_url
from stride_ray.selection.pool import Reading, pieces, refuse_changed

# Rows held in memory at once.
_ROWS = 1024


def write_part(how: Reading, stage: Stage, work: tuple[str, int, InputSplit, np.ndarray]) -> dict[str, Any]:
    """Write the selected documents of one part to one file in ``data/``; returns the done marker.

    Args:
        how: see ``pool.reading``.
        stage: the selection's folder.
        work: the arm's folder ("" or "random"), the part, its input split, and the places to keep, ascending.

    Raises:
        StrideError: the input was changed since it was sharded, or cannot be read.
    """
    started = time.monotonic()
    arm, part, unit, places = work
    wanted = set(places.tolist())
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "part")
        if how.as_blocks:
            ending, counted = ".parquet", {"blocks": _blocks(how, part, wanted, path)}
        else:
            refuse_changed(unit)
            ending, count = _rows(unit, wanted, path)
            counted = {"rows": count}
            if count != len(wanted):
                raise StrideError(
                    f"{redact_url(unit.files[0].url)} gave {count} of the {len(wanted)} documents that were selected "
                    "from it; it was changed since it was sharded: restore it, or select blocks (--blocks)."
                )
        name = f"data/{part_name(part)}{ending}"
        content = stage.store.put(f"{arm}/{name}" if arm else name, path)
    facts = {"name": name, "documents": len(wanted), **counted, "sha256": content}
    return stage.mark(marker_name(arm, part), started, **facts)


def marker_name(arm: str, part: int) -> str:
    """Name of a data file's done marker."""
    return f"{arm or 'selected'}-{part:05d}"


def _blocks(how: Reading, part: int, wanted: set[int], path: str) -> int:
    """Pack the selected documents of a part into new blocks in the run's layout; returns the number of blocks."""
    # Imported here because most selections write rows, which takes less time than importing the tokenizer libraries.
    from stride_ray.corpus.tokenization.tokenizer import end_of_text_id, load_tokenizer

    tokenizer = load_tokenizer(how.blocks.child("tokenizer").url)
    kept = (
        TokenizedDocument(
            piece.document_id, piece.source, piece.ids, None if piece.mask.all() else piece.mask, piece.place
        )
        for number, piece in enumerate(pieces(how, part, tokens=True))
        if number in wanted
    )
    layout = "pack" if how.packed else "split"
    end = end_of_text_id(tokenizer) if how.packed else -1
    counts = Counts()
    with pq.ParquetWriter(
        path, block_schema(how.block_tokens, ordinals=False), compression="zstd", write_page_checksum=True
    ) as writer:
        for batch in iter_blocks(kept, layout, how.block_tokens, end, PADDING, counts):
            writer.write_batch(batch)
    return counts.blocks


def _rows(unit: InputSplit, wanted: set[int], path: str) -> tuple[str, int]:
    """Write the selected rows of an input split to a local file, unchanged; returns its suffix and the row count."""
    if unit.kind == "parquet":
        return ".parquet", _parquet_rows(unit, wanted, path)
    if unit.kind == "arrow":
        return _arrow_rows(unit, wanted, path)
    packing = compression(unit.files[0].name) if unit.kind == "jsonl" else ""
    count = 0
    with _opened(path, packing) as file:
        for line in _text_lines(unit, wanted) if unit.kind == "text" else _json_lines(unit, wanted):
            file.write(line + b"\n")
            count += 1
    return f".jsonl{packing}", count


@contextmanager
def _opened(path: str, packing: str) -> Iterator[IO[bytes]]:
    """Open a file for writing, compressed like its source; no timestamp or file name, so its bytes are reproducible."""
    with open(path, "wb") as raw:
        if packing == ".gz":
            with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as file:
                yield file  # type: ignore[misc]
        elif packing == ".zst":
            with zstandard.ZstdCompressor().stream_writer(raw, closefd=False) as file:
                yield file
        else:
            yield raw


def _json_lines(unit: InputSplit, wanted: set[int]) -> Iterator[bytes]:
    left = len(wanted)
    try:
        for offset, line in raw_lines(unit):
            if offset in wanted:
                yield line
                left -= 1
                if not left:  # the rest of the file may be corrupt
                    return
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise StrideError(f"{redact_url(unit.files[0].url)} cannot be read: {first_line(error)}") from None


def _text_lines(unit: InputSplit, wanted: set[int]) -> Iterator[bytes]:
    names = {file.name for number, file in enumerate(unit.files) if number in wanted}
    for row in rows(unit, None):
        if isinstance(row, Row) and row.file in names:
            record = {"id": row.document_id, "text": row.values["text"], "source": row.file}
            yield json.dumps(record, ensure_ascii=False).encode()


def _parquet_rows(unit: InputSplit, wanted: set[int], path: str) -> int:
    fs, place = filesystem(unit.files[0].url)
    count = 0
    with fs.open(place, "rb") as handle:
        try:
            file = pq.ParquetFile(handle, page_checksum_verification=True)
            footer = file.metadata
            stop = footer.num_row_groups if unit.stop == END else unit.stop
            first = sum(footer.row_group(group).num_rows for group in range(unit.start))
            with pq.ParquetWriter(path, file.schema_arrow, compression="zstd", write_page_checksum=True) as writer:
                for group in range(unit.start, stop):
                    size = footer.row_group(group).num_rows
                    keep = np.array([first + row in wanted for row in range(size)], bool)
                    batches = file.iter_batches(_ROWS, row_groups=[group])
                    while keep.any():  # the rest of the row group may be corrupt
                        batch = next(batches)
                        chosen, keep = keep[: batch.num_rows], keep[batch.num_rows :]
                        writer.write_batch(batch.filter(pa.array(chosen)))
                        count += int(chosen.sum())
                    first += size
        except (pa.ArrowException, OSError) as error:
            raise StrideError(f"{redact_url(unit.files[0].url)} cannot be read: {first_line(error)}") from None
    return count


def _arrow_rows(unit: InputSplit, wanted: set[int], path: str) -> tuple[str, int]:
    """Copy rows without decoding their values, some of which Python cannot hold; returns the suffix and the count.

    They go to Parquet, or to Arrow where the schema has types that Parquet has not (unions, intervals).
    """
    schema = _arrow_schema(unit)
    ending = ".parquet"
    try:
        pq.ParquetWriter(pa.BufferOutputStream(), schema).close()
    except pa.ArrowNotImplementedError:
        ending = ".arrow"
    count = 0
    make: Any = (
        partial(pq.ParquetWriter, compression="zstd", write_page_checksum=True)
        if ending == ".parquet"
        else pa.ipc.new_stream
    )
    try:
        with make(path, schema) as writer:
            held = list[pa.Table]()
            for first, batch in arrow_batches(unit):
                places = [row for row in range(batch.num_rows) if first + row in wanted]
                if places:
                    held.append(_taken(pa.Table.from_batches([batch]), places))
                    count += len(places)
                if sum(table.num_rows for table in held) >= _ROWS:
                    writer.write_table(pa.concat_tables(held))
                    held = []
                if count == len(wanted):  # the rest may be corrupt
                    break
            if held:
                writer.write_table(pa.concat_tables(held))
    except (pa.ArrowException, OSError, EOFError) as error:
        raise StrideError(f"{redact_url(unit.files[0].url)} cannot be read: {first_line(error)}") from None
    return ending, count


def _taken(table: pa.Table, places: list[int]) -> pa.Table:
    """The rows at some places, as a copy; slices, which keep all in memory, where there is no kernel for a type."""
    try:
        return table.take(pa.array(places, pa.int64()))
    except pa.ArrowNotImplementedError:
        return pa.concat_tables([table.slice(place, 1) for place in places])


def _arrow_schema(unit: InputSplit) -> pa.Schema:
    fs, place = filesystem(unit.files[0].url)
    with fs.open(place, "rb") as handle:
        if handle.read(6) == b"ARROW1":
            handle.seek(0)
            return pa.ipc.open_file(handle).schema
        handle.seek(0)
        return pa.ipc.open_stream(handle).schema
