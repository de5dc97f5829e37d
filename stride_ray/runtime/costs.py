"""Cost accounting: seconds, workers and memory of each phase, in ``cost.json`` beside a stage's data.

Workers attach their time and peak memory to every result; the driver adds wall-clock time. ``plan`` extrapolates
larger runs from these records. They are written while results arrive, so that a killed attempt leaves one too. Does not
import Ray.
"""

import os
import socket
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.memory import peak_mb
from stride_ray.runtime.run import Stage

COST_FILE = "cost.json"
# Label of the time that workers spend loading and compiling before their first result. It does not grow with the data.
START = "start"
# Later results per worker needed to estimate the steady cost of a result; units differ in size.
MIN_LATER_RESULTS = 3
# While results arrive, records are written this often, and for no more than a twentieth of the time.
SAVE_SECONDS, SAVE_SHARE = 1.0, 20.0
# Cost of a result: seconds, peak MB, worker id ("host/pid"), and seconds of separate phases by label.
Cost = tuple[float, int, str, dict[str, float]]


@dataclass
class Phase:
    """The work behind one progress line of a stage.

    Attributes:
        total: items to process.
        amount: items processed so far.
        unit: what an item is, for example "blocks".
        wall: wall-clock seconds at the driver.
        busy: worker seconds, summed over workers, excluding ``separate``.
        peak_mb: largest peak memory of any worker since its start, MB.
        first: the part of ``busy`` spent on each worker's first result.
        results: number of results.
        seen: ids of the workers that took part.
        separate: worker seconds recorded as phases of their own, by label; not in ``busy``.
        since: time.monotonic() when the clock was started, if it runs; that time is not in ``wall`` yet.
    """

    total: int = 0
    amount: int = 0
    unit: str = ""
    wall: float = 0.0
    busy: float = 0.0
    peak_mb: int = 0
    first: float = 0.0
    results: int = 0
    seen: set[str] = field(default_factory=set)
    separate: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    since: float | None = None

    def resume(self) -> None:
        """Start the wall clock."""
        self.since = time.monotonic()

    def pause(self) -> None:
        """Add the time since ``resume`` to ``wall``."""
        now = time.monotonic()
        self.wall += now - self.since if self.since is not None else 0.0
        self.since = None

    def add(self, cost: Cost) -> None:
        """Add the cost of one result, as ``result_cost`` returns it."""
        seconds, peak, worker, separate = cost
        rest = seconds - sum(separate.values())
        self.busy += rest
        self.first += rest if worker not in self.seen else 0.0
        self.results += 1
        self.peak_mb = max(self.peak_mb, peak)
        self.seen.add(worker)
        for label, part in separate.items():
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
        separate = dict(self.separate)
        if start:
            separate[START] = separate.get(START, 0.0) + start
        wall = self.wall + (time.monotonic() - self.since if self.since is not None else 0.0)
        wall = max(0.0, wall - sum(separate.values()) / workers)

        def phase_record(wall: float, busy: float) -> dict[str, Any]:
            seconds = {"wall": round(wall, 3), "busy": round(busy, 3)}
            size = {"total": self.total, "amount": self.amount, "unit": self.unit}
            return {**size, **seconds, "workers": workers, "peak_mb": self.peak_mb}

        # Start-up takes each worker the same time however many there are, so it is wall time without shared work.
        others = {name: phase_record(took / workers, 0.0 if name == START else took) for name, took in separate.items()}
        return {label: phase_record(wall, self.busy - start), **others}


@dataclass
class _Attempt:
    """One attempt at a stage: its phases by label, to be added to the record of earlier attempts."""

    stage: Stage
    phases: dict[str, Phase] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    earlier: dict[str, Any] | None = None
    next_save: float = 0.0

    def save(self, finished: bool = False) -> None:
        """Write ``cost.json``: the earlier attempts plus this one so far."""
        started, store = time.monotonic(), self.stage.store
        if self.earlier is None:
            nothing: dict[str, Any] = {"phases": {}, "wall": 0.0, "finished": True}
            self.earlier = store.read_json(COST_FILE) if store.exists(COST_FILE) else nothing
        phases = dict(self.earlier["phases"])
        for label, each in self.phases.items():
            for name, facts in each.facts(label).items():
                if name in phases:
                    whole = self.earlier.get("finished", True)
                    facts = _merge_records(
                        phases[name], facts, kept=1.0 if whole else _reusable_share(phases[name], facts)
                    )
                phases[name] = facts
        wall = round(self.earlier["wall"] + started - self.began, 3)
        record = {"wall": wall, "driver_mb": peak_mb(), "finished": finished, "phases": phases}
        store.write_json(COST_FILE, record)
        took = time.monotonic() - started
        self.next_save = time.monotonic() + max(SAVE_SECONDS, SAVE_SHARE * took)

    def save_if_due(self) -> None:
        """Save if the interval has passed; a storage failure must not abort the stage over its cost record."""
        if time.monotonic() >= self.next_save:
            with suppress(StrideError):
                self.save()


_attempts: list[_Attempt] = []  # one for each enclosing ``record_stage_costs`` block
_current = Phase()
_separate_seconds: defaultdict[str, float] = defaultdict(
    float
)  # separate seconds of the result in progress in this worker


def record_separately(label: str, seconds: float) -> None:
    """In a worker: record seconds of the current result as a separate phase, because they scale differently."""
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
        if _attempts:
            _attempts[-1].save_if_due()


@contextmanager
def phase(label: str, unit: str, total: int) -> Iterator[Phase]:
    """Attribute the results that arrive within the block to one phase of the enclosing attempt, if any.

    Of the ``total`` items to process, the block adds to the phase's ``amount`` those that its results stand for.
    """
    global _current
    before = _current
    _current = _attempts[-1].phases.setdefault(label, Phase(unit=unit)) if _attempts else Phase()
    _current.total += total
    _current.resume()
    try:
        yield _current
    finally:
        _current.pause()
        _current = before


@contextmanager
def record_stage_costs(stage: Stage) -> Iterator[None]:
    """Add the cost of the phases within the block to the stage's ``cost.json``.

    The cost of a failed or interrupted attempt is recorded too, since the next one reuses its finished units.
    """
    _attempts.append(attempt := _Attempt(stage))
    try:
        yield
        if attempt.phases:
            attempt.save(finished=True)
    except BaseException:
        if any(each.results for each in attempt.phases.values()):
            with suppress(StrideError):
                attempt.save()
        raise
    finally:
        _attempts.pop()


def _reusable_share(interrupted: dict[str, Any], now: dict[str, Any]) -> float:
    """Return the share of an interrupted attempt's results that the next attempt reuses, judging by its total.

    Example: of 100 blocks, 60 are scored before a kill. If the next attempt has 40 left to do, the cost of the 60
    counts (share 1); if it starts over with 100, that work was lost (share 0).
    """
    left = interrupted["total"] - interrupted["amount"]
    again = max(0, now["total"] - left)
    return max(0.0, 1 - again / interrupted["amount"]) if interrupted["amount"] else 0.0


def _merge_records(one: dict[str, Any], two: dict[str, Any], kept: float) -> dict[str, Any]:
    """Merge the records of two attempts; of the first, the share ``kept`` (0 to 1) counts."""
    added = {key: round(kept * one[key] + two[key], 3) for key in ("wall", "busy")}
    amount = round(kept * one["amount"]) + two["amount"]
    most = {key: max(one[key], two[key]) for key in ("workers", "peak_mb")}
    return {**two, "total": amount + two["total"] - two["amount"], "amount": amount, **added, **most}
