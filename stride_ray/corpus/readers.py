"""Rows of a unit, with one reader per kind of file; unreadable content is yielded as rejects.

All readers stream: only a chunk, a line, a batch of rows or a few small files are in memory at a time. There are two
kinds of failure. Bad content (a corrupt line, page or stream) is a property of the input: it is rejected with its
position, and reading continues. A file that cannot be fetched raises, so that a network failure is not recorded as
rejected documents.
"""

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
from stride_ray.runtime.errors import StrideError, is_storage_error, storage_reason
from stride_ray.runtime.urls import filesystem, redacted, redacted_error

_CHUNK = 1 << 20
# Rows decoded to Python objects at once; a row may be a whole book.
_BATCH_ROWS = 256
# Small text files fetched at once: a remote file system runs these requests concurrently.
_FETCH_FILES = 64
_CORRUPT = (pa.ArrowException, zlib.error, zstandard.ZstdError, EOFError, UnicodeDecodeError, struct.error)
_SCHEMA, _DICTIONARY, _RECORDS = 1, 2, 3  # MessageHeader in Arrow's Message.fbs


@dataclass(frozen=True)
class Rejected:
    """A rejected document, or the unreadable remainder of a file.

    Attributes:
        file: name of the file; for rejects after reading, when only that is known, the document's id.
        row: line number (JSON Lines, from 1) or row number in the file (Parquet and Arrow, from 0, as in document
            ids); None for a whole file.
        reason: what is wrong, for display.
        document_id: the row's id, if it has a valid one.
    """

    file: str
    row: int | None
    reason: str
    document_id: str = ""

    def sentence(self) -> str:
        """The reject as one line for display."""
        return f"{self.file}{'' if self.row is None else f', row {self.row}'}: {self.reason}"


class Row(NamedTuple):
    """One row as read, before columns are mapped to roles.

    Attributes:
        file: name of its file.
        document_id: ``name`` for a text file, ``name#<byte offset>`` for JSON Lines, ``name#<row>`` otherwise.
        values: ``{column: value}``; ``{"text": …}`` for a text file.
        number: returns the row or line number (``Rejected.row``); called for rejects only, since it may scan the file.
    """

    file: str
    document_id: str
    values: dict[str, Any]
    number: Callable[[], int | None]


def rows(unit: InputSplit, columns: Collection[str] | None) -> Iterator[Row | Rejected]:
    """Rows of a unit in file order.

    Args:
        unit: what to read.
        columns: columns to read, if the format supports a choice; None: all.

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
    except Exception as error:
        if isinstance(error, StrideError) or not is_storage_error(error):
            raise
        raise unfetched(unit.files[0], error) from None


def unfetched(file: SourceFile, error: BaseException) -> StrideError:
    """The error for a file that cannot be fetched."""
    reason = storage_reason(error)
    if isinstance(error, FileNotFoundError) and reason in ("", "there is no such file"):
        why = "it is gone"
    elif isinstance(error, PermissionError) and not reason:
        why = "permission denied"
    else:
        why = redacted_error(error, file.url)
    return StrideError(f"Cannot read {redacted(file.url)} ({why}); fix this and run the same command again.")


def _is_corrupt(error: Exception) -> bool:
    """Whether an error means corrupt content, which pyarrow often reports as an OSError without errno."""
    return isinstance(error, _CORRUPT) or (type(error) is OSError and error.errno is None)


def _reason(error: Exception) -> str:
    text = redacted(str(error)).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _chunks(file: SourceFile, start: int = 0) -> Iterator[bytes]:
    """The file from byte ``start`` on, decompressed by its suffix; chunks of 1 MiB, or of 64 KiB before decompression.

    Raises:
        EOFError: a compressed file is truncated.
    """
    fs, path = filesystem(file.url)
    with fs.open(path, "rb") as handle:
        if start:
            handle.seek(start)
        packing = compression(file.name)
        # A compressed chunk may expand a thousandfold.
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
        # Concatenated files contain several streams; some gzip tools pad the end with zeros.
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
    """``(offset, line without newline)`` of each line; ``offset`` is that of the first chunk."""
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
    """``(offset in the decompressed file, line)`` of the lines that start in a JSON Lines unit."""
    # Start one byte early and skip the first line: if that byte is a newline, a line starts at ``start`` exactly;
    # otherwise the rest of a line of the previous unit is skipped.
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
        yield Rejected(file.name, index + 2, reason)  # only compressed files, which are read from their first line


def _text_rows(unit: InputSplit) -> Iterator[Row | Rejected]:
    fs = filesystem(unit.files[0].url)[0]
    for i in range(0, len(unit.files), _FETCH_FILES):
        files = unit.files[i : i + _FETCH_FILES]
        paths = [filesystem(file.url)[1] for file in files]
        # Not ``cat``, which would expand glob characters in a name.
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
            # With a buffer size, columns are read page by page instead of by row group.
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
    """Rows of a batch; ``first`` is its first row's number in the file."""
    for start in range(0, batch.num_rows, _BATCH_ROWS):
        part = batch.slice(start, _BATCH_ROWS)
        decoded: list[dict[str, Any] | Exception]
        try:
            decoded = part.to_pylist()
        except (ValueError, OverflowError):  # one bad value fails the whole batch: strings are validated only now
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

    Only the headers of earlier batches are read, which is enough to number rows.
    """
    file = unit.files[0]
    fs, path = filesystem(file.url)
    row = 0
    with fs.open(path, "rb") as handle:
        try:
            position = 8 if handle.read(6) == b"ARROW1" else 0  # the file format is a stream between magic and footer
            head = b""  # schema and dictionaries; prepended to a batch, they form a valid stream
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
            # A corrupt header fails all later units of the file; only the unit that owns its position reports it.
            if position >= unit.start:
                yield Rejected(file.name, row, f"unreadable from here to the end of the file: {_reason(error)}")


def _arrow_batch(name: str, stream: bytes, row: int, columns: Collection[str] | None) -> Iterator[Row | Rejected]:
    """Rows of a stream with a single batch; ``row`` is its first row's number in the file."""
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
    """``(kind, rows, total bytes)`` of the message at ``position``; None at the end of the stream.

    A message consists of 0xFFFFFFFF, the size of its metadata (int32), the metadata (a FlatBuffer) and a body.

    Raises:
        pa.ArrowInvalid, struct.error: the bytes are not a valid message.
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
        """Offset of a field of a FlatBuffer table; None if the field has its default value."""
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
