"""Operators at every site on disk: the one-bit rows that fit leaves in ``operators/`` and respond reads.

    metadata.json          written last: says that the store is complete
      format               1, of this layout
      form                 "sites"
      rows                 "blocks" (row i is block i, K = N) or "subsets" (row k is subset k, K < N)
      subsets, blocks      K rows over N blocks
      sites, shapes        names of the sites, and a and b of the sketch of each
      sizes                a·b, coordinates of each site's section of a row
      row_bytes            bytes of a row
      parts                name, first row, number of rows, xxh3_128 of the file
    sketch.safetensors, sketch.json   the sites with their directions (curvature.save_sites)
    rows-00000.safetensors, …         consecutive rows
      bits     uint64 (n, W)   one bit a coordinate, sites side by side, each from a whole word on; 1: not negative
      scales   float32 (n, S)  what a coordinate of that row and site stands for, in the sign's direction

A part is mapped into memory where it is a local file, and fetched whole where it is not. Its hash is compared when it
is opened, at some ten gigabytes a second.
"""

import json
import mmap
from typing import Any

import numpy as np
import torch
import xxhash

from stride_ray.operators.one_bit import Rows, word_starts
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.storage import Store, tensor_bytes

FORMAT = 1
DTYPES = {"bits": np.uint64, "scales": np.float32}


def write_rows(store: Store, name: str, rows: Rows) -> str:
    """Publish rows as ``name``.safetensors; returns the file's hash."""
    data = tensor_bytes({"bits": torch.from_numpy(rows.bits), "scales": torch.from_numpy(rows.scales)})
    store.write(f"{name}.safetensors", data)
    return xxhash.xxh3_128_hexdigest(data)


class RowStore:
    """A finished store of rows.

    Args:
        store: the folder ``operators/``.
        facts: its metadata.json, where that is not written yet.

    Attributes:
        facts: metadata.json.
        starts: of the sites' sections (one_bit.word_starts).

    Raises:
        StrideError: for a store of another format.
    """

    def __init__(self, store: Store, facts: dict[str, Any] | None = None) -> None:
        self.store = store
        self.facts: dict[str, Any] = store.read_json("metadata.json") if facts is None else facts
        if self.facts.get("format") != FORMAT:
            raise StrideError(
                f"{store.name_of('metadata.json')} is of format {self.facts.get('format')!r}, and this version of "
                f"stride_ray reads format {FORMAT}; fit again into a new run directory."
            )
        self.starts = word_starts(self.facts["sizes"])

    def __len__(self) -> int:
        return int(self.facts["subsets"])

    @property
    def of_blocks(self) -> bool:
        """Whether row i is block i; else row k is subset k."""
        return self.facts["rows"] == "blocks"

    def read(self, part: dict[str, Any]) -> Rows:
        """The rows of one of ``facts["parts"]``.

        Raises:
            StrideError: for a part that is missing, cut short or changed since it was written.
        """
        name = f"{part['name']}.safetensors"
        data = self._mapped(name)
        if xxhash.xxh3_128_hexdigest(data) != part["hash"]:
            raise StrideError(
                f"{self.store.name_of(name)} is not what fit wrote ({len(data)} bytes, and their hash differs): the "
                "file was cut short or changed; restore it, or delete operators/ and fit again."
            )
        header = 8 + int.from_bytes(data[:8], "little")
        tensors = {}
        for tensor, facts in json.loads(bytes(data[8:header])).items():
            if tensor in DTYPES:
                first, last = facts["data_offsets"]
                found = np.frombuffer(data[header + first : header + last], DTYPES[tensor])
                tensors[tensor] = found.reshape(facts["shape"])
        return Rows(**tensors)

    def take(self, wanted: np.ndarray) -> Rows:
        """Rows by number, ascending; parts without any of them are not read."""
        pieces = []
        for part in self.facts["parts"]:
            inside = wanted[(wanted >= part["first"]) & (wanted < part["first"] + part["count"])] - part["first"]
            if len(inside):
                rows = self.read(part)
                pieces.append(Rows(rows.bits[inside], rows.scales[inside]))
        return Rows(np.concatenate([p.bits for p in pieces]), np.concatenate([p.scales for p in pieces]))

    def _mapped(self, name: str) -> memoryview:
        if not self.store.local:
            return memoryview(self.store.read(name))
        with self.store.translated_errors(name, "read"), open(self.store.path(name), "rb") as file:
            try:
                return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            except ValueError:  # an empty file cannot be mapped
                return memoryview(b"")
