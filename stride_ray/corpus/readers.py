"""Rows of a unit, with one reader per kind of file; unreadable content is yielded as rejects.

All readers stream: only a chunk, a line, a batch of rows or a few small files are in memory at a time. There are two
kinds of failure. Bad content (a corrupt line, page or stream) is a property of the input: it is rejected with its
position, and reading continues. A file that cannot be fetched raises, so that a network failure is not recorded as
rejected documents.
"""

import json
import re
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache, partial
from typing import Any

import zstandard

from stride_ray.corpus.files import END, PACKED, SourceFile, compression, is_corrupt
from stride_ray.corpus.rows.columnar import arrow_rows, parquet_rows
from stride_ray.corpus.rows.row import Rejected, Row, reason
from stride_ray.corpus.splits import InputSplit
from stride_ray.runtime.errors import StrideError, is_storage_error, storage_reason
from stride_ray.runtime.urls import filesystem, redact_url, redacted_error

_CHUNK = 1 << 20
# The longest window of ``zstd --long``, bytes; by default the library refuses more than 128 MiB.
ZSTD_WINDOW = 1 << 31
# The largest JSON array that is read, bytes: unlike lines, it is read whole, by one worker.
_ARRAY_BYTES = 1 << 28
_ARRAY = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*[{\]]")
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]', re.DOTALL)
_STRING_OR_END = re.compile(rb'("[^"\\]*(?:\\.[^"\\]*)*")|[\r\n]', re.DOTALL)
# How packed data begins. What to do with it where neither the name says so nor the packing inside another.
_PACKINGS = {
    "gzip data": rb"\x1f\x8b",
    "zstd data": rb"\x28\xb5\x2f\xfd",
    "bzip2 data": rb"BZh[1-9]1AY&SY",
    "xz data": rb"\xfd7zXZ\0",
    "lz4 data": rb"\x04\x22M\x18",
    "a zip archive": rb"PK\x03\x04",
    "a 7z archive": rb"7z\xbc\xaf\x27\x1c",
    "a tar archive": rb"(?s:.{257})ustar",
}
_UNPACK = "unpack it, or, if it is text packed once with gzip or zstd, let its name end in .gz or .zst"
# Small text files fetched at once: a remote file system runs these requests concurrently.
_FETCH_FILES = 64


def rows(unit: InputSplit, columns: Collection[str] | None, filled: bool = False) -> Iterator[Row | Rejected]:
    """Rows of a unit in file order.

    Args:
        unit: what to read.
        columns: columns to read, if the format supports a choice; None: all.
        filled: whether ``Row.unread`` names only columns with content, for which some of their rows are read.

    Raises:
        StrideError: a file cannot be fetched (gone, no permission, no connection).
    """
    try:
        if unit.kind == "text":
            yield from _text_rows(unit)
        elif unit.kind == "jsonl":
            yield from _json_rows(unit)
        elif unit.kind == "parquet":
            yield from parquet_rows(unit, columns, filled)
        else:
            yield from arrow_rows(unit, columns, filled)
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
    return StrideError(f"Cannot read {redact_url(file.url)} ({why}); fix this and run the same command again.")


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
        yield from inflated(raw, packing)


def inflated(raw: Iterable[bytes], packing: str) -> Iterator[bytes]:
    """Decompress chunks of ``.gz`` or ``.zst`` (of any number of streams); with an empty ``packing`` they are as is."""
    if not packing:
        yield from raw
        return
    fresh: Callable[[], Any] = (
        partial(zlib.decompressobj, 31)
        if packing == ".gz"
        else zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj
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


def _lines(chunks: Iterable[bytes], offset: int, end: bytes = b"") -> Iterator[tuple[int, bytes]]:
    """``(offset, line)`` of each line, its newline replaced by ``end``; ``offset`` is that of the first chunk."""
    parts: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        parts.append(first)
        for following in others:
            line = b"".join(parts)
            yield offset, line + end
            offset += len(line) + 1
            parts = [following]
    if rest := b"".join(parts):
        yield offset, rest


def raw_lines(unit: InputSplit, whole: bool = False) -> Iterator[tuple[int, bytes]]:
    """``(offset in the decompressed file, line)`` of the lines that start in a JSON Lines unit.

    Of a file that is one JSON array, its elements, each as one line; the first unit of the file has them all.

    Args:
        unit: what to read.
        whole: whether lines, but not elements of an array, keep their newlines and the file's byte-order mark.

    Raises:
        EOFError: a compressed file is truncated; an array has no end, or is larger than 256 MiB.
    """
    if is_array(unit.files[0]):
        if not unit.start:
            yield from _elements(_chunks(unit.files[0]))
        return
    # Start one byte early and skip the first line: if that byte is a newline, a line starts at ``start`` exactly;
    # otherwise the rest of a line of the previous unit is skipped.
    early = unit.start - 1 if unit.start else 0
    found = _lines(_chunks(unit.files[0], early), early, b"\n" if whole else b"")
    if unit.start:
        next(found, None)
    for offset, line in found:
        if unit.stop != END and offset >= unit.stop:
            return
        yield offset, line.removeprefix(BOM_UTF8) if offset == 0 and not whole else line


def is_array(file: SourceFile) -> bool:
    """Whether a file of JSON is one array, and not JSON Lines."""
    return _ARRAY.match(_head(file)) is not None


def _head(file: SourceFile) -> bytes:
    """The first bytes of a file; what is wrong with them is told when all of it is read."""
    if compression(file.name):
        try:
            return next(_chunks(file), b"")[:1024]
        except (zlib.error, zstandard.ZstdError, EOFError):
            return b""
    fs, path = filesystem(file.url)
    return bytes(fs.cat_file(path, start=0, end=1024))


def _elements(chunks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """``(offset, element as one line)`` of a JSON array, and the lines after it."""
    held = bytearray()
    for chunk in chunks:
        held += chunk
        if len(held) > _ARRAY_BYTES:
            raise EOFError(f"a JSON array of over {_ARRAY_BYTES >> 20} MiB; write one JSON object a line")
    data = bytes(held)
    depth, start = -1, 0  # before the array

    def element(stop: int) -> tuple[int, bytes]:
        found = data[start:stop].lstrip()
        # Line ends are white space; inside a string, where they have to be escaped, they stay, to be rejected.
        return stop - len(found), _STRING_OR_END.sub(lambda part: part[1] or b" ", found.rstrip())

    for token in _TOKEN.finditer(data):
        sign = token[0]
        if sign in b"[{":
            depth += 1
            start = start if depth else token.end()
        elif sign in b"]}":
            depth -= 1
        if (sign == b"," and depth == 0) or depth < 0:
            yield element(token.start())
            start = token.end()
        if depth < 0:
            yield from _lines([data[start:]], start)
            return
    yield element(len(data))
    raise EOFError("a JSON array without its closing bracket: the file was cut short")


def _json_rows(unit: InputSplit) -> Iterator[Row | Rejected]:
    file = unit.files[0]
    head = _head(file)
    if _packing(head):  # a file is rejected as a whole, with its first unit
        if not unit.start:
            yield Rejected(file.name, None, _encoding_fault(head))
        return
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
            if index == 0 and unit.start:  # rows of an array are counted from its beginning too
                first = offset
            if not line.strip():
                continue
            if fault := _encoding_fault(line):
                yield Rejected(file.name, number(index), fault)
                continue
            try:
                values = json.loads(line.decode())
                if not isinstance(values, dict):
                    raise ValueError(f"holds a JSON {type(values).__name__}, not an object with columns")
            except RecursionError:
                yield Rejected(file.name, number(index), "JSON nested too deeply")
            except UnicodeDecodeError as error:
                yield Rejected(file.name, number(index), f"not UTF-8: {reason(error)}")
            except ValueError as error:
                hint = "; write one JSON object a line" if line.strip() in (b"[", b"{") else ""
                yield Rejected(file.name, number(index), f"not a line of JSON Lines: {reason(error)}{hint}")
            else:
                yield Row(file.name, f"{file.name}#{offset}", values, partial(number, index))
    except Exception as error:
        if not is_corrupt(error):
            raise
        why = f"unreadable from here to the end of the file: {reason(error)}"
        yield Rejected(file.name, index + 2, why)  # only compressed files, which are read from their first line


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
                data = b"".join(inflated([data], compression(file.name)))
                text = data.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                packed = file.name.lower().endswith(PACKED)
                why = "packed in a way that is not read; unpack it, or pack it with gzip or zstd" if packed else ""
                why = why or _mistaken(file.name, data) or _encoding_fault(data)
                yield Rejected(file.name, None, why or f"not UTF-8 text: {reason(error)}")
            except Exception as error:
                if not is_corrupt(error):
                    raise
                yield Rejected(file.name, None, f"unreadable: {reason(error)}")
            else:
                if why := _mistaken(file.name, data) or _encoding_fault(data):
                    yield Rejected(file.name, None, why)
                else:
                    yield Row(file.name, file.name, {"text": text}, lambda: None)


def _encoding_fault(data: bytes) -> str:
    """What to do with bytes that are another encoding's than UTF-8; empty if nothing speaks against UTF-8."""
    if packed := _packing(data):
        return f"holds {packed}, not text; {_UNPACK}"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return f"is UTF-{32 if data[2:4] == bytes(2) else 16}; save it as UTF-8"
    return "contains NUL characters: UTF-16 or no text at all; save it as UTF-8" if b"\0" in data else ""


def _packing(data: bytes) -> str:
    """What packed data is, by its beginning; empty if it is not known as such."""
    return next((name for name, magic in _PACKINGS.items() if re.match(magic, data)), "")


def _mistaken(name: str, data: bytes) -> str:
    """What to do with a file that is taken for text by its name and is another format by its content; else empty."""
    formats = {
        b"PAR1": ("Parquet", ".parquet"),
        b"ARROW1": ("Arrow", ".arrow"),
        b"\xff\xff\xff\xff": ("Arrow", ".arrow"),
    }
    found = next((found for magic, found in formats.items() if data.startswith(magic)), None)
    leaf = name.rpartition("/")[2].removesuffix(compression(name))
    if "." not in leaf and re.match(rb"\s*\{", data):
        try:
            if isinstance(json.loads(data.lstrip().partition(b"\n")[0].decode()), dict):
                found = ("JSON Lines", ".jsonl")
        except (ValueError, RecursionError):
            pass
    return f"holds {found[0]}; let its name end in {found[1]} to have its rows read" if found else ""
