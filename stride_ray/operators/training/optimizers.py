"""Optimisers of the training loop: Adam per row of the operator stack, Muon for the shared matrices."""

import torch
from torch import Tensor

# Adam betas of the rows; short horizons, since a row is visited only tens of times in total.
BETAS = (0.9, 0.99)


class RowAdam:
    """Sparse Adam over the rows of a stack; each row has its own moments and its own step count."""

    def __init__(self, stack: Tensor) -> None:
        self.first, self.second = torch.zeros_like(stack), torch.zeros_like(stack)
        self.visits = torch.zeros(len(stack), device=stack.device)

    def update(self, stack: Tensor, rows: Tensor, gradient: Tensor, rate: float) -> None:
        """Update ``stack[rows]`` in place, given their gradient; rows must be distinct."""
        shape = (-1, *[1] * (stack.ndim - 1))
        self.visits[rows] += 1
        visits = self.visits[rows].view(shape)
        first = self.first[rows].lerp(gradient, 1 - BETAS[0])
        second = self.second[rows].lerp(gradient.square(), 1 - BETAS[1])
        self.first[rows], self.second[rows] = first, second
        scale = (second / (1 - BETAS[1] ** visits)).sqrt() + 1e-12
        stack[rows] -= rate * (first / (1 - BETAS[0] ** visits)) / scale


def muon(parameters: list[Tensor], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Muon scaled to AdamW's update RMS, so that one learning rate suits both."""
    return torch.optim.Muon(parameters, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
