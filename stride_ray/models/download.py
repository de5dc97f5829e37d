"""Where a model is on this machine, and which: an object store's is fetched to a cache, whole or not at all."""

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

from stride_ray.runtime.config import digest
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.urls import first_line, open_url

# What a model is, of the files that lie beside it: a tokenizer's, a card and logs change nothing that it computes.
WEIGHTS = ("config.json", ".safetensors", ".bin", ".gguf", ".py")
# A file up to LARGE bytes is hashed whole; of a larger one, WINDOWS pieces of WINDOW bytes at even distances.
LARGE, WINDOWS, WINDOW = 2**26, 256, 2**16


def local_model(path: str | Path) -> str:
    """Where a model is on this machine: local paths and hub ids as they are, fsspec URLs fetched to a cache.

    The cache is ``$XDG_CACHE_HOME/stride_ray/models`` (default ``~/.cache``), one entry per URL and state of its files,
    whole or absent; folders inside the model's, such as training checkpoints, are not fetched. Raises StrideError.
    """
    text = os.path.expanduser(os.fspath(path))
    if "://" in text:
        return _fetched(text)
    if os.path.isdir(text):
        if not os.path.exists(os.path.join(text, "config.json")):
            raise StrideError(f"{path} is not a model folder: it has no config.json")
    elif os.path.exists(text) and not text.endswith(".gguf"):
        raise StrideError(f"{path} is a file; give a model folder, a .gguf file or a hub id")
    elif not os.path.exists(text) and (text.endswith(".gguf") or text.startswith((".", "/")) or text.count("/") > 1):
        raise StrideError(f"model path {path} does not exist")
    return text


def model_state(path: str | Path) -> str:
    """Sixteen hexadecimal digits that change with a model's files (WEIGHTS), wherever they lie.

    Of a local model they come from names, sizes and content (a large file's at WINDOWS places: training moves all
    weights, and a change of a few bytes by hand may go unseen), of one in an object store from its ETags, of a hub id
    from the commit. Raises StrideError where there is no such model.
    """
    if "://" in (text := os.fspath(path)):
        try:
            files, found = _listed(text)
            return digest(sorted((n, _version(files, entry)) for n, entry in found.items() if n.endswith(WEIGHTS)))
        except StrideError:
            raise
        except Exception as error:
            raise StrideError(f"model {text} cannot be listed: {first_line(error)}") from error
    local = Path(local_model(path))
    if not local.exists():
        return digest(_commit(text))
    beside = [local] if local.is_file() else [each for each in local.iterdir() if each.is_file()]
    weights = sorted(each for each in beside if each.name.endswith(WEIGHTS))
    return digest([(each.name, each.stat().st_size, _content(each)) for each in weights])


def _content(path: Path) -> str:
    size, found = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as file:
        if size <= LARGE:
            found.update(file.read())
        else:
            for i in range(WINDOWS):
                file.seek((size - WINDOW) * i // (WINDOWS - 1))
                found.update(file.read(WINDOW))
    return found.hexdigest()


def _commit(hub_id: str) -> str:
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        return extract_commit_hash(cached_file(hub_id, "config.json"), None) or ""
    except Exception as error:  # the hub's own
        raise unloadable(hub_id, hub_id, error) from error


def unloadable(path: str | Path, local: str, error: Exception) -> StrideError:
    """The sentence for a model that cannot be loaded from where ``local_model`` says that it is."""
    hub = "" if os.path.exists(local) else f"no such path from {os.getcwd()}, and the Hugging Face Hub says: "
    return StrideError(f"model {path} could not be loaded: {hub}{first_line(error)}")


def _listed(url: str) -> tuple[Any, dict[str, Any]]:
    """The file system of a model's URL and its files by name; StrideError where these are no model."""
    files, root = open_url(url)
    found = {e["name"].rsplit("/", 1)[-1]: e for e in files.ls(root, detail=True) if e["type"] == "file"}
    if "config.json" not in found and not (found and url.endswith(".gguf")):
        raise StrideError(f"{url} is not a model folder: it has no config.json")
    return files, found


def _version(files: Any, entry: dict[str, Any]) -> str:
    return str(entry.get("ETag") or files.ukey(entry["name"]))


def _fetched(url: str) -> str:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "stride_ray" / "models"
    try:
        files, found = _listed(url)
        state = sorted((name, _version(files, entry)) for name, entry in found.items())
        target = cache / hashlib.sha256(repr((url, state)).encode()).hexdigest()[:16]
        if not target.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix="fetching-") as beside:
                os.mkdir(whole := os.path.join(beside, "model"))
                for name, entry in found.items():
                    files.get_file(entry["name"], os.path.join(whole, name))
                with contextlib.suppress(OSError):  # another process was faster: its copy is as good
                    os.replace(whole, target)
    except StrideError:
        raise
    except Exception as error:  # each store has exceptions of its own
        raise StrideError(f"model {url} could not be fetched to {cache}: {first_line(error)}") from error
    return str(target / next(iter(found))) if url.endswith(".gguf") else str(target)
