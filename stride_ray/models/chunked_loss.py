"""Chunked cross-entropy through a frozen head: loss and gradient from one evaluation of each chunk of logits.

A token's loss depends only on its own state, so its gradient is computed while the logits are in memory, and the
backward pass only scales it: no chunk of logits is stored or recomputed (paper F.4).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy


class FusedLosses(torch.autograd.Function):
    """Losses (n,) float32 in nats from the states of n positions; differentiable in the states only."""

    @staticmethod
    def forward(ctx: Any, z_nD: Tensor, target_n: Tensor, logits: Callable[[Tensor], Tensor], step: int) -> Tensor:
        """Compute losses and their gradients chunk by chunk.

        Args:
            ctx: stores the gradients, of the size of the states.
            z_nD: the head's input.
            target_n: (n,) int64 target ids.
            logits: the head, (n, D) to (n, V), differentiable.
            step: positions per chunk.
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
        """Scale each position's stored gradient."""
        (slope_nD,) = ctx.saved_tensors
        return slope_nD * gradients[0].unsqueeze(1).to(slope_nD), None, None, None
