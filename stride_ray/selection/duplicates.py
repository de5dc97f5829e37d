"""Near-duplicate detection: MinHash signatures of token n-grams, and an index over the selected documents."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import xxhash
from datasketch import MinHash, MinHashLSH

from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.urls import first_line

# Tokens per n-gram; permutations per signature, for a standard error of about 0.04 in the Jaccard similarity.
GRAM, PERMUTATIONS = 5, 128
SIGNATURE = pa.binary(4 * PERMUTATIONS)
# Source and id of a document.
Name = tuple[str, str]
# SQLite's page cache, in KiB.
CACHE_KIB = 65_536
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def signature(ids: np.ndarray) -> bytes:
    """Return the MinHash of a document's n-grams as little-endian uint32; a shorter document is a single n-gram.

    Args:
        ids: (T,) token ids, at least one.
    """
    values = ids.astype(np.uint64)
    width = min(GRAM, len(values))
    hashed = np.zeros(len(values) - width + 1, np.uint64)
    for offset in range(width):  # polynomial hash of the tokens, modulo 2^64
        hashed = hashed * _FACTOR + values[offset : offset + len(hashed)] + np.uint64(1)
    hashed = np.unique((hashed ^ (hashed >> np.uint64(29))) * _FACTOR >> np.uint64(32))
    sketch = MinHash(num_perm=PERMUTATIONS, hashfunc=int, scheme="affine32")
    sketch.update_batch(hashed.tolist())
    return sketch.hashvalues.astype("<u4").tobytes()


class NearDuplicateIndex:
    """Near-duplicate index (MinHash LSH) over the selected documents, in an SQLite file.

    Two documents are compared if they agree on all values of a band of their signatures. A document takes about 1 KB
    on disk; memory is that of SQLite's cache (CACHE_KIB), whatever the number of documents.

    Args:
        threshold: estimated Jaccard similarity from which two documents are near-duplicates.
        folder: a local folder for the file; None: the index is kept in memory.

    Raises:
        StrideError: from every method, if the disk is full.
    """

    def __init__(self, threshold: float, folder: str | None = None) -> None:
        self.threshold = threshold
        # Number of bands and of values in a band that suit the threshold.
        chosen = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, weights=(0.2, 0.8))
        self._bands, self._width = chosen.b, chosen.r
        self._sql = sqlite3.connect(":memory:" if folder is None else os.path.join(folder, "duplicates.sqlite"))
        # The file is of no use after a crash: no journal and no waiting for the disk.
        for setting in ("journal_mode = OFF", "synchronous = OFF", "temp_store = FILE", f"cache_size = -{CACHE_KIB}"):
            self._sql.execute(f"PRAGMA {setting}")
        self._sql.execute("CREATE TABLE documents (number INTEGER PRIMARY KEY, source TEXT, id TEXT, signature BLOB)")
        self._sql.execute("CREATE TABLE bands (band INTEGER, number INTEGER, PRIMARY KEY (band, number)) WITHOUT ROWID")
        self._count = 0

    def like(self, stored: bytes) -> Name | None:
        """Return the most similar selected document, or None if none reaches the threshold.

        Of equally similar documents it is the one that was selected first.
        """
        values, bands = np.frombuffer(stored, "<u4"), self._hashed(stored)
        marks = ", ".join("?" * len(bands))
        with _translated_errors():
            found = self._sql.execute(
                "SELECT source, id, signature FROM documents WHERE number IN "
                f"(SELECT number FROM bands WHERE band IN ({marks})) ORDER BY number",
                bands,
            )
            best, name = 0.0, None
            for source, document_id, other in found:
                similarity = float((np.frombuffer(other, "<u4") == values).mean())
                if similarity > best:
                    best, name = similarity, (source, document_id)
        return name if best >= self.threshold else None

    def add(self, name: Name, stored: bytes) -> None:
        """Add a selected document."""
        with _translated_errors():
            self._sql.execute("INSERT INTO documents VALUES (?, ?, ?, ?)", (self._count, *name, stored))
            rows = [(band, self._count) for band in dict.fromkeys(self._hashed(stored))]
            self._sql.executemany("INSERT INTO bands VALUES (?, ?)", rows)
        self._count += 1

    def _hashed(self, stored: bytes) -> list[int]:
        """A 64-bit hash of each band, seeded with its place; a collision only adds a comparison."""
        size = 4 * self._width
        return [
            xxhash.xxh3_64_intdigest(stored[at * size : (at + 1) * size], seed=at) - 2**63 for at in range(self._bands)
        ]


@contextmanager
def _translated_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise StrideError(
            f"Comparing near-duplicates failed ({first_line(error)}); it needs room for temporary files (set TMPDIR)."
        ) from None
