"""The optimiser's damping Γ of the weights, for the queries' solve (conjugate_gradients.py).

Adam divides a gradient by √v, v being its running mean square. Stopped after a finite time, the model responds to a
change of its data approximately as (G + Γ)⁻¹ with Γ diagonal and proportional to √v (docs/method.md). Γ is kept as
Adafactor keeps v (Shazeer and Stern 2018, arXiv 1804.04235): √v_ij ≈ √(r_i c_j / Σ r), with r and c the sums of a
matrix's mean squared gradients over rows and columns.
"""

from collections.abc import Mapping

from torch import Tensor, ones_like

# √r and √c are at least this share of their mean, for inputs and outputs that the sample does not use; Γ's mean at a
# site is at least that share of its mean over all weights, for a site without gradients.
LEAST_SIDE, LEAST_SITE = 0.1, 1e-3


def optimiser_damping(
    rows: Mapping[str, Tensor], columns: Mapping[str, Tensor], trace: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """Γ of all sites: an outer product each, proportional to √v.

    Example: mean squared gradients [[1, 4], [4, 16]] have the rows 5, 20 and the columns 5, 20; √v is [[1, 2], [2, 4]].

    Args:
        rows: sums of the weights' mean squared gradients over each row, (F,) by site.
        columns: over each column, (D,).
        trace: of Γ, over all sites.
    """
    sides = {name: (r.sqrt(), (columns[name] / r.sum().clamp(min=1e-30)).sqrt()) for name, r in rows.items()}
    weights = sum(len(first) * len(second) for first, second in sides.values())
    least = LEAST_SITE * sum(float(first.sum() * second.sum()) for first, second in sides.values()) / weights
    sides = {name: _floored(*both, max(least, 1e-15)) for name, both in sides.items()}
    scale = trace / sum(float(first.sum() * second.sum()) for first, second in sides.values())
    return {name: (first * scale, second) for name, (first, second) in sides.items()}


def _floored(first: Tensor, second: Tensor, least: float) -> tuple[Tensor, Tensor]:
    if float(first.mean() * second.mean()) < least:
        return ones_like(first) * least, ones_like(second)
    return first.clamp(min=LEAST_SIDE * float(first.mean())), second.clamp(min=LEAST_SIDE * float(second.mean()))


def token_rows(total: Tensor, unigram: Tensor) -> Tensor:
    """Distribute a vocabulary's sum of squares over its tokens by their frequency: a sample lacks the rare ones."""
    return total * unigram / unigram.sum()
