"""AirRep (Sun et al. 2025, arXiv 2505.18513): an encoder trained so that inner products of embeddings are influence.

This is the pretrained form; ``fitted_methods/airrep.py`` fits an encoder to retraining results.

Its encoders are on the Hugging Face Hub (the paper uses sunweiwei/AirRep-Flan-Small unchanged). No package carries one,
so its path must be given.
"""

import os

import numpy as np

from stride_ray.evaluate.baselines.problem import Problem
from stride_ray.evaluate.baselines.representation.encoder import SentenceEncoder, decoded
from stride_ray.runtime.errors import StrideError

VARIABLE = "STRIDE_RAY_AIRREP"


def scores(problem: Problem, path: str | None = None) -> np.ndarray:
    """AirRep's scores.

    Args:
        problem: what to score.
        path: the encoder, a folder or hub id; default: ``STRIDE_RAY_AIRREP``.

    Returns:
        (Q, N) float32.

    Raises:
        StrideError: if there is no encoder.
    """
    where = path or os.environ.get(VARIABLE)
    if not where:
        raise StrideError(
            f"AirRep needs its trained encoder, which no package carries: set {VARIABLE} to its folder or to its hub "
            "id, sunweiwei/AirRep-Flan-Small"
        )
    encoder = SentenceEncoder(where)
    queries, blocks = (encoder.embed(texts).numpy() for texts in decoded(problem))
    return queries @ blocks.T
