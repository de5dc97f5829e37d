"""Lexical search: blocks that share a text's words, by TF-IDF over token uni- and bigrams, as scikit-learn has it.

It never looks at the model: the bar that attribution must clear, and a cheap second opinion.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from stride_ray.corpus.blocks import Blocks

NGRAMS: dict[str, Any] = {"token_pattern": r"\S+", "ngram_range": (1, 2)}  # uni- and bigrams of what is between spaces


def words(ids: Iterable[int]) -> str:
    """Token ids with spaces between, so that scikit-learn's text tools count n-grams of a model's own tokens."""
    return " ".join(map(str, ids))


def tfidf(**options: Any) -> TfidfVectorizer:
    """Tf-idf vectors of unit length over what ``words`` gives, counts sublinear."""
    return TfidfVectorizer(**NGRAMS, sublinear_tf=True, **options)


def similar_blocks(blocks: Blocks, asked: Iterable[Iterable[int]], k: int) -> list[np.ndarray]:
    """Ordinals of the k blocks most similar to each text, best first, those that share no token with it left out.

    Args:
        blocks: the pool, whose vectors are held in memory.
        asked: token ids of each text.
        k: how many at most.
    """
    return [ordinals[np.lexsort((ordinals, -found))[:k]] for ordinals, found in similarities(blocks, asked)]


def similarities(blocks: Blocks, asked: Iterable[Iterable[int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Per text, the ordinals (int64) of the blocks that share a token with it, and their cosine similarity."""
    vectorizer = tfidf()
    pooled = (
        words(ids[mask])
        for batch in blocks.batches(0, len(blocks), 4096)
        for ids, mask in zip(batch.ids, batch.mask, strict=True)
    )
    X = vectorizer.fit_transform(pooled).T.tocsr()
    for row in vectorizer.transform(words(ids) for ids in asked):
        found = (row @ X).tocsr()
        yield found.indices.astype(np.int64), found.data
