"""The input cut into units ("input shards"): which files, byte ranges, row groups or batches one task reads.

The cut follows from the input alone, never from the cluster, so that a unit is the same wherever and whenever it is
planned: Parquet by consecutive row groups, JSON Lines and Arrow by byte ranges (a unit owns the lines or batches that
start inside its range), compressed files whole, small text files grouped in sorted order. Planning lists folders and
reads Parquet footers and a saved dataset's ``state.json``; nothing else is opened.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stride_ray.corpus.files import END, SourceFile, compression, kind_of, list_files
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.urls import filesystem, redacted, redacted_error

# Footers are read side by side: over a network each costs a round trip or two.
_FOOTER_THREADS = 16


@dataclass(frozen=True)
class InputSplit:
    """One unit of work: a part of one file, or several whole text files.

    Attributes:
        key: stable id from kind, names and range; fit for a file name. It holds neither size nor version: compare
            ``files`` to see whether a unit that is done has changed since.
        kind: "jsonl", "parquet", "arrow" or "text".
        files: the files in reading order; one, except for "text".
        start: first byte (jsonl, arrow) or row group (parquet); 0 for text.
        stop: the byte or row group after the last one, or END.
    """

    key: str
    kind: str
    files: tuple[SourceFile, ...]
    start: int
    stop: int

    def to_dict(self) -> dict[str, Any]:
        """The unit as JSON-serialisable values. URLs are kept as they were given, credentials included."""
        files = [list(file) for file in self.files]
        return {"key": self.key, "kind": self.kind, "files": files, "start": self.start, "stop": self.stop}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "InputSplit":
        """The inverse of ``to_dict``."""
        files = tuple(SourceFile(*file) for file in value["files"])
        return cls(value["key"], value["kind"], files, value["start"], value["stop"])


def plan(inputs: Sequence[str], shard_bytes: int, skip: Collection[str] = ()) -> list[InputSplit]:
    """Cut the inputs into units.

    Args:
        inputs: files, folders (walked whole; hidden names and ``__pycache__`` skipped), globs, any fsspec URL. A
            folder may hold Hugging Face datasets saved to disk.
        shard_bytes: aim for a unit's size: bytes of JSON Lines, Arrow or text, uncompressed bytes of Parquet.
        skip: names of files that are left out (those that other units hold already); nothing else is then no error.

    Returns:
        The units, in the order of the inputs and of the sorted names within each. Names are unique over all inputs.

    Raises:
        StrideError: an input is missing or unreadable, matches no file, or two inputs hold a file of the same name;
            or there is nothing to read at all.
    """
    if not inputs:
        raise StrideError('No input is given; say which files to read, as in input = ["corpus/"].')
    if shard_bytes < 1:
        raise StrideError(f"A unit of {shard_bytes} bytes cannot be cut; give a positive size.")
    owners: dict[str, SourceFile] = {}
    units: list[InputSplit] = []
    for given in inputs:
        files = list_files(str(given))
        for file in files:
            other = owners.setdefault(file.name, file)
            if other is not file:
                raise StrideError(
                    f"{redacted(other.url)} and {redacted(file.url)} would both be called {file.name!r}; "
                    "give their common parent folder as the one input, or rename one."
                )
        units += _cut([file for file in files if file.name not in skip], shard_bytes)
    if not units and not skip:
        raise StrideError(
            f"{', '.join(map(redacted, map(str, inputs)))}: every file is empty; give files with documents."
        )
    return units


def _cut(files: list[SourceFile], shard_bytes: int) -> Iterator[InputSplit]:
    """The units of one input's files, in the order of their first file."""
    kinds = [kind_of(file.name) for file in files]
    parquet = [file for file, kind in zip(files, kinds, strict=True) if kind == "parquet"]
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        groups = dict(zip(parquet, pool.map(_row_group_bytes, parquet), strict=True))
    texts = _grouped([file for file, kind in zip(files, kinds, strict=True) if kind == "text"], shard_bytes)
    for file, kind in zip(files, kinds, strict=True):
        if kind == "text":
            if file in texts:
                yield _unit(kind, texts[file], 0, END)
        elif kind == "parquet":
            for start, stop in _row_group_ranges(groups[file], shard_bytes):
                yield _unit(kind, (file,), start, stop)
        elif compression(file.name) or file.size == END:
            yield _unit(kind, (file,), 0, END)
        else:
            for start in range(0, file.size, shard_bytes):
                yield _unit(kind, (file,), start, min(start + shard_bytes, file.size))


def _unit(kind: str, files: tuple[SourceFile, ...], start: int, stop: int) -> InputSplit:
    identity = json.dumps([kind, [file.name for file in files], start, stop])
    return InputSplit(
        f"{kind}-{hashlib.blake2b(identity.encode(), digest_size=10).hexdigest()}", kind, files, start, stop
    )


def _grouped(files: list[SourceFile], shard_bytes: int) -> dict[SourceFile, tuple[SourceFile, ...]]:
    """Text files in runs of at most ``shard_bytes`` (one file at least), each under its first file."""
    runs: list[list[SourceFile]] = []
    room = 0
    for file in files:
        size = max(file.size, 0)
        if not runs or size > room:
            runs.append([])
            room = shard_bytes
        runs[-1].append(file)
        room -= size
    return {run[0]: tuple(run) for run in runs}


def _row_group_bytes(file: SourceFile) -> list[int] | None:
    """Uncompressed bytes of each row group, or None for a file that is not readable as Parquet."""
    fs, path = filesystem(file.url)
    try:
        with fs.open(path, "rb") as handle:
            footer = pq.ParquetFile(handle).metadata
        return [footer.row_group(i).total_byte_size for i in range(footer.num_row_groups)]
    except Exception as error:
        # pyarrow tells of corrupt content by ArrowInvalid or by an OSError without a number.
        if isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None):
            return None  # planned whole, so that reading it reports it as rejected while the rest goes on
        raise StrideError(f"{redacted(file.url)} cannot be read ({redacted_error(error, file.url)}).") from None


def _row_group_ranges(sizes: list[int] | None, shard_bytes: int) -> Iterator[tuple[int, int]]:
    if sizes is None:
        yield 0, END
        return
    start = held = 0
    for i, size in enumerate(sizes):
        if i > start and held + size > shard_bytes:
            yield start, i
            start, held = i, 0
        held += size
    if sizes:
        yield start, len(sizes)
