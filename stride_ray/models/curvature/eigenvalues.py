"""EK-FAC's eigenvalues of the sites' curvature (George et al. 2018, arXiv 1806.03884), for the queries' solve.

In the eigenbasis Q of its factors, K-FAC's H has the eigenvalues λ_i μ_j, as if inputs u and output gradients g were
independent. EK-FAC keeps the basis and measures the eigenvalues Λ_ij, the mean squares of the blocks' gradients in it:
F = Q Λ Qᵀ. Blocks are still whitened with H, whose factors act on single tokens, so a query's direction x = F⁻¹ J(x) is
passed on as y with H⁻¹ y = x. F⁻¹ J costs four matrix products, as many as H⁻¹ J.
"""

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
# Λ is damped by this share of its mean at each site (Grosse et al. 2023, arXiv 2308.03296).
EIGENVALUE_DAMPING = 0.1
PARTS = ("Q_first", "Q_second", "kfac_eigenvalues_first", "kfac_eigenvalues_second", "inverse_eigenvalues")


@dataclass(frozen=True)
class EKFACSite:
    """EK-FAC's curvature at one site. All tensors are float32; J (F, D) is laid out as in sites.py.

    Attributes:
        name: the site's.
        Q_first: (F, F), eigenvectors of the first side of J: a map's inputs. Empty for embedding and head, whose first
            side is the vocabulary's n coordinates (F = n).
        Q_second: (D, D), eigenvectors of the second side: a map's output gradients, the head's inputs.
        kfac_eigenvalues_first, kfac_eigenvalues_second: (F,) or empty, and (D,): damped eigenvalues of K-FAC's factors.
        inverse_eigenvalues: (F, D), 1 / (Λ + damping); empty until they are measured.
    """

    name: str
    Q_first: Tensor
    Q_second: Tensor
    kfac_eigenvalues_first: Tensor
    kfac_eigenvalues_second: Tensor
    inverse_eigenvalues: Tensor

    def to(self, device: Any) -> "EKFACSite":
        """A copy on a device."""
        return replace(self, **{part: getattr(self, part).to(device) for part in PARTS})

    def rotate(self, J: Tensor) -> Tensor:
        """Return J (…, F, D) in the eigenbasis."""
        return (self.Q_first.T @ J if len(self.Q_first) else J) @ self.Q_second

    def _rotate_back(self, J: Tensor) -> Tensor:
        return (self.Q_first @ J if len(self.Q_first) else J) @ self.Q_second.T

    def precondition(self, J: Tensor) -> Tensor:
        """F⁻¹ J = Q ((Qᵀ J Q) / (Λ + damping)) Qᵀ."""
        return self._rotate_back(self.rotate(J).mul_(self.inverse_eigenvalues))

    def kronecker_preimage(self, J: Tensor) -> Tensor:
        """y with H⁻¹ y = F⁻¹ J.

        Example: with F = D = 1, λ = 2, μ = 3 and Λ = 12, H = 6 and J = 4 gives y = 2: 2 / 6 = 4 / 12.
        """
        inner = self.kfac_eigenvalues_first.unsqueeze(1) if len(self.kfac_eigenvalues_first) else 1.0
        return self._rotate_back(self.rotate(J).mul_(self.inverse_eigenvalues * inner * self.kfac_eigenvalues_second))


def kronecker_eigenbasis(name: str, moments: KroneckerFactors) -> EKFACSite:
    """The eigenbasis of a site's Kronecker factors, which must be means over positions."""
    none = torch.empty(0)
    if name in (EMBEDDING, HEAD):
        values, vectors = _as_tensors(moments.written_basis if name == EMBEDDING else moments.read_basis, END_DAMPING)
        return EKFACSite(name, none, vectors, none, values, none)
    first, Q_first = _as_tensors(moments.read_basis, DAMPING)
    second, Q_second = _as_tensors(moments.written_basis, DAMPING)
    return EKFACSite(name, Q_first, Q_second, first, second, none)


def _as_tensors(basis: Eigenbasis, damping: float) -> tuple[Tensor, Tensor]:
    """Return the damped eigenvalues and the eigenvectors in float32."""
    return torch.from_numpy(basis.damped(damping)).float(), torch.from_numpy(basis.vectors).float()


def with_eigenvalues(basis: EKFACSite, site: Site, squares: Tensor, blocks: int, positions: float) -> EKFACSite:
    """Complete a site with its measured eigenvalues.

    Args:
        basis: from ``kronecker_eigenbasis``.
        site: the site of this basis.
        squares: (F, D), the sum over blocks of squared gradients in the basis (add_squares).
        blocks: number of blocks in the sum.
        positions: mean positions per block: a block's J is a sum over them, H a mean.
    """
    values = squares.double() / max(1, blocks) / max(1.0, positions)
    # All weights of a matrix are damped alike; the vocabulary's coordinates of J have a factor each.
    factor = site.tokens.squared_weights().double().unsqueeze(1) if len(site.tokens.weights) else torch.ones(1).double()
    damping = EIGENVALUE_DAMPING * (values / factor).mean() * factor
    return replace(basis, inverse_eigenvalues=(values + damping + 1e-30).reciprocal().float())


def add_squares(
    totals: dict[str, Tensor],
    model: SplitModel,
    sites: tuple[Site, ...],
    bases: dict[str, EKFACSite],
    ids_BT: Tensor,
    mask_BT: Tensor,
) -> Tensor:
    """Add the blocks' squared gradients in the bases to ``totals``, (F, D) by site, in place.

    Returns:
        Which gradients are finite, (sites, B) bool, in the order of ``bases``; the others are not added.
    """
    good = dict[str, Tensor]()
    for site, J in site_gradients(model, sites, ids_BT, mask_BT)[0]:
        if site.name in bases:
            good[site.name] = finite_rows([J])
            found = bases[site.name].rotate(J[good[site.name]]).square_().sum(0)
            totals[site.name] = totals[site.name].add_(found) if site.name in totals else found
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
