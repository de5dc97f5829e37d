"""Progress of a stage: missing units of work done behind a progress bar, with costs and Prometheus metrics.

Metrics are exported through Ray's metrics endpoint (``ray.util.metrics``). Rates are left to Prometheus:
``rate(ray_stride_blocks_total[5m])`` is blocks per second. The driver reports once for each result it accepts, so a
unit that runs twice counts once. Every metric has the tag ``stage``, the label of the progress line.
``cluster/grafana.json`` is a dashboard of them.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import ray
from tqdm import tqdm

from stride_ray.runtime import costs
from stride_ray.runtime.run import Stage

# Name to kind and description; Ray prefixes names with "ray_" and appends "_total" to counters.
METRICS = {
    "stride_units": ("counter", "Units of work done."),
    "stride_blocks": ("counter", "Blocks processed by passes over the pool."),
    "stride_responses": ("counter", "Queries whose response or influence was computed."),
    "stride_failures": (
        "counter",
        "Rows with status failed, and calls that failed because a node was lost.",
    ),
    "stride_solver_gap": ("gauge", "Largest relative duality gap of the last unit of recover."),
}


def run_missing(
    stage: Stage,
    units: Mapping[str, Any],
    work: Callable[[list[Any]], Iterable[dict[str, Any]]],
    label: str,
    noun: str,
    size: Callable[[Any], int] = lambda unit: 1,
) -> list[dict[str, Any]]:
    """Do the units without a done marker; returns the markers of all units, in the order of ``units``.

    Example: with a marker for "part-00000", ``run_missing(stage, {"part-00000": 0, "part-00001": 1}, work, …)`` calls
    ``work([1])`` and returns both markers.

    Args:
        stage: from Run.begin.
        units: the worker's input for each unit, by the unit's name, which is also the name of its done marker.
        work: maps a worker over units and yields their done markers; not called if nothing is missing.
        label: of the progress bar.
        noun: what the progress bar counts.
        size: number of ``noun`` per unit; one unless given.
    """
    done = stage.done()
    missing = {name: unit for name, unit in units.items() if name not in done}
    if missing:
        total = sum(size(unit) for unit in missing.values())
        results = work(list(missing.values()))
        stage.remember(progress(results, label, total, noun, lambda marker: size(units[marker["unit"]])))
        done = stage.done()
    return [done[name] for name in units]


def progress(
    results: Iterable[dict[str, Any]],
    label: str,
    total: int,
    unit: str,
    count: Callable[[dict[str, Any]], int] = lambda result: 1,
) -> list[dict[str, Any]]:
    """Collect results behind a progress bar, recording cost and metrics.

    Args:
        results: from one of the mapping functions.
        label: of the progress bar, the cost phase and the metrics.
        total: count at completion.
        unit: name of the counted items.
        count: how many items a result stands for; one unless given.
    """
    interval = 0.5 if sys.stderr.isatty() else 5.0
    collected = []
    bar = tqdm(total=total, desc=label, unit=f" {unit}", mininterval=interval, file=sys.stderr, smoothing=0.1)
    with bar, costs.phase(label, unit, total) as phase:
        for result in results:
            collected.append(result)
            report(label, result)
            bar.update(count(result))
            phase.amount += count(result)
    return collected


@lru_cache(maxsize=1)
def _metrics() -> dict[str, Any]:
    from ray.util.metrics import Counter, Gauge

    make = {"counter": Counter, "gauge": Gauge}
    return {name: make[kind](name, description=about, tag_keys=("stage",)) for name, (kind, about) in METRICS.items()}


def report(stage: str, result: Mapping[str, Any]) -> None:
    """Count the result of a unit, in most stages its done marker (``Stage.mark``)."""
    if not ray.is_initialized():
        return
    counts = result.get("counts")
    blocks = result.get("blocks", counts.get("blocks", 0) if isinstance(counts, Mapping) else 0)
    found = {
        "stride_units": 1,
        "stride_blocks": blocks,
        "stride_responses": result.get("queries", 0),
        "stride_failures": result.get("failed", 0),
    }
    for name, amount in found.items():
        if isinstance(amount, int) and amount:  # some stages store lists under these keys
            _metrics()[name].inc(amount, {"stage": stage})
    if result.get("largest_gap") is not None:
        _metrics()["stride_solver_gap"].set(result["largest_gap"], {"stage": stage})


def count_unavailable_call() -> None:
    """Count a call to an unreachable actor as a failure of the stage ``workers``."""
    _metrics()["stride_failures"].inc(1, {"stage": "workers"})
