"""K-FAC's second moments at the sites (sites.py), and the preconditioner H^-½ made of them.

At a layer's site H is (E[u uᵀ] + damping) ⊗ (E[g gᵀ] + damping) over positions of the pool (docs/method.md). The
vocabulary's side of embedding, head and origin is diagonal, by the pool's unigram distribution π.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from stride_ray.corpus.failures import LARGEST_NORM, finite_losses
from stride_ray.models.causal_lm import SplitModel, masked_mean
from stride_ray.models.linear_algebra.matrices import Eigenbasis, eigenbasis
from stride_ray.models.linear_algebra.vocabulary import token_side
from stride_ray.models.sites import (
    EMBEDDING,
    HEAD,
    ORIGIN,
    Site,
    forward_with_activations,
    output_gradients,
    token_weights,
)

# Damping: eigenvalues λ become λ + damping · mean λ. Less makes the stored rows noisier for the directions of queries,
# which have little of the small eigenvalues' (docs/method.md).
DAMPING = 0.5
# Damping of the unigram distribution: per-token weights are (π + UNIGRAM_DAMPING)^-½, so rare tokens count more.
UNIGRAM_DAMPING = 1e-4


@dataclass(frozen=True)
class KroneckerFactors:
    """K-FAC factors of one site: sums (or means) over positions of u uᵀ (F, F) and g gᵀ (D, D), float64.

    ``read`` is empty for the embedding; ``written`` of the head is a token's squared weight in the loss, (1, 1).
    """

    read: np.ndarray
    written: np.ndarray

    @classmethod
    def of(cls, read: Tensor, written: Tensor) -> "KroneckerFactors":
        """The factors as float64."""
        return cls(*(each.double().cpu().numpy() for each in (read, written)))

    @cached_property
    def read_basis(self) -> Eigenbasis:
        """The eigenbasis of ``read``, decomposed once."""
        return eigenbasis(self.read)

    @cached_property
    def written_basis(self) -> Eigenbasis:
        """The eigenbasis of ``written``, decomposed once."""
        return eigenbasis(self.written)

    def __truediv__(self, positions: int) -> "KroneckerFactors":
        return KroneckerFactors(self.read / positions, self.written / positions)


def _state_gradients(model: SplitModel, ids_BT: Tensor, mask_BT: Tensor, z_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of each sequence's masked mean loss at its final states, (B, T, D), and the losses (B,)."""
    with torch.enable_grad():
        leaf = z_BTD.detach().requires_grad_(True)
        losses = masked_mean(model.token_losses(leaf, ids_BT, mask_BT), mask_BT)
        total = losses[mask_BT[:, 1:].any(1)].sum()
    slope = torch.autograd.grad(total, leaf)[0] if total.requires_grad else torch.zeros_like(leaf)
    return slope, losses.detach()


def _finite_blocks(values: Iterable[Tensor], counted_BT1: Tensor) -> Tensor:
    """Return which blocks have only finite vectors (B, T, ·) at the positions in ``counted_BT1``: (B,) bool."""
    good = torch.ones(len(counted_BT1), dtype=torch.bool, device=counted_BT1.device)
    for x in values:
        good &= ((x[:, :-1].norm(dim=2) < LARGEST_NORM) | ~counted_BT1).all(1)
    return good


def _affects_loss(mask_BT: Tensor) -> Tensor:
    """(B, T − 1) bool: positions up to the one that predicts the last target; later ones do not affect the loss."""
    return mask_BT[:, 1:].flip(1).cumsum(1).flip(1).gt(0)


def add_moments(
    totals: dict[str, tuple[Tensor, Tensor]], model: SplitModel, sites: Iterable[str], ids_BT: Tensor, mask_BT: Tensor
) -> tuple[int, Tensor]:
    """Add a batch's second moments at some sites to ``totals``, in place, without blocks that are not finite.

    ``totals`` holds Σ u uᵀ and Σ g gᵀ by site, float32 (KroneckerFactors): 0.4 GB for a model of 135M parameters.

    Returns:
        The number of positions, and which blocks are finite, (B,) bool.
    """
    sites = list(sites)
    z, read, wrote = forward_with_activations(model, sites, ids_BT)
    slope, losses = _state_gradients(model, ids_BT, mask_BT, z)
    written = output_gradients(z, wrote, slope)
    read[HEAD] = z.detach().float()
    counted = _affects_loss(mask_BT)
    inputs = (u for name, u in read.items() if name != EMBEDDING)
    good = _finite_blocks((*inputs, *written.values()), counted) & finite_losses(losses, mask_BT)
    counted = counted & good.unsqueeze(1)
    for name in sites:
        u, g = read.pop(name), written.pop(name, None)
        u = u[:, :-1][counted] if name != EMBEDDING else torch.empty(0, 0, device=model.device)
        g = g[:, :-1][counted] if g is not None else token_weights(mask_BT)[counted].unsqueeze(1)
        if name not in totals:
            totals[name] = (u.new_zeros(u.shape[1], u.shape[1]), g.new_zeros(g.shape[1], g.shape[1]))
        for total, x in zip(totals[name], (u, g), strict=True):
            total.addmm_(x.T, x)
    return int(counted.sum()), good


def kfac_site(name: str, moments: KroneckerFactors, counts: Tensor, seed: int) -> Site:
    """Build a site with the K-FAC preconditioner of its second moments.

    Args:
        name: of the site.
        moments: sums or means over positions of the pool.
        counts: (V,) how often each token is a target in the pool; for the vocabulary side.
        seed: of the count sketch of a large vocabulary.
    """
    if name not in (EMBEDDING, HEAD, ORIGIN):
        return Site(name, moments.read_basis.inverse_root(DAMPING), moments.written_basis.inverse_root(DAMPING))
    unigram = distribution(counts)
    weights = (unigram + UNIGRAM_DAMPING).rsqrt()
    if name == EMBEDDING:
        return Site(name, torch.empty(0), moments.written_basis.inverse_root(DAMPING), token_side(weights, seed))
    # Whitening removes ω from the layers' gradients; here it has to be divided out.
    side = token_side(weights / float(moments.written[0, 0]) ** 0.5, seed)
    W_in = moments.read_basis.inverse_root(DAMPING)
    return Site(name, W_in, torch.empty(0), side, unigram if name == ORIGIN else torch.empty(0))


def distribution(counts: Tensor) -> Tensor:
    """Return the add-one-smoothed unigram distribution π of token counts: (V,) int64 to (V,) float32."""
    return ((counts.double() + 1) / (counts.double() + 1).sum()).float()


def origin_weight(layers: float, loss: float, unigram: Tensor) -> float:
    """Weight of the origin: the number of layers times the model's loss as a share of the unigram entropy.

    The share is at most 1, and at least a millionth, for a model that has no loss left.

    Args:
        layers: number of layers with sites.
        loss: the model's mean loss on the pool, nats per token.
        unigram: (V,) π.
    """
    entropy = float(-(unigram.double() * unigram.double().log()).sum())
    return layers * min(1.0, max(1e-6, loss / entropy))
