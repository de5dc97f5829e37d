"""Local paths and fingerprints of models; models in an object store are fetched to a cache, atomically."""

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

from stride_ray.runtime.config import digest
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.urls import filesystem, first_line, looks_local, redact_url, redacted_error

# Files that define a model; the tokenizer, the model card and logs do not change what it computes.
WEIGHTS = ("config.json", ".safetensors", ".bin", ".gguf", ".py")
# Files up to LARGE bytes are hashed in full; of larger ones, WINDOWS evenly spaced pieces of WINDOW bytes.
LARGE, WINDOWS, WINDOW = 2**26, 256, 2**16


def local_model(path: str | Path) -> str:
    """Return a model's local path: local paths and hub ids unchanged, fsspec URLs after fetching them to a cache.

    The cache is ``$XDG_CACHE_HOME/stride_ray/models`` (default ``~/.cache``) or, if not writable, a folder under
    TMPDIR. It has one entry per URL and version of the files, written atomically. Subfolders, such as training
    checkpoints, are not fetched.

    Raises:
        StrideError: if there is no model at ``path``, or it cannot be fetched.
    """
    text = os.path.expanduser(os.fspath(path))
    if "://" in text:
        return _fetch_model(text)
    if os.path.isdir(text):
        if not os.path.exists(os.path.join(text, "config.json")):
            raise StrideError(f"{path} is not a model folder: it has no config.json")
    elif os.path.exists(text) and not text.endswith(".gguf"):
        raise StrideError(f"{path} is a file; give a model folder, a .gguf file or a hub id")
    elif not os.path.exists(text) and looks_local(text):
        raise StrideError(f"model path {path} does not exist")
    return text


def model_fingerprint(path: str | Path) -> str:
    """Return a fingerprint of a model's files (WEIGHTS), independent of their location: sixteen hexadecimal digits.

    It covers names, sizes and content of a local model, the ETags of one in an object store, and the commit of a hub
    id. Large local files are sampled at WINDOWS places: training changes all weights, so it is detected, but an edit of
    a few bytes may not be.

    Raises:
        StrideError: if there is no such model.
    """
    if "://" in (text := os.fspath(path)):
        try:
            files, found = _list_model_files(text)
            return digest(sorted((n, _file_version(files, entry)) for n, entry in found.items() if n.endswith(WEIGHTS)))
        except StrideError:
            raise
        except Exception as error:
            raise StrideError(f"model {redact_url(text)} cannot be listed ({redacted_error(error, text)})") from None
    local = Path(local_model(path))
    if not local.exists():
        return digest(_hub_commit(text))
    beside = [local] if local.is_file() else [each for each in local.iterdir() if each.is_file()]
    weights = sorted(each for each in beside if each.name.endswith(WEIGHTS))
    return digest([(each.name, each.stat().st_size, _content_hash(each)) for each in weights])


def _content_hash(path: Path) -> str:
    size, found = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as file:
        if size <= LARGE:
            found.update(file.read())
        else:
            for i in range(WINDOWS):
                file.seek((size - WINDOW) * i // (WINDOWS - 1))
                found.update(file.read(WINDOW))
    return found.hexdigest()


def _hub_commit(hub_id: str) -> str:
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        return extract_commit_hash(cached_file(hub_id, "config.json"), None) or ""
    except Exception as error:  # the hub raises types of its own
        raise loading_error(hub_id, hub_id, error) from error


def loading_error(path: str | Path, local: str, error: Exception) -> StrideError:
    """Return the StrideError for a model that cannot be loaded from ``local``, the result of ``local_model``."""
    hub = "" if os.path.exists(local) else f"no such path from {os.getcwd()}, and Hugging Face Hub error: "
    return StrideError(f"model {redact_url(str(path))} could not be loaded: {hub}{first_line(error)}")


def _list_model_files(url: str) -> tuple[Any, dict[str, Any]]:
    """Return the file system of a model's URL and its entries by file name; StrideError if they are not a model."""
    files, root = filesystem(url)
    found = {e["name"].rsplit("/", 1)[-1]: e for e in files.ls(root, detail=True) if e["type"] == "file"}
    if "config.json" not in found and not (found and url.endswith(".gguf")):
        raise StrideError(f"{redact_url(url)} is not a model folder: it has no config.json")
    return files, found


def _file_version(files: Any, entry: dict[str, Any]) -> str:
    return str(entry.get("ETag") or files.ukey(entry["name"]))


def _cache_folder() -> Path:
    """Return the user's model cache or, if it is not writable, a folder under TMPDIR that belongs to this user.

    Raises:
        StrideError: the folder under TMPDIR belongs to another user, who could put files into it.
    """
    home = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "stride_ray" / "models"
    if home.is_absolute():  # a relative path means that this user has no home
        with contextlib.suppress(OSError):
            home.mkdir(parents=True, exist_ok=True)
            if os.access(home, os.W_OK):
                return home
    folder = Path(tempfile.gettempdir()) / f"stride_ray-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise StrideError(f"{home} cannot be written, and {folder} is another user's; set XDG_CACHE_HOME to a folder.")
    return folder / "models"


def _fetch_model(url: str) -> str:
    cache = _cache_folder()
    try:
        files, found = _list_model_files(url)
        state = sorted((name, _file_version(files, entry)) for name, entry in found.items())
        target = cache / hashlib.sha256(repr((url, state)).encode()).hexdigest()[:16]
        if not target.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix="fetching-") as beside:
                os.mkdir(whole := os.path.join(beside, "model"))
                for name, entry in found.items():
                    files.get_file(entry["name"], os.path.join(whole, name))
                with contextlib.suppress(OSError):  # another process was first; its copy is identical
                    os.replace(whole, target)
    except StrideError:
        raise
    except Exception as error:  # each store raises types of its own
        why = redacted_error(error, url)
        raise StrideError(f"model {redact_url(url)} could not be fetched to {cache} ({why})") from None
    return str(target / next(iter(found))) if url.endswith(".gguf") else str(target)
