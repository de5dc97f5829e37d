"""A small scorer of documents, distilled from influence: ridge regression on hashed word n-grams, by scikit-learn.

It scores data that no model has read, as quality classifiers do, at the speed of hashing words. What it can know of a
document's influence is in the document's words; the cross-validated rank correlation says how much that is.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.stats import spearmanr
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import Ridge
from sklearn.model_selection import KFold

from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.storage import Store, tensor_bytes

# Word n-grams, number of hashed features, folds, and penalties that cross-validation chooses from.
NGRAMS, FEATURES, FOLDS = (1, 2), 2**18, 5
PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
# Fewer documents tell nothing about others.
FEWEST = 20
_VECTORIZER = HashingVectorizer(ngram_range=NGRAMS, n_features=FEATURES, token_pattern=r"\w+|[^\w\s]", dtype=np.float32)


@dataclass(frozen=True)
class Scorer:
    """A linear function of a text's hashed word n-grams.

    Attributes:
        coefficients: (FEATURES,) float32.
        facts: ``intercept``, ``penalty``, ``documents`` it was fitted to, ``correlation`` (mean of the folds' Spearman
            correlations on documents left out), ``folds`` (each of them), and what the caller adds.
    """

    coefficients: np.ndarray
    facts: dict[str, Any]

    def scores(self, texts: Iterable[str]) -> np.ndarray:
        """Predicted influence per token, (n,) float64, in root mean squares of a query's."""
        return features(texts) @ self.coefficients.astype(np.float64) + self.facts["intercept"]

    def write(self, store: Store) -> None:
        """Write the scorer into a folder: ``coefficients.safetensors``, then ``scorer.json``."""
        tensors = {"coefficients": torch.from_numpy(self.coefficients)}
        store.write("coefficients.safetensors", tensor_bytes(tensors))
        store.write_json("scorer.json", self.facts)


def read_scorer(store: Store) -> Scorer:
    """Read a scorer.

    Raises:
        StrideError: the folder holds none.
    """
    if not store.exists("scorer.json"):
        raise StrideError(f"{store.display_url('')} is not a scorer: it has no scorer.json; fit one first.")
    coefficients = store.read_tensors("coefficients.safetensors")["coefficients"].numpy()
    return Scorer(coefficients, store.read_json("scorer.json"))


def features(texts: Iterable[str]) -> csr_matrix:
    """Hashed word n-grams, (n, FEATURES) float32, each row of length 1."""
    return _VECTORIZER.transform(texts)


def fit_scorer(texts: Sequence[str], values: np.ndarray, seed: int) -> Scorer:
    """Fit a scorer to documents; the penalty is chosen by cross-validation.

    Example: of texts whose value is how often they say "sea", it learns that word.

    Args:
        texts: of the documents.
        values: (n,) their influence per token.
        seed: of the folds.

    Raises:
        StrideError: fewer than FEWEST documents, or all values are equal.
    """
    if len(texts) < FEWEST:
        raise StrideError(f"A scorer needs {FEWEST} documents with influence or more, and there are {len(texts)}.")
    if not np.ptp(values) > 0:
        raise StrideError("All documents have the same influence, so there is nothing to learn; raise attribute.top.")
    X = features(texts)
    folds = list(KFold(FOLDS, shuffle=True, random_state=seed).split(X))

    def held_out(penalty: float) -> list[float]:
        return [_correlation(_ridge(X[train], values[train], penalty), X[test], values[test]) for train, test in folds]

    found = {penalty: held_out(penalty) for penalty in PENALTIES}
    penalty = max(found, key=lambda each: float(np.mean(found[each])))
    ridge = _ridge(X, values, penalty)
    facts = {
        "intercept": float(ridge.intercept_),
        "penalty": penalty,
        "documents": len(texts),
        "correlation": float(np.mean(found[penalty])),
        "folds": found[penalty],
    }
    return Scorer(ridge.coef_.astype(np.float32), facts)


def _ridge(X: csr_matrix, values: np.ndarray, penalty: float) -> Ridge:
    return Ridge(alpha=penalty, solver="sparse_cg", tol=1e-6).fit(X, values)


def _correlation(ridge: Ridge, X: csr_matrix, values: np.ndarray) -> float:
    """Spearman's correlation of predictions with values; 0 if either does not vary."""
    found = float(spearmanr(ridge.predict(X), values).statistic)
    return found if np.isfinite(found) else 0.0
