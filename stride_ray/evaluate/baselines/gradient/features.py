"""Gradients as vectors: whole if they fit into memory, else projected from both sides.

A weight's gradient G is kept as P_rowsᵀ G P_columns with Gaussian projections (as in LoGRA, Choe et al. 2024), which
preserves inner products in expectation. Vectors are kept per weight, since most methods precondition per weight.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from stride_ray.evaluate.baselines.gradient.per_example import LayerCall, Objective, backward_batches, weight_shapes
from stride_ray.evaluate.baselines.problem import Texts
from stride_ray.models.causal_lm import SplitModel

WHOLE_BUDGET = 2**28  # elements of all queries' gradients above which they are projected: 1 GiB
BATCH_BUDGET = 2**26  # elements of one weight's gradients in one batch
Projections = dict[str, tuple[Tensor, Tensor]]
Gradients = dict[str, Tensor]


def projections(shapes: dict[str, tuple[int, int]], rank: int, seed: int, device: torch.device) -> Projections:
    """Draw a pair of Gaussian projections for each weight; sides of at most ``rank`` get the identity.

    Args:
        shapes: (rows, columns) by weight.
        rank: rows and columns after projecting.
        seed: for the draw; gives the same projections on every device.
        device: where they are used.

    Returns:
        (rows, min(rank, rows)) and (columns, min(rank, columns)) float32.
    """
    generator = torch.Generator().manual_seed(seed)

    def side(size: int) -> Tensor:
        if size <= rank:
            return torch.eye(size)
        return torch.randn(size, rank, generator=generator) / math.sqrt(rank)

    return {name: (side(rows).to(device), side(columns).to(device)) for name, (rows, columns) in shapes.items()}


def whole_or_projected(model: SplitModel, queries: int, rank: int, seed: int) -> Projections:
    """No projection if the queries' whole gradients fit into ``WHOLE_BUDGET``, else ``rank`` per side."""
    shapes = weight_shapes(model, embedding=True)
    if queries * sum(rows * columns for rows, columns in shapes.values()) <= WHOLE_BUDGET:
        return {}
    return projections(shapes, rank, seed, model.device)


def batches(
    model: SplitModel,
    texts: Texts,
    batch_tokens: int,
    drawn: Projections,
    objective: Objective | None = None,
    embedding: bool = True,
    change: Callable[[str, Tensor], Tensor] | None = None,
) -> Iterator[tuple[slice, Gradients]]:
    """Compute the per-example gradients of all texts.

    Args:
        model: in float32.
        texts: n sequences.
        batch_tokens: tokens in one pass.
        drawn: projections by weight; weights without one are kept whole.
        objective: see ``per_example.backward_batches``.
        embedding: whether to include the token embedding's gradient.
        change: maps a weight's name and its whole gradients (B, rows, columns) to others of that shape, before
            projection.

    Yields:
        The rows of a batch and, per weight, (B, features) float32.
    """
    most = None if drawn and change is None else most_at_once(model)
    for rows, uses in backward_batches(model, texts, batch_tokens, objective, embedding, most):
        found: Gradients = {}
        for name in dict.fromkeys(use.weight for use in uses):
            of_weight = [use for use in uses if use.weight == name]
            found[name] = _gradient(of_weight, drawn.get(name), change).flatten(1)
        yield rows, found


def _gradient(
    uses: list[LayerCall], pair: tuple[Tensor, Tensor] | None, change: Callable[[str, Tensor], Tensor] | None
) -> Tensor:
    """Sum one weight's gradients over its uses."""
    if pair is not None and change is None:
        return torch.stack([use.project(*pair) for use in uses]).sum(0)
    whole = uses[0].full()
    for use in uses[1:]:
        whole += use.full()
    if change is not None:
        whole = change(uses[0].weight, whole)
    return whole if pair is None else pair[0].T @ whole @ pair[1]


def most_at_once(model: SplitModel) -> int:
    """Maximum sequences per pass such that the largest weight's whole gradients fit into ``BATCH_BUDGET``."""
    largest = max(rows * columns for rows, columns in weight_shapes(model, embedding=True).values())
    return max(1, BATCH_BUDGET // largest)


def concatenate(stream: Iterator[tuple[slice, Gradients]], total: int) -> Gradients:
    """Concatenate a stream of batches into one tensor per weight, (total, features)."""
    kept: Gradients = {}
    for rows, found in stream:
        for name, part in found.items():
            if name not in kept:
                kept[name] = part.new_zeros(total, part.shape[1])
            kept[name][rows] = part
    return kept


def products(
    queries: Gradients, stream: Iterator[tuple[slice, Gradients]], total: int, unit: bool = False
) -> np.ndarray:
    """Inner products of queries with a stream of blocks, summed over all weights.

    Args:
        queries: per weight (Q, features).
        stream: batches of blocks.
        total: N.
        unit: divide by both norms (an all-zero gradient gives 0).

    Returns:
        (Q, N) float32.
    """
    Q = len(next(iter(queries.values())))
    found = torch.zeros(Q, total)
    squares = torch.zeros(total)
    for rows, blocks in stream:
        for name, part in blocks.items():
            found[:, rows] += (queries[name] @ part.T).cpu()
            squares[rows] += part.square().sum(1).cpu()
    if unit:
        lengths = torch.stack([part.square().sum(1) for part in queries.values()]).sum(0).sqrt().cpu()
        found /= lengths.clamp(min=1e-30).unsqueeze(1) * squares.sqrt().clamp(min=1e-30)
    return found.numpy()


def damped_products(queries: list[Tensor], blocks: list[Tensor], damping: float) -> Tensor:
    """Queries times the damped inverse second moment of the blocks times blocks: q (BᵀB/N + λI)⁻¹ bᵀ.

    Args:
        queries: parts of (Q, F), split by columns.
        blocks: parts of (N, F), split alike.
        damping: λ as a share of the mean eigenvalue of BᵀB/N.

    Returns:
        (Q, N) float64, solved in F×F or N×N, whichever is smaller; zeros if all blocks are zero.
    """
    N, F = len(blocks[0]), sum(part.shape[1] for part in blocks)
    amount = damping * sum(float(part.double().square().sum()) for part in blocks) / (N * F)
    if amount == 0:
        return torch.zeros(len(queries[0]), N, dtype=torch.float64, device=blocks[0].device)
    if F <= N:
        q, b = torch.cat(queries, 1).double(), torch.cat(blocks, 1).double()
        moment = b.T @ b / N
        moment.diagonal().add_(amount)
        return torch.linalg.solve(moment, q.T).T @ b.T
    both = torch.zeros(len(queries[0]) + N, N, dtype=torch.float64, device=blocks[0].device)
    for q, b in zip(queries, blocks, strict=True):
        both += torch.cat([q, b]).double() @ b.double().T
    known, kernel = both[: len(queries[0])], both[len(queries[0]) :]
    kernel.diagonal().add_(amount * N)
    return N * torch.linalg.solve(kernel, known.T).T
