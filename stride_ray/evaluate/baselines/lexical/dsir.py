"""DSIR (Xie et al. 2023): importance weights of blocks for a query from hashed uni- and bigrams.

DSIR selects a corpus for one target data set: a block's weight is Σ_n count(n) · log(p_target(n) / p_pool(n)). For
per-query scores, each query is its own target. One query is too little text to estimate p_target, so it is mixed
half and half with the pool's distribution.
"""

import numpy as np
from scipy.sparse import csr_array
from sklearn.feature_extraction.text import HashingVectorizer

from stride_ray.evaluate.baselines.problem import Problem
from stride_ray.evaluate.word_counts import NGRAMS


def scores(problem: Problem, buckets: int = 10_000) -> np.ndarray:
    """(Q, N) float32 log importance weights, with the paper's default for ``buckets``."""
    hashing = HashingVectorizer(**NGRAMS, n_features=buckets, alternate_sign=False, norm=None)
    blocks = csr_array(hashing.transform(problem.blocks.words()))
    queries = hashing.transform(problem.queries.words()).toarray()
    pool = np.asarray(blocks.sum(0)).ravel() + 1.0
    pool /= pool.sum()
    target = (queries / np.maximum(queries.sum(1, keepdims=True), 1) + pool) / 2
    return (blocks @ np.log(target / pool).T).T.astype(np.float32)
