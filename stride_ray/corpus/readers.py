"""Rows of a unit, one reader for each kind of file; what cannot be read comes out as a reject beside them.

Everything streams: a chunk, a line, a batch of rows or a few small files are in memory at a time. Two sorts of failure
are kept apart. Bad content (a corrupt line, page or stream) is a property of the input: it is rejected, with its place,
and the rest goes on. A file that cannot be fetched says nothing of its content: that raises, lest a network failure be
recorded as rejected documents.
"""

import asyncio
import json
import struct
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from stride_ray.corpus.files import END, SourceFile, compression
from stride_ray.corpus.splits import InputSplit
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.urls import filesystem, redacted, redacted_error

_CHUNK = 1 << 20
# Rows decoded to Python objects at once; rows may be whole books.
_BATCH_ROWS = 256
# Small text files fetched at once: a remote file system runs these requests side by side.
_FETCH_FILES = 64
_CORRUPT = (pa.ArrowException, zlib.error, zstandard.ZstdError, EOFError, UnicodeDecodeError, struct.error)
_SCHEMA, _DICTIONARY, _RECORDS = 1, 2, 3  # MessageHeader in Arrow's Message.fbs


@dataclass(frozen=True)
class Rejected:
    """A document, or the unreadable rest of a file, that is left out, and why.

    Attributes:
        file: name of the file; the document's id where only that is known (after reading).
        row: number of the line (JSON Lines, from 1) or row in the file (Parquet and Arrow, from 0, as in document
            ids); None for a whole file.
        reason: what is wrong, for a person.
        document_id: the row's own id, where it has one that is fit.
    """

    file: str
    row: int | None
    reason: str
    document_id: str = ""

    def sentence(self) -> str:
        """The reject in a line, for a person."""
        return f"{self.file}{'' if self.row is None else f', row {self.row}'}: {self.reason}"


class Row(NamedTuple):
    """One row as read, before its columns are given a meaning.

    Attributes:
        file: name of its file.
        document_id: ``name`` for a text file, ``name#<byte offset>`` for JSON Lines, ``name#<row>`` otherwise.
        values: ``{column: value}``; ``{"text": …}`` for a text file.
        number: gives the row or line number (``Rejected.row``); called for rejects only, for it may cost a scan.
    """

    file: str
    document_id: str
    values: dict[str, Any]
    number: Callable[[], int | None]


def rows(unit: InputSplit, columns: Collection[str] | None) -> Iterator[Row | Rejected]:
    """Rows of a unit in file order.

    Args:
        unit: what to read.
        columns: columns to read where the format allows it; None for all.

    Raises:
        StrideError: a file cannot be fetched (gone, no permission, no connection).
    """
    try:
        if unit.kind == "text":
            yield from _text_rows(unit)
        elif unit.kind == "jsonl":
            yield from _json_rows(unit)
        elif unit.kind == "parquet":
            yield from _parquet_rows(unit, columns)
        else:
            yield from _arrow_rows(unit, columns)
    except (OSError, asyncio.TimeoutError) as error:
        raise unfetched(unit.files[0], error) from None
    except Exception as error:
        # botocore and aiohttp raise classes of their own; importing them to name them would tie us to S3.
        if type(error).__module__.split(".")[0] in ("botocore", "aiobotocore", "aiohttp", "s3fs", "gcsfs", "adlfs"):
            raise unfetched(unit.files[0], error) from None
        raise


def unfetched(file: SourceFile, error: BaseException) -> StrideError:
    """The sentence for a file that its file system does not give."""
    if isinstance(error, FileNotFoundError):
        why = "it is gone"
    elif isinstance(error, PermissionError):
        why = "permission denied"
    else:
        why = redacted_error(error, file.url)
    return StrideError(f"Cannot read {redacted(file.url)} ({why}); put that right and run the same command again.")


def _is_corrupt(error: Exception) -> bool:
    """Whether the content is at fault: pyarrow reports much of that as an OSError without a number."""
    return isinstance(error, _CORRUPT) or (type(error) is OSError and error.errno is None)


def _reason(error: Exception) -> str:
    text = redacted(str(error)).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _chunks(file: SourceFile, start: int = 0) -> Iterator[bytes]:
    """The file from byte ``start`` on, decompressed by its ending, in pieces of about a mebibyte.

    Raises:
        EOFError: a compressed file ends too early.
    """
    fs, path = filesystem(file.url)
    with fs.open(path, "rb") as handle:
        if start:
            handle.seek(start)
        packing = compression(file.name)
        # A compressed piece may swell a thousandfold.
        raw = iter(partial(handle.read, _CHUNK // 16 if packing else _CHUNK), b"")
        yield from _inflated(raw, packing)


def _inflated(raw: Iterable[bytes], packing: str) -> Iterator[bytes]:
    if not packing:
        yield from raw
        return
    fresh: Callable[[], Any] = (
        partial(zlib.decompressobj, 31) if packing == ".gz" else zstandard.ZstdDecompressor().decompressobj
    )
    machine, inside = fresh(), False
    for chunk in raw:
        # Files made by concatenation hold several streams; gzip tools pad the end with zeros.
        while chunk:
            if not inside and packing == ".gz" and not (chunk := chunk.lstrip(b"\0")):
                break
            inside = True
            if data := machine.decompress(chunk):
                yield data
            chunk = b""
            if machine.eof:
                chunk, machine, inside = machine.unused_data, fresh(), False
    if inside:
        raise EOFError("the compressed file ends too early")


def _lines(chunks: Iterable[bytes], offset: int) -> Iterator[tuple[int, bytes]]:
    """``(offset of the line's first byte, line without its newline)``; ``offset`` is that of the first chunk."""
    parts: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        parts.append(first)
        for following in others:
            line = b"".join(parts)
            yield offset, line
            offset += len(line) + 1
            parts = [following]
    if rest := b"".join(parts):
        yield offset, rest


def raw_lines(unit: InputSplit) -> Iterator[tuple[int, bytes]]:
    """``(offset in the decompressed file, line)`` of the lines that a JSON Lines unit owns."""
    # Reading begins one byte early: should that be a newline, a line starts at ``start`` exactly. Whatever comes before
    # the first newline then belongs to the unit before.
    early = unit.start - 1 if unit.start else 0
    found = _lines(_chunks(unit.files[0], early), early)
    if unit.start:
        next(found, None)
    for offset, line in found:
        if unit.stop != END and offset >= unit.stop:
            return
        yield offset, line.removeprefix(b"\xef\xbb\xbf") if offset == 0 else line


def _json_rows(unit: InputSplit) -> Iterator[Row | Rejected]:
    file = unit.files[0]
    first = 0  # offset of the unit's first line
    index = -1

    @cache
    def lines_before() -> int:
        remaining, count = first, 0
        for chunk in _chunks(file) if first else ():
            count += chunk[:remaining].count(b"\n")
            remaining -= len(chunk)
            if remaining <= 0:
                break
        return count

    def number(i: int) -> int:
        return lines_before() + i + 1

    try:
        for index, (offset, line) in enumerate(raw_lines(unit)):
            first = first if index else offset
            if not line.strip():
                continue
            try:
                values = json.loads(line.decode())
                if not isinstance(values, dict):
                    raise ValueError(f"holds a JSON {type(values).__name__}, not an object with columns")
            except RecursionError:
                yield Rejected(file.name, number(index), "JSON nested too deeply")
            except UnicodeDecodeError as error:
                yield Rejected(file.name, number(index), f"not UTF-8: {_reason(error)}")
            except ValueError as error:
                hint = "; write one JSON object a line" if line.strip() in (b"[", b"{") else ""
                yield Rejected(file.name, number(index), f"not a line of JSON Lines: {_reason(error)}{hint}")
            else:
                yield Row(file.name, f"{file.name}#{offset}", values, partial(number, index))
    except Exception as error:
        if not _is_corrupt(error):
            raise
        reason = f"unreadable from here to the end of the file: {_reason(error)}"
        yield Rejected(file.name, index + 2, reason)  # compressed files only: they are read from their first line


def _text_rows(unit: InputSplit) -> Iterator[Row | Rejected]:
    fs = filesystem(unit.files[0].url)[0]
    for i in range(0, len(unit.files), _FETCH_FILES):
        files = unit.files[i : i + _FETCH_FILES]
        paths = [filesystem(file.url)[1] for file in files]
        # Not ``cat``, which would expand the characters of a glob in a name.
        for file, data in zip(files, fs.cat_ranges(paths, None, None, on_error="return"), strict=True):
            if isinstance(data, BaseException):
                raise unfetched(file, data)
            try:
                text = b"".join(_inflated([data], compression(file.name))).decode("utf-8-sig")
            except UnicodeDecodeError as error:
                yield Rejected(file.name, None, f"not UTF-8 text: {_reason(error)}")
            except _CORRUPT as error:
                yield Rejected(file.name, None, f"unreadable: {_reason(error)}")
            else:
                yield Row(file.name, file.name, {"text": text}, lambda: None)


def _parquet_rows(unit: InputSplit, columns: Collection[str] | None) -> Iterator[Row | Rejected]:
    file = unit.files[0]
    fs, path = filesystem(file.url)
    with fs.open(path, "rb") as handle:
        try:
            # With a buffer size, columns are read page by page rather than a row group at a time.
            table = pq.ParquetFile(handle, buffer_size=_CHUNK, pre_buffer=False)
        except Exception as error:
            if not _is_corrupt(error):
                raise
            yield Rejected(file.name, None, f"not readable as Parquet: {_reason(error)}")
            return
        wanted = [name for name in table.schema_arrow.names if columns is None or name in columns]
        footer = table.metadata
        stop = footer.num_row_groups if unit.stop == END else min(unit.stop, footer.num_row_groups)
        row = sum(footer.row_group(group).num_rows for group in range(unit.start))
        for group in range(unit.start, stop):
            end = row + footer.row_group(group).num_rows
            try:
                for batch in table.iter_batches(_BATCH_ROWS, row_groups=[group], columns=wanted, use_threads=False):
                    yield from _batch_rows(file.name, batch, row)
                    row += batch.num_rows
            except Exception as error:
                if not _is_corrupt(error):
                    raise
                yield Rejected(file.name, row, f"row group {group} is unreadable from here on: {_reason(error)}")
            row = end


def _batch_rows(name: str, batch: pa.RecordBatch, first: int) -> Iterator[Row | Rejected]:
    """Rows of a batch; ``first`` is the number in the file of its first row."""
    for start in range(0, batch.num_rows, _BATCH_ROWS):
        part = batch.slice(start, _BATCH_ROWS)
        decoded: list[dict[str, Any] | Exception]
        try:
            decoded = part.to_pylist()
        except (ValueError, OverflowError):  # one bad value fails all rows: strings are not validated before
            decoded = [_row_or_error(part.slice(i, 1)) for i in range(part.num_rows)]
        for i, values in enumerate(decoded):
            number = first + start + i
            if isinstance(values, Exception):
                yield Rejected(name, number, f"not readable: {_reason(values)}")
            else:
                yield Row(name, f"{name}#{number}", values, partial(int, number))


def _row_or_error(row: pa.RecordBatch) -> dict[str, Any] | Exception:
    try:
        return row.to_pylist()[0]
    except (ValueError, OverflowError) as error:
        return error


def _arrow_rows(unit: InputSplit, columns: Collection[str] | None) -> Iterator[Row | Rejected]:
    """Rows of the record batches whose message starts in the unit's byte range.

    Batches before the range are hopped over by their headers, so that rows are numbered without being read.
    """
    file = unit.files[0]
    fs, path = filesystem(file.url)
    row = 0
    with fs.open(path, "rb") as handle:
        try:
            position = 8 if handle.read(6) == b"ARROW1" else 0  # the file format is the stream between two frames
            head = b""  # schema and dictionaries: with them a batch alone is a stream
            while unit.stop == END or position < unit.stop:
                message = _arrow_message(handle, position)
                if message is None:
                    return
                kind, count, size = message
                handle.seek(position)
                if kind in (_SCHEMA, _DICTIONARY):
                    head += handle.read(size)
                elif kind == _RECORDS:
                    if position >= unit.start:
                        yield from _arrow_batch(file.name, head + handle.read(size), row, columns)
                    row += count
                position += size
        except Exception as error:
            if not _is_corrupt(error):
                raise
            # Units of one file all meet the fault of an early header, but only one owns the place.
            if position >= unit.start:
                yield Rejected(file.name, row, f"unreadable from here to the end of the file: {_reason(error)}")


def _arrow_batch(name: str, stream: bytes, row: int, columns: Collection[str] | None) -> Iterator[Row | Rejected]:
    """Rows of the one batch of a stream; ``row`` is the number in the file of its first row."""
    try:
        with pa.ipc.open_stream(pa.py_buffer(stream)) as reader:
            batch = reader.read_next_batch()
        batch.validate()
    except Exception as error:
        if not isinstance(error, StopIteration) and not _is_corrupt(error):
            raise
        yield Rejected(name, row, f"this row and those written with it are unreadable: {_reason(error)}")
        return
    yield from _batch_rows(name, batch.select([c for c in batch.schema.names if columns is None or c in columns]), row)


def _arrow_message(handle: Any, position: int) -> tuple[int, int, int] | None:
    """``(kind, rows, bytes with prefix and body)`` of the message at ``position``; None at the end of the stream.

    A message is 0xFFFFFFFF, the size of its metadata (int32), the metadata (a FlatBuffer) and a body.

    Raises:
        pa.ArrowInvalid, struct.error: the bytes are not such a message.
    """
    handle.seek(position)
    prefix = handle.read(8)
    if not prefix or prefix[4:] == b"\0\0\0\0":
        return None
    marker, size = struct.unpack("<Ii", prefix)
    if marker != 0xFFFFFFFF or size <= 0:
        raise pa.ArrowInvalid("not an Arrow stream")
    metadata = handle.read(size)

    def field(table: int, slot: int) -> int | None:
        """Where a FlatBuffer table's field stands; None where it has its default value."""
        vtable = table - struct.unpack_from("<i", metadata, table)[0]
        if 4 + 2 * slot >= struct.unpack_from("<H", metadata, vtable)[0]:
            return None
        offset = struct.unpack_from("<H", metadata, vtable + 4 + 2 * slot)[0]
        return table + offset if offset else None

    def number(form: str, place: int | None) -> int:
        return 0 if place is None else struct.unpack_from(form, metadata, place)[0]

    message = number("<I", 0)
    kind, header = number("<B", field(message, 1)), field(message, 2)
    body = number("<q", field(message, 3))
    count = 0
    if kind == _RECORDS and header is not None:
        count = number("<q", field(header + number("<I", header), 0))
    if body < 0 or count < 0:
        raise pa.ArrowInvalid("a message of negative size")
    return kind, count, 8 + size + body
