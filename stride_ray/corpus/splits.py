"""Splitting the input into units: the files, byte ranges or row groups that one task reads.

The split depends on the input only, not on the cluster, so units are reproducible. Parquet is split by consecutive row
groups, JSON Lines and Arrow by byte ranges (a unit owns the lines or batches that start in its range). Compressed files
are never split; small text files are grouped in sorted order. Planning lists folders and reads Parquet footers and the
``state.json`` of saved datasets; it opens nothing else.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from stride_ray.corpus.files import END, SourceFile, compression, is_corrupt, kind_of, list_files
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.urls import filesystem, redact_url, redacted_error, with_secrets

# Footers are read concurrently: over a network each costs one or two round trips.
_FOOTER_THREADS = 16


@dataclass(frozen=True)
class InputSplit:
    """One unit of work: a part of one file, or several whole text files.

    Attributes:
        key: stable id from kind, names and range, valid as a file name. It does not depend on size or version; compare
            ``files`` to find out whether a finished unit has changed.
        kind: "jsonl", "parquet", "arrow" or "text".
        files: the files in reading order; exactly one, except for "text".
        start: first byte (jsonl, arrow) or row group (parquet); 0 for text.
        stop: exclusive end, or END.
    """

    key: str
    kind: str
    files: tuple[SourceFile, ...]
    start: int
    stop: int

    def to_dict(self) -> dict[str, Any]:
        """The unit as a JSON-serialisable dict for a worker. URLs keep their credentials: not to be stored."""
        files = [list(file) for file in self.files]
        return {"key": self.key, "kind": self.kind, "files": files, "start": self.start, "stop": self.stop}

    def to_record(self) -> dict[str, Any]:
        """As ``to_dict``, without credentials and signatures, to be stored."""
        files = [list(file._replace(url=redact_url(file.url))) for file in self.files]
        return {**self.to_dict(), "files": files}

    @classmethod
    def from_dict(cls, value: dict[str, Any], inputs: Sequence[str] = ()) -> "InputSplit":
        """The inverse of ``to_dict``, and of ``to_record`` where ``inputs`` have the credentials (``corpus.input``)."""
        found = [SourceFile(*file) for file in value["files"]]
        files = tuple(file._replace(url=with_secrets(file.url, inputs)) for file in found)
        return cls(value["key"], value["kind"], files, value["start"], value["stop"])


def plan(
    inputs: Sequence[str], shard_bytes: int, skip: Collection[str] = (), left_out: list[str] | None = None
) -> list[InputSplit]:
    """Cut the inputs into units.

    Args:
        inputs: files, folders (recursive), globs, any fsspec URL. A folder may contain Hugging Face datasets saved to
            disk. ``list_files`` says which of its files are no documents.
        shard_bytes: target size of a unit: bytes of JSON Lines, Arrow or text, uncompressed bytes of Parquet.
        skip: names of files to leave out because other units hold them; if given, the result may be empty.
        left_out: takes the names of files that were left out because they are no documents.

    Returns:
        The units, in the order of the inputs and of the sorted names within each. Names are unique over all inputs.

    Raises:
        StrideError: an input is missing or unreadable or matches no file, two inputs contain a file of the same name,
            or all files are empty.
    """
    if not inputs:
        raise StrideError('No input is given; say which files to read, as in input = ["corpus/"].')
    if shard_bytes < 1:
        raise StrideError(f"A unit of {shard_bytes} bytes cannot be cut; give a positive size.")
    owners: dict[str, SourceFile] = {}
    units: list[InputSplit] = []
    for given in inputs:
        files = list_files(str(given), left_out)
        for file in files:
            other = owners.setdefault(file.name, file)
            if other is not file:
                raise StrideError(
                    f"{redact_url(other.url)} and {redact_url(file.url)} would both be called {file.name!r}; "
                    "give their common parent folder as the one input, or rename one."
                )
        units += _cut([file for file in files if file.name not in skip], shard_bytes)
    if not units and not skip:
        given = ", ".join(redact_url(str(each)) for each in inputs)
        raise StrideError(f"{given}: every file is empty; give files with documents.")
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
    """Consecutive text files in groups of at most ``shard_bytes`` (at least one file), by the group's first file."""
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
    """Uncompressed bytes of each row group, or None if the file is not valid Parquet."""
    fs, path = filesystem(file.url)
    try:
        with fs.open(path, "rb") as handle:
            footer = pq.ParquetFile(handle).metadata
        return [footer.row_group(i).total_byte_size for i in range(footer.num_row_groups)]
    except Exception as error:
        if is_corrupt(error):
            return None  # planned as one unit, so that reading it yields a reject and the rest continues
        raise StrideError(f"{redact_url(file.url)} cannot be read ({redacted_error(error, file.url)}).") from None


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
