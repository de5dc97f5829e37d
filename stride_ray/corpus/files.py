"""Listing the files of an input (paths, folders, globs, URLs), with size and version to detect changes."""

import json
import os
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

from fsspec.implementations.local import LocalFileSystem

from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.urls import exists, filesystem, redact_url, redacted_error

# ``InputSplit.stop`` of a unit that extends to the end of its file; also an unknown file size.
END = -1

_COMPRESSIONS = (".gz", ".zst")
# Packings and archives that are not read; such files are rejected by name.
PACKED = (".bz2", ".xz", ".lz4", ".br", ".zip", ".7z", ".tar", ".tgz")
_KINDS = {
    **dict.fromkeys((".jsonl", ".jsonlines", ".ndjson", ".json"), "jsonl"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".arrow", ".feather"), "arrow"),  # Feather's second version is Arrow's file format
}
_TABLES = (".csv", ".tsv", ".xls", ".xlsx")
_CONVERT = "make it Parquet, as in pandas.read_csv(…).to_parquet(…), or JSON Lines"
_DATASET_FILES = ("state.json", "dataset_info.json")
# What writers leave beside their files: Spark, Databricks, Dask and pyarrow; checksums of Hadoop; desktops.
_MARKERS = re.compile(
    r"_SUCCESS|_metadata|_common_metadata|_committed_\d+|_started_\d+|.*\.crc|thumbs\.db|desktop\.ini", re.IGNORECASE
)
# What data sets keep beside their data: the card, the licence, descriptions by the library datasets and others.
_COMPANIONS = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|changelog|requirements|sha256sums|md5sums|checksums?)(\..*)?"
    r"|(dataset_infos?|dataset_dict|state|croissant|metadata|schema|index|stats|statistics|config|package)\.json",
    re.IGNORECASE,
)
# The card at the top of a data set of the Hub begins with YAML that has some of these keys.
_CARD = "readme.md"
_CARD_BYTES = 1 << 14
_CARD_KEYS = re.compile(
    rb"\A(\xef\xbb\xbf)?---\r?\n(?:(?!---).*\n)*?"
    rb"([\"']?)(annotations_creators|configs|dataset_info|extra_gated_\w+|language_bcp47|language_creators|languages?"
    rb"|licenses?|license_\w+|modalities|multilinguality|paperswithcode_id|pretty_name|size_categories|source_datasets|tags"
    rb"|task_categories|task_ids|train-eval-index|viewer|arxiv|doi|library_name)\2\s*:"
)
# Keys under which file systems report a file's version; the first one present is used.
_VERSION_KEYS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")


class SourceFile(NamedTuple):
    """One file of the input.

    Attributes:
        name: path relative to the root of its input, so that moving the input changes no identity.
        url: where to read it, including credentials in the input's URL; use ``redact_url`` in messages.
        size: bytes; END if the file system does not report it.
        version: ETag or modification time, which changes with the content; empty if unknown.
    """

    name: str
    url: str
    size: int
    version: str

    @property
    def content(self) -> tuple[int, str]:
        """Size and version, whose equality means an unchanged file as far as its file system reports."""
        return self.size, self.version


def refreshed(file: SourceFile) -> SourceFile:
    """The file with its current size and version; exceptions of the file system pass through."""
    fs, path = filesystem(file.url)
    return _source_file(fs, file.url, path, file.name, fs.info(path))


def compression(name: str) -> str:
    """The compression suffix of a file name: ".gz", ".zst" or "" if uncompressed."""
    return next((ending for ending in _COMPRESSIONS if name.lower().endswith(ending)), "")


def kind_of(name: str) -> str:
    """The unit kind of a file by its suffix, ignoring that of a compression; anything unknown is text."""
    packed = compression(name)
    name = re.sub(r"(\.parquet)\.snappy$", r"\1", name, flags=re.IGNORECASE)  # the codec of its pages
    kind = _KINDS.get(_suffix(name), "text")
    # Compressed Parquet or Arrow files are not supported; read as text, they are rejected by name.
    return "text" if packed and kind != "jsonl" else kind


def list_files(given: str, left_out: list[str] | None = None) -> list[SourceFile]:
    """The files of one input that hold documents, sorted by name.

    Left out of a folder or glob are hidden files, markers such as ``_SUCCESS``, and, where there are data files, tables
    (CSV, Excel) and what lies in a folder with data files (in it or below) beside them: all that is neither a data file
    nor ``.txt``, cards, licences, descriptions, names with an underscore in front. Below the card of a data set of the
    Hub, all that is neither a data file nor ``.txt`` is left out, such as the scripts that made it.

    Args:
        given: a file, folder, glob or URL.
        left_out: takes the names of files left out; of a folder of which nothing is kept, its own with a slash, unless
            it has tables.

    Raises:
        StrideError: the input is missing or cannot be read, matches no file, or has tables (CSV, Excel) and no data.
    """
    if not given.strip():
        raise StrideError("An input's name is empty, which would be the working folder; give a path or URL, or '.'.")
    fs, path = filesystem(given)
    try:
        if exists(fs, path):  # checked first, because a name may contain glob characters
            top = fs.info(path)
            if top["type"] != "directory":
                if _is_table(path):
                    raise StrideError(f"Input {redact_url(given)} is a table that is not read; {_CONVERT}.")
                if isinstance(fs, LocalFileSystem):
                    _check_regular_file(path)
                return [_source_file(fs, given, path, _leaf(path), top)]
            root, found = path, fs.find(path, detail=True)
        elif any(sign in path for sign in "*?["):
            root, found = _expand_glob(fs, path)
        else:
            raise StrideError(f"Input {redact_url(given)} does not exist; check the path, or create it.")
    except StrideError:
        raise
    except PermissionError as error:
        why = redacted_error(error, given)
        raise StrideError(f"Input {redact_url(given)} cannot be read: permission denied ({why}).") from None
    except Exception as error:  # remote file systems raise their own classes
        raise StrideError(
            f"Input {redact_url(given)} cannot be listed ({redacted_error(error, given)}); "
            "check the address, the credentials and the network."
        ) from None
    named = {_relative(file, root): file for file in found}
    kept = _resolve_datasets(fs, [name for name in named if _visible(name)], lambda name: named[name])
    kept = _documents(kept, lambda name: _is_card(fs, named[name], given))
    tables = [name for name in kept if _is_table(name)]
    if tables:  # and no data files
        others = f" and {len(tables) - 1} more" if len(tables) > 1 else ""
        raise StrideError(
            f"Input {redact_url(given)} has tables that are not read: {tables[0]}{others}; {_CONVERT}. To read only "
            "what lies beside them, name it: a file, or a pattern such as *.txt."
        )
    if left_out is not None:
        left_out += _left_out(named, set(kept))
    files = [_source_file(fs, given, named[name], name, found[named[name]]) for name in sorted(kept)]
    if not files:
        gone = sorted(name for name in named if _leaf(name))
        others = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
        why = f" that is read: {gone[0]}{others} is left out by its name (hidden, private or a marker)" if gone else ""
        raise StrideError(f"Input {redact_url(given)} matches no file{why}; check the folder or pattern.")
    if isinstance(fs, LocalFileSystem):
        for name in kept:
            _check_regular_file(named[name])
    return files


def _check_regular_file(path: str) -> None:
    """Raise StrideError for a local path that is not a regular file: a broken link, a link to a folder, a pipe."""
    if not os.path.exists(path):
        raise StrideError(f"{redact_url(path)} is a link to nothing; restore what it points to or remove it.")
    if os.path.isdir(path):
        raise StrideError(f"{redact_url(path)} is a link to a folder; name that folder as an input of its own.")
    if not os.path.isfile(path):
        raise StrideError(f"{redact_url(path)} is not a regular file (a pipe?); give a file.")


def _is_table(name: str) -> bool:
    return _suffix(name) in _TABLES


def _expand_glob(fs: Any, path: str) -> tuple[str, dict[str, Any]]:
    """The folder before the first wildcard of a pattern, and ``{path: info}`` of the files that it matches."""
    parts = path.split("/")
    first = next(i for i, part in enumerate(parts) if any(sign in part for sign in "*?["))
    found: dict[str, Any] = {}
    for match, info in fs.glob(path, detail=True).items():
        found.update(fs.find(match, detail=True) if info["type"] == "directory" else {match: info})
    return "/".join(parts[:first]), found


def _relative(path: str, root: str) -> str:
    return path.removeprefix(root).lstrip("/")


def _visible(name: str) -> bool:
    """Whether to read a file: not hidden, not byte code, and not the empty object that represents a folder."""
    parts = name.split("/")
    return bool(parts[-1]) and not any(part.startswith(".") or part == "__pycache__" for part in parts)


def _is_card(fs: Any, path: str, given: str) -> bool:
    """Whether a file is the card of a data set, as the Hub has it."""
    try:
        return _CARD_KEYS.match(fs.cat_file(path, start=0, end=_CARD_BYTES)) is not None
    except Exception as error:  # remote file systems raise their own classes
        raise StrideError(f"{redact_url(path)} cannot be read ({redacted_error(error, given)}).") from None


def _documents(names: list[str], is_card: Callable[[str], bool]) -> list[str]:
    """The names without markers and, where there are data files, without what lies beside them or below their card."""
    names = [name for name in names if not _MARKERS.fullmatch(_leaf(name))]
    data = {name for name in names if kind_of(name) != "text" and not _COMPANIONS.fullmatch(_leaf(name))}
    objects = {name for name in data if _suffix(name) == ".json"}
    texts = [name for name in names if kind_of(name) == "text" and not _COMPANIONS.fullmatch(_leaf(name))]
    # Code and texts come with some JSON of their own, which makes no data set of them.
    if objects and len(objects) <= sum(not _is_table(name) for name in texts):
        data -= objects
    if not data:
        return names
    # Cards stand at the top of a data set, private files beside the data or its partitions (``date=2026-01-01/``).
    above = {folder for name in data for folder in _folders(name)}
    beside = {folder for name in data for folder in _folders(name) if _is_partitioned(name.removeprefix(folder))}
    kept = [
        name
        for name in names
        if not _is_table(name)
        and not (_folders(name)[-1] in above and not _is_data_or_text(name))
        and not any(_is_private(name.removeprefix(folder)) for folder in beside if name.startswith(folder))
    ]
    loose = [name for name in kept if not _is_data_or_text(name)]
    carded = [
        folder
        for card in sorted(name for name in names if _leaf(name).lower() == _CARD)
        if (folder := _folders(card)[-1]) in above and any(name.startswith(folder) for name in loose) and is_card(card)
    ]
    return [name for name in kept if _is_data_or_text(name) or not any(map(name.startswith, carded))]


def _is_data_or_text(name: str) -> bool:
    """Whether a file beside data files is one too, or a text; what is packed so that it is not read is told later."""
    suffix = _suffix(name)
    held = kind_of(name) != "text" or suffix in _KINDS or suffix == ".txt" or name.lower().endswith(PACKED)
    return held and not _COMPANIONS.fullmatch(_leaf(name))


def _folders(name: str) -> list[str]:
    """The folders of a name from the root, which is "", each with a slash at its end."""
    parts = name.split("/")[:-1]
    return ["".join(f"{part}/" for part in parts[:depth]) for depth in range(len(parts) + 1)]


def _is_partitioned(rest: str) -> bool:
    return all("=" in part for part in rest.split("/")[:-1])


def _is_private(rest: str) -> bool:
    return rest.startswith("_") and not rest.startswith("__")


def _left_out(names: Iterable[str], kept: Collection[str]) -> list[str]:
    """The names that are not kept, sorted; of a folder of which nothing is, its own name with a slash."""
    used = {folder for name in kept for folder in _folders(name)} | {""}
    gone = (name for name in names if name not in kept and _leaf(name))
    return sorted(
        {
            next((folder for folder in _folders(name) if folder not in used and not _is_table(name)), name)
            for name in gone
        }
    )


def _suffix(name: str) -> str:
    return os.path.splitext(name.lower().removesuffix(compression(name)))[1]


def _leaf(path: str) -> str:
    # Over HTTP the path is the whole URL; its query is not part of the name.
    path = path.partition("?")[0] if "://" in path else path
    return path.rstrip("/").rpartition("/")[2]


def _source_file(fs: Any, given: str, path: str, name: str, info: dict[str, Any]) -> SourceFile:
    size = info.get("size")
    if info.get("islink"):  # fsspec reports the link's own modification time
        info = {**info, "mtime": os.stat(path).st_mtime if os.path.exists(path) else None}
    version = next((str(info[key]).strip('"') for key in _VERSION_KEYS if info.get(key) is not None), "")
    # A file name that is not valid Unicode (possible on Linux) could not be written to a table.
    name = name.encode("utf-8", "backslashreplace").decode()
    return SourceFile(name, _url(fs, given, path), END if size is None else int(size), version)


def _url(fs: Any, given: str, path: str) -> str:
    """The URL of a path on the file system of the input ``given``."""
    if isinstance(fs, LocalFileSystem):
        return f"file://{path}"
    first, _, rest = given.partition("::")
    if rest and "://" in first:  # an archive: zip://*.txt::s3://bucket/archive.zip
        return f"{first.partition('://')[0]}://{path.lstrip('/')}::{rest}"
    if rest:  # a cache: simplecache::s3://bucket/folder
        return f"{first}::{rest.partition('://')[0]}://{path}"
    # Keep the prefix of the path: host, user and password belong to the file system, not to the path.
    stripped = fs._strip_protocol(given)
    if given.rstrip("/").endswith(stripped):
        return given.rstrip("/").removesuffix(stripped) + path
    return fs.unstrip_protocol(path)


def _resolve_datasets(fs: Any, names: list[str], path_of: Callable[[str], str]) -> list[str]:
    """The names to read, with each saved Hugging Face dataset reduced to its data files.

    The folder of a dataset also holds metadata and possibly caches of earlier computations.
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
        except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
            raise StrideError(
                f"{redact_url(state)} does not list a dataset's files ({type(error).__name__}); save it anew."
            ) from None
        missing = [part for part in parts if part not in present]
        if missing:
            raise StrideError(f"{redact_url(state)} lists {missing[0]}, which is missing; save the dataset anew.")
        kept += parts
    return kept
