"""Storage of operators at every site: one-bit rows in ``operators/``, written by fit and read by respond.

    manifest.json          written last: marks the store as complete
      format               1, the version of this layout
      form                 "sites"
      rows                 "blocks" (row i is block i, K = N) or "subsets" (row k is subset k, K < N)
      subsets, blocks      K rows over N blocks
      sites, shapes        names of the sites, and a and b of each one's sketch
      sizes                a·b, coordinates of each site's section of a row
      row_bytes            bytes per row
      parts                name, first row, number of rows, xxh3_128 of the file
    sketch.safetensors, sketch.json   the sketched sites (curvature.kfac.save_sites)
    rows-….safetensors                consecutive rows; the names are those in ``parts``
      bits     uint64 (n, W)   one bit per coordinate, sites concatenated at word boundaries; 1: not negative
      scales   float32 (n, S)  decoded magnitude of a coordinate, by row and site

Local parts are memory-mapped; remote ones are fetched whole. The hash is verified on opening, at some ten gigabytes per
second.
"""

import json
import mmap
from typing import Any

import numpy as np
import torch
import xxhash

from stride_ray.corpus.failures import LARGEST_NORM
from stride_ray.operators.one_bit import Rows, word_starts
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.storage import Store, tensor_bytes

FORMAT = 1
DTYPES = {"bits": np.uint64, "scales": np.float32}


def write_rows(store: Store, name: str, rows: Rows) -> str:
    """Publish rows as ``name``.safetensors; returns the xxh3_128 of the file."""
    data = tensor_bytes({"bits": torch.from_numpy(rows.bits), "scales": torch.from_numpy(rows.scales)})
    store.write(f"{name}.safetensors", data)
    return xxhash.xxh3_128_hexdigest(data)


class RowStore:
    """A finished store of rows.

    Args:
        store: the folder ``operators/``.
        facts: the content of manifest.json, if the file is not written yet.

    Attributes:
        facts: the content of manifest.json.
        starts: of the sites' sections (one_bit.word_starts).

    Raises:
        StrideError: if the store has another format version.
    """

    def __init__(self, store: Store, facts: dict[str, Any] | None = None) -> None:
        self.store = store
        self.facts: dict[str, Any] = store.read_json("manifest.json") if facts is None else facts
        if self.facts.get("format") != FORMAT:
            raise StrideError(
                f"{store.display_url('manifest.json')} has format {self.facts.get('format')!r}, but this version of "
                f"stride_ray reads format {FORMAT}; fit again into a new run directory."
            )
        self.starts = word_starts(self.facts["sizes"])

    def __len__(self) -> int:
        return int(self.facts["subsets"])

    @property
    def of_blocks(self) -> bool:
        """Whether rows are of blocks (row i is block i) rather than of subsets."""
        return self.facts["rows"] == "blocks"

    def read(self, part: dict[str, Any]) -> Rows:
        """Return the rows of one of ``facts["parts"]``.

        Raises:
            StrideError: if the part is missing, truncated or modified.
        """
        name = f"{part['name']}.safetensors"
        data = self._file_bytes(name)
        if xxhash.xxh3_128_hexdigest(data) != part["hash"]:
            raise StrideError(
                f"{self.store.display_url(name)} ({len(data)} bytes) differs in its hash from the file that fit wrote: "
                "it was truncated or modified; restore it, or delete operators/ and fit again."
            )
        header = 8 + int.from_bytes(data[:8], "little")
        tensors = {}
        for tensor, facts in json.loads(bytes(data[8:header])).items():
            if tensor in DTYPES:
                first, last = facts["data_offsets"]
                found = np.frombuffer(data[header + first : header + last], DTYPES[tensor])
                tensors[tensor] = found.reshape(facts["shape"])
        return Rows(**tensors)

    def read_finite(self, part: dict[str, Any]) -> tuple[Rows, list[int]]:
        """Like ``read``, with non-finite rows of blocks set to zero; also returns the numbers of those rows.

        Raises:
            StrideError: as ``read``, or the row of a subset is not finite, which would corrupt every query's recovery.
        """
        rows = self.read(part)
        good = np.asarray((np.abs(rows.scales) < LARGEST_NORM).all(1))
        failed = (part["first"] + np.flatnonzero(~good)).tolist()
        if failed and not self.of_blocks:
            raise StrideError(
                f"Row {failed[0]} in {self.store.display_url(part['name'] + '.safetensors')} is not finite; delete "
                "operators/ and fit again."
            )
        return Rows(rows.bits, np.where(good[:, None], rows.scales, np.float32(0))) if failed else rows, failed

    def take(self, wanted: np.ndarray) -> Rows:
        """Return rows by number; ``wanted`` is ascending, and only the parts that contain it are read."""
        pieces = []
        for part in self.facts["parts"]:
            inside = wanted[(wanted >= part["first"]) & (wanted < part["first"] + part["count"])] - part["first"]
            if len(inside):
                rows = self.read(part)
                pieces.append(Rows(rows.bits[inside], rows.scales[inside]))
        return Rows(np.concatenate([p.bits for p in pieces]), np.concatenate([p.scales for p in pieces]))

    def _file_bytes(self, name: str) -> memoryview:
        """Return a file's content, memory-mapped if the store is local."""
        if not self.store.local:
            return memoryview(self.store.read(name))
        with self.store.translated_errors(name, "read"), open(self.store.path(name), "rb") as file:
            try:
                return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            except ValueError:  # an empty file cannot be mapped
                return memoryview(b"")
