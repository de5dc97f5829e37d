"""The paper's training loop in plain torch: all operators and the shared basis, trained jointly on three losses.

The streaming form of the objective (docs/method.md): each block of a step is used for fidelity with two of its own
subsets and for stability with one of the step's other subsets; the first few blocks are paired with all subsets of the
step for linearity. A step is a function of (seed, step), so the loop resumes from parameters, optimiser state and step
number. Each rank takes a slice of the step's (block, subset) pairs and gradients are summed: the step does not depend
on the number of ranks, up to the order of floating-point sums.

Only the subsets of a step receive gradients. Each row of the operator stack has its own Adam moments, which change only
in steps that include it; a dense optimiser would decay the moments, and move the rows, in steps without a gradient.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from stride_ray.corpus.blocks import Batch, Blocks
from stride_ray.corpus.failures import check_failed_blocks
from stride_ray.models.batch_size import rows_at_once
from stride_ray.models.causal_lm import SplitModel
from stride_ray.operators.forms import Basis, Operators, random_basis
from stride_ray.operators.membership import Membership
from stride_ray.operators.training.batches import (
    FIDELITY_PAIRS_PER_BLOCK,
    BatchStates,
    SeededShuffle,
    Step,
    plan_step,
    sample_pairs,
    without_blocks,
)
from stride_ray.operators.training.objective import (
    finite_blocks,
    linearity_loss,
    mean_square_steering,
    projection,
    stability_losses,
    steered_losses,
)
from stride_ray.operators.training.optimizers import RowAdam, muon
from stride_ray.operators.validation import STRENGTHS, gap
from stride_ray.runtime.config import Config
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.storage import Store, tensor_bytes

# Warm-up as a share of the steps; afterwards the learning rate decays to zero (paper's Appendix F.5).
WARM_UP = 0.05
# Learning rate of the shared matrices relative to the rows': they must not drift between a row's visits, every
# K/rows steps.
SHARED_RATE = 0.1
RIDGE = 1.0
# Number of evaluations and of checkpoints in a run.
EVALUATIONS, CHECKPOINTS = 10, 20
# Evaluation: number of blocks, and maximum subsets per block among its own and among the others.
EVALUATED, EVALUATED_SUBSETS = 32, 4

Report = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class Ranks:
    """This process's rank and the world size; a single process by default."""

    rank: int = 0
    world: int = 1

    def share(self, count: int) -> slice:
        """This rank's slice of ``count`` items."""
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place; every rank must call it."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
        return tensor


ALONE = Ranks()


class Loop:
    """Parameters, optimiser state and step number of the joint training.

    Trained are W_in (D, r), the stack A (K, …) and, for the gate form only, W_out (D, r). ``gain`` scales W_out so that
    an A with root mean square a steers by about a times the size of the stream (a nats, for logits): one learning rate
    then suits every model and form.

    Args:
        config: the run's configuration.
        model: from loading.load_run_model.
        blocks: the pool.
        membership: M.
        start: operators to start from (the closed form's); None: a random basis and A = 0.
        ranks: rank and world size.
    """

    def __init__(
        self,
        config: Config,
        model: SplitModel,
        blocks: Blocks,
        membership: Membership,
        start: Operators | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.model, self.membership, self.ranks = config, model, membership, ranks
        self.shuffle = SeededShuffle(blocks, config.seed, config.fit.blocks_per_step)
        self.done, self.failed = 0, set[int]()
        self._at_once = rows_at_once(config, self.model, blocks.block_tokens)
        self._sample = blocks.batch(blocks.sample(EVALUATED, config.seed + 2))
        self._pairs = sample_pairs(membership, self._sample.ordinals, config.seed, EVALUATED_SUBSETS)
        # Far fewer columns than rows: otherwise the projection fits any responses and the loss is uninformative.
        self.columns = max(1, min(FIDELITY_PAIRS_PER_BLOCK * self.shuffle.per_step, membership.subsets) // 8)
        self.Z = torch.empty(0)
        if config.fit.linearity:
            self.Z = projection(membership, len(blocks), self.columns, config.seed).to(model.device)
        self._set_parameters(start)
        self.moments = RowAdam(self.A)
        kind = muon if config.fit.optimizer == "muon" else torch.optim.AdamW
        self.optimizer = kind(self.shared, lr=0.0, weight_decay=0.0)

    def _set_parameters(self, start: Operators | None) -> None:
        """Initialise parameters and gain; the closed form starts at the strength with the highest member response."""
        wanted, model = self.config.operators, self.model
        sizes = (model.width, model.vocabulary, wanted.rank, wanted.sketch)
        basis = start.basis if start else random_basis(wanted.form, *sizes, self.config.seed)
        # Trained operators use plain gradients for first-order responses, not the closed form's unit norm and target.
        self._constant = replace(basis, unit=False, target="model", centre=torch.empty(0)).to(model.device)
        trained = basis.form == "gate"
        size = torch.linalg.matrix_norm(basis.W_out, 2) if trained else 1.0
        self.W_in = self._constant.W_in.clone().requires_grad_(True)
        self.W_out = (self._constant.W_out / size).requires_grad_(trained)
        self.shared = [self.W_in, self.W_out] if trained else [self.W_in]
        self.gain = torch.ones((), device=model.device)
        generator = torch.Generator().manual_seed(self.config.seed)
        A = start.A if start else torch.randn(self.membership.subsets, *basis.shape, generator=generator)
        A = (A / A.square().mean().sqrt()).to(model.device)
        self.A = torch.zeros_like(A)
        members = self._pairs[0]
        self.gain = 1 / self._steering(members, A).clamp(min=1e-30)
        if start:
            held = self._run_trunk(self._sample, members)
            means = [float(self._responses(held, members, A * strength).nanmean()) for strength in STRENGTHS]
            self.A = A * STRENGTHS[int(np.argmax(means))]

    def basis(self) -> Basis:
        """The current basis; differentiable in W_in, and in W_out if it is trained."""
        return replace(self._constant, W_in=self.W_in, W_out=self.W_out * self.gain)

    def operators(self) -> Operators:
        """A detached copy of the current operators."""
        basis = self.basis()
        detached = {name: getattr(basis, name).detach().clone() for name in ("W_in", "W_out")}
        return Operators(replace(basis, **detached), self.A.clone())

    def step(self) -> dict[str, float]:
        """Take one step.

        If a loss or gradient is not finite, the blocks at fault go to ``failed`` and the step is repeated without them.

        Returns:
            The three losses before the update, over the pairs of all ranks: fidelity in nats, stability in the unit of
            its form, linearity in nats².

        Raises:
            StrideError: a loss or gradient is not finite although all blocks are, or too many blocks are not finite.
        """
        plan = plan_step(self.shuffle, self.membership, self.config.seed, self.done)
        plan = without_blocks(plan, np.flatnonzero(np.isin(plan.batch.ordinals, sorted(self.failed))))
        losses = self._attempt(plan)
        if losses is None:
            ids, mask = (torch.from_numpy(x).to(self.model.device) for x in plan.batch[1:])
            failed = np.flatnonzero(~finite_blocks(self.model, ids, mask, self._at_once).cpu().numpy())
            self.failed |= set(plan.batch.ordinals[failed].tolist())
            check_failed_blocks(sorted(self.failed), len(self.shuffle.blocks))
            losses = self._attempt(without_blocks(plan, failed)) if len(failed) else None
        if losses is None:
            raise StrideError(
                f"The loop's losses or gradients are not finite at step {self.done}; lower fit.learning_rate, or use "
                "float32 or bfloat16 (model.dtype)."
            )
        self.done += 1
        return losses

    def _attempt(self, plan: Step) -> dict[str, float] | None:
        """Compute the losses of a step and update the parameters; None, without an update, if one is not finite."""
        fit = self.config.fit
        rows = torch.from_numpy(plan.subsets).to(self.A.device)
        A = self.A[rows].requires_grad_(True)
        pairs = {"fidelity": plan.fidelity, "stability": plan.stability, "linearity": plan.linearity}
        weights = {"fidelity": 1.0, "stability": fit.stability, "linearity": fit.linearity}
        if len(rows) < 2 * self.columns or not len(plan.linearity):
            weights["linearity"] = 0.0
        mine = {name: self._rank_slice(found) for name, found in pairs.items() if weights[name]}
        held = self._run_trunk(plan.batch, np.concatenate(list(mine.values())))
        losses = dict.fromkeys(pairs, torch.zeros((), device=self.A.device))
        if "linearity" in mine:
            losses["linearity"], slopes = self._linearity(held, plan, A.detach(), rows)
        for name, some in mine.items():
            for index, part in enumerate(self._split_batches(some)):
                h, ids, mask = held.of(part)
                chosen = A[part[:, 1]]
                if name == "stability":
                    found = stability_losses(self.model, self.basis(), h, mask, chosen, fit.top_m, fit.stability_form)
                else:
                    found = steered_losses(self.model, self.basis(), h, ids, mask, chosen)
                if name == "linearity":
                    (-weights[name] * found @ slopes.split(self._at_once)[index]).backward()
                else:
                    mean = found.sum() / len(pairs[name])
                    (weights[name] * mean).backward()
                    losses[name] = losses[name] + mean.detach()
        summed = self._update(rows, A, torch.stack(list(losses.values())))
        return dict(zip(losses, summed, strict=True)) if summed else None

    def _update(self, rows: Tensor, A: Tensor, losses: Tensor) -> list[float]:
        """All-reduce losses and gradients, and update the parameters; returns the losses, none if one is not finite."""
        leaves = [A, *self.shared]
        flat = [(torch.zeros_like(x) if x.grad is None else x.grad).flatten() for x in leaves]
        parts = self.ranks.sum(torch.cat([losses, *flat])).split([len(losses), *(len(x) for x in flat)])
        if not all(part.isfinite().all() for part in parts):
            self.optimizer.zero_grad()
            return []
        rate = self.rate()
        self.moments.update(self.A, rows, parts[1].view_as(A), rate)
        for parameter, gradient in zip(self.shared, parts[2:], strict=True):
            parameter.grad = gradient.view_as(parameter)
        self.optimizer.param_groups[0]["lr"] = SHARED_RATE * rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return parts[0].tolist()

    def _linearity(self, held: BatchStates, plan: Step, A: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's part of the linearity loss, and the loss's derivative by the responses of this rank's pairs.

        Responses are computed here without a graph; the caller recomputes them in batches for the gradients. So the
        graphs of all subsets are never in memory together, and no collective has to be differentiated.
        """
        y = self._responses(held, plan.linearity, A).view(-1, len(rows)).requires_grad_(True)
        loss = linearity_loss(y, self.Z[rows], RIDGE)
        (slopes,) = torch.autograd.grad(loss, y)
        return loss.detach() / self.ranks.world, slopes.flatten()[self.ranks.share(len(plan.linearity))]

    def rate(self) -> float:
        """The rows' learning rate at the next step: linear warm-up, then linear decay to zero."""
        steps = self.config.fit.steps
        warm = max(1, round(WARM_UP * steps))
        share = min((self.done + 1) / warm, (steps - self.done) / max(1, steps - warm))
        return self.config.fit.learning_rate * share

    def evaluate(self) -> dict[str, float]:
        """Compare members with non-members on a fixed sample; the gap leaves out the blocks of the last step.

        Returns:
            ``gap`` and ``gap_error`` (nats; validation.gap), ``member_response`` (nats) and ``steering``, the median
            size of the steering by members' operators, relative to the stream (in nats for the logit form).
        """
        members, others = self._pairs
        pairs = np.concatenate([members, others])
        y = self._responses(self._run_trunk(self._sample, self._rank_slice(pairs)), pairs, self.A).cpu().numpy()
        found = np.full((len(self._sample.ordinals), self.membership.subsets), np.nan)
        found[pairs[:, 0], pairs[:, 1]] = y
        inside = np.zeros(found.shape, dtype=bool)
        inside[members[:, 0], members[:, 1]] = True
        measured = np.isfinite(found)
        seen = np.isin(self._sample.ordinals, self.shuffle.batch(max(0, self.done - 1)).ordinals)
        kept = ~seen & (measured & inside).any(1) & (measured & ~inside).any(1)
        difference, error = gap(found[kept], inside[kept]) if kept.sum() > 1 else (float("nan"), float("nan"))
        return {
            "gap": difference,
            "gap_error": error,
            "member_response": float(np.nanmean(found[inside])),
            "steering": float(self._steering(members, self.A)),
        }

    @torch.no_grad()
    def _responses(self, held: BatchStates, pairs: np.ndarray, A: Tensor) -> Tensor:
        """y = CE_0 − CE_k for the pairs of all ranks, (len(pairs),) nats; ``held`` has this rank's blocks.

        ``pairs`` index the blocks of the batch and the rows of ``A``.
        """
        y = torch.zeros(len(pairs), device=A.device)
        mine = self._rank_slice(pairs)
        places, back = np.unique(mine[:, 0], return_inverse=True)
        base = [self.model.losses(*held.of(part)) for part in self._split_batches(places[:, None])]
        steered = [
            steered_losses(self.model, self.basis(), *held.of(part), A[torch.from_numpy(part[:, 1]).to(A.device)])
            for part in self._split_batches(mine)
        ]
        if len(mine):
            y[self.ranks.share(len(pairs))] = torch.cat(base)[torch.from_numpy(back).to(A.device)] - torch.cat(steered)
        return self.ranks.sum(y)

    @torch.no_grad()
    def _steering(self, pairs: np.ndarray, A: Tensor) -> Tensor:
        """Median size of the steering over pairs and positions, relative to the stream (in nats for logits)."""
        sizes = []
        for part in self._split_batches(pairs[:EVALUATED]):
            h, _, mask = self._run_trunk(self._sample, part).of(part)
            squares = mean_square_steering(self.basis(), h, A[torch.from_numpy(part[:, 1]).to(A.device)])
            sizes.append(squares[mask != 0].sqrt())
        return torch.cat(sizes).nanmedian()

    def _run_trunk(self, batch: Batch, pairs: np.ndarray) -> BatchStates:
        """Run the trunk on the blocks of some pairs and return their streams."""
        places = np.unique(pairs[:, 0])
        ids, mask = (torch.from_numpy(x[places]).to(self.model.device) for x in (batch.ids, batch.mask))
        streams = [self.model.trunk(some) for some in ids.split(self._at_once)] if len(places) else []
        return BatchStates(places, torch.cat(streams) if streams else torch.zeros(0, device=ids.device), ids, mask)

    def _rank_slice(self, pairs: np.ndarray) -> np.ndarray:
        """Return this rank's slice of the pairs of all ranks."""
        return pairs[self.ranks.share(len(pairs))]

    def _split_batches(self, pairs: np.ndarray) -> list[np.ndarray]:
        """Split pairs into batches of rows_at_once."""
        return [pairs[first : first + self._at_once] for first in range(0, len(pairs), self._at_once)]

    def state(self) -> dict[str, Tensor]:
        """Return the checkpoint as tensors for safetensors; an untrained W_out is left out, since it can be rebuilt."""
        state = {"A": self.A, "gain": self.gain, "step": torch.tensor(self.done)}
        state["failed"] = torch.tensor(sorted(self.failed), dtype=torch.long)
        state |= dict(zip(("W_in", "W_out"), self.shared, strict=False))
        state |= {"first": self.moments.first, "second": self.moments.second, "visits": self.moments.visits}
        for index, parameter in enumerate(self.shared):
            state |= {f"optimizer.{index}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        return {name: value.detach().cpu() for name, value in state.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Resume from a checkpoint of ``state``."""
        here = {name: value.to(self.model.device) for name, value in state.items() if name != "step"}
        self.done, self.failed = int(state["step"]), set(state["failed"].tolist())
        self.A, self.gain = here["A"], here["gain"]
        self.moments.first, self.moments.second, self.moments.visits = (here[n] for n in ("first", "second", "visits"))
        with torch.no_grad():
            for name, parameter in zip(("W_in", "W_out"), self.shared, strict=False):
                parameter.copy_(here[name])
        for name, value in here.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                self.optimizer.state[self.shared[int(index)]][key] = state[name] if key == "step" else value


def run_loop(loop: Loop, store: Store, report: Report | None = None) -> list[dict[str, float]]:
    """Run the loop to its last step, resuming from the newest checkpoint in ``store`` if there is one.

    Rank 0 publishes a checkpoint (``step-….safetensors``) after every twentieth of the steps. After every tenth all
    ranks evaluate, rank 0 appends the metrics to ``log.json`` and prints them, and every rank calls ``report``.

    Args:
        loop: a new loop, with the configuration that ``store`` was created with.
        store: folder of the checkpoints.
        report: called after each evaluation.

    Returns:
        The metrics of all evaluations: ``step``, the losses and the result of ``Loop.evaluate``.
    """
    steps, first = loop.config.fit.steps, not loop.ranks.rank
    if names := store.names("", ".safetensors"):
        loop.load(store.read_tensors(names[-1]))
    known = store.read_json("log.json")["evaluations"] if store.exists("log.json") else []
    log = [each for each in known if each["step"] <= loop.done]
    started, begun = time.monotonic(), loop.done
    while loop.done < steps:
        losses = loop.step()
        if _is_due(loop.done, steps, EVALUATIONS):
            found = {"step": loop.done, **losses, **loop.evaluate()}
            log.append(found)
            if first:
                store.write_json("log.json", {"evaluations": log})
                _print_progress(found, steps, (loop.done - begun) / (time.monotonic() - started))
            if report:
                report(found)
        if first and _is_due(loop.done, steps, CHECKPOINTS):
            older = store.names("", ".safetensors")
            store.write(f"step-{loop.done:07d}.safetensors", tensor_bytes(loop.state()))
            for name in older:
                store.remove(name)
    return log


def _is_due(done: int, steps: int, times: int) -> bool:
    """Whether an action that runs ``times`` times, and after the last step, is due after this step."""
    return done == steps or done % max(1, steps // times) == 0


def _print_progress(found: dict[str, float], steps: int, speed: float) -> None:
    """Write one progress line: step, speed, time left and metrics."""
    left = (steps - found["step"]) / speed
    losses = ", ".join(f"{name} {found[name]:.4g}" for name in ("fidelity", "stability", "linearity"))
    # Not print(): Ray Train replaces it, and every line would appear twice.
    sys.stderr.write(
        f"train: step {found['step']}/{steps}, {speed:.2f} steps/s, {left / 60:.1f} min left; {losses}; "
        f"steering {found['steering']:.2%}, members minus others {found['gap']:+.4f} ± {found['gap_error']:.4f} nats\n"
    )
