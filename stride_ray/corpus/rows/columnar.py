"""Rows of Parquet and Arrow files.

Only the wanted columns are read. What cannot be read is as small as the format allows: a value, a column of a row
group or record batch, or the group or batch with all its rows. A column that turns out not to be used costs nothing,
or, to those who ask which of the others hold something, its first rows.
"""

import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stride_ray.corpus.files import END, is_corrupt
from stride_ray.corpus.rows.json_values import decoded, holds_json
from stride_ray.corpus.rows.row import Rejected, Row, Unreadable, has_content, reason
from stride_ray.corpus.splits import InputSplit
from stride_ray.runtime.urls import filesystem

_BUFFER = 1 << 20
# Rows decoded to Python objects at once; a row may be a whole book.
_BATCH_ROWS = 256
# Rows read at once of a column that is not wanted, to see whether it holds anything; a value may be an image.
_PROBE_ROWS = 32
_SCHEMA, _DICTIONARY, _RECORDS = 1, 2, 3  # MessageHeader in Arrow's Message.fbs


def parquet_rows(unit: InputSplit, columns: Collection[str] | None, filled: bool) -> Iterator[Row | Rejected]:
    """Rows of the unit's row groups, with the checksums of pages verified where the file has them.

    Args:
        unit: what to read.
        columns: columns to read; None: all.
        filled: whether ``Row.unread`` names only columns with content, for which some of their rows are read.
    """
    file = unit.files[0]
    fs, path = filesystem(file.url)
    with fs.open(path, "rb") as handle:
        try:
            # With a buffer size, columns are read page by page instead of by row group.
            table = pq.ParquetFile(handle, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True)
            schema = table.schema_arrow
            _check_names(schema.names)
            wanted = [name for name in schema.names if columns is None or name in columns]
            footer = table.metadata
            held = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
            if sum(held) != footer.num_rows:
                raise pa.ArrowInvalid(f"its footer states {footer.num_rows} rows, and {sum(held)} in row groups")
            stop = footer.num_row_groups if unit.stop == END else min(unit.stop, footer.num_row_groups)
            unread = _others(schema, wanted)
            if filled:
                unread = frozenset(name for name in unread if _holds(table, range(unit.start, stop), name))
        except Exception as error:
            if not is_corrupt(error):
                raise
            yield Rejected(file.name, None, f"not readable as Parquet: {reason(error)}")
            return
        row = sum(held[: unit.start])
        for group in range(unit.start, stop):
            end = row + held[group]

            def batches(names: Sequence[str], group: int = group) -> Iterator[pa.RecordBatch]:
                return table.iter_batches(_BATCH_ROWS, row_groups=[group], columns=names, use_threads=False)

            try:
                for batch in batches(wanted):
                    yield from _batch_rows(file.name, batch, row, unread)
                    row += batch.num_rows
            except Exception as error:
                if not is_corrupt(error):
                    raise
                readable, faults = _readable(wanted, lambda name: sum(1 for _ in batches([name])))
                if readable and faults:
                    first = end - held[group]
                    for batch in batches(readable):
                        fresh = batch.slice(max(0, row - first))  # rows before the fault are out already
                        yield from _batch_rows(file.name, fresh, max(row, first), unread, faults)
                        first += batch.num_rows
                    row = max(row, first)
                else:
                    why = f"row group {group} is unreadable from here on: {reason(error)}"
                    yield Rejected(file.name, row, why, rows=end - row)
                    row = end
            if row < end:
                why = f"row group {group} ends here, {end - row} rows before the end that the file's footer states"
                yield Rejected(file.name, row, why, rows=end - row)
            row = end


def _check_names(names: Sequence[str]) -> None:
    """Raise ArrowInvalid for two columns of one name, of which readers would take one or the other."""
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise pa.ArrowInvalid(f"it has two columns named {twice!r}; rename one")


def _others(schema: pa.Schema, wanted: Collection[str]) -> frozenset[str]:
    """The columns that are not wanted, without those that were null from the beginning, which have no type."""
    return frozenset(f.name for f in schema if f.name not in wanted and not pa.types.is_null(f.type))


def _holds(table: pq.ParquetFile, groups: range, name: str) -> bool:
    """Whether a column has content in some row groups; what cannot be read may hold something.

    By its values: pyarrow ends the process if asked for the statistics of a column that a corrupt footer describes.
    """
    try:
        batches = table.iter_batches(_PROBE_ROWS, row_groups=list(groups), columns=[name], use_threads=False)
        return any(_has_values(batch.column(0)) for batch in batches)
    except Exception as error:
        if not is_corrupt(error):
            raise
        return True


def _has_values(column: pa.Array) -> bool:
    """Whether an array has a value with content, by the rule for rows of JSON; what is not valid may hold something."""
    if column.null_count == len(column):
        return False
    try:
        column.validate(full=True)
        return any(has_content(decoded(column.type, value.as_py(maps_as_pydicts="strict"))) for value in column)
    except (ValueError, OverflowError, KeyError):
        return True


def _readable(names: Sequence[str], read: Callable[[str], Any]) -> tuple[list[str], dict[str, Unreadable]]:
    """The columns that can be read alone, and what is wrong with the others."""
    readable, faults = list[str](), dict[str, Unreadable]()
    for name in names:
        try:
            read(name)
            readable.append(name)
        except Exception as error:
            if not is_corrupt(error):
                raise
            faults[name] = Unreadable(reason(error))
    return readable, faults


def _batch_rows(
    name: str,
    batch: pa.RecordBatch,
    first: int,
    unread: frozenset[str],
    faults: Mapping[str, Unreadable] | None = None,
) -> Iterator[Row]:
    """Rows of a batch; ``first`` is its first row's number in the file, ``faults`` the values of unreadable columns."""
    for start in range(0, batch.num_rows, _BATCH_ROWS):
        part = batch.slice(start, _BATCH_ROWS)
        for i, values in enumerate(_decoded(part)):
            number = first + start + i
            yield Row(name, f"{name}#{number}", {**values, **(faults or {})}, partial(int, number), unread)


def _decoded(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    try:
        batch.validate(full=True)  # decoding offsets that lead out of the buffers would crash the process
        rows = batch.to_pylist(maps_as_pydicts="strict")
        for field in filter(lambda field: holds_json(field.type), batch.schema):
            for row in rows:
                row[field.name] = decoded(field.type, row[field.name])
        return rows
    except (ValueError, OverflowError, KeyError):  # one bad value fails the batch
        if batch.num_rows > 1:
            return [_decoded(batch.slice(i, 1))[0] for i in range(batch.num_rows)]
        return [{name: _value(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}]


def _value(column: pa.Array) -> Any:
    try:
        column.validate(full=True)
        return decoded(column.type, column.to_pylist(maps_as_pydicts="strict")[0])
    except (ValueError, OverflowError, KeyError) as error:
        return Unreadable(reason(error))


def arrow_rows(unit: InputSplit, columns: Collection[str] | None, filled: bool) -> Iterator[Row | Rejected]:
    """Rows of the record batches whose message starts in the unit's byte range; arguments as in ``parquet_rows``."""
    held = set[str]() if filled else None
    for item in _arrow_streams(unit):
        if isinstance(item, Rejected):
            yield item
        else:
            yield from _arrow_batch(unit.files[0].name, *item, columns, held)


def arrow_batches(unit: InputSplit) -> Iterator[tuple[int, pa.RecordBatch]]:
    """``(number of its first row, batch)`` of the unit's record batches, with all columns, up to the first corrupt one.

    Raises:
        pa.ArrowException, OSError: a batch cannot be decoded.
    """
    for item in _arrow_streams(unit):
        if isinstance(item, Rejected):
            return
        first, _, stream = item
        with pa.ipc.open_stream(pa.py_buffer(stream)) as reader:
            yield first, reader.read_next_batch()


def _arrow_streams(unit: InputSplit) -> Iterator[tuple[int, int, bytes] | Rejected]:
    """``(first row, rows, stream with a single batch)`` of the unit's record batches.

    Only the headers of earlier batches are read, which is enough to number rows.
    """
    file = unit.files[0]
    fs, path = filesystem(file.url)
    row = batches = 0
    with fs.open(path, "rb") as handle:
        try:
            framed = handle.read(6) == b"ARROW1"  # the file format: a stream between magic and footer
            position = 8 if framed else 0
            head = b""  # schema and dictionaries; prepended to a batch, they form a valid stream
            while unit.stop == END or position < unit.stop or position == unit.stop == file.size:
                message = _arrow_message(handle, position)
                if message is None:
                    if not framed and file.size not in (END, position + 8):
                        raise pa.ArrowInvalid("bytes follow the end of the stream")
                    stated = _stated_batches(handle) if framed and position >= unit.start else batches
                    if stated != batches:
                        why = f"the file has {batches} record batches up to here, and its footer states {stated}"
                        yield Rejected(file.name, row, why)
                    return
                kind, count, size = message
                if file.size != END and size > file.size - position:
                    raise EOFError("the file ends too early")
                handle.seek(position)
                if kind in (_SCHEMA, _DICTIONARY):
                    head += handle.read(size)
                elif kind == _RECORDS:
                    if position >= unit.start:
                        yield row, count, head + handle.read(size)
                    row += count
                    batches += 1
                position += size
        except Exception as error:
            if not is_corrupt(error):
                raise
            # A corrupt header fails all later units of the file; only the unit that owns its position reports it.
            if position >= unit.start:
                yield Rejected(file.name, row, f"unreadable from here to the end of the file: {reason(error)}")


def _stated_batches(handle: Any) -> int:
    """Record batches that the footer of a file in Arrow's file format states.

    Raises:
        pa.ArrowInvalid: the footer is not valid.
    """
    handle.seek(0)
    with pa.ipc.open_file(handle) as file:
        return int(file.num_record_batches)


def _arrow_batch(
    name: str, row: int, count: int, stream: bytes, columns: Collection[str] | None, filled: set[str] | None
) -> Iterator[Row | Rejected]:
    """Rows of a stream with a single batch of ``count`` rows.

    Args:
        name: name of the file.
        row: number of the first row in the file.
        count: rows.
        stream: the schema, dictionaries and the batch.
        columns: columns to read; None: all.
        filled: columns that are not read and have content in the file's batches so far; added to. None: do not
            find out.
    """
    try:
        schema = pa.ipc.open_stream(pa.py_buffer(stream)).schema
        names: list[str] = schema.names
        _check_names(names)
    except Exception as error:
        if not is_corrupt(error):
            raise
        yield Rejected(name, row, f"the record batch is unreadable by its schema: {reason(error)}", rows=max(1, count))
        return
    wanted = [each for each in names if columns is None or each in columns]

    def batch(chosen: Sequence[str]) -> pa.RecordBatch:
        options = pa.ipc.IpcReadOptions(included_fields=[names.index(each) for each in chosen])
        with pa.ipc.open_stream(pa.py_buffer(stream), options=options) as reader:
            try:
                read = reader.read_next_batch()
            except StopIteration:
                raise EOFError("the record batch is missing") from None
        read.validate()
        return read.select(list(chosen))

    unread = _others(schema, wanted)
    if filled is not None:
        for each in sorted(unread - filled):
            try:
                held = _has_values(batch([each]).column(0))
            except Exception as error:
                if not is_corrupt(error):
                    raise
                held = True  # what cannot be read may hold something
            if held:
                filled.add(each)
        unread = frozenset(filled)
    try:
        yield from _batch_rows(name, batch(wanted), row, unread)
    except Exception as error:
        if not is_corrupt(error):
            raise
        readable, faults = _readable(wanted, lambda each: batch([each]))
        if readable and faults:
            yield from _batch_rows(name, batch(readable), row, unread, faults)
        else:
            yield Rejected(name, row, f"the record batch is unreadable: {reason(error)}", rows=max(1, count))


def _arrow_message(handle: Any, position: int) -> tuple[int, int, int] | None:
    """``(kind, rows, total bytes)`` of the message at ``position``; None at the stream's end mark.

    A message consists of 0xFFFFFFFF, the size of its metadata (int32), the metadata (a FlatBuffer) and a body.

    Raises:
        pa.ArrowInvalid, struct.error, EOFError: the bytes are not a valid message.
    """
    handle.seek(position)
    prefix = handle.read(8)
    if not prefix:  # the format allows it, but every writer that was not cut short leaves the mark
        raise EOFError("the file ends without the mark of a stream's end: it was cut short")
    if prefix == b"\xff\xff\xff\xff\0\0\0\0":
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
    if body < 0 or count < 0 or kind not in (_SCHEMA, _DICTIONARY, _RECORDS):
        raise pa.ArrowInvalid("not a message of an Arrow stream")
    return kind, count, 8 + size + body
