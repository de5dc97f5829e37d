"""TF-IDF: cosine of tf-idf vectors over token uni- and bigrams with sublinear counts, as scikit-learn has it.

It never looks at the model: the lexical bar that any attribution method must clear (LDS benchmarks of this project).
"""

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from stride_ray.baselines.ngrams import NGRAMS, words
from stride_ray.baselines.problem import Problem


def scores(problem: Problem) -> np.ndarray:
    """(Q, N) float32 cosines."""
    vectorizer = TfidfVectorizer(**NGRAMS, sublinear_tf=True, dtype=np.float32)
    blocks = vectorizer.fit_transform(words(problem.blocks))
    return (vectorizer.transform(words(problem.queries)) @ blocks.T).toarray()
