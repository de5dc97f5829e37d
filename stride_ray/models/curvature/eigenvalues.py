"""EK-FAC's eigenvalues and the optimiser's damping at the sites, for the queries' solve (conjugate_gradients.py).

In the eigenbasis Q of its factors, K-FAC's H has the eigenvalues λ_i μ_j, as if inputs u and output gradients g were
independent. EK-FAC (George et al. 2018, arXiv 1806.03884) keeps the basis and measures the eigenvalues Λ_ij, the mean
squares of the blocks' gradients in it.

Adam moves a weight by its gradient over √v, with v the gradient's mean square, so far as the curvature lets it. A
model trained for a finite time therefore answers to a change of its data like (G + M)⁻¹ with M diagonal and
proportional to √v, not to the curvature. M is kept as Adafactor keeps v (Shazeer and Stern 2018, arXiv 1804.04235): by
the sums of the squares over a matrix's rows and columns, √v_ij ≈ √(r_i c_j / Σ r).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stride_ray.corpus.failures import finite_rows
from stride_ray.models.causal_lm import SplitModel
from stride_ray.models.curvature.moments import DAMPING, END_DAMPING, KroneckerFactors
from stride_ray.models.matrices import Eigenbasis
from stride_ray.models.sites import EMBEDDING, HEAD, Site, site_gradients
from stride_ray.runtime.storage import Store, tensor_bytes

BASES, EIGENVALUES = "bases", "eigenvalues"
# √r and √c are at least this share of their mean: tokens that the sample lacks would have no damping.
LEAST_DAMPING = 0.1
PARTS = (
    "Q_first",
    "Q_second",
    "kfac_eigenvalues_first",
    "kfac_eigenvalues_second",
    "eigenvalues",
    "damping_first",
    "damping_second",
)
# Sums over blocks: of squared gradients in the basis, and of the weights' squared gradients by row and by column.
SQUARES = ("rotated", "rows", "columns")
_none = torch.empty(0)


@dataclass(frozen=True)
class EKFACSite:
    """EK-FAC's curvature at one site. All tensors are float32; J (F, D) is laid out as in sites.py.

    Attributes:
        name: the site's.
        Q_first: (F, F), eigenvectors of the first side of J: a map's inputs. Empty for embedding and head, whose first
            side is the vocabulary's n coordinates (F = n).
        Q_second: (D, D), eigenvectors of the second side: a map's output gradients, the head's inputs.
        kfac_eigenvalues_first, kfac_eigenvalues_second: (F,) or empty, and (D,): damped eigenvalues of K-FAC's factors.
        eigenvalues: (F, D), Λ.
        damping_first, damping_second: (F,) and (D,), whose outer product is M. Empty, as Λ, until they are measured.
    """

    name: str
    Q_first: Tensor
    Q_second: Tensor
    kfac_eigenvalues_first: Tensor
    kfac_eigenvalues_second: Tensor
    eigenvalues: Tensor = _none
    damping_first: Tensor = _none
    damping_second: Tensor = _none

    def to(self, device: Any) -> "EKFACSite":
        """A copy on a device."""
        return replace(self, **{part: getattr(self, part).to(device) for part in PARTS})

    def rotate(self, J: Tensor) -> Tensor:
        """Return J (…, F, D) in the eigenbasis."""
        return (self.Q_first.T @ J if len(self.Q_first) else J) @ self.Q_second

    def rotate_back(self, J: Tensor) -> Tensor:
        """The inverse of ``rotate``."""
        return (self.Q_first @ J if len(self.Q_first) else J) @ self.Q_second.T

    def kfac(self, x: Tensor) -> Tensor:
        """H x, by K-FAC's damped factors."""
        first = self.kfac_eigenvalues_first.unsqueeze(1) if len(self.kfac_eigenvalues_first) else 1.0
        return self.rotate_back(self.rotate(x).mul_(first).mul_(self.kfac_eigenvalues_second))


class DampedSite:
    """The damping cM of a site, and the preconditioner 1 / (Λ + cM) in the eigenbasis.

    Example: with F = D = 1, Λ = 2, M = 3 and c = 2, a direction x = 4 is damped to 24 and preconditioned to ½.

    Args:
        site: measured.
        factor: c.
    """

    def __init__(self, site: EKFACSite, factor: float) -> None:
        self.site, self.name = replace(site, eigenvalues=_none), site.name
        self.first, self.second = (factor * site.damping_first).unsqueeze(1), site.damping_second
        first = site.Q_first.square().T @ self.first if len(site.Q_first) else self.first
        second = site.Q_second.square().T @ self.second
        self.inverse = (site.eigenvalues + first * second).reciprocal_()

    def damp(self, x: Tensor) -> Tensor:
        """cM x."""
        return x * self.first * self.second

    def precondition(self, J: Tensor) -> Tensor:
        """Four matrix products, as many as H⁻¹ J."""
        return self.site.rotate_back(self.site.rotate(J).mul_(self.inverse))


def kronecker_eigenbasis(name: str, moments: KroneckerFactors) -> EKFACSite:
    """The eigenbasis of a site's Kronecker factors, which must be means over positions."""
    if name in (EMBEDDING, HEAD):
        values, vectors = _as_tensors(moments.written_basis if name == EMBEDDING else moments.read_basis, END_DAMPING)
        return EKFACSite(name, _none, vectors, _none, values)
    first, Q_first = _as_tensors(moments.read_basis, DAMPING)
    second, Q_second = _as_tensors(moments.written_basis, DAMPING)
    return EKFACSite(name, Q_first, Q_second, first, second)


def _as_tensors(basis: Eigenbasis, damping: float) -> tuple[Tensor, Tensor]:
    """Return the damped eigenvalues and the eigenvectors in float32."""
    return torch.from_numpy(basis.damped(damping)).float(), torch.from_numpy(basis.vectors).float()


def with_eigenvalues(
    bases: list[EKFACSite], sites: Mapping[str, Site], sums: dict[str, Tensor], blocks: list[int], positions: float
) -> list[EKFACSite]:
    """Complete all sites with their eigenvalues and damping.

    Args:
        bases: from ``kronecker_eigenbasis``.
        sites: by name.
        sums: "name.rotated" (F, D), "name.rows" (F,) and "name.columns" (D,), from ``add_squares``; consumed.
        blocks: number of blocks in the sums, by site.
        positions: mean positions per block: a block's J is a sum over them, H a mean.
    """
    values, rows, columns, factors_sq = (dict[str, Tensor]() for _ in range(4))
    for basis, count in zip(bases, blocks, strict=True):
        name, tokens = basis.name, sites[basis.name].tokens
        rotated, rows[name], columns[name] = (sums.pop(f"{name}.{each}").double() / max(1, count) for each in SQUARES)
        values[name] = (rotated / max(1.0, positions)).float()
        factors_sq[name] = torch.ones(1).double()
        if len(tokens.weights):
            factors_sq[name] = tokens.squared_weights().double()
            rows[name] = token_rows(rows[name].sum(), 1 / factors_sq[name])
    curvature = sum(float(each.sum()) for each in rows.values()) / max(1.0, positions)
    damping = optimiser_damping(rows, columns, curvature)
    return [
        replace(
            basis,
            eigenvalues=values[basis.name],
            # J has a factor per token, and x its inverse: what multiplies x has its square.
            damping_first=(damping[basis.name][0] * factors_sq[basis.name]).float(),
            damping_second=damping[basis.name][1].float(),
        )
        for basis in bases
    ]


def optimiser_damping(
    rows: Mapping[str, Tensor], columns: Mapping[str, Tensor], trace: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """M of all sites: an outer product each, proportional to √v.

    Example: mean squared gradients [[1, 4], [4, 16]] have the rows 5, 20 and the columns 5, 20; √v is [[1, 2], [2, 4]].

    Args:
        rows: sums of the weights' mean squared gradients over each row, (F,) by site.
        columns: over each column, (D,).
        trace: of M, over all sites.
    """
    sides = {
        name: (_floored(r.sqrt()), _floored((columns[name] / r.sum().clamp(min=1e-30)).sqrt()))
        for name, r in rows.items()
    }
    scale = trace / max(1e-30, sum(float(first.sum() * second.sum()) for first, second in sides.values()))
    return {name: (first * scale, second) for name, (first, second) in sides.items()}


def token_rows(total: Tensor, unigram: Tensor) -> Tensor:
    """Divide a vocabulary's sum of squares over its tokens by their distribution: a sample lacks the rare ones."""
    return total * unigram / unigram.sum()


def _floored(roots: Tensor) -> Tensor:
    return roots.clamp(min=max(1e-15, LEAST_DAMPING * float(roots.mean())))


def add_squares(
    totals: dict[str, Tensor],
    model: SplitModel,
    sites: tuple[Site, ...],
    bases: dict[str, EKFACSite],
    ids_BT: Tensor,
    mask_BT: Tensor,
) -> Tensor:
    """Add the blocks' squared gradients to ``totals`` in place: "name.rotated", "name.rows", "name.columns" (SQUARES).

    Returns:
        Which gradients are finite, (sites, B) bool, in the order of ``bases``; the others are not added.
    """
    good = dict[str, Tensor]()
    for site, J in site_gradients(model, sites, ids_BT, mask_BT)[0]:
        if site.name in bases:
            good[site.name] = finite_rows([J])
            J = J[good[site.name]]
            rotated, squares = bases[site.name].rotate(J).square_().sum(0), J.square_().sum(0)
            if len(site.tokens.weights):  # of the weights themselves: J's vocabulary coordinates have a factor each
                squares /= site.tokens.squared_weights().unsqueeze(1)
            for each, x in zip(SQUARES, (rotated, squares.sum(1), squares.sum(0)), strict=True):
                name = f"{site.name}.{each}"
                totals[name] = totals[name].add_(x) if name in totals else x
    return torch.stack([good[name] for name in bases])


def save_ekfac(store: Store, name: str, sites: list[EKFACSite]) -> None:
    """Publish EK-FAC's sites as ``name``.safetensors and ``name``.json."""
    tensors = {f"{i}.{part}": getattr(site, part).cpu() for i, site in enumerate(sites) for part in PARTS}
    store.write(f"{name}.safetensors", tensor_bytes(tensors))
    store.write_json(f"{name}.json", {"sites": [site.name for site in sites]})


def load_ekfac(store: Store, name: str, device: Any) -> tuple[EKFACSite, ...]:
    """Read the sites that save_ekfac wrote, onto a device."""
    tensors = store.read_tensors(f"{name}.safetensors")
    return tuple(
        EKFACSite(site, **{part: tensors[f"{i}.{part}"] for part in PARTS}).to(device)
        for i, site in enumerate(store.read_json(f"{name}.json")["sites"])
    )
