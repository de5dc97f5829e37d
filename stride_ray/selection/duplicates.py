"""Near-duplicate detection: MinHash signatures of token n-grams, and an index over the selected documents."""

import numpy as np
import pyarrow as pa
from datasketch import MinHash, MinHashLSH

# Tokens per n-gram; permutations per signature, for a standard error of about 0.04 in the Jaccard similarity.
GRAM, PERMUTATIONS = 5, 128
SIGNATURE = pa.binary(4 * PERMUTATIONS)
# Source and id of a document.
Name = tuple[str, str]
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
    """Near-duplicate index (MinHash LSH) over the selected documents; about 6 KB per document.

    Args:
        threshold: estimated Jaccard similarity from which two documents are near-duplicates.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, weights=(0.2, 0.8))
        self._names: list[Name] = []
        self._values: list[np.ndarray] = []

    def like(self, stored: bytes) -> Name | None:
        """Return the most similar selected document, or None if none reaches the threshold."""
        values = np.frombuffer(stored, "<u4")
        close = [(float((self._values[i] == values).mean()), -i) for i in self._index.query(_sketch(values))]
        best, number = max(close, default=(0.0, 0))
        return self._names[-number] if best >= self.threshold else None

    def add(self, name: Name, stored: bytes) -> None:
        """Add a selected document."""
        values = np.frombuffer(stored, "<u4")
        self._index.insert(len(self._names), _sketch(values))
        self._names.append(name)
        self._values.append(values)


def _sketch(values: np.ndarray) -> MinHash:
    return MinHash(num_perm=PERMUTATIONS, hashvalues=values.astype(np.uint32), scheme="affine32")
