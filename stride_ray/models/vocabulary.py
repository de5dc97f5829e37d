"""The side of a site that is per token: V weights, one coordinate a token, or fewer coordinates than tokens.

A vocabulary of more than SKETCH tokens is folded: tokens are dealt out to SKETCH buckets with random signs (a count
sketch, Charikar et al. 2002; feature hashing, Weinberger et al. 2009, arXiv 0902.2206), which keeps inner products up
to noise of one over the root of the number of buckets, at the cost of one addition a token. A matrix of random
combinations would keep them no better, take 805 MB at 49,152 tokens, and cost more than the rest of a small model's
forward pass.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

# Coordinates of a larger vocabulary that are kept.
SKETCH = 4096


def _none() -> Tensor:
    return torch.empty(0)


@dataclass(frozen=True)
class TokenSide:
    """What a vocabulary's coordinates are multiplied by, and how they are brought to fewer.

    Attributes:
        weights: (V,) float32, with random signs where there are buckets.
        buckets: (V,) int64, each token's bucket; empty: every token has its own coordinate.
        directions: (v, b) float32, what the v coordinates are projected with (sketch.py); empty: nothing.
    """

    weights: Tensor
    buckets: Tensor = field(default_factory=_none)
    directions: Tensor = field(default_factory=_none)

    @property
    def folded(self) -> int:
        """v: coordinates before they are projected."""
        return min(SKETCH, len(self.weights)) if len(self.buckets) else len(self.weights)

    def __len__(self) -> int:
        return self.directions.shape[1] if len(self.directions) else self.folded

    def to(self, device: Any) -> "TokenSide":
        """A copy on a device."""
        return TokenSide(*(each.to(device) for each in (self.weights, self.buckets, self.directions)))

    def of(self, x: Tensor) -> Tensor:
        """Coordinates (…, n) of numbers (…, V), which are overwritten; where there are fewer, of the first tokens."""
        V = x.shape[-1]
        x = x.mul_(self.weights[:V])
        if len(self.buckets):
            x = x.new_zeros(*x.shape[:-1], self.folded).index_add_(-1, self.buckets[:V], x)
        return x @ self.directions[: x.shape[-1]] if len(self.directions) else x

    def to_tokens(self, x: Tensor) -> Tensor:
        """The transpose of ``of``: numbers (…, V) from coordinates (…, n), which are not projected."""
        return (x[..., self.buckets] if len(self.buckets) else x) * self.weights

    def spread(self, ids_BT: Tensor, v_nD: Tensor) -> Tensor:
        """The transpose of ``summed``: (B, T, D) from (n, D), each token's row at its places."""
        places = self.buckets[ids_BT] if len(self.buckets) else ids_BT
        return v_nD[places] * self.weights[ids_BT].unsqueeze(2)

    def summed(self, ids_BT: Tensor, x_BTD: Tensor, begun: Tensor | None = None) -> Tensor:
        """Σ_t coordinates(id_t) ⊗ x_t of each sequence: (B, n, D); ``begun``, of that shape, is added to in place."""
        places = self.buckets[ids_BT] if len(self.buckets) else ids_BT
        x = x_BTD * self.weights[ids_BT].unsqueeze(2)
        if len(self.directions):
            found = self.directions[places].transpose(1, 2) @ x
            return found if begun is None else begun.add_(found)
        B, n, D = len(ids_BT), self.folded, x.shape[2]
        begun = x.new_zeros(B, n, D) if begun is None else begun
        rows = (places + n * torch.arange(B, device=x.device).unsqueeze(1)).flatten()
        begun.view(B * n, D).index_add_(0, rows, x.flatten(0, 1))
        return begun


def token_side(weights: Tensor, seed: int) -> TokenSide:
    """A vocabulary's side with these (V,) weights, folded where it is large."""
    V = len(weights)
    if V <= SKETCH:
        return TokenSide(weights)
    generator = torch.Generator().manual_seed(seed)
    buckets = torch.randperm(V, generator=generator) % SKETCH
    signs = torch.randint(0, 2, (V,), generator=generator) * 2 - 1
    return TokenSide(weights * signs, buckets)


def projected(side: TokenSide, directions: Tensor) -> TokenSide:
    """The side, its coordinates projected with (v, b) directions."""
    return replace(side, directions=directions)
