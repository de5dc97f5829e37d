"""Token ids as words, so that scikit-learn's text tools count n-grams of a model's own tokens."""

from typing import Any

from stride_ray.baselines.problem import Texts

NGRAMS: dict[str, Any] = {"token_pattern": r"\S+", "ngram_range": (1, 2)}  # uni- and bigrams of what is between spaces


def words(texts: Texts) -> list[str]:
    """Each sequence as its ids with spaces between; padding and tokens that do not count are left out."""
    return [" ".join(map(str, texts.tokens(row).tolist())) for row in range(len(texts))]
