"""Sites and their per-example gradients J: the exact mode, a K-FAC influence function at layer outputs.

The influence of block i on query x is Σ_sites J(x)ᵀ H⁻¹ J_i (influence functions, Koh and Liang 2017, arXiv
1703.04730). H is K-FAC's curvature (Martens and Grosse 2015, arXiv 1503.05671; for language models Grosse et al. 2023,
arXiv 2308.03296): at each site the Kronecker product of the damped second moments of its inputs u and of the gradients
g at its outputs, over the pool with its actual next tokens (empirical Fisher; method.md, measured point 4).

A steering operator at a site adds u A to its output, so to first order its gradient is J = Σ_t u_t ⊗ g_t (method.md,
measured point 1), that of a linear map's own weight. The logit form of operators/forms.py corresponds to the site
"head"; the matrix form, with the model's activations in place of SiLU(LN(h) W_in), to the others. The sites are

    the last linear map of each part of a layer into the residual stream (output projections of MLP and attention):
        u = its input, of width F
    the embedding: u = the one-hot token
    the head: u = the final state; its outputs are the logits, g_t = p_t − y_t
    the origin: the head at the start of training, when it predicts the pool's unigram distribution π: g_t = π − y_t;
        only for models trained from random weights, whose first and largest steps it stands for

Scores are in units of a block's mean influence on itself. Sites are not reweighted, except for the origin: a site's
weight comes from its well-conditioned directions. Using the last layers only costs less than half, since
backpropagation stops at the first site. H⁻¹ is applied to the few queries, not to the pool: for an MLP four times as
wide as the stream it costs five times as much as the gradient itself.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stride_ray.corpus.failures import LARGEST_NORM, finite_losses
from stride_ray.models.causal_lm import SplitModel, masked_mean
from stride_ray.models.matrices import inverse_root
from stride_ray.models.vocabulary import TokenSide, token_side
from stride_ray.runtime.errors import StrideError

EMBEDDING, HEAD, ORIGIN = "embedding", "head", "origin"
# Damping: eigenvalues λ become λ + damping · mean λ. The layers do better with less; embedding and head do not.
DAMPING, END_DAMPING = 0.01, 0.1
# Damping of the unigram distribution: per-token weights are (π + RARE)^-½, so rare tokens count more.
UNIGRAM_DAMPING = 1e-4
# Negative scores are halved: they are noisier.
NEGATIVE_SCORE_FACTOR = 0.5


@dataclass(frozen=True)
class Site:
    """One site with its preconditioner H^-½.

    Attributes:
        name: of the module, or "embedding", "head" or "origin".
        W_in: (F, F) float32, whitens the input; empty for the embedding, whose input is tokens.
        W_out: (D, D) float32, whitens the output gradient; empty for head and origin, whose outputs are logits.
        tokens: the vocabulary side of embedding, head and origin; else empty.
        unigram: (V,) π for the origin, else empty.
        scale: divisor of inner products of J: the mean of |H^-½ J_i|² summed over all sites, over the site's weight.
    """

    name: str
    W_in: Tensor
    W_out: Tensor
    tokens: TokenSide = field(default_factory=lambda: TokenSide(torch.empty(0)))
    unigram: Tensor = field(default_factory=lambda: torch.empty(0))
    scale: float = 1.0

    def to(self, device: Any) -> "Site":
        """A copy on a device."""
        return replace(
            self, **{name: getattr(self, name).to(device) for name in ("W_in", "W_out", "tokens", "unigram")}
        )

    def whitened(self, J: Tensor) -> Tensor:
        """H^-½ J, for J from ``site_gradients``, which already includes the per-token factors of H^-½."""
        if self.name == EMBEDDING:
            return J @ self.W_out
        if self.name in (HEAD, ORIGIN):
            return J @ self.W_in
        return self.W_in.T @ J @ self.W_out

    def solved(self, J: Tensor) -> Tensor:
        """H⁻¹ J of a query; its inner product with a block's J, over ``scale``, is the site's part of the influence."""
        return self.whitened(self.whitened(J))


@dataclass(frozen=True)
class KroneckerFactors:
    """K-FAC factors of one site: sums (or means) over positions of u uᵀ (F, F) and g gᵀ (D, D), float64.

    ``read`` is empty for the embedding; ``written`` of the head is a token's squared weight in the loss, (1, 1).
    """

    read: np.ndarray
    written: np.ndarray

    def __add__(self, other: "KroneckerFactors") -> "KroneckerFactors":
        return KroneckerFactors(self.read + other.read, self.written + other.written)

    def __truediv__(self, positions: int) -> "KroneckerFactors":
        return KroneckerFactors(self.read / positions, self.written / positions)


def last_layers(wanted: float, n_layers: int) -> int:
    """Resolve ``operators.layers`` to a number of last layers: 0 is all, below 1 a share (rounded up), else a number.

    Raises:
        StrideError: if it exceeds the number of layers.
    """
    if wanted > n_layers:
        raise StrideError(f"operators.layers is {wanted:g}, and the model has {n_layers} layers; ask for fewer, or 0.")
    return math.ceil(wanted * n_layers) if 0 < wanted < 1 else int(wanted) or n_layers


def find_sites(model: SplitModel, wanted: float = 0.0) -> tuple[str, ...]:
    """The model's own sites in order: "embedding", modules of the layers, "head".

    Args:
        model: to search.
        wanted: number or share of last layers (last_layers), without the embedding; 0: all layers and the embedding.

    Raises:
        StrideError: if no layer has a linear map into the residual stream, or the model has too few layers.
    """
    first = model.n_layers - last_layers(wanted, model.n_layers)
    names = {id(module): name for name, module in model.model.named_modules()}
    last: dict[tuple[int, str], str] = {}

    def note(layer: int, part: str) -> Callable:
        def hook(module: nn.Module, given: tuple, output: Tensor) -> None:
            if output.shape == (1, 2, model.width):  # runs on every token; an expert of an MoE may not
                last.pop((layer, part), None)  # re-insert: parts are ordered by their last map
                last[layer, part] = names[id(module)]

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
            f"{model.name}: no layer ends in a linear map; influence at sites needs one; use operators.form = logit"
        )
    found = (name for (layer, _), name in last.items() if layer >= first)
    return (*(() if wanted else (EMBEDDING,)), *found, HEAD)


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


def _state_gradients(model: SplitModel, ids_BT: Tensor, mask_BT: Tensor, z_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of each sequence's masked mean loss at its final states, (B, T, D), and the losses (B,)."""
    with torch.enable_grad():
        leaf = z_BTD.detach().requires_grad_(True)
        losses = masked_mean(model.token_losses(leaf, ids_BT, mask_BT), mask_BT)
        total = losses[mask_BT[:, 1:].any(1)].sum()
    slope = torch.autograd.grad(total, leaf)[0] if total.requires_grad else torch.zeros_like(leaf)
    return slope, losses.detach()


def _finite_blocks(values: Iterable[Tensor], counted_BT1: Tensor) -> Tensor:
    """(B,) bool: whether all of a block's vectors (B, T, ·) are finite, at the counted of its first T − 1 positions."""
    good = torch.ones(len(counted_BT1), dtype=torch.bool, device=counted_BT1.device)
    for x in values:
        good &= ((x[:, :-1].norm(dim=2) < LARGEST_NORM) | ~counted_BT1).all(1)
    return good


def _affects_loss(mask_BT: Tensor) -> Tensor:
    """(B, T − 1) bool: positions up to the one that predicts the last target; later ones do not affect the loss."""
    return mask_BT[:, 1:].flip(1).cumsum(1).flip(1).gt(0)


def token_weights(mask_BT: Tensor) -> Tensor:
    """(B, T − 1): the weight ω of each next token in its sequence's mean loss."""
    omega = mask_BT[:, 1:].float()
    return omega / omega.sum(1, keepdim=True).clamp(min=1)


def add_moments(
    totals: dict[str, tuple[Tensor, Tensor]], model: SplitModel, sites: Iterable[str], ids_BT: Tensor, mask_BT: Tensor
) -> tuple[int, Tensor]:
    """Add a batch's second moments at some sites to ``totals``, in place, without blocks that are not finite.

    ``totals`` holds Σ u uᵀ and Σ g gᵀ by site, float32 (see Moments): 0.4 GB for a model of 135 million parameters.

    Returns:
        The number of positions, and which blocks are finite, (B,) bool.
    """
    sites = list(sites)
    z, read, wrote = forward_with_activations(model, sites, ids_BT)
    slope, losses = _state_gradients(model, ids_BT, mask_BT, z)
    written = output_gradients(z, wrote, slope)
    read[HEAD] = z.detach().float()
    counted = _affects_loss(mask_BT)
    inputs = (u for name, u in read.items() if name != EMBEDDING)
    good = _finite_blocks((*inputs, *written.values()), counted) & finite_losses(losses, mask_BT)
    counted = counted & good.unsqueeze(1)
    for name in sites:
        u, g = read.pop(name), written.pop(name, None)
        u = u[:, :-1][counted] if name != EMBEDDING else torch.empty(0, 0, device=model.device)
        g = g[:, :-1][counted] if g is not None else token_weights(mask_BT)[counted].unsqueeze(1)
        if name not in totals:
            totals[name] = (u.new_zeros(u.shape[1], u.shape[1]), g.new_zeros(g.shape[1], g.shape[1]))
        for total, x in zip(totals[name], (u, g), strict=True):
            total.addmm_(x.T, x)
    return int(counted.sum()), good


def moments_of(totals: dict[str, tuple[Tensor, Tensor]]) -> dict[str, KroneckerFactors]:
    """The sums of ``add_moments``, in float64."""
    return {name: KroneckerFactors(*(each.double().cpu().numpy() for each in both)) for name, both in totals.items()}


def preconditioned(name: str, moments: KroneckerFactors, counts: Tensor, seed: int) -> Site:
    """A site with the K-FAC preconditioner of its second moments.

    Args:
        name: of the site.
        moments: sums or means over positions of the pool.
        counts: (V,) how often each token is a target in the pool; for the vocabulary side.
        seed: of the count sketch of a large vocabulary.
    """
    if name not in (EMBEDDING, HEAD, ORIGIN):
        return Site(name, inverse_root(moments.read, DAMPING), inverse_root(moments.written, DAMPING))
    unigram = distribution(counts)
    weights = (unigram + UNIGRAM_DAMPING).rsqrt()
    if name == EMBEDDING:
        return Site(name, torch.empty(0), inverse_root(moments.written, END_DAMPING), token_side(weights, seed))
    # Whitening removes ω from the layers' gradients; here it has to be divided out.
    side = token_side(weights / float(moments.written[0, 0]) ** 0.5, seed)
    W_in = inverse_root(moments.read, END_DAMPING)
    return Site(name, W_in, torch.empty(0), side, unigram if name == ORIGIN else torch.empty(0))


def distribution(counts: Tensor) -> Tensor:
    """The add-one unigram distribution π of token counts: (V,) in, (V,) float32 out."""
    return ((counts.double() + 1) / (counts.double() + 1).sum()).float()


def origin_weight(layers: float, loss: float, unigram: Tensor) -> float:
    """Weight of the origin: the number of layers times the model's loss as a share of the unigram entropy (at most 1).

    Args:
        layers: number of layers with sites.
        loss: the model's mean loss on the pool, nats per token.
        unigram: (V,) π.
    """
    entropy = float(-(unigram.double() * unigram.double().log()).sum())
    return layers * min(1.0, loss / entropy)


def site_gradients(
    model: SplitModel, sites: tuple[Site, ...], ids_BT: Tensor, mask_BT: Tensor
) -> tuple[Iterator[tuple[Site, Tensor]], Tensor]:
    """Per-example gradients J site by site, and the sequences' losses (B,) float32.

    Only the per-token factors of H^-½ are applied. ``Site.whitened`` applies the rest: once for a block's norm, twice
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
            yield site, site.tokens.summed(u, g) if site.name == EMBEDDING else u.transpose(1, 2) @ g

    return each(), losses


def head_gradients(
    model: SplitModel, sites: Iterable[Site], ids_BT: Tensor, mask_BT: Tensor, z_BTD: Tensor
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """J of head and origin, (B, n, D) each, the losses (B,) and their gradient at the states; one pass over the logits.

    Head: Σ_t ω_t ((p_t − y_t) W_out) ⊗ z_t; origin: π in place of p_t. Logits of a few sequences at a time.
    """
    omega, ids = token_weights(mask_BT), ids_BT[:, 1:]
    rows = model.logits_rows(ids_BT.shape[1])
    pieces: dict[str, list[Tensor]] = {site.name: [] for site in sites if site.name in (HEAD, ORIGIN)}
    losses, slopes = [], []
    for z, target, weight in zip(z_BTD[:, :-1].split(rows), ids.split(rows), omega.split(rows), strict=True):
        with torch.enable_grad():
            leaf = z.detach().requires_grad_(True)
            logits = model.logits(leaf).float()
        log_p, at = logits.detach().log_softmax(-1), target.unsqueeze(2)
        losses.append(-(log_p.gather(2, at).squeeze(2) * weight).sum(1))
        g = log_p.exp_().scatter_add_(2, at, -torch.ones_like(at, dtype=log_p.dtype)).mul_(weight.unsqueeze(2))
        slopes.append(torch.autograd.grad(logits, leaf, g)[0])
        read = z.detach().float()
        for site in sites:
            if site.name == HEAD:
                pieces[HEAD].append(site.tokens.of(g).transpose(1, 2) @ read)
            elif site.name == ORIGIN:
                known, seen = site.tokens.of(site.unigram.clone()), read * weight.unsqueeze(2)
                expected = known.unsqueeze(1) * seen.sum(1, keepdim=True)
                pieces[ORIGIN].append(site.tokens.summed(target, -seen, expected))
    # With a single chunk, avoid a copy of J.
    found = {name: each[0] if len(each) == 1 else torch.cat(each) for name, each in pieces.items()}
    slope = torch.nn.functional.pad(torch.cat(slopes), (0, 0, 0, 1))
    return found, torch.cat(losses).masked_fill(~mask_BT[:, 1:].any(1), torch.nan), slope


def influence(queries: dict[str, Tensor], gradients: Iterator[tuple[Site, Tensor]]) -> Tensor:
    """Influence of B blocks on Q queries.

    Args:
        queries: H⁻¹ J of the queries (``Site.solved``) by site name, (Q, P) float32, P = F·D.
        gradients: J of the blocks, site by site.

    Returns:
        (Q, B) float32; positive: training on the block lowers the query's loss. Negative scores are halved (HARM).
    """
    total: Any = 0.0
    for site, J in gradients:
        total = total + queries[site.name] @ J.flatten(1).T / site.scale
    return halve_negative(total)


def halve_negative(influence: Tensor) -> Tensor:
    """Scale negative influence by HARM."""
    return torch.where(influence > 0, influence, NEGATIVE_SCORE_FACTOR * influence)
