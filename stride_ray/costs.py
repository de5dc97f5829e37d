"""What stages cost: each phase's seconds, workers and memory, kept in ``cost.json`` beside a stage's data.

Workers say with every result how long it took and what they hold; the driver adds the wall clock. ``plan`` works out
from these what a larger run will take. Ray-free.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from stride_ray.memory import peak_mb
from stride_ray.run import Stage

NAME = "cost.json"


@dataclass
class Phase:
    """One progress line's worth of work, of one attempt or several.

    Attributes:
        amount: how many ``unit`` were counted.
        wall: seconds at the driver.
        busy: seconds of work of all workers together, without their start.
        workers: how many took part.
        peak_mb: the most that a worker held since it was started, MB.
    """

    amount: int = 0
    unit: str = ""
    wall: float = 0.0
    busy: float = 0.0
    workers: int = 0
    peak_mb: int = 0
    seen: set[str] = field(default_factory=set, repr=False)

    def add(self, cost: tuple[float, int, str]) -> None:
        """Count what a worker said of a result, see ``paid``."""
        seconds, peak, worker = cost
        self.busy += seconds
        self.peak_mb = max(self.peak_mb, peak)
        self.seen.add(worker)

    def facts(self) -> dict[str, Any]:
        """For cost.json."""
        found = asdict(self)
        found.pop("seen")
        return {**found, "wall": round(self.wall, 3), "busy": round(self.busy, 3), "workers": max(1, len(self.seen))}


_open: list[dict[str, Phase]] = []  # a stage's phases by label; stages may be nested
_current = Phase()


def paid(began: float) -> tuple[float, int, str]:
    """What a result cost this worker since ``began`` (time.monotonic): seconds, peak MB, and which worker it is."""
    return time.monotonic() - began, peak_mb(), f"{socket.gethostname()}/{os.getpid()}"


def noted(cost: tuple[float, int, str] | None) -> None:
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
        phases = {label: each.facts() for label, each in _open[-1].items()}
        if not phases:
            return
        earlier: dict[str, Any] = (
            stage.store.read_json(NAME) if stage.store.exists(NAME) else {"phases": {}, "wall": 0.0}
        )
        for label, old in earlier["phases"].items():
            phases[label] = _sum(old, phases[label]) if label in phases else old
        wall = earlier["wall"] + time.monotonic() - began
        stage.store.write_json(NAME, {"wall": round(wall, 3), "driver_mb": peak_mb(), "phases": phases})
    finally:
        _open.pop()


def _sum(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    added = {key: one[key] + two[key] for key in ("amount", "wall", "busy")}
    return {**two, **added, **{key: max(one[key], two[key]) for key in ("workers", "peak_mb")}}
