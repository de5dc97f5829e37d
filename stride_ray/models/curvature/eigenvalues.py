"""EK-FAC's eigenvalues of the sites' curvature, and the preconditioner of the queries' solve (conjugate_gradients.py).

In the eigenbasis Q of its factors, K-FAC's H has the eigenvalues λ_i μ_j, as if inputs u and output gradients g were
independent. EK-FAC (George et al. 2018, arXiv 1806.03884) keeps the basis and measures the eigenvalues Λ_ij, the mean
squares of the blocks' gradients in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stride_ray.corpus.failures import finite_rows
from stride_ray.models.causal_lm import SplitModel
from stride_ray.models.curvature.damping import optimiser_damping, token_rows
from stride_ray.models.curvature.moments import DAMPING, KroneckerFactors
from stride_ray.models.linear_algebra.matrices import Eigenbasis
from stride_ray.models.sites import EMBEDDING, HEAD, Site, site_gradients
from stride_ray.runtime.storage import Store, tensor_bytes

BASES, EIGENVALUES = "bases", "eigenvalues"
PARTS = (
    "Q_first",
    "Q_second",
    "kfac_eigenvalues_first",
    "kfac_eigenvalues_second",
    "eigenvalues",
    "damping_first",
    "damping_second",
)
_none = torch.empty(0)


@dataclass(frozen=True)
class EKFACSite:
    """EK-FAC's curvature and the optimiser's damping at one site. Tensors are float32; J (F, D) is as in sites.py.

    Attributes:
        name: the site's.
        Q_first: (F, F), eigenvectors of the first side of J: a map's inputs. Empty for embedding and head, whose first
            side is the vocabulary's n coordinates (F = n).
        Q_second: (D, D), eigenvectors of the second side: a map's output gradients, the head's inputs.
        kfac_eigenvalues_first, kfac_eigenvalues_second: (F,) or empty, and (D,): damped eigenvalues of K-FAC's factors.
        eigenvalues: (F, D), Λ.
        damping_first, damping_second: (F,) and (D,), whose outer product is Γ (damping.py). Like Λ, empty until they
            are measured.
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

    def kfac(self, direction: Tensor) -> Tensor:
        """H times a direction, by K-FAC's damped factors."""
        first = self.kfac_eigenvalues_first.unsqueeze(1) if len(self.kfac_eigenvalues_first) else 1.0
        return self.rotate_back(self.rotate(direction).mul_(first).mul_(self.kfac_eigenvalues_second))


class DampedSite:
    """A site's damping cΓ, and the preconditioner P = Q (Λ + c diag(Qᵀ Γ Q)) Qᵀ.

    Example: with F = D = 1, Λ = 2, Γ = 3 and c = 2, a direction of 4 is damped to 24, and P⁻¹ 4 = ½.

    Args:
        site: measured.
        factor: c.
    """

    def __init__(self, site: EKFACSite, factor: float) -> None:
        self.name, self.basis = site.name, replace(site, eigenvalues=_none)
        self.rows, self.columns = (factor * site.damping_first).unsqueeze(1), site.damping_second
        rotated_rows = site.Q_first.square().T @ self.rows if len(site.Q_first) else self.rows
        rotated_columns = site.Q_second.square().T @ self.columns
        self.inverse_eigenvalues = torch.addcmul(site.eigenvalues, rotated_rows, rotated_columns).reciprocal_()

    def damp(self, direction: Tensor) -> Tensor:
        """Multiply a direction by cΓ."""
        return direction * self.rows * self.columns

    def precondition(self, J: Tensor) -> Tensor:
        """P⁻¹ J."""
        return self.basis.rotate_back(self.basis.rotate(J).mul_(self.inverse_eigenvalues))


class Squares(NamedTuple):
    """Squared gradients at a site, summed or averaged over blocks.

    Attributes:
        rotated: (F, D), of J in the eigenbasis.
        rows: (F,), of the weights' own gradients, summed over each row.
        columns: (D,), over each column.
    """

    rotated: Tensor
    rows: Tensor
    columns: Tensor


def kronecker_eigenbasis(name: str, moments: KroneckerFactors) -> EKFACSite:
    """The eigenbasis of a site's Kronecker factors, which must be means over positions."""
    if name in (EMBEDDING, HEAD):
        values, vectors = _as_tensors(moments.written_basis if name == EMBEDDING else moments.read_basis)
        return EKFACSite(name, _none, vectors, _none, values)
    first, Q_first = _as_tensors(moments.read_basis)
    second, Q_second = _as_tensors(moments.written_basis)
    return EKFACSite(name, Q_first, Q_second, first, second)


def _as_tensors(basis: Eigenbasis) -> tuple[Tensor, Tensor]:
    """Return the damped eigenvalues and the eigenvectors in float32."""
    return torch.from_numpy(basis.damped(DAMPING)).float(), torch.from_numpy(basis.vectors).float()


def complete_sites(
    bases: list[EKFACSite], sites: Mapping[str, Site], means: Mapping[str, Squares], positions: float
) -> list[EKFACSite]:
    """Add the eigenvalues and the damping, whose trace over all sites is that of Λ in the weights themselves.

    Args:
        bases: from ``kronecker_eigenbasis``.
        sites: by name.
        means: mean squares over blocks, by site.
        positions: mean positions per block: a block's J is a sum over them, H a mean.
    """
    rows, columns, factors_sq = (dict[str, Tensor]() for _ in range(3))
    for basis in bases:
        name, tokens = basis.name, sites[basis.name].tokens
        rows[name], columns[name] = means[name].rows.double(), means[name].columns.double()
        if len(tokens.weights):
            factors_sq[name] = tokens.weights.double().square()
            rows[name] = token_rows(rows[name].sum(), 1 / factors_sq[name])
    curvature = sum(float(each.sum()) for each in rows.values()) / max(1.0, positions)
    damping = optimiser_damping(rows, columns, curvature)
    found = []
    for basis in bases:
        first, second = damping[basis.name]
        if basis.name in factors_sq:  # J has a factor per token, a direction its inverse: Γ has its square
            first = sites[basis.name].tokens.fold(first * factors_sq[basis.name])
        values = (means[basis.name].rotated.double() / max(1.0, positions)).float()
        found.append(replace(basis, eigenvalues=values, damping_first=first.float(), damping_second=second.float()))
    return found


def add_squares(
    totals: dict[str, Squares],
    model: SplitModel,
    sites: tuple[Site, ...],
    bases: dict[str, EKFACSite],
    ids_BT: Tensor,
    mask_BT: Tensor,
) -> Tensor:
    """Add the blocks' squared gradients to ``totals`` by site, in place.

    Returns:
        Which gradients are finite, (sites, B) bool, in the order of ``bases``; the others are not added.
    """
    good = dict[str, Tensor]()
    for site, J in site_gradients(model, sites, ids_BT, mask_BT)[0]:
        if site.name in bases:
            good[site.name] = finite_rows([J])
            J = J[good[site.name]]
            rotated, squares = bases[site.name].rotate(J).square_().sum(0), J.square_().sum(0)
            if len(site.tokens.weights):  # J's vocabulary coordinates have a factor each
                squares /= site.tokens.mean_squared_weights.unsqueeze(1)
            found = Squares(rotated, squares.sum(1), squares.sum(0))
            for total, x in zip(
                totals.setdefault(site.name, Squares(*map(torch.zeros_like, found))), found, strict=True
            ):
                total.add_(x)
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
        EKFACSite(site, **{part: tensors.pop(f"{i}.{part}") for part in PARTS}).to(device)
        for i, site in enumerate(store.read_json(f"{name}.json")["sites"])
    )
