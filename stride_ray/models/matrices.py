"""Shared numerical helpers: damped inverse square roots, random orthonormal and Gaussian matrices, compiled loops."""

from typing import Any

import numba
import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor


# Runs on the driver; one thread, so that the last digits do not depend on its number of cores.
@threadpool_limits.wrap(limits=1)
def _damped_eigenbasis(moment: np.ndarray, damping: float) -> tuple[np.ndarray, np.ndarray]:
    values, vectors = np.linalg.eigh(moment)
    values = np.clip(values, 0, None)
    return values + damping * values.mean() + 1e-30, vectors


def damped_eigenbasis(moment: np.ndarray, damping: float) -> tuple[Tensor, Tensor]:
    """Return λ_i + damping · mean λ, (D,), and the eigenvectors in columns, (D, D); (D, D) float64 to float32."""
    values, vectors = _damped_eigenbasis(moment, damping)
    return torch.from_numpy(values).float(), torch.from_numpy(vectors).float()


@threadpool_limits.wrap(limits=1)
def inverse_root(moment: np.ndarray, damping: float = 1.0) -> Tensor:
    """Damped inverse square root: eigenvalues λ_i become (λ_i + damping · mean λ)^−½. (D, D) float64 to float32."""
    values, vectors = _damped_eigenbasis(moment, damping)
    return torch.from_numpy((vectors * values**-0.5) @ vectors.T).float()


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A random (rows, columns) matrix with orthonormal columns."""
    Q, R = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))
    return (Q * R.diagonal().sign()).float()


def gaussian_sketch(vocabulary: int, sketch: int, generator: torch.Generator) -> Tensor:
    """Q ∈ R^{V×v}, entries N(0, 1/v)."""
    return torch.randn(vocabulary, sketch, generator=generator) / np.sqrt(sketch)


def compiled(function: Any) -> Any:
    """Compile a loop with numba on its first call, and cache the machine code for later processes where possible.

    The cache lies beside the source or in the user's cache folder. If both are read-only, as in some containers, every
    process compiles anew, which takes seconds, unless NUMBA_CACHE_DIR names a writable folder.
    """
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # "cannot cache function: no locator available"
        return numba.njit(nogil=True)(function)
