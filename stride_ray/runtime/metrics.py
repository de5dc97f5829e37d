"""What a run says of itself to Prometheus, through Ray's own metrics endpoint (``ray.util.metrics``).

Rates are Prometheus' to take: ``rate(ray_stride_blocks_total[5m])`` is blocks a second. The driver reports, once for
every result that reaches it, so a unit that is done twice counts once. Every metric has the tag ``stage``, the word
that the progress line begins with. ``cluster/grafana.json`` draws them.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import ray

# Name to kind and description; Ray puts "ray_" before the name and "_total" after a counter's.
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
    """Count a unit's result: what workers and tasks return, most of them a marker (``Stage.mark``)."""
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
        if isinstance(amount, int) and amount:  # a result of another kind may have a list of that name
            _metrics()[name].inc(amount, {"stage": stage})
    if result.get("largest_gap") is not None:
        _metrics()["stride_solver_gap"].set(result["largest_gap"], {"stage": stage})


def count_unavailable_call() -> None:
    """Count a call that a lost node refused, as a failure of the stage ``workers``."""
    _metrics()["stride_failures"].inc(1, {"stage": "workers"})
