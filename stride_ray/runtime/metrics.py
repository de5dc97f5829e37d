"""Prometheus metrics of a run, exported through Ray's metrics endpoint (``ray.util.metrics``).

Rates are left to Prometheus: ``rate(ray_stride_blocks_total[5m])`` is blocks per second. The driver reports once for
each result it accepts, so a unit that runs twice counts once. Every metric has the tag ``stage``, the label of the
progress line. ``cluster/grafana.json`` is a dashboard of them.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import ray

# Name to kind and description; Ray prefixes names with "ray_" and appends "_total" to counters.
METRICS = {
    "stride_units": ("counter", "Units of work done."),
    "stride_blocks": ("counter", "Blocks that a pass went over."),
    "stride_responses": ("counter", "Queries whose response or influence was found."),
    "stride_failures": (
        "counter",
        "Rows that ended with an error in their status, and calls that a lost node refused.",
    ),
    "stride_solver_gap": ("gauge", "Largest relative duality gap of the last unit of recover."),
}


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
