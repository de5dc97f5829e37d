"""The input cut into units ("input shards"): which files, byte ranges, row groups or batches one task reads.

The cut follows from the input alone, never from the cluster, so that a unit is the same wherever and whenever it is
planned: Parquet by consecutive row groups, JSON Lines and Arrow by byte ranges (a unit owns the lines or batches that
start inside its range), compressed files whole, small text files grouped in sorted order. Planning lists folders and
reads Parquet footers and a saved dataset's ``state.json``; nothing else is opened.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from stride_ray.errors import StrideError
from stride_ray.storage import file_system

# ``Unit.stop`` of a unit that goes on to the end of its file.
END = -1

_COMPRESSIONS = (".gz", ".zst")
_KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".arrow": "arrow"}
_TABLES = (".csv", ".tsv", ".xls", ".xlsx")
_DATASET_FILES = ("state.json", "dataset_info.json")
# File systems put what changes with a file's content under different names; the first that is there serves.
_VERSION_KEYS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")
# Footers are read side by side: over a network each costs a round trip or two.
_FOOTER_THREADS = 16


class SourceFile(NamedTuple):
    """One file of the input.

    Attributes:
        name: path relative to its input's own root, so that moving the input changes no identity.
        url: where to read it, with whatever credentials the input's URL carries; for messages use ``shown``.
        size: bytes, END where the file system does not say.
        version: changes when the content does (ETag or modification time); empty where nothing is known.
    """

    name: str
    url: str
    size: int
    version: str

    @property
    def content(self) -> tuple[int, str]:
        """What tells that the file is still the one that it was, as well as its file system knows."""
        return self.size, self.version


@dataclass(frozen=True)
class Unit:
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
    def from_dict(cls, value: dict[str, Any]) -> "Unit":
        """The inverse of ``to_dict``."""
        files = tuple(SourceFile(*file) for file in value["files"])
        return cls(value["key"], value["kind"], files, value["start"], value["stop"])


def plan(inputs: Sequence[str], shard_bytes: int, skip: Collection[str] = ()) -> list[Unit]:
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
    units: list[Unit] = []
    for given in inputs:
        files = _list_files(str(given))
        for file in files:
            other = owners.setdefault(file.name, file)
            if other is not file:
                raise StrideError(
                    f"{shown(other.url)} and {shown(file.url)} would both be called {file.name!r}; "
                    "give their common parent folder as the one input, or rename one."
                )
        units += _cut([file for file in files if file.name not in skip], shard_bytes)
    if not units and not skip:
        raise StrideError(f"{', '.join(map(shown, map(str, inputs)))}: every file is empty; give files with documents.")
    return units


def current(file: SourceFile) -> SourceFile:
    """The file as it is now; raises what its file system does."""
    fs, path = filesystem(file.url)
    return _source_file(fs, file.url, path, file.name, fs.info(path))


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path inside it.

    Raises:
        StrideError: unknown protocol, its package is not installed, or nobody answers there.
    """
    # A local name may well hold "::" (Perl's manual pages do), which fsspec would take for a chain of URLs.
    if url.startswith("file://") or ("://" not in url and ("::" not in url or os.path.lexists(url))):
        return LocalFileSystem(), LocalFileSystem._strip_protocol(url)
    try:
        return file_system(url)
    except (ValueError, ImportError) as error:
        raise StrideError(f"{shown(url)} is not a path or URL that can be opened ({told(error, url)}).") from None
    except Exception as error:  # some connect at once, and raise classes of their own
        raise StrideError(
            f"{shown(url)} cannot be reached ({told(error, url)}); check the address, the credentials and the network."
        ) from None


def shown(text: str) -> str:
    """A URL, or a message that holds some, without user names, passwords and queries (which may be signatures)."""
    text = re.sub(r"://[^/\s]*@", "://", text)
    text = re.sub(r"(https?://[^\s?]*)\?[^\s'\"]*", r"\1", text)
    # Elsewhere a question mark may belong to a glob; a query has an equals sign.
    return re.sub(r"(://[^\s?]*)\?[^\s'\"]*=[^\s'\"]*", r"\1", text)


def told(error: BaseException, url: str) -> str:
    """What went wrong with a URL, without the secrets that it carries."""
    text = shown(str(error))
    # The error may repeat the URL without its scheme, or parts of it.
    secrets = re.findall(r"://([^/\s]*)@", url) + re.findall(r"\?([^?\s]*=[^?\s]*)", url)
    parts = [part for secret in secrets for part in re.split("[:&=]", secret) if len(part) > 3]
    for known in secrets + parts:
        text = text.replace(f"{known}@", "").replace(known, "…")
    return f"{type(error).__name__}: {text}"


def compression(name: str) -> str:
    """How a file is compressed by its name's ending: ".gz", ".zst" or "" for not at all."""
    return next((ending for ending in _COMPRESSIONS if name.lower().endswith(ending)), "")


def _kind(name: str) -> str:
    """The kind of unit for a file: by its ending before that of its compression; anything unknown is text."""
    packed = compression(name)
    kind = _KINDS.get(os.path.splitext(name.lower().removesuffix(packed))[1], "text")
    # A compressed Parquet or Arrow file is not a thing; as text it is rejected as such, with its name.
    return "text" if packed and kind != "jsonl" else kind


def _list_files(given: str) -> list[SourceFile]:
    """All files of one input, sorted by name.

    Raises:
        StrideError: as ``plan`` says.
    """
    fs, path = filesystem(given)
    try:
        if fs.exists(path):  # first, for a name may hold the characters of a glob
            top = fs.info(path)
            if top["type"] != "directory":
                _refuse_tables(given, [path])
                if isinstance(fs, LocalFileSystem):
                    _refuse_strange(path)
                return [_source_file(fs, given, path, _leaf(path), top)]
            root, found = path, fs.find(path, detail=True)
        elif any(sign in path for sign in "*?["):
            root, found = _expand_glob(fs, path)
        else:
            raise StrideError(f"Input {shown(given)} does not exist; check the path, or create it.")
    except StrideError:
        raise
    except PermissionError as error:
        raise StrideError(f"Input {shown(given)} cannot be read: permission denied ({told(error, given)}).") from None
    except Exception as error:  # every remote file system raises classes of its own
        raise StrideError(
            f"Input {shown(given)} cannot be listed ({told(error, given)}); "
            "check the address, the credentials and the network."
        ) from None
    named = {_relative(file, root): file for file in found}
    kept = _resolve_datasets(fs, [name for name in named if _visible(name)], lambda name: named[name])
    _refuse_tables(given, [named[name] for name in kept])
    files = [_source_file(fs, given, named[name], name, found[named[name]]) for name in sorted(kept)]
    if not files:
        raise StrideError(f"Input {shown(given)} matches no file; check the folder or pattern.")
    if isinstance(fs, LocalFileSystem):
        for name in kept:
            _refuse_strange(named[name])
    return files


def _refuse_strange(path: str) -> None:
    """A local path of which a listing does not tell that it is a whole file."""
    if not os.path.exists(path):
        raise StrideError(f"{shown(path)} is a link to nothing; restore what it points to or remove it.")
    if os.path.isdir(path):
        raise StrideError(f"{shown(path)} is a link to a folder; name that folder as an input of its own.")
    if not os.path.isfile(path):
        raise StrideError(f"{shown(path)} is no file that can be read twice (a pipe?); give a file.")


def _refuse_tables(given: str, paths: Sequence[str]) -> None:
    """A table is no text, though one among other files may be; only an input of nothing else is refused."""
    if paths and all(path.lower().removesuffix(compression(path)).endswith(_TABLES) for path in paths):
        raise StrideError(
            f"Input {shown(given)} is a table that is not read ({', '.join(_TABLES)}); make it Parquet, as in "
            "pandas.read_csv(…).to_parquet(…), or JSON Lines."
        )


def _expand_glob(fs: Any, path: str) -> tuple[str, dict[str, Any]]:
    """The folder before the first magic part of a pattern, and ``{path: info}`` of the files that it matches."""
    parts = path.split("/")
    first = next(i for i, part in enumerate(parts) if any(sign in part for sign in "*?["))
    found: dict[str, Any] = {}
    for match, info in fs.glob(path, detail=True).items():
        found.update(fs.find(match, detail=True) if info["type"] == "directory" else {match: info})
    return "/".join(parts[:first]), found


def _relative(path: str, root: str) -> str:
    return path.removeprefix(root).lstrip("/")


def _visible(name: str) -> bool:
    """Whether to read a file: not hidden, no byte code, and not the empty object that stands for a folder."""
    parts = name.split("/")
    return bool(parts[-1]) and not any(part.startswith(".") or part == "__pycache__" for part in parts)


def _leaf(path: str) -> str:
    # Over HTTP the path is the whole URL: its query is no part of the name.
    path = path.partition("?")[0] if "://" in path else path
    return path.rstrip("/").rpartition("/")[2]


def _source_file(fs: Any, given: str, path: str, name: str, info: dict[str, Any]) -> SourceFile:
    size = info.get("size")
    if info.get("islink"):  # fsspec tells the link's own time
        info = {**info, "mtime": os.stat(path).st_mtime if os.path.exists(path) else None}
    version = next((str(info[key]).strip('"') for key in _VERSION_KEYS if info.get(key) is not None), "")
    # A name that is no valid Unicode (possible on Linux) could not be written to a table.
    name = name.encode("utf-8", "backslashreplace").decode()
    return SourceFile(name, _url(fs, given, path), END if size is None else int(size), version)


def _url(fs: Any, given: str, path: str) -> str:
    """The URL of a path on the file system that ``given`` led to."""
    if isinstance(fs, LocalFileSystem):
        return f"file://{path}"
    first, _, rest = given.partition("::")
    if rest and "://" in first:  # an archive: zip://*.txt::s3://bucket/archive.zip
        return f"{first.partition('://')[0]}://{path.lstrip('/')}::{rest}"
    if rest:  # a cache: simplecache::s3://bucket/folder
        return f"{first}::{rest.partition('://')[0]}://{path}"
    # Keep what stands before the path: host, user and password belong to the file system, not to the path.
    stripped = fs._strip_protocol(given)
    if given.rstrip("/").endswith(stripped):
        return given.rstrip("/").removesuffix(stripped) + path
    return fs.unstrip_protocol(path)


def _resolve_datasets(fs: Any, names: list[str], path_of: Callable[[str], str]) -> list[str]:
    """Names to read once each folder with a saved Hugging Face dataset is reduced to the files that make it up.

    Such a folder also holds metadata, and may hold caches of earlier computations.
    """
    present = set(names)
    folders = {name.removesuffix("state.json") for name in names if name.rpartition("/")[2] == "state.json"}
    folders = {folder for folder in folders if all(folder + leaf in present for leaf in _DATASET_FILES)}
    if not folders:
        return names
    kept = [name for name in names if name.removesuffix(name.rpartition("/")[2]) not in folders]
    parents = {folder.rstrip("/").rpartition("/")[0] for folder in folders}
    dictionaries = {f"{parent}/dataset_dict.json".lstrip("/") for parent in parents}
    kept = [name for name in kept if name not in dictionaries]
    for folder in sorted(folders):
        state = path_of(folder + "state.json")
        try:
            parts = [folder + entry["filename"] for entry in json.loads(fs.cat_file(state))["_data_files"]]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise StrideError(
                f"{shown(state)} does not list a dataset's files ({type(error).__name__}); save it anew."
            ) from None
        missing = [part for part in parts if part not in present]
        if missing:
            raise StrideError(f"{shown(state)} lists {missing[0]}, which is missing; save the dataset anew.")
        kept += parts
    return kept


def _cut(files: list[SourceFile], shard_bytes: int) -> Iterator[Unit]:
    """The units of one input's files, in the order of their first file."""
    kinds = [_kind(file.name) for file in files]
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


def _unit(kind: str, files: tuple[SourceFile, ...], start: int, stop: int) -> Unit:
    identity = json.dumps([kind, [file.name for file in files], start, stop])
    return Unit(f"{kind}-{hashlib.blake2b(identity.encode(), digest_size=10).hexdigest()}", kind, files, start, stop)


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
        raise StrideError(f"{shown(file.url)} cannot be read ({told(error, file.url)}).") from None


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
