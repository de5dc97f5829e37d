"""RDS (Hanawa et al. 2021): cosine of the attributed model's mean last-layer hidden states.

The residual stream after the last layer, before the final norm, is averaged over the target tokens.
"""

import numpy as np
import torch

from stride_ray.evaluate.baselines.gradient.per_example import tensors
from stride_ray.evaluate.baselines.problem import Problem, Texts
from stride_ray.models.causal_lm import SplitModel, load_model


def scores(problem: Problem, predicting: bool = False) -> np.ndarray:
    """(Q, N) float32 cosines; ``predicting``: of the head's input where target tokens are predicted (FeatSim)."""
    model = load_model(problem.model)
    queries, blocks = (
        _mean_states(model, texts, problem.batch_tokens, predicting) for texts in (problem.queries, problem.blocks)
    )
    return (queries @ blocks.T).cpu().numpy()


def _mean_states(model: SplitModel, texts: Texts, batch_tokens: int, predicting: bool) -> torch.Tensor:
    """Normalised mean states of the target tokens, or of the head's input that predicts them: (n, D) float32."""
    ids, mask = tensors(texts)
    if predicting:
        mask = torch.nn.functional.pad(mask[:, 1:], (0, 1))
    step = max(1, batch_tokens // ids.shape[1])
    found = []
    for ids_BT, mask_BT in zip(ids.split(step), mask.split(step), strict=True):
        weights = mask_BT.to(model.device).float().unsqueeze(2)
        h_BTD = (model.read(ids_BT) if predicting else model.last_stream(ids_BT)).float()
        found.append((h_BTD * weights).sum(1) / weights.sum(1).clamp(min=1))
    return torch.nn.functional.normalize(torch.cat(found), dim=1)
