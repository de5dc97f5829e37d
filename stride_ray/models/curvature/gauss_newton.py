"""Products with the Gauss–Newton matrix of a model's loss on some blocks, in the coordinates of J (sites.py).

For a block G = Σ_t ω_t Z_tᵀ (diag p_t − p_t p_tᵀ) Z_t, with Z_t the Jacobian of the logits at t with respect to the
operators at the sites, p_t the model's own distribution and ω_t the token's weight in the block's mean loss. Unlike the
Kronecker factors it includes interactions between sites.

Z v is computed by double backward instead of forward mode: the map from the gradient w at the final states to the
gradients at the sites is linear in w, and its derivative by w is its transpose, which maps a small step at the sites to
the change of the states. One graph serves any number of directions v. For a model with a module that is not twice
differentiable, a central difference of two steered forward passes is used instead.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stride_ray.models.causal_lm import SplitModel
from stride_ray.models.curvature.conjugate_gradients import Gradient
from stride_ray.models.sites import (
    EMBEDDING,
    HEAD,
    ORIGIN,
    Site,
    forward_with_activations,
    output_gradients,
    site_module,
    token_weights,
)

# Tolerance for double backward against the transpose that it should be, in standard deviations of a random probe.
DOUBLE_BACKWARD_TOLERANCE = 0.05
# Step of the central difference: its norm at every site is at most this share of the site's output norm, by dtype.
STEP = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


class Linearised:
    """A model on a batch of blocks, linearised in the operators at its sites.

    Args:
        model: determines the device.
        sites: must include the head; the origin, which stands for the start of training, is ignored.
        ids_BT, mask_BT: the blocks and their targets.
        finite_difference: for Z, use central differences instead of double backward; None: if the model needs it.

    Attributes:
        finite_difference: as given or detected.
    """

    def __init__(
        self,
        model: SplitModel,
        sites: tuple[Site, ...],
        ids_BT: Tensor,
        mask_BT: Tensor,
        finite_difference: bool | None = None,
    ) -> None:
        self.model, self.ids, self.omega = model, ids_BT.to(model.device), token_weights(mask_BT.to(model.device))
        self.sites = tuple(site for site in sites if site.name != ORIGIN)
        # Fused attention has no second derivative.
        with contextlib.nullcontext() if finite_difference else sdpa_kernel(SDPBackend.MATH):
            names = [site.name for site in self.sites]
            # Final states (B, T, D), and by site u (B, T, F) and outputs (B, T, D).
            self.z, self.inputs, self.outputs = forward_with_activations(model, names, ids_BT)
            self.w = torch.zeros_like(self.z, requires_grad=True)
            self.gradients_of_w = {} if finite_difference else self._differentiable_gradients()
        self.predicting_states = self.z.detach()[:, :-1]
        # Logits and their graph take about four times the memory of the logits alone.
        self.positions_at_once = max(1, model.logits_rows(1) // 4)
        self.finite_difference = not self._double_backward_works() if finite_difference is None else finite_difference

    def _differentiable_gradients(self) -> dict[str, Tensor]:
        """Return the gradients at the sites as differentiable functions of w; empty without double backward."""
        try:
            gradients = torch.autograd.grad(self.z, list(self.outputs.values()), self.w, create_graph=True)
        except RuntimeError:
            return {}
        return dict(zip(self.outputs, gradients, strict=True))

    def _double_backward_works(self) -> bool:
        """Whether double backward gives the transpose of the backward pass, tested on a random probe.

        A module may raise an error, or silently drop its part of the derivative.
        """
        if not self.gradients_of_w:
            return not self.outputs
        generator = torch.Generator().manual_seed(0)
        w, *changes = (torch.randn(x.shape, generator=generator).to(x) for x in (self.z, *self.outputs.values()))
        gradients = output_gradients(self.z, self.outputs, w, keep=True)
        # ⟨w, Z x⟩ = ⟨Zᵀ w, x⟩ for random w and x; the right side needs a single backward pass.
        expected = sum((g * x).sum() for g, x in zip(gradients.values(), changes, strict=True))
        deviation = sum((g * x).square().sum() for g, x in zip(gradients.values(), changes, strict=True)) ** 0.5
        try:
            dz = self._state_change(dict(zip(self.outputs, changes, strict=True)))
        except RuntimeError:
            return False
        return bool(((w * dz).sum() - expected).abs() <= DOUBLE_BACKWARD_TOLERANCE * deviation)

    def product(self, v: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield Σ G v over the blocks, site by site: (name, tensor of J's shape without the batch dimension)."""
        head = next(site for site in self.sites if site.name == HEAD)
        # 1. Z v up to the final states.
        along = self._along(v)
        # 2. On to the logits, times ω (diag p − p pᵀ), and back to the states, some positions at a time.
        state_gradients, head_product = [], torch.zeros_like(v[HEAD])
        parts = (x.flatten(0, 1).split(self.positions_at_once) for x in along)
        for states_PD, dz_PD, omega_P in zip(*parts, strict=True):
            logit_gradient, state_gradient = self._curvature_product(states_PD, dz_PD, omega_P, head, v[HEAD])
            state_gradients.append(state_gradient)
            head_product += head.tokens.of(logit_gradient).T @ states_PD.float()
        yield HEAD, head_product
        # 3. An ordinary backward pass from the states to the other sites; the last position predicts nothing.
        w = torch.nn.functional.pad(torch.cat(state_gradients).view_as(self.predicting_states), (0, 0, 0, 1))
        gradients = output_gradients(self.z, self.outputs, w, keep=True)
        for site in self.sites:
            if site.name != HEAD:
                yield site.name, self._weight_gradient(site, gradients.pop(site.name))

    def quadratic_form(self, v: Mapping[str, Tensor]) -> float:
        """Σ vᵀ G v over the blocks: Σ_t ω_t times the variance under p_t of the logits' change along v.

        Costs less than half of ``product``, which goes back to the sites.
        """
        head, found = next(site for site in self.sites if site.name == HEAD), 0.0
        parts = (x.flatten(0, 1).split(self.positions_at_once) for x in self._along(v))
        for states_PD, dz_PD, omega_P in zip(*parts, strict=True):
            _, logits, change_PV = self._logits_along(states_PD, dz_PD, head, v[HEAD])
            p_PV = logits.detach().float().softmax(-1)
            change_PV -= (p_PV * change_PV).sum(-1, keepdim=True)
            found += float((p_PV.mul_(change_PV).mul_(change_PV).sum(-1).double() * omega_P).sum())
        return found

    def loss_changes(self, v: Mapping[str, Tensor]) -> Tensor:
        """Change of each token's weighted loss for a step along v: ω_t ⟨∇ loss_t, Z_t v⟩, (B, T − 1).

        A block's changes add up to ⟨J, v⟩, without the origin.
        """
        head = next(site for site in self.sites if site.name == HEAD)
        parts = (
            x.flatten(0, 1).split(self.positions_at_once)
            for x in (self.predicting_states, self._states_along(v), self.ids[:, 1:].unsqueeze(2))
        )
        found = []
        for states_PD, dz_PD, targets_P1 in zip(*parts, strict=True):
            _, logits, change_PV = self._logits_along(states_PD, dz_PD, head, v[HEAD])
            mean_change = (logits.detach().float().softmax(-1) * change_PV).sum(-1)
            found.append(mean_change - change_PV.gather(1, targets_P1).squeeze(1))
        return self.omega * torch.cat(found).view_as(self.omega)

    def _along(self, v: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Predicting states and their change along v, (B, T − 1, D), and ω (B, T − 1)."""
        return self.predicting_states, self._states_along(v), self.omega

    def _states_along(self, v: Mapping[str, Tensor]) -> Tensor:
        """Return the change of the final states (B, T − 1, D): a step along v changes the sites' outputs, and these."""
        changes = {site.name: self._output_change(site, v[site.name]) for site in self.sites if site.name != HEAD}
        state_change = self._state_change_by_difference if self.finite_difference else self._state_change
        return state_change(changes)[:, :-1]

    def _output_change(self, site: Site, v: Tensor) -> Tensor:
        """Return the change of a site's output for a step along v: (B, T, D)."""
        return site.tokens.spread(self.ids, v) if site.name == EMBEDDING else self.inputs[site.name] @ v

    def _weight_gradient(self, site: Site, g: Tensor) -> Tensor:
        """Return Σ_t u_t ⊗ g_t, summed over the batch, for output gradients g (B, T, D)."""
        if site.name == EMBEDDING:
            return site.tokens.sum_outer_products(self.ids.reshape(1, -1), g.reshape(1, -1, g.shape[-1]))[0]
        return self.inputs[site.name].flatten(0, 1).T @ g.flatten(0, 1)

    def _state_change(self, changes: Mapping[str, Tensor]) -> Tensor:
        """Return the change of the final states (B, T, D) for changes of the sites' outputs, by double backward."""
        if not self.outputs:
            return torch.zeros_like(self.z)
        products = [(self.gradients_of_w[name] * x.to(self.z.dtype)).sum() for name, x in changes.items()]
        total = torch.stack(products).sum()
        return torch.autograd.grad(total, self.w, retain_graph=True)[0]

    @torch.no_grad()
    def _state_change_by_difference(self, changes: Mapping[str, Tensor]) -> Tensor:
        """Like ``_state_change``, by a central difference."""
        shares = [self.outputs[name].norm() / x.norm().clamp(min=1e-30) for name, x in changes.items()]
        step = STEP[self.z.dtype] * float(torch.stack(shares).min()) if shares else 1.0
        ahead, behind = (self._states_after({name: sign * step * x for name, x in changes.items()}) for sign in (1, -1))
        return (ahead - behind) / (2 * step)

    def _states_after(self, added: Mapping[str, Tensor]) -> Tensor:
        """Return the final states (B, T, D) of a forward pass with tensors added to the sites' outputs."""
        with contextlib.ExitStack() as hooks:
            for name, x in added.items():
                handle = site_module(self.model, name).register_forward_hook(partial(_add, x))
                hooks.callback(handle.remove)
            return self.model.read(self.ids).float()

    def _curvature_product(
        self, states_PD: Tensor, dz_PD: Tensor, omega_P: Tensor, head: Site, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return ω (diag p − p pᵀ) times the logits' change at P positions, (P, V), and its gradient at the states."""
        leaf, logits, change_PV = self._logits_along(states_PD, dz_PD, head, v)
        p_PV = logits.detach().float().softmax(-1)
        mean_change = (p_PV * change_PV).sum(-1, keepdim=True)
        logit_gradient = p_PV.mul_(change_PV - mean_change).mul_(omega_P.unsqueeze(1))
        return logit_gradient, torch.autograd.grad(logits, leaf, logit_gradient.to(logits.dtype))[0]

    def _logits_along(self, states_PD: Tensor, dz_PD: Tensor, head: Site, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the states as a leaf, the logits with their graph, and the logits' change, (P, V) float32.

        They change with the states (double backward, as in ``_state_change``) and with the head's own weight.
        """
        with torch.enable_grad():
            leaf = states_PD.detach().requires_grad_(True)
            logits = self.model.logits(leaf)
            w = torch.zeros_like(logits, requires_grad=True)
            gradient_of_w = torch.autograd.grad(logits, leaf, w, create_graph=True)[0]
        change_PV = torch.autograd.grad(gradient_of_w, w, dz_PD.to(gradient_of_w.dtype), retain_graph=True)[0].float()
        change_PV += head.tokens.to_tokens(states_PD.float() @ v.T)
        return leaf, logits, change_PV


def representable(direction: Gradient, dtype: torch.dtype) -> tuple[Gradient, float]:
    """Scale a direction to the range of float16 (65,504), if that is the dtype: the direction, and the factor back."""
    size = max(float(x.abs().max()) for x in direction.values()) if dtype == torch.float16 else 1.0
    return (direction, 1.0) if size in (0.0, 1.0) else ({name: x / size for name, x in direction.items()}, size)


def cut_texts(ids_BT: Tensor, mask_BT: Tensor, tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Cut a batch of blocks into pieces of at most ``tokens`` tokens; pieces without a target are left out.

    A piece's first token is nobody's target, and its context begins there. Blocks that need no cut stay as they are.

    Example: blocks of 5 tokens become pieces of 3 and 2 with ``tokens`` = 3.
    """
    if tokens >= ids_BT.shape[1]:
        return [(ids_BT, mask_BT)]
    pieces = zip(ids_BT.split(tokens, 1), mask_BT.split(tokens, 1), strict=True)
    with_targets = [(ids, mask, mask[:, 1:].any(1)) for ids, mask in pieces]
    return [(ids[rows], mask[rows]) for ids, mask, rows in with_targets if rows.any()]


class GaussNewton:
    """κ times the mean of G over a sample of blocks; several directions share each linearisation.

    Args:
        model, sites: as in Linearised.
        sample: ids and mask of the blocks, in batches that are linearised one at a time.
        scale: κ.
        keep: number of batches whose linearisation stays in memory for further directions.
    """

    def __init__(
        self,
        model: SplitModel,
        sites: tuple[Site, ...],
        sample: Sequence[tuple[Tensor, Tensor]],
        scale: float,
        keep: int = 0,
    ) -> None:
        self.model, self.sites, self.sample, self.keep = model, sites, sample, keep
        self.kept = list[Linearised]()
        self.factor = scale / sum(len(ids) for ids, _ in sample)
        self.finite_difference: bool | None = None

    def prepare(self) -> None:
        """Linearise the batches that stay in memory; otherwise the first product does."""
        for at in range(min(self.keep, len(self.sample))):
            self._linearised(at)

    def products(self, directions: list[Gradient]) -> list[Gradient]:
        """κ G times each direction, in order."""
        totals: list[Gradient] = [{} for _ in directions]
        scaled = [representable(direction, self.model.dtype) for direction in directions]
        linearised: Linearised | None
        for at in range(len(self.sample)):
            linearised = None  # free the last batch's graph before the next is built
            linearised = self._linearised(at)
            for (direction, _), total in zip(scaled, totals, strict=True):
                for name, x in linearised.product(direction):
                    total[name] = total[name].add_(x) if name in total else x
        for total, (_, size) in zip(totals, scaled, strict=True):
            for x in total.values():
                x.mul_(self.factor * size)
        return totals

    def quadratic_forms(self, directions: list[Gradient]) -> list[float]:
        """vᵀ κ G v of each direction v, in order."""
        totals = [0.0] * len(directions)
        scaled = [representable(direction, self.model.dtype) for direction in directions]
        linearised: Linearised | None
        for at in range(len(self.sample)):
            linearised = None  # as above
            linearised = self._linearised(at)
            for i, (direction, _) in enumerate(scaled):
                totals[i] += linearised.quadratic_form(direction)
        return [self.factor * size**2 * total for total, (_, size) in zip(totals, scaled, strict=True)]

    def _linearised(self, at: int) -> Linearised:
        """The model, linearised on a batch of the sample; batches come in order."""
        if at < len(self.kept):
            return self.kept[at]
        found = Linearised(self.model, self.sites, *self.sample[at], self.finite_difference)
        self.finite_difference = found.finite_difference
        if at < self.keep:
            self.kept.append(found)
        return found


def _add(x: Tensor, module: Any, given: tuple, output: Tensor) -> Tensor:
    return output + x.to(output.dtype)
