"""TRAK (Park et al. 2023): linearise the model in projected gradients of its output, then regression influence.

φ(x) is the gradient of the model output function, the log-odds of the right token averaged over a sequence's targets;
τ = φ(query) (ΦᵀΦ + λI)⁻¹ φ(block)ᵀ · Q(block), with Q the mean of 1 − p over the block's targets. The first factor and
Q are each averaged over checkpoints. Gradients are projected per weight from both sides, whereas the paper projects
them all at once: a dense projection of a model's whole gradient costs more than the gradient.
"""

import numpy as np
import torch
from torch import Tensor

from stride_ray.evaluate.baselines.gradient.features import batches, concatenate, damped_products, projections
from stride_ray.evaluate.baselines.gradient.per_example import masked_means, token_losses, weight_shapes
from stride_ray.evaluate.baselines.problem import Problem, Texts
from stride_ray.models.causal_lm import load_model
from stride_ray.models.linear_algebra.vocabulary import next_tokens

# Damping, as a share of a mean eigenvalue.
DAMPING = 10.0


def scores(problem: Problem, rank: int = 64, damping: float = DAMPING) -> np.ndarray:
    """TRAK's scores over ``problem.checkpoints``, or at the trained model if there are none.

    Args:
        problem: what to score.
        rank: rows and columns of each weight's projected gradient.
        damping: λ as a share of the mean eigenvalue of ΦᵀΦ.

    Returns:
        (Q, N) float32.
    """
    folders = problem.checkpoints or (problem.model,)
    found, weights = zip(*(_at(problem, folder, rank, damping) for folder in folders), strict=True)
    return (np.mean(found, axis=0) * np.mean(weights, axis=0)).astype(np.float32)


def _at(problem: Problem, folder: str, rank: int, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """At one checkpoint: the first factor (Q, N), and Q's diagonal (N,)."""
    model = load_model(folder)
    drawn = projections(weight_shapes(model, embedding=True), rank, problem.seed, model.device)

    def phi(texts: Texts) -> tuple[list[Tensor], np.ndarray]:
        output = _Margins()
        found = concatenate(batches(model, texts, problem.batch_tokens, drawn, output), len(texts))
        return list(found.values()), torch.cat(output.missing).cpu().numpy()

    blocks, weights = phi(problem.blocks)
    return damped_products(phi(problem.queries)[0], blocks, damping).cpu().numpy(), weights


class _Margins:
    """The model output function, log p / (1 − p) of the right token; also records each sequence's mean 1 − p."""

    def __init__(self) -> None:
        self.missing: list[Tensor] = []

    def __call__(self, logits_BTV: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        log_p = -token_losses(logits_BTV, next_tokens(ids_BT, logits_BTV.shape[-1])).clamp(min=1e-6)
        other = -torch.expm1(log_p)
        self.missing.append(masked_means(other, mask_BT).detach())
        return masked_means(log_p - other.log(), mask_BT)
