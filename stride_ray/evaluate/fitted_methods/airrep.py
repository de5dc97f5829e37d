"""AirRep (Sun et al. 2025, arXiv 2505.18513) fitted to retraining results.

An encoder e is trained so that its prediction for a query x after training on a subset S,

    f(x, S) = Σ_{i ∈ S} a_i e(x)·e(i),   a = softmax over S of |e(x)·e(i)|,

orders the subsets as the query's losses do (RankNet: logistic loss on pairs of subsets, weighted by the difference of
the query's standardised losses). Like datamodels it reads the retraining results, so subsets are cross-fitted: a fold
is predicted by an encoder that was trained on the other folds.

The authors embed every member of 32 subsets in each step, on eight GPUs. Here a step embeds a few blocks with
gradients, and takes the others' embeddings from their last visit (cross-batch memory, Wang et al. 2020), so that a
fold takes minutes on two cores. Their rate, clipping, warm-up, and training without dropout are kept.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import softplus

from stride_ray.evaluate.baselines.problem import Problem
from stride_ray.evaluate.baselines.representation.embedding import default_encoder
from stride_ray.evaluate.baselines.representation.encoder import SentenceEncoder, decoded
from stride_ray.evaluate.fitted_methods.folds import cross_fitting_folds
from stride_ray.evaluate.retraining.results import RetrainingResults
from stride_ray.runtime.errors import StrideError

# Standardised losses, and differences that weight a pair, are cut here, as the authors do.
LARGEST = 10.0


@dataclass(frozen=True)
class AirRepTraining:
    """How an encoder is trained.

    Attributes:
        steps: of AdamW, in each fold.
        blocks: blocks embedded with gradients in a step.
        queries: queries in a step.
        learning_rate: after ``warmup`` steps.
        clip: maximum gradient norm.
        sharpness: e(x)·e(i) of equal texts when training begins; the softmax follows from it. Chosen on the
            development queries of the ``continued`` benchmark.
        folds: of the subsets.
    """

    steps: int = 100
    blocks: int = 64
    queries: int = 16
    learning_rate: float = 1e-4
    warmup: int = 10
    clip: float = 1.0
    sharpness: float = 10.0
    folds: int = 4


def airrep_sums(
    problem: Problem, truth: RetrainingResults, training: AirRepTraining | None = None, path: str | None = None
) -> np.ndarray:
    """Predict each subset by an encoder fitted to the other folds.

    Args:
        problem: texts and the seed.
        truth: retraining results; losses are averaged over seeds.
        training: how; None: the defaults.
        path: the encoder to start from; None: ``embedding.default_encoder``.

    Returns:
        (Q, S) float64: f(x, S) minus its mean over the fitting subsets, which makes folds comparable.

    Raises:
        StrideError: for fewer than three subsets or two folds, or without an encoder.
    """
    training = training or AirRepTraining()
    losses_QS = truth.losses.mean(0, dtype=np.float64).T
    member_SN = torch.from_numpy(truth.membership(len(problem.blocks)).astype(bool))
    n_queries, n_subsets = losses_QS.shape
    if n_subsets < 3 or training.folds < 2:
        raise StrideError(
            f"AirRep needs at least three subsets and two folds; there are {n_subsets} and {training.folds}."
        )
    start, (queries, blocks) = path or default_encoder(), decoded(problem)
    sums_QS = np.zeros((n_queries, n_subsets))
    embedded_ND = SentenceEncoder(start).embed(blocks)
    folds = list(cross_fitting_folds(n_subsets, training.folds, problem.seed))
    for number, (known, held_out) in enumerate(folds):
        print(f"AirRep: fold {number + 1} of {len(folds)}, {training.steps} steps", file=sys.stderr, flush=True)
        seen, seed = (member_SN[known], losses_QS[:, known]), problem.seed + number
        encoder = fit_encoder(start, queries, blocks, embedded_ND, *seen, training, seed)
        predicted = pooled(encoder.embed(queries) @ encoder.embed(blocks).T, member_SN).double().numpy()
        sums_QS[:, held_out] = predicted[:, held_out] - predicted[:, known].mean(1, keepdims=True)
    return sums_QS


def fit_encoder(
    path: str,
    queries: list[str],
    blocks: list[str],
    embedded_ND: torch.Tensor,
    member_SN: torch.Tensor,
    losses_QS: np.ndarray,
    training: AirRepTraining,
    seed: int,
) -> SentenceEncoder:
    """Train an encoder on the losses after retraining on these subsets.

    Args:
        path: the encoder to start from.
        queries: Q texts.
        blocks: N texts.
        embedded_ND: their embeddings by the encoder to start from, (N, d) float32.
        member_SN: (S, N) bool, the members of each subset.
        losses_QS: (Q, S), each query's loss after training on each subset, in nats.
        training: how.
        seed: for the order of blocks and queries.

    Returns:
        The trained encoder.
    """
    encoder = SentenceEncoder(path)
    scale = float(np.sqrt(training.sharpness / embedded_ND.square().sum(1).mean().item()))
    encoder.projector = _scaled(encoder.projector, embedded_ND.shape[1], scale).to(next(encoder.parameters()).device)
    memory_ND = scale * embedded_ND
    gains_QS = standardised_gains(losses_QS)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=training.learning_rate)
    draw = torch.Generator().manual_seed(seed)
    block_order, query_order = _shuffles(len(blocks), draw), _shuffles(len(queries), draw)
    for step in range(training.steps):
        optimizer.param_groups[0]["lr"] = training.learning_rate * min(1.0, (step + 1) / training.warmup)
        rows, chosen = _next(block_order, training.blocks), _next(query_order, training.queries)
        embedded = encoder([blocks[row] for row in rows]).cpu()
        all_ND = memory_ND.index_copy(0, torch.tensor(rows), embedded)
        scores_QN = encoder([queries[row] for row in chosen]).cpu() @ all_ND.T
        loss = ranknet_loss(pooled(scores_QN, member_SN), gains_QS[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), training.clip)
        optimizer.step()
        memory_ND[rows] = embedded.detach()
    return encoder


def pooled(scores_QN: torch.Tensor, member_SN: torch.Tensor) -> torch.Tensor:
    """Attention pooling of scores over each subset's members, weighted by the softmax of their sizes: (Q, S)."""
    rows = [
        (row * row.abs().masked_fill(~member_SN, float("-inf")).softmax(1)).sum(1)  # (S, N) at a time
        for row in scores_QN.unsqueeze(1)
    ]
    return torch.stack(rows)


def standardised_gains(losses_QS: np.ndarray) -> torch.Tensor:
    """How far below its mean each query's loss is, in standard deviations over the subsets: (Q, S) float32."""
    spread = losses_QS.std(1, keepdims=True)
    gains = (losses_QS.mean(1, keepdims=True) - losses_QS) / np.where(spread > 0, spread, 1)
    return torch.from_numpy(gains).float().clamp(-LARGEST, LARGEST)


def ranknet_loss(predicted_QS: torch.Tensor, gains_QS: torch.Tensor) -> torch.Tensor:
    """RankNet: the mean over pairs of subsets of log(1 + exp(−predicted difference)), weighted by the true one."""
    gain_differences = gains_QS.unsqueeze(2) - gains_QS.unsqueeze(1)
    predicted_differences = predicted_QS.unsqueeze(2) - predicted_QS.unsqueeze(1)
    better = gain_differences > 0
    weights = gain_differences[better].clamp(max=LARGEST)
    return (weights * softplus(-predicted_differences[better])).sum() / max(1, len(weights))


def _scaled(projector: torch.nn.Module, width: int, scale: float) -> torch.nn.Linear:
    """The projector times ``scale``; the identity becomes a matrix that can be trained."""
    linear = torch.nn.Linear(width, width)
    with torch.no_grad():
        given = projector if isinstance(projector, torch.nn.Linear) else None
        linear.weight.copy_(scale * (given.weight if given else torch.eye(width)))
        linear.bias.copy_(scale * given.bias if given else torch.zeros(width))
    return linear


def _shuffles(count: int, draw: torch.Generator) -> Iterator[int]:
    """Yield 0 … count − 1 in a new order again and again."""
    while True:
        yield from torch.randperm(count, generator=draw).tolist()


def _next(order: Iterator[int], count: int) -> list[int]:
    """The next ``count`` numbers, ascending; a number that a new order repeats within them is taken once."""
    return sorted({next(order) for _ in range(count)})
