"""A folder at any fsspec URL: atomic publishing of whole files, small JSON records and Parquet tables.

Every stage keeps its state through this file alone, so that one rule holds everywhere: a name that can be read is
complete. Locally a file is written beside its place, synced and renamed; an object store gets one PUT, which is
atomic there.
"""

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.urls import first_line, open_url, safe_url

# Rows in a Parquet row group; readers that want a few rows of a file read whole groups.
ROW_GROUP = 4096
# Files of an object store that are deleted side by side.
DELETES = 16


class Store:
    """A folder, local or remote, with the few operations that stages need. Names are relative, with ``/``.

    Raises (every method): StrideError for a missing file, no permission, no room, no bucket or no connection.
    """

    def __init__(self, url: str) -> None:
        self.url = str(url).rstrip("/") or "/"
        try:
            if "://" in self.url:
                self.fs, self.root = open_url(self.url)
            else:  # a local name may hold "::", which fsspec would take for a chain of URLs
                self.fs, self.root = LocalFileSystem(), LocalFileSystem._strip_protocol(self.url)
        except (ValueError, ImportError) as error:
            raise StrideError(f"{safe_url(self.url)} is not a path or URL that can be opened: {error}.") from None
        self.local = isinstance(self.fs, LocalFileSystem)

    def __repr__(self) -> str:
        """The folder's URL without secrets."""
        return f"Store({safe_url(self.url)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.url,)

    def child(self, name: str) -> "Store":
        """The folder ``name`` below this one (it need not exist)."""
        self._refuse_above(name)
        return Store(f"{self.url}/{name}")

    def name_of(self, name: str) -> str:
        """The full URL of a file, for messages."""
        return f"{safe_url(self.url)}/{name}"

    def path(self, name: str) -> str:
        """The path of ``name`` as the file system itself wants it.

        Raises:
            StrideError: the name leads out of the folder; names may come from an input's archive or listing.
        """
        self._refuse_above(name)
        return f"{self.root}/{name}"

    def _refuse_above(self, name: str) -> None:
        if ".." in name.replace("\\", "/").split("/"):
            raise StrideError(f"{name!r} leads out of {safe_url(self.url)}; rename it in the input.")

    def exists(self, name: str) -> bool:
        """Whether a file of that name is there."""
        with self.translated_errors(name, "read"):
            return bool(self.fs.exists(self.path(name)))

    def names(self, folder: str = "", ending: str = "") -> list[str]:
        """Names directly inside ``folder``, sorted, without hidden and half-written ones."""
        with self.translated_errors(folder, "list"):
            where = self.path(folder).rstrip("/")
            try:
                found = self.fs.ls(where, detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
        names = (str(path).rstrip("/").rpartition("/")[2] for path in found)
        return sorted(name for name in names if name.endswith(ending) and not name.startswith("."))

    def size(self) -> int:
        """Bytes of all that lies in the folder and below it."""
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
            raise StrideError(f"{self.name_of(name)} is not UTF-8 text ({error}).") from None

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Publish a whole file atomically, replacing an older one."""
        path = self.path(name)
        with self.translated_errors(name, "write"):
            if not self.local:
                self.fs.pipe_file(path, bytes(data))
                return
            folder = path.rpartition("/")[0]
            os.makedirs(folder, exist_ok=True)
            partial = f"{folder}/.{uuid.uuid4().hex}.partial"  # the whole name may be as long as the system lets it
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
        """Publish a local file atomically, for what is too large to hold in memory, and perhaps move it.

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
                shutil.move(path, partial)  # a copy where the two are on different disks
                with open(partial, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(partial, target)
            finally:
                if os.path.exists(partial):
                    os.remove(partial)
        return digest.hexdigest()

    def remove(self, name: str) -> None:
        """Delete a file or a folder with all it holds, if it is there."""
        with self.translated_errors(name, "delete"):
            if not self.fs.exists(self.path(name)):
                return
            if self.local:
                self.fs.rm(self.path(name), recursive=True)
                return
            # One request a file: many at once want a checksum that boto no longer sends and some stores insist on.
            with ThreadPoolExecutor(DELETES) as threads:
                list(threads.map(self.fs.rm_file, self.fs.find(self.path(name))))

    def read_json(self, name: str) -> Any:
        """A JSON record."""
        return self._json(name, self.read(name))

    def _json(self, name: str, data: bytes) -> Any:
        try:
            return json.loads(data)
        except ValueError as error:
            raise StrideError(f"{self.name_of(name)} is not valid JSON ({error}); restore or delete it.") from None

    def read_jsons(self, names: Sequence[str]) -> list[Any]:
        """Many JSON records, fetched at once where the file system can."""
        if self.local or not names:
            return [self.read_json(name) for name in names]
        with self.translated_errors(names[0], "read"):
            found = self.fs.cat([self.path(name) for name in names])
        return [self._json(name, found[self.path(name)]) for name in names]

    def read_tensors(self, name: str) -> dict[str, Any]:
        """The torch tensors of a safetensors file.

        Raises:
            StrideError: for a file that is missing, or cut short.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return load(self.read(name))
        except SafetensorError as error:
            raise StrideError(
                f"{self.name_of(name)} cannot be read ({first_line(error)}); restore or delete it."
            ) from None

    def write_json(self, name: str, value: Any) -> None:
        """Publish a JSON record, keys in the order given."""
        self.write(name, (json.dumps(value, indent=1) + "\n").encode())

    def write_table(self, name: str, table: pa.Table) -> str:
        """Publish a Parquet file; the same table gives the same bytes. Returns their SHA-256."""
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, row_group_size=ROW_GROUP, compression="zstd", write_statistics=True)
        data = memoryview(buffer.getvalue())
        self.write(name, data)
        return hashlib.sha256(data).hexdigest()

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A whole Parquet file, or some of its columns."""
        with self.open_parquet(name) as file:
            return file.read(columns=list(columns) if columns else None)

    @contextmanager
    def open_parquet(self, name: str) -> Iterator[pq.ParquetFile]:
        """A Parquet file to read by row groups.

        Raises:
            StrideError: for a file that is missing or not Parquet.
        """
        with self.translated_errors(name, "read"):
            handle = open(self.path(name), "rb") if self.local else self.fs.open(self.path(name), "rb")  # noqa: SIM115
        with handle:
            try:
                file = pq.ParquetFile(handle)
                yield file
            except (pa.ArrowInvalid, OSError) as error:
                raise StrideError(f"{self.name_of(name)} cannot be read as Parquet: {first_line(error)}") from None

    @contextmanager
    def translated_errors(self, name: str, deed: str) -> Iterator[None]:
        """Turn what file systems raise into one sentence."""
        place = self.name_of(name)
        try:
            yield
        except FileNotFoundError as error:
            missing = "bucket" if "bucket does not exist" in str(error) else "file or folder"
            raise StrideError(f"Cannot {deed} {place}: no such {missing}.") from None
        except PermissionError as error:
            raise StrideError(f"Cannot {deed} {place}: permission denied ({first_line(error)}).") from None
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StrideError(
                    f"No room left to {deed} {place}; free some space and run the same command again: "
                    "what is done is kept."
                ) from None
            raise StrideError(f"Cannot {deed} {place}: {first_line(error)}") from None
        except Exception as error:
            # botocore and aiohttp raise classes of their own; importing them to name them would tie us to S3.
            if type(error).__module__.split(".")[0] in ("botocore", "aiobotocore", "aiohttp", "s3fs"):
                raise StrideError(f"Cannot {deed} {place}: {first_line(error)}") from None
            raise


def refuse_inside(store: Store, inputs: Iterable[str], what: str) -> None:
    """Raise StrideError where an output folder lies in an input, whose next reader would take it for text."""
    for given in inputs:
        if "://" in given or not store.local:
            inside = store.url.startswith(given.rstrip("/") + "/")
        else:
            folder = Path(given).resolve()
            inside = folder.is_dir() and Path(store.root).resolve().is_relative_to(folder)
        if inside:
            raise StrideError(f"{what} {safe_url(store.url)} lies in the input {safe_url(given)}; put it elsewhere.")


def tensor_bytes(tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> bytes:
    """Torch tensors as one safetensors file."""
    from safetensors.torch import save

    return save({name: value.contiguous() for name, value in tensors.items()}, metadata)
