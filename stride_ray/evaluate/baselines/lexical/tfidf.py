"""TF-IDF: cosine of tf-idf vectors over token uni- and bigrams with sublinear counts, as scikit-learn has it.

It never looks at the model: the lexical bar that any attribution method must clear (LDS benchmarks of this project).
"""

import numpy as np

from stride_ray.corpus.word_counts import tfidf
from stride_ray.evaluate.baselines.problem import Problem


def scores(problem: Problem) -> np.ndarray:
    """(Q, N) float32 cosines."""
    vectorizer = tfidf(dtype=np.float32)
    blocks = vectorizer.fit_transform(problem.blocks.words())
    return (vectorizer.transform(problem.queries.words()) @ blocks.T).toarray()
