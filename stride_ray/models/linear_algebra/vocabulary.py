"""The vocabulary side of a site: a weight per token and, for large vocabularies, a count sketch of the coordinates.

A vocabulary of more than MAX_BUCKETS tokens is hashed into MAX_BUCKETS buckets with random signs (count sketch,
Charikar et al. 2002; feature hashing, Weinberger et al. 2009, arXiv 0902.2206). This preserves inner products up to
noise of one over the root of the number of buckets and costs one addition per token. A dense random projection is no
more accurate, takes 805 MB at 49,152 tokens, and costs more than the rest of a small model's forward pass.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

# Number of buckets for a vocabulary larger than that.
MAX_BUCKETS = 4096


def _none() -> Tensor:
    return torch.empty(0)


def next_tokens(ids_BT: Tensor, vocabulary: int) -> Tensor:
    """The targets, (B, T − 1), with a token of the vocabulary for ids that a classifier reads and never predicts."""
    return ids_BT[:, 1:].clamp(max=vocabulary - 1)


@dataclass(frozen=True)
class TokenSide:
    """Per-token weights, and how the vocabulary's coordinates are reduced.

    Attributes:
        weights: (V,) float32, including the count sketch's random signs if there are buckets.
        buckets: (V,) int64, each token's bucket; empty: one coordinate per token.
    """

    weights: Tensor
    buckets: Tensor = field(default_factory=_none)

    def __len__(self) -> int:
        """n: the number of coordinates."""
        return min(MAX_BUCKETS, len(self.weights)) if len(self.buckets) else len(self.weights)

    def to(self, device: Any) -> "TokenSide":
        """A copy on a device."""
        return TokenSide(self.weights.to(device), self.buckets.to(device))

    def of(self, x: Tensor) -> Tensor:
        """Map per-token values (…, V) to coordinates (…, n), in place; fewer values belong to the first tokens."""
        V = x.shape[-1]
        x = x.mul_(self.weights[:V])
        return x.new_zeros(*x.shape[:-1], len(self)).index_add_(-1, self.buckets[:V], x) if len(self.buckets) else x

    def fold(self, x: Tensor) -> Tensor:
        """Sum per-token values (V,) over the tokens of each coordinate, (n,), without weights."""
        return x.new_zeros(len(self)).index_add(0, self.buckets, x) if len(self.buckets) else x

    @cached_property
    def mean_squared_weights(self) -> Tensor:
        """Each coordinate's squared weight, (n,): averaged over the tokens of a bucket by their frequency.

        The frequency is one over the squared weight, so this is the harmonic mean.
        """
        squares = self.weights.square()
        return self.fold(torch.ones_like(squares)) / self.fold(1 / squares)

    def to_tokens(self, x: Tensor) -> Tensor:
        """The transpose of ``of``: coordinates (…, n) to per-token values (…, V)."""
        return (x[..., self.buckets] if len(self.buckets) else x) * self.weights

    def spread(self, ids_BT: Tensor, v_nD: Tensor) -> Tensor:
        """The transpose of ``sum_outer_products``: each position's row of (n, D), as (B, T, D)."""
        places = self.buckets[ids_BT] if len(self.buckets) else ids_BT
        return v_nD[places] * self.weights[ids_BT].unsqueeze(2)

    def sum_outer_products(self, ids_BT: Tensor, x_BTD: Tensor, begun: Tensor | None = None) -> Tensor:
        """Σ_t coordinates(id_t) ⊗ x_t per sequence: (B, n, D), added in place to ``begun`` of that shape if given."""
        places = self.buckets[ids_BT] if len(self.buckets) else ids_BT
        x = x_BTD * self.weights[ids_BT].unsqueeze(2)
        B, n, D = len(ids_BT), len(self), x.shape[2]
        begun = x.new_zeros(B, n, D) if begun is None else begun
        rows = (places + n * torch.arange(B, device=x.device).unsqueeze(1)).flatten()
        begun.view(B * n, D).index_add_(0, rows, x.flatten(0, 1))
        return begun


def token_side(weights: Tensor, seed: int) -> TokenSide:
    """The vocabulary side with (V,) weights, count-sketched if V exceeds MAX_BUCKETS."""
    V = len(weights)
    if V <= MAX_BUCKETS:
        return TokenSide(weights)
    generator = torch.Generator().manual_seed(seed)
    buckets = torch.randperm(V, generator=generator) % MAX_BUCKETS
    signs = torch.randint(0, 2, (V,), generator=generator) * 2 - 1
    return TokenSide(weights * signs, buckets)
