"""Validation of a fit: response on members minus that on non-members, and size and strength of the steering."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stride_ray.corpus.blocks import Blocks
from stride_ray.corpus.failures import check_failed_blocks, finite_rows
from stride_ray.models.batch_size import rows_at_once
from stride_ray.models.causal_lm import SplitModel
from stride_ray.operators.forms import Operators, features, steering_vectors
from stride_ray.operators.membership import Membership
from stride_ray.runtime.config import Config
from stride_ray.runtime.errors import StrideError

# Sample sizes in blocks: for first-order responses, and for steered forward passes.
SAMPLE, STEERED = 64, 32
# Per steered block: maximum targets, and maximum subsets among its own and among the others. Steered logits cost
# targets × vocabulary × sketch per subset, which takes minutes without these bounds.
TARGETS, SUBSETS = 32, 4
# Below this many nats per token, a model has learnt its pool by heart.
NO_LOSS = 1e-6
# Strengths tried for the closed form: size of the steering relative to the stream, or in nats for logits.
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def validate(
    model: SplitModel, operators: Operators, blocks: Blocks, membership: Membership, config: Config
) -> dict[str, Any]:
    """Validate fitted operators on a sample of the pool.

    A block's gap is its mean response to the operators of its own subsets minus that to the others; reported are the
    mean over blocks and its standard error. Each block contributed to its own subsets' operators, so the gap is only a
    sanity check that operators respond to their members; accuracy is measured against retraining.

    Returns:
        * ``scale``, the steering strength;
        * ``gap`` and ``gap_error``, nats, from steered forward passes on 32 blocks;
        * ``gap_linear`` and ``gap_linear_error``, nats, to first order on 64 blocks;
        * ``relative_steering``, the root mean square of the steering over that of the stream (in nats for logits);
        * ``member_response``, the mean response on members as a share of the loss; 0 if there is no loss;
        * ``learned``, whether the gap exceeds two standard errors: the first-order gap of a closed form, the steered
          gap of a trained fit;
        * ``verdict``, a sentence.

    Raises:
        StrideError: an operator is not finite, too many blocks of the sample are not finite (check_failed_blocks), or
            no block has a target.
    """
    check_operators(operators.A)
    sample = with_targets(blocks, blocks.sample(SAMPLE, config.seed + 1))
    linear = torch.cat(
        [_linear_responses(model, operators, blocks, part) for part in np.array_split(sample, 16) if len(part)]
    )
    good = finite_rows([linear]).cpu().numpy()
    check_failed_blocks(sample[~good].tolist(), len(sample))
    sample, linear = sample[good], linear[torch.from_numpy(good).to(linear.device)]
    inside = membership_matrix(membership, sample)
    gap_linear, error_linear = gap(linear.cpu().numpy(), inside)
    few = np.sort(np.random.default_rng(config.seed).permutation(sample)[:STEERED])
    unit_size = _relative_steering(model, replace(operators, scale=1.0), blocks, few, membership)
    if config.fit.method == "closed_form":
        scales = [strength / max(unit_size, 1e-30) for strength in STRENGTHS]
        means = [
            _steered_gap(model, replace(operators, scale=s), blocks, few[:4], membership, config)[2] for s in scales
        ]
        operators = replace(operators, scale=scales[int(np.argmax(np.nan_to_num(means, nan=-np.inf)))])
    gap_nats, error_nats, response, loss = _steered_gap(model, operators, blocks, few, membership, config)
    decisive = (gap_linear, error_linear) if config.fit.method == "closed_form" else (gap_nats, error_nats)
    facts = {
        "scale": operators.scale,
        "gap": gap_nats,
        "gap_error": error_nats,
        "gap_linear": gap_linear,
        "gap_linear_error": error_linear,
        "relative_steering": unit_size * operators.scale,
        "member_response": response / loss if loss else 0.0,
        "learned": bool(decisive[0] > 2 * decisive[1]),
    }
    return {**facts, "verdict": _verdict(facts, loss)}


def check_operators(A: Tensor) -> None:
    """Raise StrideError if any of K operators, (K, …), is not finite."""
    good = finite_rows([A])
    if not good.all():
        first = int((~good).nonzero()[0, 0])
        raise StrideError(
            f"{int((~good).sum())} of {len(good)} operators are not finite (the first: operator {first}); if the model "
            "overflows, use model.dtype = float32 or bfloat16; if they were trained, lower fit.learning_rate."
        )


def gap(responses: np.ndarray, inside: np.ndarray) -> tuple[float, float]:
    """Mean response on members minus non-members, and its standard error over blocks.

    Args:
        responses: (n, K); NaN where not measured.
        inside: (n, K) bool, whether the block is in the subset.

    Returns:
        The gap and its standard error, over blocks with both a measured member and a measured non-member; zeros if
        there are fewer than two such blocks.
    """
    measured = np.isfinite(responses)
    responses = np.where(measured, responses, 0.0)
    members, others = inside & measured, ~inside & measured
    both = members.any(axis=1) & others.any(axis=1)
    if both.sum() < 2:
        return 0.0, 0.0
    means = [(responses * side)[both].sum(axis=1) / side[both].sum(axis=1) for side in (members, others)]
    difference = means[0] - means[1]
    return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))


def with_targets(blocks: Blocks, ordinals: np.ndarray) -> np.ndarray:
    """Return the ordinals of blocks that have a target; a long prompt may fill a whole block.

    Raises:
        StrideError: none of the blocks has a target.
    """
    found = ordinals[blocks.batch(ordinals).mask[:, 1:].any(axis=1)]
    if not len(found):
        raise StrideError(
            f"None of {len(ordinals)} blocks sampled from the pool has a target token; enlarge corpus.block_tokens, so "
            "that an answer shares a block with the end of its prompt."
        )
    return found


def membership_matrix(membership: Membership, ordinals: np.ndarray) -> np.ndarray:
    """Return which blocks belong to which subsets: (n, K) bool."""
    inside = np.zeros((len(ordinals), membership.subsets + 1), dtype=bool)
    np.put_along_axis(inside, membership.columns_at(ordinals).astype(np.int64), True, axis=1)
    return inside[:, :-1]


def _tensors(model: SplitModel, blocks: Blocks, ordinals: np.ndarray) -> tuple[Tensor, Tensor]:
    batch = blocks.batch(ordinals)
    return tuple(torch.from_numpy(np.ascontiguousarray(x)).to(model.device) for x in (batch.ids, batch.mask))  # type: ignore[return-value]


def _linear_responses(model: SplitModel, operators: Operators, blocks: Blocks, ordinals: np.ndarray) -> Tensor:
    return operators.linear(model, *_tensors(model, blocks, ordinals))


def _relative_steering(
    model: SplitModel, operators: Operators, blocks: Blocks, ordinals: np.ndarray, membership: Membership
) -> float:
    """Root mean square of the steering by each block's first subset, relative to the stream (in nats for logits)."""
    ids, _ = _tensors(model, blocks, ordinals)
    h = model.trunk(ids)
    # The columns of Bernoulli membership are padded with K: a block may be in no subset.
    own = membership.columns_at(ordinals)[:, 0].astype(np.int64)
    h, own = h[torch.from_numpy(own < membership.subsets).to(h.device)], own[own < membership.subsets]
    if not len(own):
        return 0.0
    size = steering_vectors(operators.basis, features(operators.basis, h), operators.A[own]).square().mean().sqrt()
    stream = 1.0 if operators.basis.form == "logit" else h.float().square().mean().sqrt()
    return float(size / stream)


def _steered_gap(
    model: SplitModel,
    operators: Operators,
    blocks: Blocks,
    ordinals: np.ndarray,
    membership: Membership,
    config: Config,
) -> tuple[float, float, float, float]:
    """Steer each block with operators of its own and of other subsets: gap, its error, member response, base loss."""
    inside = membership_matrix(membership, ordinals)
    responses = np.full(inside.shape, np.nan)
    tokens = blocks.block_tokens * rows_at_once(config, model, blocks.block_tokens)
    losses = []
    ids, mask = _tensors(model, blocks, ordinals)
    mask = mask & (mask[:, 1:].cumsum(1) <= TARGETS)[:, [0, *range(mask.shape[1] - 1)]]
    for row, member in enumerate(inside):
        order = np.random.default_rng([config.seed, int(ordinals[row])]).permutation(len(member))
        chosen = np.concatenate([order[member[order]][:SUBSETS], order[~member[order]][:SUBSETS]])
        base, found = operators.exact(model, ids[row], mask[row], torch.from_numpy(chosen).to(model.device), tokens)
        responses[row, chosen] = found.cpu().numpy()
        losses.append(base)
    mean_gap, error = gap(responses, inside)
    # A member's steered loss may overflow at the larger strengths that are tried.
    measured = responses[inside & np.isfinite(responses)]
    return mean_gap, error, float(measured.mean()) if len(measured) else 0.0, float(np.mean(losses))


def _verdict(facts: dict[str, Any], loss: float) -> str:
    numbers = (
        f"members minus non-members {facts['gap']:+.4g} ± {facts['gap_error']:.2g} nats steered, "
        f"{facts['gap_linear']:+.4g} ± {facts['gap_linear_error']:.2g} to first order; "
        f"steering {facts['relative_steering']:.2%}, members' response {facts['member_response']:+.2%} of the loss"
    )
    if facts["learned"]:
        return f"The operators respond to their members: {numbers}."
    if loss < NO_LOSS:
        return (
            f"WARNING: the model has no loss left on its own blocks ({loss:.1e} nats), so operators have nothing to "
            "lower and recovered influence is meaningless; fit at a model from earlier in training."
        )
    return (
        f"WARNING: these operators do not distinguish members from non-members; recovered influence is meaningless: "
        f"{numbers}. Train longer, change fit.* or use fit.method = closed_form."
    )
