"""Cross-entropy through a head that is not trained: value and slope from one look at each chunk of logits.

A token's loss depends on its own state alone, so its slope can be taken while the logits are there, and a backward pass
only scales it: no chunk of logits is kept or computed a second time (paper F.4).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy


class FusedLosses(torch.autograd.Function):
    """Losses of n positions, (n,) float32 nats, from their states; only the states receive gradients."""

    @staticmethod
    def forward(ctx: Any, z_nD: Tensor, target_n: Tensor, logits: Callable[[Tensor], Tensor], step: int) -> Tensor:
        """Take values and slopes chunk by chunk.

        Args:
            ctx: keeps the slopes, as large as the states.
            z_nD: what the head reads.
            target_n: (n,) int64 tokens.
            logits: the head, (n, D) to (n, V), with gradients.
            step: positions of one chunk.
        """
        losses, slopes = [], []
        for z, target in zip(z_nD.split(step), target_n.split(step), strict=True):
            with torch.enable_grad():
                leaf = z.detach().requires_grad_(True)
                each = cross_entropy(logits(leaf).float(), target, reduction="none")
                slopes += torch.autograd.grad(each.sum(), leaf)
            losses.append(each.detach())
        ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Scale each position's slope."""
        (slope_nD,) = ctx.saved_tensors
        return slope_nD * gradients[0].unsqueeze(1).to(slope_nD), None, None, None
