"""EK-FAC's eigenvalues of the sites' curvature (George et al. 2018, arXiv 1806.03884), for the queries' solve.

K-FAC's H has the eigenvalues λ_i μ_j in the eigenbasis of its factors, for inputs u and output gradients g as if these
were independent. EK-FAC keeps the basis and measures Λ_ij, the mean square of the blocks' gradients in it. H stays what
blocks are whitened with: a query's direction x = Λ⁻¹ J(x) is passed on as y with H⁻¹ y = x.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stride_ray.corpus.failures import finite_rows
from stride_ray.models.causal_lm import SplitModel
from stride_ray.models.curvature.moments import DAMPING, END_DAMPING, KroneckerFactors
from stride_ray.models.matrices import damped_eigenbasis
from stride_ray.models.sites import EMBEDDING, HEAD, Site, site_gradients
from stride_ray.runtime.storage import Store, tensor_bytes

EIGENVALUES = "eigenvalues"
# Λ is damped by this share of its mean at each site (Grosse et al. 2023, arXiv 2308.03296).
EIGENVALUE_DAMPING = 0.1
PARTS = ("Q_in", "Q_out", "factors_in", "factors_out", "inverse")


def _none() -> Tensor:
    return torch.empty(0)


@dataclass(frozen=True)
class Eigenvalues:
    """The eigenvalues of one site's curvature; J is laid out as in sites.py.

    Attributes:
        name: the site's.
        Q_in: (F, F) float32, eigenvectors of the first side of J; empty for embedding and head, whose first side is the
            vocabulary's.
        Q_out: (D, D) float32, eigenvectors of the second side.
        factors_in, factors_out: (F,) and (D,), the damped eigenvalues λ and μ of K-FAC's factors.
        inverse: (F, D), 1 / (Λ + damping).
    """

    name: str
    Q_in: Tensor
    Q_out: Tensor
    factors_in: Tensor
    factors_out: Tensor
    inverse: Tensor

    def to(self, device: Any) -> "Eigenvalues":
        """A copy on a device."""
        return replace(self, **{part: getattr(self, part).to(device) for part in PARTS})

    def rotated(self, J: Tensor) -> Tensor:
        """J (…, F, D) in the eigenbasis."""
        return (self.Q_in.T @ J if len(self.Q_in) else J) @ self.Q_out

    def _back(self, J: Tensor) -> Tensor:
        return (self.Q_in @ J if len(self.Q_in) else J) @ self.Q_out.T

    def solved(self, J: Tensor) -> Tensor:
        """Λ⁻¹ J."""
        return self._back(self.rotated(J).mul_(self.inverse))

    def for_kronecker(self, J: Tensor) -> Tensor:
        """y with H⁻¹ y = Λ⁻¹ J.

        Example: with F = D = 1, λ = 2, μ = 3 and Λ = 12, H = 6 and J = 4 gives y = 2: 2 / 6 = 4 / 12.
        """
        inner = self.factors_in.unsqueeze(1) if len(self.factors_in) else 1.0
        return self._back(self.rotated(J).mul_(self.inverse * inner * self.factors_out))


def eigenbasis(name: str, moments: KroneckerFactors) -> Eigenvalues:
    """The basis of a site's Kronecker factors (means over positions), with Λ still to be measured."""
    if name == EMBEDDING:
        values, vectors = damped_eigenbasis(moments.written, END_DAMPING)
        return Eigenvalues(name, _none(), vectors, _none(), values, _none())
    if name == HEAD:
        values, vectors = damped_eigenbasis(moments.read, END_DAMPING)
        return Eigenvalues(name, _none(), vectors, _none(), values, _none())
    (inner, Q_in), (outer, Q_out) = (damped_eigenbasis(each, DAMPING) for each in (moments.read, moments.written))
    return Eigenvalues(name, Q_in, Q_out, inner, outer, _none())


def measured(basis: Eigenvalues, site: Site, squares: Tensor, blocks: int, positions: float) -> Eigenvalues:
    """The eigenvalues, from the sum over blocks of squared gradients in the basis.

    Args:
        basis: from ``eigenbasis``.
        site: the same one's.
        squares: (F, D), the sum.
        blocks: number of blocks in the sum.
        positions: a block's mean number of positions. A block's J is a sum over them, and H a mean.
    """
    values = squares.double() / max(1, blocks) / max(1.0, positions)
    # All weights of a matrix are damped alike; the vocabulary's coordinates of J have a factor each.
    factor = site.tokens.squared_weights().double().unsqueeze(1) if len(site.tokens.weights) else torch.ones(1).double()
    damping = EIGENVALUE_DAMPING * (values / factor).mean() * factor
    return replace(basis, inverse=(values + damping + 1e-30).reciprocal().float())


def add_squares(
    totals: dict[str, Tensor],
    model: SplitModel,
    sites: tuple[Site, ...],
    bases: dict[str, Eigenvalues],
    ids_BT: Tensor,
    mask_BT: Tensor,
) -> None:
    """Add the blocks' squared gradients in the bases to ``totals``, (F, D) by site, in place.

    A gradient that is not finite, though its block was so in ``add_moments``, adds nothing.
    """
    gradients, _ = site_gradients(model, sites, ids_BT, mask_BT)
    for site, J in gradients:
        if site.name in bases:
            found = bases[site.name].rotated(J[finite_rows([J])]).square_().sum(0)
            totals[site.name] = totals[site.name].add_(found) if site.name in totals else found


def save_eigenvalues(store: Store, found: list[Eigenvalues]) -> None:
    """Publish the eigenvalues of all sites."""
    tensors = {f"{i}.{part}": getattr(each, part).cpu() for i, each in enumerate(found) for part in PARTS}
    store.write(f"{EIGENVALUES}.safetensors", tensor_bytes(tensors))
    store.write_json(f"{EIGENVALUES}.json", {"sites": [each.name for each in found]})


def load_eigenvalues(store: Store, device: Any) -> tuple[Eigenvalues, ...]:
    """Read what save_eigenvalues wrote; nothing if it was not called."""
    return tuple(_load(store, device)) if store.exists(f"{EIGENVALUES}.json") else ()


def _load(store: Store, device: Any) -> Iterator[Eigenvalues]:
    tensors = store.read_tensors(f"{EIGENVALUES}.safetensors")
    for i, name in enumerate(store.read_json(f"{EIGENVALUES}.json")["sites"]):
        yield Eigenvalues(name, **{part: tensors[f"{i}.{part}"] for part in PARTS}).to(device)
