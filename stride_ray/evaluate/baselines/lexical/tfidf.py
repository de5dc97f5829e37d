"""TF-IDF: cosine of tf-idf vectors over token uni- and bigrams with sublinear counts, as in scikit-learn.

It does not use the model: the lexical baseline that any attribution method must beat (this project's LDS benchmarks).
"""

import numpy as np

from stride_ray.evaluate.baselines.problem import Problem
from stride_ray.evaluate.word_counts import tfidf


def scores(problem: Problem) -> np.ndarray:
    """(Q, N) float32 cosines."""
    vectorizer = tfidf(dtype=np.float32)
    blocks = vectorizer.fit_transform(problem.blocks.words())
    return (vectorizer.transform(problem.queries.words()) @ blocks.T).toarray()
