"""AirRep (Sun et al. 2025): an encoder trained so that inner products of its embeddings predict influence.

Its encoders are on the Hugging Face Hub (sunweiwei/AirRep-Flan-Small is the one that the paper runs as it is); none
comes as a package, so the path must be given. Texts are embedded as the paper's own GTE is, by mean pooling.
"""

import os

import numpy as np

from stride_ray.evaluate.baselines.problem import Problem
from stride_ray.evaluate.baselines.representation.encoder import embedded
from stride_ray.runtime.errors import StrideError

VARIABLE = "STRIDE_RAY_AIRREP"


def scores(problem: Problem, path: str | None = None) -> np.ndarray:
    """AirRep's scores.

    Args:
        problem: what to score.
        path: the encoder, a folder or hub id; by default what ``STRIDE_RAY_AIRREP`` says.

    Returns:
        (Q, N) float32.

    Raises:
        StrideError: there is no encoder.
    """
    where = path or os.environ.get(VARIABLE)
    if not where:
        raise StrideError(
            f"AirRep needs its trained encoder, which no package carries: set {VARIABLE} to its folder or to its hub "
            "id, sunweiwei/AirRep-Flan-Small"
        )
    queries, blocks = embedded(problem, where)
    return queries @ blocks.T
