"""Okapi BM25 (Robertson et al. 1994) over token uni- and bigrams, with Lucene's idf, log(1 + (N − n + ½) / (n + ½)).

Queries are as long as documents here, so a term repeated in the query is weighted by (k3 + 1) q / (k3 + q), the paper's
own rule for long queries. Libraries omit it (k3 = ∞), hence this short implementation.
"""

import numpy as np
from scipy.sparse import diags_array
from sklearn.feature_extraction.text import CountVectorizer

from stride_ray.evaluate.baselines.problem import Problem
from stride_ray.evaluate.word_counts import NGRAMS


def scores(problem: Problem, k1: float = 1.5, b: float = 0.75, k3: float = 8.0) -> np.ndarray:
    """BM25 scores.

    Args:
        problem: what to score.
        k1: saturation of a term's count in a block.
        b: strength of the length normalisation.
        k3: saturation of a term's count in a query.

    Returns:
        (Q, N) float32.
    """
    vectorizer = CountVectorizer(**NGRAMS, dtype=np.float64)
    counts = vectorizer.fit_transform(problem.blocks.words()).tocoo()
    asked = vectorizer.transform(problem.queries.words()).tocsr()
    lengths = np.asarray(counts.sum(1)).ravel()
    held = np.bincount(counts.col, minlength=counts.shape[1])
    idf = np.log1p((counts.shape[0] - held + 0.5) / (held + 0.5))
    norm = k1 * (1 - b + b * lengths / lengths.mean())
    counts.data = counts.data * (k1 + 1) / (counts.data + norm[counts.row])
    asked.data = asked.data * (k3 + 1) / (asked.data + k3)
    return (asked @ diags_array(idf) @ counts.T).toarray().astype(np.float32)
