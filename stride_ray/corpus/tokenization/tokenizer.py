"""Tokenizers: loading them from folders, files, URLs and hubs, and what is known about one."""

import json
import os
import tempfile
import weakref
from typing import Any

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from xxhash import xxh3_128_hexdigest

from stride_ray.runtime.config import digest
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.storage import Store
from stride_ray.runtime.urls import filesystem, first_line, looks_local, redact_url, redacted_error

# Not downloaded with a tokenizer.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt")
# Beside the blocks: the xxh3_128 of each file of the saved tokenizer.
TOKENIZER_CHECKSUMS = "tokenizer/checksums.json"


def load_tokenizer(path: "str | os.PathLike[str] | tokenizers.Tokenizer | PreTrainedTokenizerBase") -> Any:
    """Load a Hugging Face tokenizer for texts of any length.

    Args:
        path: a model or tokenizer folder, a ``tokenizer.json`` or a ``.gguf`` file, each local or at an fsspec URL; a
            hub id; or a tokenizer object.

    Returns:
        A transformers tokenizer without length warnings. A ``tokenizer.json`` may configure truncation or padding;
        encoding.py disables both.

    Raises:
        StrideError: the tokenizer does not exist or cannot be read.
    """
    if isinstance(path, PreTrainedTokenizerBase):
        tokenizer: Any = path
    elif isinstance(path, tokenizers.Tokenizer):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=path)
    elif "://" in (place := os.fspath(path)):
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = _load_local(_downloaded(place, folder), redact_url(place))
    else:
        place = os.path.expanduser(place)
        if looks_local(place) and not os.path.exists(place):
            raise StrideError(f"There is no tokenizer at {place}; check the path.")
        tokenizer = _load_local(place, place)
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def load_saved_tokenizer(blocks: Store) -> Any:
    """The tokenizer that shard saved beside the blocks.

    Raises:
        StrideError: as ``load_tokenizer``, or it is not as shard saved it.
    """
    for name, checksum in blocks.read_json(TOKENIZER_CHECKSUMS).items():
        if xxh3_128_hexdigest(blocks.read(f"tokenizer/{name}")) != checksum:
            place = blocks.display_url(f"tokenizer/{name}")
            raise StrideError(f"{place} was damaged or changed since shard saved it; restore it, or shard anew.")
    return load_tokenizer(blocks.child("tokenizer").url)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A fingerprint of what a tokenizer does, independent of where it was loaded from: sixteen hexadecimal digits."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    does: Any = sorted(tokenizer.get_vocab().items()) if backend is None else json.loads(backend.to_str())
    if backend is not None:
        does |= {"truncation": None, "padding": None}  # not used here, and set by earlier calls
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return digest([does, special, tokenizer.chat_template])


def _load_local(place: str, name: str) -> Any:
    """A tokenizer from a local path or hub id; ``name`` identifies it in error messages."""
    try:
        if place.endswith(".gguf"):
            folder, leaf = os.path.split(place)
            return AutoTokenizer.from_pretrained(folder or ".", gguf_file=leaf)
        if place.endswith(".json") and os.path.isfile(place):
            return PreTrainedTokenizerFast(tokenizer_file=place)
        plain = os.path.join(place, "tokenizer.json")
        if os.path.isdir(place) and os.listdir(place) and not _is_wrapped(place) and os.path.isfile(plain):
            return PreTrainedTokenizerFast(tokenizer_file=plain)
        return AutoTokenizer.from_pretrained(place)
    except Exception as error:  # the libraries raise many classes for invalid files
        raise StrideError(
            f"No tokenizer can be loaded from {name} ({first_line(error)}); give a folder with tokenizer.json, "
            "a .gguf file or a hub id that can be reached."
        ) from None


def _is_wrapped(folder: str) -> bool:
    return any(os.path.isfile(os.path.join(folder, leaf)) for leaf in ("tokenizer_config.json", "config.json"))


def _downloaded(url: str, folder: str) -> str:
    """Download a tokenizer's files, but not model weights, into ``folder``; returns their local path."""
    fs, path = filesystem(url)
    try:
        if fs.info(path)["type"] != "directory":
            target = os.path.join(folder, path.rpartition("/")[2])
            fs.get_file(path, target)
            return target
        for info in fs.ls(path, detail=True):
            if info["type"] != "directory" and not info["name"].endswith(_WEIGHTS):
                fs.get_file(info["name"], os.path.join(folder, info["name"].rpartition("/")[2]))
    except Exception as error:  # remote file systems raise their own classes
        raise StrideError(
            f"The tokenizer at {redact_url(url)} cannot be fetched ({redacted_error(error, url)}); "
            "check the address, the credentials and the network."
        ) from None
    return folder


def end_of_text_id(tokenizer: Any) -> int:
    """The id of the end-of-text token.

    Raises:
        StrideError: the tokenizer does not define one.
    """
    if tokenizer.eos_token_id is None:
        raise StrideError(
            "The tokenizer names no end-of-text token, which joins documents and ends answers; "
            'add "eos_token" to its tokenizer_config.json.'
        )
    return int(tokenizer.eos_token_id)


# Cache of (length, size): listing a vocabulary takes a tenth of a second. A changed length means added tokens.
_sizes: "weakref.WeakKeyDictionary[Any, tuple[int, int]]" = weakref.WeakKeyDictionary()


def vocabulary_size(tokenizer: Any) -> int:
    """The largest token id plus one, that is the number of rows an embedding needs, gaps included."""
    length, size = _sizes.get(tokenizer, (-1, 0))
    if length != len(tokenizer):
        size = max(tokenizer.get_vocab().values(), default=-1) + 1
        _sizes[tokenizer] = (len(tokenizer), size)
    return size
