"""From a statistic to a p-value against controls, and from many p-values to findings at a false-discovery rate."""

import numpy as np

# Controls whose values the tail is fitted to: a share of them, and the fewest that bear a fit.
TAIL_SHARE, TAIL_LEAST = 0.1, 10
# No p-value is smaller: a tail fitted to some controls knows nothing of that.
SMALLEST = 1e-15


def standardised(values: np.ndarray, control: np.ndarray) -> np.ndarray:
    """Values (n,) as distances from the controls' median in the controls' spread (1.4826 median absolute deviations).

    ``control`` (n,) says which are controls; nan stay nan, and controls that are all alike spread by 1.
    """
    known = values[control & ~np.isnan(values)]
    if not len(known):
        return np.full(len(values), np.nan)
    middle = np.median(known)
    return (values - middle) / (1.4826 * np.median(np.abs(known - middle)) or 1.0)


def p_values(statistics: np.ndarray, controls: np.ndarray) -> np.ndarray:
    """How often a control is at least as extreme as each item.

    Inside the controls' range the share of controls that reach the item's value, both counted in. Counting alone never
    gets below 1/(m + 1), too much for one leak among many items; beyond the tenth of the controls that are largest, an
    exponential tail fitted to these goes on, as in Knijnenburg et al. (2009), if that is smaller. The fit needs 10
    controls in the tail.

    Args:
        statistics: (n,) of the items, large is suspicious; nan gives 1.
        controls: (m,) of the controls; nan are left out.

    Returns:
        (n,) float64 in (0, 1].
    """
    known = np.sort(controls[~np.isnan(controls)])
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
    """Benjamini and Hochberg's adjusted p-values (q): those at most α are findings at false-discovery rate α.

    Args:
        p: (n,) p-values.

    Returns:
        (n,) float64, not below p and not above 1.
    """
    n = len(p)
    order = np.argsort(p, kind="stable")
    scaled = p[order] * n / np.arange(1, n + 1)
    q = np.empty(n)
    q[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0) if n else scaled
    return q


def q_values(p: np.ndarray) -> np.ndarray:
    """Storey's q-values: ``adjusted``, times the share of items that are no findings as the large p-values tell it.

    Where most items leaked, Benjamini and Hochberg's rate is far below the one asked for. The share is estimated from
    p > 1/2 with one more counted (Storey, Taylor and Siegmund 2004), and is 1 for a few items.

    Args:
        p: (n,) p-values.

    Returns:
        (n,) float64.
    """
    share = min(1.0, (1 + int((p > 0.5).sum())) / (0.5 * max(len(p), 1)))
    return adjusted(p) * share
