"""A folder at any fsspec URL: atomic publishing of whole files, small JSON records, Parquet tables and tensors.

All stages store their state through this module. It guarantees that a file that can be read is complete and unchanged.
A local file is written under a temporary name, synced and renamed; an object store gets a single PUT, which is atomic.
Every file has a checksum that is verified on reading. A JSON record has it under a key, tensors in their metadata. A
table has checksums in its pages and one of the footer in the bytes before it, which other Parquet readers skip.
"""

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from fsspec.implementations.local import LocalFileSystem

from stride_ray.runtime.errors import StrideError, is_storage_error, storage_reason
from stride_ray.runtime.urls import check_folder_name, exists, filesystem, first_line, redact_url, redacted_error

# Rows in a Parquet row group, the smallest part of a file that can be read.
ROW_GROUP = 4096
# Concurrent deletions on an object store.
DELETES = 16
# Key of the checksum, in a JSON record and in the metadata of tensors.
CHECKSUM = "checksum"
# The bytes before the footer of a Parquet file: this mark, the checksum of the pages, and that of pages' checksum and
# footer. TAIL is how many bytes at the end pyarrow, too, reads first.
SEAL, SEAL_BYTES, TAIL = b"xxh3", 36, 1 << 16
# Records that a rerun writes again if they are missing, so a damaged one may be deleted alone.
OPTIONAL = ("latest.json", "units.json", "cost.json", "trust.json", "selection.json")


class Store:
    """A local or remote folder with the operations that stages need. Names are relative and use ``/``.

    Raises (every method): StrideError for a missing file or bucket, a full disk, missing permission or a failed
    connection.
    """

    def __init__(self, url: str) -> None:
        check_folder_name(str(url))
        self.url = str(url).rstrip("/") or "/"
        self.fs, self.root = filesystem(self.url)
        self.local = isinstance(self.fs, LocalFileSystem)

    def __repr__(self) -> str:
        """The folder's URL without secrets."""
        return f"Store({redact_url(self.url)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.anchored_url,)

    @property
    def anchored_url(self) -> str:
        """The URL, absolute for a local folder: a worker that unpickles it may be in another working directory."""
        return self.root if self.local else self.url

    def child(self, name: str) -> "Store":
        """Return the store of the subfolder ``name``, which need not exist."""
        self._check_inside(name)
        return Store(f"{self.url}/{name}")

    def display_url(self, name: str) -> str:
        """The full URL of a file without secrets, for messages."""
        return f"{redact_url(self.url)}/{name}"

    def path(self, name: str) -> str:
        """The path of ``name`` within its file system.

        Raises:
            StrideError: the name leads out of the folder. Names may come from an archive or a listing of the input.
        """
        self._check_inside(name)
        return f"{self.root}/{name}"

    def _check_inside(self, name: str) -> None:
        if ".." in name.replace("\\", "/").split("/"):
            raise StrideError(f"{name!r} leads out of {redact_url(self.url)}; rename that file in the input.")

    def check_claim(self) -> None:
        """Raise StrideError if the folder was claimed and the claim is lost (run.claim)."""

    def exists(self, name: str) -> bool:
        """Whether the file exists."""
        with self.translated_errors(name, "read"):
            return exists(self.fs, self.path(name))

    def names(self, folder: str = "", ending: str = "") -> list[str]:
        """Sorted names directly inside ``folder``, without hidden and partially written files."""
        with self.translated_errors(folder, "list"):
            where = self.path(folder).rstrip("/")
            try:
                found = self.fs.ls(where, detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
        names = (str(path).rstrip("/").rpartition("/")[2] for path in found)
        return sorted(name for name in names if name.endswith(ending) and not name.startswith("."))

    def size(self) -> int:
        """Total bytes in the folder and its subfolders."""
        with self.translated_errors("", "list"):
            return int(self.fs.du(self.root, total=True))

    def read(self, name: str) -> bytes:
        """The whole file."""
        with self.translated_errors(name, "read"):
            return self.fs.cat_file(self.path(name))

    def read_text(self, name: str) -> str:
        """The whole file as text."""
        try:
            return self.read(name).decode()
        except UnicodeDecodeError as error:
            raise StrideError(f"{self.display_url(name)} is not UTF-8 text ({error}).") from None

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Publish a file atomically, replacing an existing one."""
        path = self.path(name)
        with self.translated_errors(name, "write"):
            if not self.local:
                self.fs.pipe_file(path, bytes(data))
                return
            folder = path.rpartition("/")[0]
            os.makedirs(folder, exist_ok=True)
            partial = f"{folder}/.{uuid.uuid4().hex}.partial"  # name + suffix might exceed the system's limit
            try:
                with open(partial, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, path)
            except BaseException:
                if os.path.exists(partial):
                    os.remove(partial)
                raise

    def put(self, name: str, path: str) -> str:
        """Publish a local file atomically, for files too large for memory; a local store moves it.

        Returns:
            The SHA-256 of its content.
        """
        target, digest = self.path(name), hashlib.sha256()
        with open(path, "rb") as file:
            for chunk in iter(lambda: file.read(1 << 20), b""):
                digest.update(chunk)
        with self.translated_errors(name, "write"):
            if not self.local:
                self.fs.put_file(path, target)
                return digest.hexdigest()
            folder = target.rpartition("/")[0]
            os.makedirs(folder, exist_ok=True)
            partial = f"{folder}/.{uuid.uuid4().hex}.partial"
            try:
                shutil.move(path, partial)  # copies across file systems
                with open(partial, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(partial, target)
            finally:
                if os.path.exists(partial):
                    os.remove(partial)
        return digest.hexdigest()

    def remove(self, name: str) -> None:
        """Delete a file, or a folder recursively, if it exists."""
        with self.translated_errors(name, "delete"):
            if not exists(self.fs, self.path(name)):
                return
            if self.local:
                self.fs.rm(self.path(name), recursive=True)
                return
            # One request per file: bulk deletion needs a checksum that boto no longer sends and some stores require.
            with ThreadPoolExecutor(DELETES) as threads:
                list(threads.map(self.fs.rm_file, self.fs.find(self.path(name))))

    def read_json(self, name: str, foreign: bool = False) -> dict[str, Any]:
        """Read a JSON object.

        Args:
            name: name of the file.
            foreign: whether another program may have written the file, without a checksum.

        Raises:
            StrideError: the file is missing, or was damaged or edited.
        """
        return self._parse_record(name, self.read(name), foreign)

    def _parse_record(self, name: str, data: bytes, foreign: bool = False) -> dict[str, Any]:
        """Parse a JSON record and verify its checksum; errors as read_json."""
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise self._damage_error(name, f"is not valid JSON: {first_line(error)}", foreign) from None
        if not isinstance(found, dict):
            raise self._damage_error(name, "does not hold a JSON object", foreign)
        checksum = found.pop(CHECKSUM, None)
        if checksum is None and not foreign:
            raise self._damage_error(
                name, f"has no {CHECKSUM}: another version of stride_ray wrote it, or it was edited"
            )
        if not foreign and checksum != _record_checksum(found):
            raise self._damage_error(name, f"was damaged or edited: its {CHECKSUM} differs")
        return found

    def _damage_error(self, name: str, how: str, foreign: bool = False) -> StrideError:
        """Return the error for a damaged file; ``how`` is the sentence's predicate, ``foreign`` as in read_json."""
        if foreign:
            return StrideError(f"{self.display_url(name)} {how}; correct it.")
        alone = name.startswith("_done/") or name in OPTIONAL
        what = "it" if alone else f"its folder {self.display_url(name).rpartition('/')[0]}"
        return StrideError(
            f"{self.display_url(name)} {how}; restore it, or delete {what} and rerun the command that made it."
        )

    def read_jsons(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Read several JSON records in order; those of a remote store are fetched concurrently."""
        if self.local or not names:
            return [self.read_json(name) for name in names]
        with self.translated_errors(names[0], "read"):
            found = self.fs.cat([self.path(name) for name in names])
        return [self._parse_record(name, found[self.path(name)]) for name in names]

    def read_tensors(self, name: str) -> dict[str, Any]:
        """Read a safetensors file made with ``tensor_bytes``: torch tensors by name.

        Raises:
            StrideError: the file is missing, or was damaged or changed.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        data = self.read(name)
        try:
            found = load(data)
        except SafetensorError as error:
            raise self._damage_error(name, f"cannot be read: {first_line(error)}") from None
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        if header.get("__metadata__", {}).get(CHECKSUM) != _tensor_checksum(found):
            raise self._damage_error(name, f"was damaged or changed: its {CHECKSUM} differs")
        return found

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Publish a JSON record; keys keep their order, and a checksum is added last."""
        value = json.loads(json.dumps(value))  # keys become strings, tuples lists
        self.write(name, (json.dumps({**value, CHECKSUM: _record_checksum(value)}, indent=1) + "\n").encode())

    def write_table(self, name: str, table: pa.Table) -> str:
        """Publish a Parquet file and return its SHA-256; equal tables give equal bytes."""
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, row_group_size=ROW_GROUP, compression="zstd", write_page_checksum=True)
        whole = memoryview(buffer.getvalue())
        pages, footer = whole[: -_footer_bytes(whole)], whole[-_footer_bytes(whole) :]
        data = b"".join([pages, _seal(xxhash.xxh3_128_digest(pages), footer), footer])
        self.write(name, data)
        return hashlib.sha256(data).hexdigest()

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Read a whole Parquet file, or some of its columns."""
        with self.open_parquet(name, whole=self.local) as file:
            return file.read(columns=list(columns) if columns else None)

    @contextmanager
    def open_parquet(self, name: str, whole: bool = False) -> Iterator[pq.ParquetFile]:
        """Open a Parquet file for reading by row group; the footer's checksum is verified if the file has one.

        Args:
            name: name of the file.
            whole: whether to verify the pages up front too, for readers that do not verify page checksums.

        Raises:
            StrideError: the file is missing, damaged or not Parquet.
        """
        with self.translated_errors(name, "read"):
            handle = open(self.path(name), "rb") if self.local else self.fs.open(self.path(name), "rb")  # noqa: SIM115
            with handle:
                try:
                    if not _checksums_match(handle, whole):
                        raise pa.ArrowInvalid("it was damaged or changed: its checksum differs")
                    yield pq.ParquetFile(handle, page_checksum_verification=True)
                except Exception as error:
                    if not is_corrupt(error):
                        raise
                    raise self._damage_error(name, f"cannot be read as Parquet: {first_line(error)}") from None

    @contextmanager
    def translated_errors(self, name: str, verb: str) -> Iterator[None]:
        """Translate exceptions of any file system into a StrideError: "Cannot <verb> <file>: …"."""
        place = self.display_url(name)
        try:
            yield
        except StrideError:
            raise
        except Exception as error:
            if not is_storage_error(error):
                raise
            raise StrideError(self._failure_message(error, verb, place)) from None

    def _failure_message(self, error: BaseException, verb: str, place: str) -> str:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            again = "free some space and run the same command again: finished work is kept."
            return f"No room left to {verb} {place}; {again}"
        reason = storage_reason(error)
        if reason in ("", "there is no such file") and (isinstance(error, FileNotFoundError) or reason):
            missing = "no such file or folder" if self.local or verb != "write" else "no such bucket"
            return f"Cannot {verb} {place}: {missing}."
        if isinstance(error, PermissionError) and not reason:
            return f"Cannot {verb} {place}: permission denied ({first_line(error)})."
        return f"Cannot {verb} {place}: {redacted_error(error, self.url)}"


def is_corrupt(error: BaseException) -> bool:
    """Whether an exception from pyarrow means that a file's content is corrupt.

    pyarrow raises OSError without an errno for some corruption; an OSError of a file system has an errno or a cause.
    """
    return isinstance(error, pa.ArrowInvalid) or (
        type(error) is OSError and error.errno is None and not storage_reason(error)
    )


def seal(path: str) -> None:
    """Insert into a local Parquet file the checksums that ``Store.write_table`` puts before the footer."""
    with open(path, "r+b") as file:
        file.seek(-8, os.SEEK_END)
        pages = file.seek(-_footer_bytes(file.read()), os.SEEK_END)
        footer = file.read()
        sealed = _seal(_prefix_checksum(file, pages), footer) + footer
        file.seek(pages)
        file.write(sealed)


def _footer_bytes(tail: bytes | memoryview) -> int:
    """Return the size of a Parquet footer including its length and magic, given the file's last bytes."""
    return int.from_bytes(tail[-8:-4], "little") + 8


def _seal(pages: bytes, footer: bytes | memoryview) -> bytes:
    return SEAL + pages + xxhash.xxh3_128_digest(b"".join([pages, footer]))


def _prefix_checksum(handle: Any, size: int) -> bytes:
    """Return the checksum of the first ``size`` bytes of a file."""
    found = xxhash.xxh3_128()
    handle.seek(0)
    while chunk := handle.read(min(size, 1 << 22)):
        found.update(chunk)
        size -= len(chunk)
    return found.digest()


def _checksums_match(handle: Any, whole: bool) -> bool:
    """Whether a Parquet file's footer checksum matches, if it has one, and with ``whole`` its pages' checksum too."""
    size = handle.seek(0, os.SEEK_END)
    tail = b""
    for wanted in (TAIL, 0):
        wanted = min(size, wanted or _footer_bytes(tail) + SEAL_BYTES)
        if len(tail) < wanted:
            handle.seek(-wanted, os.SEEK_END)
            tail = handle.read(wanted)
    footer = tail[-_footer_bytes(tail) :]
    seal = tail[: -len(footer)][-SEAL_BYTES:]
    if not seal.startswith(SEAL):
        return True
    fits = seal == _seal(seal[len(SEAL) : 20], footer)
    if fits and whole:
        fits = _prefix_checksum(handle, size - len(footer) - SEAL_BYTES) == seal[len(SEAL) : 20]
    handle.seek(0)
    return fits


def _record_checksum(value: dict[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


def tensor_bytes(tensors: dict[str, Any]) -> bytes:
    """Serialise torch tensors in the safetensors format, with a checksum in the metadata."""
    from safetensors.torch import save

    tensors = {name: value.contiguous() for name, value in tensors.items()}
    return save(tensors, {CHECKSUM: _tensor_checksum(tensors)})


def _tensor_checksum(tensors: dict[str, Any]) -> str:
    """A checksum of names, types, shapes and values."""
    import torch

    found = xxhash.xxh3_128()
    for name, value in sorted(tensors.items()):
        found.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        found.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
