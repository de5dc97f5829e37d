"""Closed form: a subset's operator is minus the preconditioned mean of its members' J (docs/method.md).

Plain functions of batches and sums; ``fit.py`` runs them as a map–reduce over the pool.
"""

from dataclasses import replace

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from stride_ray.corpus.failures import LARGEST_NORM, finite_rows
from stride_ray.models.causal_lm import SplitModel
from stride_ray.models.linear_algebra.matrices import gaussian_sketch, inverse_root, orthonormal
from stride_ray.operators.forms import Basis, normalised, random_basis, stream_gradients


def stream_moments(
    model: SplitModel, ids_BT: Tensor, mask_BT: Tensor, with_gradients: bool
) -> tuple[np.ndarray, np.ndarray, int, np.ndarray]:
    """Sum second moments over the finite blocks of a batch.

    Args:
        model: split at the operators' layer.
        ids_BT: (B, T) token ids.
        mask_BT: (B, T) bool targets.
        with_gradients: sum g gᵀ too, g = ∂loss/∂h; needed by operators in the residual stream.

    Returns:
        * Σ z zᵀ with z = LN(h), (D, D) float64, over the positions that predict a target;
        * Σ g gᵀ, (D, D) float64, over all positions; zeros without gradients;
        * the number of positions that predict a target;
        * which blocks are finite, (B,) bool.
    """
    h = model.trunk(ids_BT)
    predicts = torch.zeros_like(mask_BT)
    predicts[:, :-1] = mask_BT[:, 1:]
    normal = normalised(h)
    good = ((normal.norm(dim=2) < LARGEST_NORM) | ~predicts).all(1)
    g = torch.zeros(1, h.shape[2], dtype=torch.float64, device=h.device)
    if with_gradients:
        slopes = stream_gradients(model, h, ids_BT, mask_BT)
        good &= finite_rows([slopes])
        # Position t's gradient also comes from later targets, so all positions are summed; padding contributes zeros.
        g = slopes[good].flatten(0, 1).double()
    z = normal[predicts & good.unsqueeze(1)].double()
    return (z.T @ z).cpu().numpy(), (g.T @ g).cpu().numpy(), len(z), good.cpu().numpy()


@threadpool_limits.wrap(limits=1)
def preconditioned_basis(
    form: str,
    rank: int,
    sketch: int,
    target: str,
    seed: int,
    stream: np.ndarray,
    gradient: np.ndarray,
    counts: np.ndarray,
) -> Basis:
    """Build the closed form's basis, whitened on both sides (docs/method.md).

    Args:
        form: gate, matrix or logit.
        rank: r.
        sketch: v of the logit form.
        target: unigram or model.
        seed: of the random directions and the Gaussian sketch.
        stream: (D, D) second moment of LN(h) over the pool.
        gradient: (D, D) second moment of ∂loss/∂h (unused by logit).
        counts: (V,) how often each token is a target in the pool (used by logit only).

    Returns:
        A basis with linear activation. W_in = whitening of the stream times r random orthonormal directions. W_out =
        whitening of the gradients for the residual forms (times r directions for gate); w ∘ Q for the logit form, with
        w = (π + 1e-5)^−½, π the add-one unigram distribution and Q a Gaussian sketch.
    """
    D, V = len(stream), len(counts)
    generator = torch.Generator().manual_seed(seed)
    W_in = inverse_root(stream) @ orthonormal(D, min(rank, D), generator)
    if form == "logit":
        unigram = (counts + 1.0) / (counts + 1.0).sum()
        weights = torch.from_numpy((unigram + 1e-5) ** -0.5).float()
        W_out = weights.unsqueeze(1) * gaussian_sketch(V, sketch, generator)
        centre = torch.from_numpy(unigram).float() @ W_out if target == "unigram" else torch.empty(0)
        return Basis(form, W_in, W_out, "linear", target, centre, unit=True)
    W_out = inverse_root(gradient)
    if form == "gate":
        W_out = W_out @ orthonormal(D, min(rank, D), generator)
    return replace(random_basis(form, D, V, rank, sketch, seed, "linear"), W_in=W_in, W_out=W_out, unit=True)


def add_to_subsets(sums: Tensor, J: Tensor, subsets: np.ndarray) -> None:
    """Add each block's J to its subsets' sums, in place.

    Args:
        sums: (K + 1, P) float32; row K absorbs the padding of Bernoulli columns.
        J: (B, P) float32.
        subsets: (B, width) subset ids, padded with K.
    """
    for column in range(subsets.shape[1]):
        sums.index_add_(0, torch.from_numpy(subsets[:, column].astype(np.int64)).to(sums.device), J)


def operators_from_sums(sums: Tensor, sizes: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """Return the operators A_k, minus the mean J of the members: (K, P) sums and (K,) sizes to (K, *shape) float32."""
    means = sums / torch.from_numpy(np.maximum(sizes, 1)).to(sums).unsqueeze(1)
    return -means.view(len(means), *shape)
