"""Lexical search: TF-IDF similarity (scikit-learn) over token unigrams and bigrams.

It does not use the model: a baseline that attribution has to beat, and a cheap second opinion.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from stride_ray.corpus.blocks import Blocks

NGRAMS: dict[str, Any] = {"token_pattern": r"\S+", "ngram_range": (1, 2)}  # unigrams and bigrams of space-separated ids


def words(ids: Iterable[int]) -> str:
    """Token ids separated by spaces, so that scikit-learn's vectorizers count n-grams of the model's tokens."""
    return " ".join(map(str, ids))


def tfidf(**options: Any) -> TfidfVectorizer:
    """TF-IDF vectorizer for the output of ``words``, with sublinear counts and unit-length vectors."""
    return TfidfVectorizer(**NGRAMS, sublinear_tf=True, **options)


def similar_blocks(blocks: Blocks, asked: Iterable[Iterable[int]], k: int) -> list[np.ndarray]:
    """Ordinals of the k blocks most similar to each text, best first; blocks without a common token are left out.

    Args:
        blocks: the pool, whose vectors are held in memory.
        asked: token ids of each text.
        k: maximum number of blocks per text.
    """
    vectorizer = tfidf()
    pooled = (
        words(ids[mask])
        for batch in blocks.batches(0, len(blocks), 4096)
        for ids, mask in zip(batch.ids, batch.mask, strict=True)
    )
    X = vectorizer.fit_transform(pooled).T.tocsr()
    tops = []
    for row in vectorizer.transform(words(ids) for ids in asked):
        found = (row @ X).tocsr()
        ordinals = found.indices.astype(np.int64)
        tops.append(ordinals[np.lexsort((ordinals, -found.data))[:k]])
    return tops
