"""Shared numerical helpers: damped inverse square roots, random orthonormal and Gaussian matrices, compiled loops."""

from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor


class Eigenbasis(NamedTuple):
    """Eigendecomposition of a second moment (D, D), float64.

    Attributes:
        values: (D,) eigenvalues λ, none below zero.
        vectors: (D, D), the eigenvectors in columns.
    """

    values: np.ndarray
    vectors: np.ndarray

    def damped(self, damping: float) -> np.ndarray:
        """λ_i + damping · mean λ, (D,)."""
        return self.values + damping * self.values.mean() + 1e-30

    # Runs on the driver; one thread, so that the last digits do not depend on its number of cores.
    @threadpool_limits.wrap(limits=1)
    def inverse_root(self, damping: float) -> Tensor:
        """Damped inverse square root, (D, D) float32: eigenvalues become (λ_i + damping · mean λ)^−½."""
        return torch.from_numpy((self.vectors * self.damped(damping) ** -0.5) @ self.vectors.T).float()


@threadpool_limits.wrap(limits=1)
def eigenbasis(moment: np.ndarray) -> Eigenbasis:
    """Decompose a second moment; eigenvalues that rounding left below zero become zero."""
    values, vectors = np.linalg.eigh(moment)
    return Eigenbasis(np.clip(values, 0, None), vectors)


def inverse_root(moment: np.ndarray, damping: float = 1.0) -> Tensor:
    """Damped inverse square root of a second moment (Eigenbasis.inverse_root)."""
    return eigenbasis(moment).inverse_root(damping)


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
