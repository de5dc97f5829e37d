"""What stages cost: each phase's seconds, workers and memory, kept in ``cost.json`` beside a stage's data.

Workers say with every result how long it took and what they hold; the driver adds the wall clock. ``plan`` works out
from these what a larger run will take. Ray-free.
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

NAME = "cost.json"
# The label of what workers load and compile before their first result, which does not grow.
START = "start"
# Later results per first one that tell what a result takes; units are not all of one size.
ENOUGH = 3
# What a result says: seconds, peak MB, which worker, and the seconds of separate phases.
Cost = tuple[float, int, str, dict[str, float]]


@dataclass
class Phase:
    """One progress line's worth of work, of one attempt or several.

    Attributes:
        amount: how many ``unit`` were counted.
        wall: seconds at the driver.
        busy: seconds of work of all workers together, without their start.
        seen: the workers that took part.
        peak_mb: the most that a worker held since it was started, MB.
        first: of these, seconds of each worker's first result. ``results``: how many there were.
        separate: of all seconds of work, those that are not in ``busy`` but phases of their own, by label.
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
        """Count what a worker said of a result, see ``paid``."""
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
        """For cost.json: this phase and those that were kept apart from it.

        What the workers' first results took more than the others, where there are enough of those to tell, is
        ``start`` too: something was loaded or compiled.
        """
        workers = max(1, len(self.seen))
        later = self.results - len(self.seen)
        told_apart = later >= ENOUGH * workers
        start = max(0.0, self.first - workers * (self.busy - self.first) / later) if told_apart else 0.0
        apart = dict(self.separate)
        if start:
            apart[START] = apart.get(START, 0.0) + start
        wall = max(0.0, self.wall - sum(apart.values()) / workers)

        def told(wall: float, busy: float) -> dict[str, Any]:
            seconds = {"wall": round(wall, 3), "busy": round(busy, 3)}
            return {"amount": self.amount, "unit": self.unit, **seconds, "workers": workers, "peak_mb": self.peak_mb}

        # Each worker has its own start, however many there are: seconds, but no work to share.
        others = {name: told(took / workers, 0.0 if name == START else took) for name, took in apart.items()}
        return {label: told(wall, self.busy - start), **others}


_open: list[dict[str, Phase]] = []  # a stage's phases by label; stages may be nested
_current = Phase()
_apart: defaultdict[str, float] = defaultdict(float)  # of the result that this worker is making


def record_separately(label: str, seconds: float) -> None:
    """In a worker: so many seconds of this result grow otherwise than the rest and are a phase of their own."""
    _apart[label] += seconds


def begun() -> float:
    """In a worker, before a result: the time (time.monotonic). What was kept apart of one that failed is forgotten."""
    _apart.clear()
    return time.monotonic()


def result_cost(began: float) -> Cost:
    """What a result cost this worker since it was ``begun``.

    Returns:
        Seconds, peak MB, which worker it is, and the seconds of separate phases, by label.
    """
    return time.monotonic() - began, peak_mb(), f"{socket.gethostname()}/{os.getpid()}", dict(_apart)


def add_result_cost(cost: Cost | None) -> None:
    """At the driver: a result has come with this cost."""
    if cost is not None:
        _current.add(cost)


@contextmanager
def phase(label: str, unit: str, amount: int) -> Iterator[None]:
    """A phase, whose results come within the block."""
    global _current
    before, began = _current, time.monotonic()
    _current = _open[-1].setdefault(label, Phase(unit=unit)) if _open else Phase()
    try:
        yield
        _current.amount += amount
    finally:
        _current.wall += time.monotonic() - began
        _current = before


@contextmanager
def costed(stage: Stage) -> Iterator[None]:
    """Keep what the phases within the block cost in the stage's ``cost.json``, added to earlier attempts'."""
    began = time.monotonic()
    _open.append({})
    try:
        yield
        if not _open[-1]:
            return
        found: dict[str, Any] = stage.store.read_json(NAME) if stage.store.exists(NAME) else {"phases": {}, "wall": 0.0}
        phases = found["phases"]
        for label, each in _open[-1].items():
            for name, told in each.facts(label).items():
                phases[name] = _sum(phases[name], told) if name in phases else told
        wall = found["wall"] + time.monotonic() - began
        stage.store.write_json(NAME, {"wall": round(wall, 3), "driver_mb": peak_mb(), "phases": phases})
    finally:
        _open.pop()


def _sum(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    added = {key: one[key] + two[key] for key in ("amount", "wall", "busy")}
    return {**two, **added, **{key: max(one[key], two[key]) for key in ("workers", "peak_mb")}}
