"""Optimisers of the loop: AdamW by rows of the stack, Muon for what all subsets share."""

import torch
from torch import Tensor

# Decay of the rows' first and second moments; short, since a row is visited tens of times in all.
BETAS = (0.9, 0.99)


class RowAdam:
    """Adam on the rows of a stack that a step visits; each row has its own moments and count of visits."""

    def __init__(self, stack: Tensor) -> None:
        self.first, self.second = torch.zeros_like(stack), torch.zeros_like(stack)
        self.visits = torch.zeros(len(stack), device=stack.device)

    def update(self, stack: Tensor, rows: Tensor, gradient: Tensor, rate: float) -> None:
        """Move ``stack[rows]`` in place, given the gradient of those rows (distinct)."""
        shape = (-1, *[1] * (stack.ndim - 1))
        self.visits[rows] += 1
        visits = self.visits[rows].view(shape)
        first = self.first[rows].lerp(gradient, 1 - BETAS[0])
        second = self.second[rows].lerp(gradient.square(), 1 - BETAS[1])
        self.first[rows], self.second[rows] = first, second
        scale = (second / (1 - BETAS[1] ** visits)).sqrt() + 1e-12
        stack[rows] -= rate * (first / (1 - BETAS[0] ** visits)) / scale


def muon(parameters: list[Tensor], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Muon at the scale of AdamW's updates, so that one learning rate serves both."""
    return torch.optim.Muon(parameters, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
