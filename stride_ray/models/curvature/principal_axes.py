"""Principal axes of a site's whitened gradients, of which a sketch keeps the first (sketch.py).

Damping shrinks directions with small eigenvalues, so whitened gradients are largest along the leading eigenvectors. The
axes are therefore the eigenvectors of K-FAC's factors, and EK-FAC's eigenvalues, divided by H's, are the blocks' mean
squares along them. The vocabulary's side has no axes: its coordinates are projected at random.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stride_ray.models.curvature.eigenvalues import EKFACSite
from stride_ray.models.sites import EMBEDDING, HEAD, ORIGIN, Site


class Axes(NamedTuple):
    """The principal axes of one side of a whitened gradient.

    Attributes:
        vectors: (L, L) float32, axes in columns, in any order.
        order: (L,) int64, the columns by decreasing energy.
        energy: (L,) float64, the share of the mean squared gradient that the first 1, 2, … axes hold.
    """

    vectors: Tensor
    order: Tensor
    energy: NDArray[np.float64]

    def first(self, kept: int) -> Tensor:
        """The first ``kept`` axes, (L, kept)."""
        return self.vectors[:, self.order[:kept]]


# The axes of W_in's side and of W_out's; None for the vocabulary.
SiteAxes = tuple[Axes | None, Axes | None]


def principal_axes(sites: Sequence[Site], measured: Iterable[EKFACSite]) -> list[SiteAxes]:
    """The axes of the sites' whitened gradients.

    Args:
        sites: whitened (kfac.py).
        measured: EK-FAC's sites, all but the origin, which is taken to have the head's axes and energy.
    """
    by_name = {site.name: site for site in measured}
    return [_axes(site.name, by_name[HEAD if site.name == ORIGIN else site.name]) for site in sites]


def _axes(name: str, site: EKFACSite) -> SiteAxes:
    energies = site.eigenvalues.double() / site.kfac_eigenvalues_second.double()
    if len(site.Q_first):
        energies /= site.kfac_eigenvalues_first.double().unsqueeze(1)
    second = _ordered(site.Q_second, energies.sum(0))
    if name == EMBEDDING:
        return None, second
    return (second, None) if name in (HEAD, ORIGIN) else (_ordered(site.Q_first, energies.sum(1)), second)


def _ordered(vectors: Tensor, energies: Tensor) -> Axes:
    order = energies.argsort(descending=True, stable=True)
    total = np.cumsum(energies[order].numpy())
    # A site that no block acts on has no energy; then no axis leaves any out.
    return Axes(vectors, order, total / total[-1] if total[-1] > 0 else np.ones(len(total)))
