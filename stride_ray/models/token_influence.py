"""A block's influence on a query, token by token: which words of the block its influence comes from.

J_i = Σ_t u_t ⊗ g_t at every site (sites.py), so the block's influence ⟨H⁻¹J(x), J_i⟩ is a sum over its positions t of
Σ_sites u_tᵀ H⁻¹J(x) g_t / scale: what an operator that acts at position t alone would do to the block's loss.

Example with one site, D = 1: u = [1, 0], [0, 2], g = 3, 1 and H⁻¹J(x) = [3, ½] give 3·3 and 2·½·1, in all the block's
influence 10 / scale.

The query's side is another question: how much of the loss of each of its own tokens do some blocks account for?
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from stride_ray.models.causal_lm import SplitModel
from stride_ray.models.curvature.gauss_newton import Linearised, representable
from stride_ray.models.sites import (
    EMBEDDING,
    HEAD,
    ORIGIN,
    LogitGradients,
    Site,
    forward_with_activations,
    logit_gradients,
    output_gradients,
)


def token_influence(
    model: SplitModel, sites: tuple[Site, ...], queries: Mapping[str, Tensor], ids_BT: Tensor, mask_BT: Tensor
) -> Tensor:
    """Influence of every position of B blocks on Q queries.

    One forward and backward pass for the blocks, and per query one product of the blocks' activations.

    Args:
        model: determines the device.
        sites: with the preconditioner, not sketched.
        queries: H⁻¹ J of the queries (``Site.precondition``) by site name, (Q, F·D) float32.
        ids_BT: the blocks.
        mask_BT: their targets.

    Returns:
        (Q, B, T) float32, whose sum over positions is ``sites.influence``.
    """
    Q = len(next(iter(queries.values())))
    found = torch.zeros(Q, *ids_BT.shape, device=model.device)
    z, read, wrote = forward_with_activations(model, [site.name for site in sites], ids_BT)
    # The head last, since its coordinates overwrite g.
    ends = sorted((site for site in sites if site.name in (HEAD, ORIGIN)), key=lambda site: site.name == HEAD)
    slopes = torch.zeros_like(z)
    for piece in logit_gradients(model, ids_BT, mask_BT, z.detach()):
        slopes[piece.rows, piece.positions] = piece.slope
        states = z.detach()[piece.rows, piece.positions].float()
        for site in ends:
            at_logits = site.tokens.of(piece.g) if site.name == HEAD else None
            for query, X in enumerate(_at_site(queries, site)):
                here = _at_the_logits(site, at_logits, states @ X.T, piece)
                found[query, piece.rows, piece.positions] += here / site.scale
    written = output_gradients(z, wrote, slopes)
    for site in sites:
        for query, X in enumerate(_at_site(queries, site) if site.name in written else ()):
            change = site.tokens.spread(read[site.name], X) if site.name == EMBEDDING else read[site.name] @ X
            found[query] += (change * written[site.name]).sum(2) / site.scale
    return found


def query_token_influence(
    model: SplitModel, sites: tuple[Site, ...], blocks: Mapping[str, Tensor], ids_BT: Tensor, mask_BT: Tensor
) -> Tensor:
    """Influence of some blocks together on the loss of each token of B texts.

    A derivative of the texts' losses along the blocks' direction, in one linearised pass (gauss_newton.Linearised).

    Args:
        model: determines the device.
        sites: with the preconditioner, not sketched.
        blocks: H⁻¹ times the sum of the blocks' J, by site name (F, D) float32.
        ids_BT: the texts.
        mask_BT: their targets.

    Returns:
        (B, T) float32; positive: training on the blocks lowers the token's loss. Its sum over a text is the influence
        of the blocks on it by the preconditioner alone, without a solve, and without the origin.
    """
    direction, size = representable({site.name: blocks[site.name] / site.scale for site in sites}, model.dtype)
    changes = Linearised(model, sites, ids_BT, mask_BT).loss_changes(direction)
    return torch.nn.functional.pad(changes * size, (1, 0))


def _at_site(queries: Mapping[str, Tensor], site: Site) -> Tensor:
    """The queries at a site, (Q, F, D)."""
    first = len(site.tokens) if site.name in (EMBEDDING, HEAD, ORIGIN) else len(site.W_in)
    return queries[site.name].unflatten(1, (first, -1))


def _at_the_logits(site: Site, g_BTn: Tensor | None, change_BTn: Tensor, piece: LogitGradients) -> Tensor:
    """⟨gradient, change⟩ of the logits' coordinates at each position, (B, T), at the head, or without g the origin."""
    if g_BTn is not None:
        return (g_BTn * change_BTn).sum(2)
    tokens, target = site.tokens, piece.target
    places = tokens.buckets[target] if len(tokens.buckets) else target
    actual = change_BTn.gather(2, places.unsqueeze(2)).squeeze(2) * tokens.weights[target]
    return (change_BTn @ tokens.of(site.unigram.clone()) - actual) * piece.weight
