"""P-values of a statistic against controls, and q-values for findings at a false-discovery rate."""

import numpy as np
import scipy.stats

# Share of the controls, the largest, that the tail is fitted to, and the minimum number for a fit.
TAIL_SHARE, TAIL_LEAST = 0.1, 10
# Lower bound on p-values: a tail fitted to few controls cannot support smaller ones.
SMALLEST = 1e-15


def standardised(values: np.ndarray, control: np.ndarray) -> np.ndarray:
    """Robust z-scores: values (n,) minus the controls' median, over 1.4826 times the controls' median abs. deviation.

    ``control`` (n,) marks the controls. Values that are not finite give NaN; a spread of 0 is replaced by 1, and
    without controls all are NaN.
    """
    values = np.where(np.isfinite(values), values, np.nan)
    known = values[control & np.isfinite(values)]
    if not len(known):
        return np.full(len(values), np.nan)
    middle = np.median(known)
    return (values - middle) / (1.4826 * np.median(np.abs(known - middle)) or 1.0)


def p_values(statistics: np.ndarray, controls: np.ndarray) -> np.ndarray:
    """Empirical p-values of the items against the controls, with a fitted tail.

    Within the controls' range, p is (1 + number of controls at or above the item's value) / (m + 1). This is never
    below 1/(m + 1), too coarse for one leak among many items. Above the largest control, p is that of an exponential
    tail fitted to the top tenth of the controls, as in Knijnenburg et al. (2009), if that is smaller. The fit needs 10
    controls in the tail.

    Args:
        statistics: (n,) of the items; large is suspicious, NaN gives 1.
        controls: (m,) of the controls; those that are not finite are ignored.

    Returns:
        (n,) float64 in (0, 1].
    """
    known = np.sort(controls[np.isfinite(controls)])
    m = len(known)
    values = np.nan_to_num(statistics, nan=-np.inf)
    found = (1 + m - np.searchsorted(known, values, side="left")) / (m + 1)
    k = int(TAIL_SHARE * m)
    if k >= TAIL_LEAST:
        edge = known[-k - 1]
        mean = (known[-k:] - edge).mean()
        beyond = values > known[-1]
        if mean > 0:
            tail = (k / m) * np.exp(-(values[beyond] - edge) / mean)
            found[beyond] = np.clip(tail, SMALLEST, found[beyond])
    return found


def adjusted(p: np.ndarray) -> np.ndarray:
    """Benjamini–Hochberg adjusted p-values (q): those at most α are findings at false-discovery rate α.

    Args:
        p: (n,) p-values.

    Returns:
        (n,) float64, not below p and not above 1.
    """
    return scipy.stats.false_discovery_control(p) if len(p) else p.astype(np.float64)


def q_values(p: np.ndarray) -> np.ndarray:
    """Storey's q-values: ``adjusted`` times the share of true nulls, estimated from the large p-values.

    If most items leaked, the Benjamini–Hochberg rate is far below the requested one. The share is estimated as
    (1 + number of p > 1/2) / (n / 2) (Storey, Taylor and Siegmund 2004), capped at 1, as it is for very few items.

    Args:
        p: (n,) p-values.

    Returns:
        (n,) float64.
    """
    share = min(1.0, (1 + int((p > 0.5).sum())) / (0.5 * max(len(p), 1)))
    return adjusted(p) * share
