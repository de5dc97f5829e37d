"""Sites and their per-example gradients J: the exact mode, a K-FAC influence function at layer outputs.

The influence of block i on query x is Σ_sites J(x)ᵀ H⁻¹ J_i (influence functions, Koh and Liang 2017, arXiv
1703.04730). H is K-FAC's curvature (Martens and Grosse 2015, arXiv 1503.05671; for language models Grosse et al. 2023,
arXiv 2308.03296): at each site the Kronecker product of the damped second moments of its inputs u and of the gradients
g at its outputs, over the pool with its actual next tokens (empirical Fisher).

A steering operator A at a site adds u A to its output and changes the loss by ⟨A, J⟩ to first order, J = Σ_t u_t ⊗ g_t:
the gradient of a linear map's own weight. The logit form of operators/forms.py corresponds to the site "head"; the
matrix form, with the model's activations in place of SiLU(LN(h) W_in), to the others.

    site        u_t                     g_t                         J       H^-½ J
    a layer's   input (F) of its last   gradient at its output (D)  (F, D)  W_inᵀ J W_out
    part        linear map
    embedding   one-hot token           gradient at its output (D)  (n, D)  J W_out
    head        final state (D)         p_t − y_t, at the logits    (n, D)  J W_in
    origin      final state (D)         π − y_t                     (n, D)  J W_in

Parts of a layer are attention and MLP; n counts the vocabulary's coordinates (vocabulary.py). The origin is the head at
the start of training, when it predicts the pool's unigram distribution π: only for models trained from random weights,
whose first and largest steps it stands for.

Example with D = 1: u = [1, 0], [0, 2] and g = 3, 1 give J = [3, 2]. With W_in = diag(1, ½) and W_out = 1, H⁻¹ J is
[3, ½], so on a query with J(x) = [1, 1] the block has the influence 3.5 / scale.

Scores are in units of a block's mean influence on itself. Sites are not reweighted, except for the origin: a site's
weight comes from its well-conditioned directions. Using the last layers only costs less than half, since
backpropagation stops at the first site. H⁻¹ is applied to the few queries, not to the pool: for an MLP four times as
wide as the stream it costs five times as much as the gradient itself.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stride_ray.models.causal_lm import SplitModel
from stride_ray.models.linear_algebra.rotation import Rotation
from stride_ray.models.linear_algebra.vocabulary import TokenSide, next_tokens
from stride_ray.runtime.errors import StrideError

EMBEDDING, HEAD, ORIGIN = "embedding", "head", "origin"


@dataclass(frozen=True)
class Site:
    """One site with its preconditioner H^-½.

    Attributes:
        name: of the module, or "embedding", "head" or "origin".
        W_in: (F, F) float32, whitens the input, or (F, a) if sketched; empty for the embedding, whose input is tokens.
        W_out: (D, D) float32, or (D, b) if sketched, whitens the output gradient; empty for head and origin, whose
            outputs are logits.
        tokens: the vocabulary side of embedding, head and origin; else empty.
        unigram: (V,) π for the origin, else empty.
        scale: divisor of inner products of J: the mean of |H^-½ J_i|² summed over all sites, over the site's weight.
        rotation: projects the coordinates of ``tokens`` in a sketch of embedding, head or origin; else None.
    """

    name: str
    W_in: Tensor
    W_out: Tensor
    tokens: TokenSide = field(default_factory=lambda: TokenSide(torch.empty(0)))
    unigram: Tensor = field(default_factory=lambda: torch.empty(0))
    scale: float = 1.0
    rotation: Rotation | None = None

    def to(self, device: Any) -> "Site":
        """A copy on a device."""
        parts = {name: getattr(self, name).to(device) for name in ("W_in", "W_out", "tokens", "unigram")}
        return replace(self, **parts, rotation=self.rotation if self.rotation is None else self.rotation.to(device))

    def whiten(self, J: Tensor) -> Tensor:
        """H^-½ J or its sketch, for J from ``site_gradients``, which already includes the per-token factors of H^-½."""
        if self.name not in (EMBEDDING, HEAD, ORIGIN):
            return self.W_in.T @ J @ self.W_out
        J = J @ (self.W_out if self.name == EMBEDDING else self.W_in)
        return J if self.rotation is None else self.rotation(J)

    def precondition(self, J: Tensor) -> Tensor:
        """H⁻¹ J of a query; its inner product with a block's J, over ``scale``, is the site's part of the influence.

        Only for a site that is not sketched.
        """
        return self.whiten(self.whiten(J))


def last_layers(wanted: float, n_layers: int) -> int:
    """Resolve ``operators.layers`` to a number of last layers: 0 is all, below 1 a share (rounded up), else a number.

    Raises:
        StrideError: if it exceeds the number of layers.
    """
    if wanted > n_layers:
        raise StrideError(
            f"operators.layers is {wanted:g}, but the model has {n_layers} layers; use at most that, or 0 for all."
        )
    return math.ceil(wanted * n_layers) if 0 < wanted < 1 else int(wanted) or n_layers


def find_sites(model: SplitModel, wanted: float = 0.0, every: bool = False) -> tuple[str, ...]:
    """The model's own sites in order: "embedding", modules of the layers, "head".

    Args:
        model: to search.
        wanted: number or share of last layers (last_layers), without the embedding; 0: all layers and the embedding,
            if it is trained.
        every: every linear map of the layers, instead of the last of each part.

    Raises:
        StrideError: if no layer has a linear map into the residual stream, or the model has too few layers.
    """
    first = model.n_layers - last_layers(wanted, model.n_layers)
    names = {id(module): name for name, module in model.model.named_modules()}
    last: dict[tuple[int, str], str] = {}

    def note(layer: int, part: str) -> Callable:
        def hook(module: nn.Module, given: tuple, output: Tensor) -> None:
            # Two outputs for two tokens: the map runs on every token, which an expert of an MoE may not.
            if output.shape == (1, 2, model.width) or (every and output.shape[:-1] == (1, 2)):
                key = (layer, names[id(module)] if every else part)
                last.pop(key, None)  # re-insert: parts are ordered by their last map
                last[key] = names[id(module)]

        return hook

    handles = []
    for layer, block in enumerate(model.layers):
        for part, inside in block.named_children():
            maps = [module for module in inside.modules() if isinstance(module, nn.Linear | Conv1D)]
            handles += [module.register_forward_hook(note(layer, part)) for module in maps]
    try:
        with torch.no_grad():
            model.read(torch.zeros(1, 2, dtype=torch.long))
    finally:
        for handle in handles:
            handle.remove()
    if not last:
        raise StrideError(
            f"{model.name}: no layer ends in a linear map, which influence at sites needs; use operators.form = logit"
        )
    found = (name for (layer, _), name in last.items() if layer >= first)
    return (*((EMBEDDING,) if model.embedding_is_trained and not wanted else ()), *found, HEAD)


def site_module(model: SplitModel, name: str) -> Any:
    """The module whose output is the site; not for head and origin."""
    return model.model.get_input_embeddings() if name == EMBEDDING else model.model.get_submodule(name)


def forward_with_activations(
    model: SplitModel, sites: Iterable[str], ids_BT: Tensor
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """A forward pass that keeps the inputs and outputs of all sites except head and origin.

    Args:
        model: determines the device.
        sites: names from find_sites.
        ids_BT: (B, T) int64 token ids.

    Returns:
        The final states (B, T, D) with their autograd graph; inputs u by site, (B, T, F) float32, for the embedding
        the ids; outputs by site, (B, T, D), in the graph.
    """
    wanted = [name for name in sites if name not in (HEAD, ORIGIN)]
    read: dict[str, Tensor] = {EMBEDDING: ids_BT.to(model.device)}
    wrote: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, given: tuple, output: Tensor) -> Tensor:
            if name != EMBEDDING:
                read[name] = given[0].detach().float()
            # All parameters are frozen: the graph begins at the first site.
            wrote[name] = output if output.requires_grad else output.detach().requires_grad_(True)
            return wrote[name]

        return hook

    handles = [site_module(model, name).register_forward_hook(keep(name)) for name in wanted]
    try:
        with torch.enable_grad():
            z = model.read(ids_BT)
    finally:
        for handle in handles:
            handle.remove()
    return z, read, {name: wrote[name] for name in wanted}


def output_gradients(
    z_BTD: Tensor, wrote: dict[str, Tensor], slope_BTD: Tensor, keep: bool = False
) -> dict[str, Tensor]:
    """Backpropagate from the final states to the sites' outputs: (B, T, D) float32; ``keep`` retains the graph."""
    gradients = torch.autograd.grad(z_BTD, list(wrote.values()), slope_BTD, retain_graph=keep) if wrote else []
    return {name: g.float() for name, g in zip(wrote, gradients, strict=True)}


def token_weights(mask_BT: Tensor) -> Tensor:
    """(B, T − 1): the weight ω of each next token in its sequence's mean loss."""
    omega = mask_BT[:, 1:].float()
    return omega / omega.sum(1, keepdim=True).clamp(min=1)


def site_gradients(
    model: SplitModel, sites: tuple[Site, ...], ids_BT: Tensor, mask_BT: Tensor
) -> tuple[Iterator[tuple[Site, Tensor]], Tensor]:
    """Per-example gradients J site by site, and the sequences' losses (B,) float32.

    Only the per-token factors of H^-½ are applied. ``Site.whiten`` applies the rest: once for a block's norm, twice
    for a query.

    Returns:
        An iterator over (site, J), J float32 of shape (B, F, D); for embedding, head and origin (B, n, D) with n
        vocabulary coordinates.
    """
    z, read, wrote = forward_with_activations(model, [site.name for site in sites], ids_BT)
    ends, losses, slope = head_gradients(model, sites, ids_BT, mask_BT, z.detach())
    written = output_gradients(z, wrote, slope)

    def each() -> Iterator[tuple[Site, Tensor]]:
        # Release activations site by site: together they take as much memory as the forward pass.
        for site in sites:
            if site.name in (HEAD, ORIGIN):
                yield site, ends.pop(site.name)
                continue
            u, g = read.pop(site.name), written.pop(site.name)
            yield site, site.tokens.sum_outer_products(u, g) if site.name == EMBEDDING else u.transpose(1, 2) @ g

    return each(), losses


def head_gradients(
    model: SplitModel, sites: Iterable[Site], ids_BT: Tensor, mask_BT: Tensor, z_BTD: Tensor, whiten: bool = False
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """J of head and origin, (B, n, D) each, the losses (B,) and their gradient at the states; one pass over the logits.

    Head: Σ_t ω_t ((p_t − y_t) W_out) ⊗ z_t; origin: π in place of p_t. Logits are computed for a few sequences
    at a time or, if one sequence exceeds the budget, for some of its positions at a time; the J of the pieces add up.
    With ``whiten`` J is multiplied by W_in, the states before their sum: there are fewer of them than coordinates.
    """
    wanted = [site for site in sites if site.name in (HEAD, ORIGIN)]
    ends: dict[str, list[Tensor]] = {site.name: [] for site in wanted}
    losses, slopes = z_BTD.new_zeros(len(z_BTD), dtype=torch.float32), torch.zeros_like(z_BTD)
    for piece in logit_gradients(model, ids_BT, mask_BT, z_BTD):
        losses[piece.rows] += piece.losses
        slopes[piece.rows, piece.positions] = piece.slope
        states = z_BTD[piece.rows, piece.positions].detach().float()
        for site in wanted:
            part = _end_gradients(site, piece.g, states @ site.W_in if whiten else states, piece.target, piece.weight)
            if piece.positions.start:  # a further piece of the same sequences
                ends[site.name][-1].add_(part)
            else:
                ends[site.name].append(part)
    # With a single chunk, avoid a copy of J.
    found = {name: each[0] if len(each) == 1 else torch.cat(each) for name, each in ends.items()}
    return found, losses.masked_fill(~mask_BT[:, 1:].any(1), torch.nan), slopes


class LogitGradients(NamedTuple):
    """Gradients at the logits of some positions of some sequences.

    Attributes:
        rows, positions: of the batch, without the last position, which predicts nothing.
        g: ω (p − y), (B, T, V) float32.
        target, weight: the next tokens and ω, (B, T).
        losses: the sequences' losses over these positions, (B,).
        slope: gradient at the states, (B, T, D).
    """

    rows: slice
    positions: slice
    g: Tensor
    target: Tensor
    weight: Tensor
    losses: Tensor
    slope: Tensor


def logit_gradients(model: SplitModel, ids_BT: Tensor, mask_BT: Tensor, z_BTD: Tensor) -> Iterator[LogitGradients]:
    """Gradients at the logits, for a few sequences at a time or, if one exceeds the budget, some of its positions."""
    omega, ids = token_weights(mask_BT), next_tokens(ids_BT, model.vocabulary)
    B, T = ids.shape
    rows_at_once, positions_at_once = model.logits_rows(T), model.logits_rows(1)
    for first in range(0, B, rows_at_once):
        rows = slice(first, min(B, first + rows_at_once))
        for start in range(0, T, positions_at_once):
            positions = slice(start, min(T, start + positions_at_once))
            target, weight = ids[rows, positions], omega[rows, positions]
            g, losses, slope = _logit_gradients(model, z_BTD[rows, positions], target, weight)
            yield LogitGradients(rows, positions, g, target, weight, losses, slope)


def _logit_gradients(model: SplitModel, z: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients ω (p − y) at the logits (B, T, V), the losses (B,), and the gradients at the states (B, T, D)."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_(True)
        logits = model.logits(leaf).float()
    log_p, at = logits.detach().log_softmax(-1), target.unsqueeze(2)
    losses = -(log_p.gather(2, at).squeeze(2) * weight).sum(1)
    g = log_p.exp_().scatter_add_(2, at, -torch.ones_like(at, dtype=log_p.dtype)).mul_(weight.unsqueeze(2))
    return g, losses, torch.autograd.grad(logits, leaf, g)[0]


def _end_gradients(site: Site, g: Tensor, z: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """J of head (overwriting g) or origin, (B, n, D), by their states z."""
    if site.name == HEAD:
        return site.tokens.of(g).transpose(1, 2) @ z
    seen = z * weight.unsqueeze(2)
    expected = site.tokens.of(site.unigram.clone()).unsqueeze(1) * seen.sum(1, keepdim=True)
    return site.tokens.sum_outer_products(target, -seen, expected)


def influence(queries: dict[str, Tensor], gradients: Iterator[tuple[Site, Tensor]]) -> Tensor:
    """Influence of B blocks on Q queries.

    Args:
        queries: H⁻¹ J of the queries (``Site.precondition``) by site name, (Q, P) float32, P = F·D.
        gradients: J of the blocks, site by site.

    Returns:
        (Q, B) float32; positive: training on the block lowers the query's loss.
    """
    total: Any = 0.0
    for site, J in gradients:
        total = total + queries[site.name] @ J.flatten(1).T / site.scale
    return total


def scale_negative(scores: Tensor, factor: float) -> Tensor:
    """Multiply negative scores by ``attribute.negative_scale``."""
    return torch.where(scores > 0, scores, factor * scores)
