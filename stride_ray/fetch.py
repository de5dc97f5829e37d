"""Where a model is on this machine: what lies in an object store is fetched to a cache, whole or not at all."""

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

from stride_ray.errors import StrideError
from stride_ray.storage import file_system, first_line


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


def _fetched(url: str) -> str:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "stride_ray" / "models"
    try:
        files, root = file_system(url)
        found = {e["name"].rsplit("/", 1)[-1]: e for e in files.ls(root, detail=True) if e["type"] == "file"}
        if "config.json" not in found and not (found and url.endswith(".gguf")):
            raise StrideError(f"{url} is not a model folder: it has no config.json")
        state = sorted((name, files.ukey(entry["name"])) for name, entry in found.items())
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
