"""Did a fit learn anything? Response on members minus non-members, the size of the steering, and its strength."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stride_ray.corpus.blocks import Blocks
from stride_ray.models.batch_size import rows_at_once
from stride_ray.models.causal_lm import SplitModel
from stride_ray.operators.forms import Operators, features, steering
from stride_ray.operators.membership import Membership
from stride_ray.runtime.config import Config
from stride_ray.runtime.errors import StrideError

# Blocks whose responses are compared to first order, and those that are steered for real.
SAMPLE, STEERED = 64, 32
# Of a steered block: targets that count, and subsets of its own and others that steer it. Steered logits cost
# targets × vocabulary × sketch for each subset, minutes where these were not bounded.
TARGETS, SUBSETS = 32, 4
# Strengths tried for the closed form: relative sizes of the steering (of the stream, or in nats of logit).
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def judge(
    model: SplitModel, operators: Operators, blocks: Blocks, membership: Membership, config: Config
) -> dict[str, Any]:
    """Measure fitted operators on a sample of the pool.

    The gap is, per block, its mean response to the operators of its own subsets minus that to others, and then the
    mean over blocks with its standard error. A block has a share in its own subsets' operators: that they answer to
    their members at all is what the gap says, and no more (accuracy is measured against retraining).

    Returns:
        ``scale``; ``gap`` and ``gap_error`` in nats by steered forwards on 32 blocks; ``gap_linear`` and
        ``gap_linear_error`` to first order on 64; ``relative_steering`` (root mean square of what operators add,
        over that of the stream, or in nats for logits); ``member_response`` (mean over members, share of the loss);
        ``learned`` (the first-order gap of a closed form, or the steered one of a trained fit, is above two standard
        errors) and ``verdict``, a sentence.
    """
    sample = with_targets(blocks, blocks.sample(SAMPLE, config.seed + 1))
    inside = members(membership, sample)
    linear = torch.cat([_linear(model, operators, blocks, part) for part in np.array_split(sample, 16) if len(part)])
    gap_linear, error_linear = gap(linear.cpu().numpy(), inside)
    few = np.sort(np.random.default_rng(config.seed).permutation(sample)[:STEERED])
    unit_size = _relative_steering(model, replace(operators, scale=1.0), blocks, few, membership)
    if config.fit.method == "closed_form":
        scales = [strength / max(unit_size, 1e-30) for strength in STRENGTHS]
        means = [_steered(model, replace(operators, scale=s), blocks, few[:4], membership, config)[2] for s in scales]
        operators = replace(operators, scale=scales[int(np.argmax(np.nan_to_num(means, nan=-np.inf)))])
    gap_nats, error_nats, response, loss = _steered(model, operators, blocks, few, membership, config)
    decisive = (gap_linear, error_linear) if config.fit.method == "closed_form" else (gap_nats, error_nats)
    facts = {
        "scale": operators.scale,
        "gap": gap_nats,
        "gap_error": error_nats,
        "gap_linear": gap_linear,
        "gap_linear_error": error_linear,
        "relative_steering": unit_size * operators.scale,
        "member_response": response / loss,
        "learned": bool(decisive[0] > 2 * decisive[1]),
    }
    return {**facts, "verdict": _verdict(facts)}


def gap(responses: np.ndarray, inside: np.ndarray) -> tuple[float, float]:
    """Mean response on members minus non-members, and its standard error over blocks.

    Args:
        responses: (n, K); nan where not measured.
        inside: (n, K) bool, whether the block is in the subset.

    Returns:
        Both over the blocks that have members and non-members measured; zeros where fewer than two do.
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
    """Those blocks that have a token to predict (a long prompt may fill a block)."""
    found = ordinals[blocks.batch(ordinals).mask[:, 1:].any(axis=1)]
    if not len(found):
        raise StrideError(
            f"None of {len(ordinals)} blocks drawn from the pool has a token that counts; enlarge corpus.block_tokens, "
            "so that answers share a block with their prompts' ends."
        )
    return found


def members(membership: Membership, ordinals: np.ndarray) -> np.ndarray:
    """(n, K) bool membership of some blocks."""
    inside = np.zeros((len(ordinals), membership.subsets + 1), dtype=bool)
    np.put_along_axis(inside, membership.columns_at(ordinals).astype(np.int64), True, axis=1)
    return inside[:, :-1]


def _tensors(model: SplitModel, blocks: Blocks, ordinals: np.ndarray) -> tuple[Tensor, Tensor]:
    batch = blocks.batch(ordinals)
    return tuple(torch.from_numpy(np.ascontiguousarray(x)).to(model.device) for x in (batch.ids, batch.mask))  # type: ignore[return-value]


def _linear(model: SplitModel, operators: Operators, blocks: Blocks, ordinals: np.ndarray) -> Tensor:
    return operators.linear(model, *_tensors(model, blocks, ordinals))


def _relative_steering(
    model: SplitModel, operators: Operators, blocks: Blocks, ordinals: np.ndarray, membership: Membership
) -> float:
    """Root mean square of what members' operators add, relative to the stream (absolute, in nats, for logits)."""
    ids, _ = _tensors(model, blocks, ordinals)
    h = model.trunk(ids)
    own = membership.columns_at(ordinals)[:, 0].astype(np.int64) % membership.subsets
    size = steering(operators.basis, features(operators.basis, h), operators.A[own]).square().mean().sqrt()
    stream = 1.0 if operators.basis.form == "logit" else h.float().square().mean().sqrt()
    return float(size / stream)


def _steered(
    model: SplitModel,
    operators: Operators,
    blocks: Blocks,
    ordinals: np.ndarray,
    membership: Membership,
    config: Config,
) -> tuple[float, float, float, float]:
    """Steer each block with some of its own subsets' operators and others: gap, error, member response, loss."""
    inside = members(membership, ordinals)
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
    return mean_gap, error, float(np.nanmean(responses[inside])), float(np.mean(losses))


def _verdict(facts: dict[str, Any]) -> str:
    numbers = (
        f"members minus non-members {facts['gap']:+.4g} ± {facts['gap_error']:.2g} nats steered, "
        f"{facts['gap_linear']:+.4g} ± {facts['gap_linear_error']:.2g} to first order; "
        f"steering {facts['relative_steering']:.2%}, members' response {facts['member_response']:+.2%} of the loss"
    )
    if facts["learned"]:
        return f"The operators answer to their members: {numbers}."
    return (
        f"WARNING: these operators do not tell members from non-members; what they recover means nothing: {numbers}. "
        "Train longer, change fit.* or use fit.method = closed_form."
    )
