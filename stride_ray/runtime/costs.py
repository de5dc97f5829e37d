"""Cost accounting: seconds, workers and memory of each phase, in ``cost.json`` beside a stage's data.

Workers attach their time and peak memory to every result; the driver adds wall-clock time. ``plan`` extrapolates
larger runs from these records. Does not import Ray.
"""

import os
import socket
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from stride_ray.runtime.memory import peak_mb
from stride_ray.runtime.run import Stage

COST_FILE = "cost.json"
# Label of the time that workers spend loading and compiling before their first result. It does not grow with the data.
START = "start"
# Later results per worker needed to estimate the steady cost of a result; units differ in size.
MIN_LATER_RESULTS = 3
# Cost of a result: seconds, peak MB, worker id ("host/pid"), and seconds of separate phases by label.
Cost = tuple[float, int, str, dict[str, float]]


@dataclass
class Phase:
    """The work behind one progress line of a stage.

    Attributes:
        amount: items processed.
        unit: what an item is, for example "blocks".
        wall: wall-clock seconds at the driver.
        busy: worker seconds, summed over workers, excluding ``separate``.
        peak_mb: largest peak memory of any worker since its start, MB.
        first: the part of ``busy`` spent on each worker's first result.
        results: number of results.
        seen: ids of the workers that took part.
        separate: worker seconds recorded as phases of their own, by label; not in ``busy``.
    """

    amount: int = 0
    unit: str = ""
    wall: float = 0.0
    busy: float = 0.0
    peak_mb: int = 0
    first: float = 0.0
    results: int = 0
    seen: set[str] = field(default_factory=set)
    separate: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, cost: Cost) -> None:
        """Add the cost of one result, as ``result_cost`` returns it."""
        seconds, peak, worker, apart = cost
        rest = seconds - sum(apart.values())
        self.busy += rest
        self.first += rest if worker not in self.seen else 0.0
        self.results += 1
        self.peak_mb = max(self.peak_mb, peak)
        self.seen.add(worker)
        for label, part in apart.items():
            self.separate[label] += part

    def facts(self, label: str) -> dict[str, dict[str, Any]]:
        """Records for cost.json, by label: this phase and its separate phases.

        First results take longer than later ones because something is loaded or compiled. If there are enough later
        results to estimate the excess, it is moved to the ``start`` phase.
        """
        workers = max(1, len(self.seen))
        later = self.results - len(self.seen)
        enough_later_results = later >= MIN_LATER_RESULTS * workers
        start = max(0.0, self.first - workers * (self.busy - self.first) / later) if enough_later_results else 0.0
        apart = dict(self.separate)
        if start:
            apart[START] = apart.get(START, 0.0) + start
        wall = max(0.0, self.wall - sum(apart.values()) / workers)

        def phase_record(wall: float, busy: float) -> dict[str, Any]:
            seconds = {"wall": round(wall, 3), "busy": round(busy, 3)}
            return {"amount": self.amount, "unit": self.unit, **seconds, "workers": workers, "peak_mb": self.peak_mb}

        # Start-up takes each worker the same time however many there are, so it is wall time without shared work.
        others = {name: phase_record(took / workers, 0.0 if name == START else took) for name, took in apart.items()}
        return {label: phase_record(wall, self.busy - start), **others}


_phase_stack: list[dict[str, Phase]] = []  # stack of phases by label, one entry per enclosing ``costed`` block
_current = Phase()
_separate_seconds: defaultdict[str, float] = defaultdict(
    float
)  # separate seconds of the result in progress in this worker


def record_separately(label: str, seconds: float) -> None:
    """In a worker: book seconds of the current result as a phase of their own, because they scale differently."""
    _separate_seconds[label] += seconds


def start_result_timer() -> float:
    """In a worker: start timing a result and return time.monotonic(); discards separate seconds of a failed one."""
    _separate_seconds.clear()
    return time.monotonic()


def result_cost(began: float) -> Cost:
    """In a worker: the cost of a result whose timing started at ``began``.

    Returns:
        Seconds, peak MB, worker id and the seconds of separate phases by label.
    """
    return time.monotonic() - began, peak_mb(), f"{socket.gethostname()}/{os.getpid()}", dict(_separate_seconds)


def add_result_cost(cost: Cost | None) -> None:
    """At the driver: add the cost of an incoming result to the current phase."""
    if cost is not None:
        _current.add(cost)


@contextmanager
def phase(label: str, unit: str, amount: int) -> Iterator[None]:
    """Attribute the results that arrive within the block to one phase of the enclosing ``costed`` block, if any."""
    global _current
    before, began = _current, time.monotonic()
    _current = _phase_stack[-1].setdefault(label, Phase(unit=unit)) if _phase_stack else Phase()
    try:
        yield
        _current.amount += amount
    finally:
        _current.wall += time.monotonic() - began
        _current = before


@contextmanager
def record_stage_costs(stage: Stage) -> Iterator[None]:
    """Add the cost of the phases within the block to the stage's ``cost.json``, on top of earlier attempts."""
    began = time.monotonic()
    _phase_stack.append({})
    try:
        yield
        if not _phase_stack[-1]:
            return
        found: dict[str, Any] = (
            stage.store.read_json(COST_FILE) if stage.store.exists(COST_FILE) else {"phases": {}, "wall": 0.0}
        )
        phases = found["phases"]
        for label, each in _phase_stack[-1].items():
            for name, told in each.facts(label).items():
                phases[name] = _sum(phases[name], told) if name in phases else told
        wall = found["wall"] + time.monotonic() - began
        stage.store.write_json(COST_FILE, {"wall": round(wall, 3), "driver_mb": peak_mb(), "phases": phases})
    finally:
        _phase_stack.pop()


def _sum(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    added = {key: one[key] + two[key] for key in ("amount", "wall", "busy")}
    return {**two, **added, **{key: max(one[key], two[key]) for key in ("workers", "peak_mb")}}
