"""Sites: the places of a model where exact influence is measured, and the gradient J of a block's loss there.

A steering operator at a site adds u A to what the site writes, u being what the site reads, so to first order its
gradient is J = Σ_t u_t ⊗ g_t with g_t the loss's gradient at what is written (method.md, measured point 1; the logit
form of operators/forms.py is the site "head", the matrix form with the model's own activations in place of
SiLU(LN(h) W_in) the others). The sites of a model are

    each layer's last linear map into the residual stream (an MLP's output projection): u = its input, F wide
    the last map of a layer's other parts (attention's output projection)
    the embedding: u = the token itself, one-hot
    the head: u = the final state, and what is written are the logits, g_t = p_t − y_t
    the origin: the head before it knew more than token counts, g_t = π − y_t with π the pool's unigram distribution;
        only where training began from random weights, whose first and largest steps these were

The influence of block i on query x is Σ_sites J(x)ᵀ H⁻¹ J_i, H the Kronecker product of the two sides' damped second
moments over the pool (measured point 4), in units of a block's mean influence on itself. Sites of the last layers alone
cost less than half: nothing goes back through the layers before them. A site's say is that of its
directions that H knows: nothing weighs the sites, but for the origin. H⁻¹ is applied to the few queries, not to the
pool: at an MLP as wide as four streams it would cost five times the gradient that it is applied to.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stride_ray.models.causal_lm import SplitModel, masked_mean
from stride_ray.models.matrices import inverse_root
from stride_ray.models.vocabulary import TokenSide, token_side
from stride_ray.runtime.errors import StrideError

EMBEDDING, HEAD, ORIGIN = "embedding", "head", "origin"
# Damping: eigenvalues λ become λ + damping · mean λ. Less helped the layers and did nothing for the two ends.
DAMPING, END_DAMPING = 0.01, 0.1
# Added to the unigram distribution before its square root divides what is per token: rare tokens count more.
RARE = 1e-4
# Negative scores are halved: they are noisier.
HARM = 0.5


@dataclass(frozen=True)
class Site:
    """One site with its preconditioner H^-½.

    Attributes:
        name: of the module, or "embedding", "head" or "origin".
        W_in: (F, F) float32, whitens what is read; empty for the embedding, which reads tokens.
        W_out: (D, D) float32, whitens the gradient at what is written; empty for head and origin, which write logits.
        tokens: the side of the embedding, head and origin that is per token; else of no tokens.
        unigram: (V,) π for the origin, else empty.
        scale: what products of J are divided by: mean |H^-½ J_i|² of all sites together, over the site's weight.
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
        """H^-½ J of gradients as ``site_gradients`` gives them, which hold what H^-½ has per token already."""
        if self.name == EMBEDDING:
            return J @ self.W_out
        if self.name in (HEAD, ORIGIN):
            return J @ self.W_in
        return self.W_in.T @ J @ self.W_out

    def solved(self, J: Tensor) -> Tensor:
        """What H⁻¹ makes of a query's J: its products with blocks' J are influence, but for the scale."""
        return self.whitened(self.whitened(J))


@dataclass(frozen=True)
class Moments:
    """Sums (or means) over positions at one site: u uᵀ (F, F) and g gᵀ (D, D), float64.

    ``read`` is empty for the embedding; ``written`` of the head is the squared weight of a token in the loss, (1, 1).
    """

    read: np.ndarray
    written: np.ndarray

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.read + other.read, self.written + other.written)

    def __truediv__(self, positions: int) -> "Moments":
        return Moments(self.read / positions, self.written / positions)


def last_layers(wanted: float, n_layers: int) -> int:
    """How many of the last layers ``operators.layers`` means: 0 all, below 1 a share (rounded up), else a number.

    Raises:
        StrideError: for more than there are.
    """
    if wanted > n_layers:
        raise StrideError(f"operators.layers is {wanted:g}, and the model has {n_layers} layers; ask for fewer, or 0.")
    return math.ceil(wanted * n_layers) if 0 < wanted < 1 else int(wanted) or n_layers


def find_sites(model: SplitModel, wanted: float = 0.0) -> tuple[str, ...]:
    """The model's own sites in order: "embedding", modules of the layers, "head".

    Args:
        model: whose.
        wanted: the last layers only, and no embedding, see last_layers; 0: all.

    Raises:
        StrideError: where no layer has a linear map into the residual stream, or there are fewer than wanted.
    """
    first = model.n_layers - last_layers(wanted, model.n_layers)
    names = {id(module): name for name, module in model.model.named_modules()}
    last: dict[tuple[int, str], str] = {}

    def note(layer: int, part: str) -> Callable:
        def hook(module: nn.Module, given: tuple, output: Tensor) -> None:
            if output.shape == (1, 2, model.width):  # one that sees every token, as an expert need not
                last.pop((layer, part), None)  # the order of the parts is that of their last maps
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
    """The module whose output a site is, of one that is neither head nor origin."""
    return model.model.get_input_embeddings() if name == EMBEDDING else model.model.get_submodule(name)


def forward_with_activations(
    model: SplitModel, sites: Iterable[str], ids_BT: Tensor
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """A forward pass, and what every site but head and origin reads and writes in it.

    Args:
        model: on whose device everything is.
        sites: names as find_sites gives them.
        ids_BT: (B, T) int64 token ids.

    Returns:
        The final states (B, T, D), with the graph that leads to them; by site u (B, T, F) float32, for the embedding
        the ids instead; by site what it writes (B, T, D), in the graph.
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


def written_gradients(
    z_BTD: Tensor, wrote: dict[str, Tensor], slope_BTD: Tensor, keep: bool = False
) -> dict[str, Tensor]:
    """Gradients (B, T, D) float32 at what sites write, from those at the final states; ``keep`` the graph for more."""
    gradients = torch.autograd.grad(z_BTD, list(wrote.values()), slope_BTD, retain_graph=keep) if wrote else []
    return {name: g.float() for name, g in zip(wrote, gradients, strict=True)}


def _slope(model: SplitModel, ids_BT: Tensor, mask_BT: Tensor, z_BTD: Tensor) -> Tensor:
    """The gradient of each sequence's masked mean loss at its final states, (B, T, D)."""
    with torch.enable_grad():
        leaf = z_BTD.detach().requires_grad_(True)
        losses = masked_mean(model.token_losses(leaf, ids_BT, mask_BT), mask_BT)
        total = losses[mask_BT[:, 1:].any(1)].sum()
    return torch.autograd.grad(total, leaf)[0] if total.requires_grad else torch.zeros_like(leaf)


def _counted(mask_BT: Tensor) -> Tensor:
    """(B, T) bool: positions up to the one that predicts a sequence's last target; what follows has no say."""
    return mask_BT[:, 1:].flip(1).cumsum(1).flip(1).gt(0)


def token_weights(mask_BT: Tensor) -> Tensor:
    """(B, T − 1): the weight of each next token in its sequence's mean loss."""
    omega = mask_BT[:, 1:].float()
    return omega / omega.sum(1, keepdim=True).clamp(min=1)


def add_moments(
    totals: dict[str, tuple[Tensor, Tensor]], model: SplitModel, sites: Iterable[str], ids_BT: Tensor, mask_BT: Tensor
) -> int:
    """Add a batch's second moments at some sites to ``totals``, in place; returns how many positions they are over.

    ``totals`` holds Σ u uᵀ and Σ g gᵀ by site, float32 (see Moments): at 135 million parameters 0.4 GB.
    """
    sites = list(sites)
    z, read, wrote = forward_with_activations(model, sites, ids_BT)
    written = written_gradients(z, wrote, _slope(model, ids_BT, mask_BT, z))
    read[HEAD] = z.detach().float()
    counted = _counted(mask_BT)
    for name in sites:
        u, g = read.pop(name), written.pop(name, None)
        u = u[:, :-1][counted] if name != EMBEDDING else torch.empty(0, 0, device=model.device)
        g = g[:, :-1][counted] if g is not None else token_weights(mask_BT)[counted].unsqueeze(1)
        if name not in totals:
            totals[name] = (u.new_zeros(u.shape[1], u.shape[1]), g.new_zeros(g.shape[1], g.shape[1]))
        for total, x in zip(totals[name], (u, g), strict=True):
            total.addmm_(x.T, x)
    return int(counted.sum())


def moments_of(totals: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Moments]:
    """Sums that ``add_moments`` made, in float64."""
    return {name: Moments(*(each.double().cpu().numpy() for each in both)) for name, both in totals.items()}


def preconditioned(name: str, moments: Moments, counts: Tensor, seed: int) -> Site:
    """A site's preconditioner from its second moments.

    Args:
        name: of the site.
        moments: sums or means over the pool.
        counts: (V,) how often each token is in the pool; for what is per token.
        seed: of the sketch of a large vocabulary.
    """
    if name not in (EMBEDDING, HEAD, ORIGIN):
        return Site(name, inverse_root(moments.read, DAMPING), inverse_root(moments.written, DAMPING))
    unigram = distribution(counts)
    weights = (unigram + RARE).rsqrt()
    if name == EMBEDDING:
        return Site(name, torch.empty(0), inverse_root(moments.written, END_DAMPING), token_side(weights, seed))
    # In a layer's gradients a token's weight in the loss is whitened away; here it must be, too.
    side = token_side(weights / float(moments.written[0, 0]) ** 0.5, seed)
    W_in = inverse_root(moments.read, END_DAMPING)
    return Site(name, W_in, torch.empty(0), side, unigram if name == ORIGIN else torch.empty(0))


def distribution(counts: Tensor) -> Tensor:
    """The add-one unigram distribution π of token counts: (V,) in, (V,) float32 out."""
    return ((counts.double() + 1) / (counts.double() + 1).sum()).float()


def origin_weight(layers: float, loss: float, unigram: Tensor) -> float:
    """Weight of the origin: the number of layers, times what the model left of the tokens' unigram entropy.

    Args:
        layers: how many.
        loss: the model's mean loss on the pool, nats a token.
        unigram: (V,) π.
    """
    entropy = float(-(unigram.double() * unigram.double().log()).sum())
    return layers * min(1.0, loss / entropy)


def site_gradients(
    model: SplitModel, sites: tuple[Site, ...], ids_BT: Tensor, mask_BT: Tensor
) -> tuple[Iterator[tuple[Site, Tensor]], Tensor]:
    """J of each sequence, site by site, and the sequences' losses (B,) float32.

    Of the preconditioner only what is per token is applied: ``Site.whitened`` applies the rest, once to blocks for
    their length, twice to queries for influence.

    Returns:
        An iterator over (site, J) with J float32 of shape (B, F, D); of embedding, head and origin (B, n, D), n the
        coordinates of tokens.
    """
    z, read, wrote = forward_with_activations(model, [site.name for site in sites], ids_BT)
    ends, losses, slope = head_gradients(model, sites, ids_BT, mask_BT, z.detach())
    written = written_gradients(z, wrote, slope)

    def each() -> Iterator[tuple[Site, Tensor]]:
        # Each is let go when it was used: together they take as much memory as the model's forward.
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
    """J of head and origin, (B, n, D) each, the losses (B,) and their ``_slope``, from one look at the logits.

    Head: Σ_t ω_t ((p_t − y_t) W_out) ⊗ z_t; origin: π for p_t. A few sequences' logits at a time.
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
    # A copy of J is worth avoiding where there was one look.
    found = {name: each[0] if len(each) == 1 else torch.cat(each) for name, each in pieces.items()}
    slope = torch.nn.functional.pad(torch.cat(slopes), (0, 0, 0, 1))
    return found, torch.cat(losses).masked_fill(~mask_BT[:, 1:].any(1), torch.nan), slope


def influence(queries: dict[str, Tensor], gradients: Iterator[tuple[Site, Tensor]]) -> Tensor:
    """Influence of B blocks on Q queries.

    Args:
        queries: by site's name, (Q, P) float32 H⁻¹ J of the queries (``Site.solved``), P = F·D.
        gradients: J of the blocks, site by site.

    Returns:
        (Q, B) float32; positive: training on the block lowers the query's loss. Harm counts half (HARM).
    """
    total: Any = 0.0
    for site, J in gradients:
        total = total + queries[site.name] @ J.flatten(1).T / site.scale
    return harm_halved(total)


def harm_halved(influence: Tensor) -> Tensor:
    """Negative influence times HARM."""
    return torch.where(influence > 0, influence, HARM * influence)
