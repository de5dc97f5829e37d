"""A pool of actors that works through units: units of a dead or slow actor go to one that has nothing to do.

A unit may thus be done twice. That is no harm: what it publishes has the same bytes, whole files at a time, and the
first result counts.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import ray.exceptions
from ray._private import state as ray_state

from stride_ray.runtime import metrics
from stride_ray.runtime.config import Config
from stride_ray.runtime.tasks import (
    PATIENCE,
    RETRIES,
    Pool,
    Unit,
    Worker,
    connected,
    killed,
    pool,
    ready_of,
    result_of,
    settle,
    wrapped,
)

# Units an actor holds: the next one is there when the first is done.
HELD = 2
# How many times longer than the longest unit so far nothing may happen, until units are given out twice.
SLOW = 3
# Seconds until a call is made again that an actor could not be reached for.
BREATH = 1.0


class Crew:
    """A pool of actors for the length of a ``with`` block, for one or several maps over units of work.

    Actors outlive a map, so that what a process keeps (the model, see ``loading.load_run_model``) serves the next one.
    An actor whose node is lost comes back where there is room. Until then, and where one is far slower than the
    others, those that have nothing to do get its units too: after PATIENCE seconds, or SLOW times what the longest
    unit took, without a result.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool, self.device = pool, pool.device
        self._calls: dict[Any, list[Any]] = {}  # actor to the calls that it has not answered
        self._maps = 0

    def __enter__(self) -> "Crew":
        options = {**self.pool.options, "max_restarts": -1, "max_task_retries": RETRIES}
        member: Any = ray.remote(_Member)
        self._calls = {member.options(**options).remote(os.getcwd()): [] for _ in range(self.pool.workers)}
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._calls:
            ray.kill(each)

    def map(
        self, make: Callable[..., Worker], arguments: tuple[Any, ...], units: Sequence[Unit]
    ) -> Iterator[dict[str, Any]]:
        """Apply ``make(*arguments)`` to every unit; each actor that gets one makes it once.

        Raises:
            StrideError: the worker's own, or that a unit killed its workers again and again.
        """
        self._maps += 1
        what = (self._maps, ray.put((make, arguments)))
        waiting = list(reversed(range(len(units))))
        running: dict[Any, int] = {}  # a call to its unit's place
        left = set(waiting)
        given: dict[Any, float] = {}
        lives: dict[Any, int] = {}  # of actors that could not be reached since the last result
        since, longest = time.monotonic(), 0.0
        while left:
            stalled = time.monotonic() - since >= max(PATIENCE, SLOW * longest)
            for actor, calls in self._calls.items():
                while (waiting and len(calls) < HELD) or (stalled and not calls and left):
                    at = waiting.pop() if waiting else _rarest(running, left)
                    calls.append(actor.work.remote(*what, units[at]))
                    running[calls[-1]], given[calls[-1]] = at, time.monotonic()
            for call in ready_of([each for calls in self._calls.values() for each in calls], since):
                actor = next(actor for actor, calls in self._calls.items() if call in calls)
                self._calls[actor].remove(call)
                at = running.pop(call, -1)  # -1: an earlier map's, which another actor had answered
                if at not in left:
                    continue
                try:
                    result = result_of(call)
                except ray.exceptions.ActorUnavailableError:
                    # Its node is lost, and Ray does not know that yet: no fault of the unit's. But where its process
                    # has come up again and again and nothing is ever done, the unit is what kills it.
                    restarts = ray_state.actors(actor._actor_id.hex())["NumRestarts"]
                    if restarts - lives.setdefault(actor, restarts) > RETRIES:
                        raise killed(f"Ray started the worker again {restarts} times") from None
                    waiting.append(at)
                    metrics.refused()
                    time.sleep(BREATH)
                    continue
                since, lives = time.monotonic(), {}
                longest = max(longest, since - given[call])
                left.remove(at)
                yield result


def _rarest(running: dict[Any, int], left: set[int]) -> int:
    """Of the units without a result, the one that the fewest actors have."""
    held = list(running.values())
    return min(left, key=lambda at: (held.count(at), at))


class _Member:
    """An actor of a crew: holds the worker of the map that it is in."""

    def __init__(self, folder: str) -> None:
        settle(folder)
        self.map = 0
        self.worker: Worker | None = None

    def work(self, number: int, what: tuple[Callable[..., Worker], tuple[Any, ...]], unit: Unit) -> dict[str, Any]:
        if number != self.map or self.worker is None:
            self.worker = None  # let go of the last map's before the next one's memory is asked for
            made = wrapped(self._make, *what)
            if self.worker is None:
                return made  # the sentence that says why not
            self.map = number
        return wrapped(self.worker, unit)

    def _make(self, make: Callable[..., Worker], arguments: tuple[Any, ...]) -> dict[str, Any]:
        self.worker = make(*arguments)
        return {}


_open: list[Crew] = []  # the crew of the block that is being executed, if there is one


@contextmanager
def crew_for(config: Config, units: int) -> Iterator[Crew]:
    """Ray and a crew for ``units`` pieces of work: those of the block around this one, where it has them, or new ones.

    Stages that follow each other within a block thus share processes, which take seconds to start and load a model.

    Raises:
        StrideError: as connected and pool.
    """
    if _open:
        yield _open[-1]
        return
    with connected(config.compute), Crew(pool(config.compute, units, expected_gb(config))) as crew:
        _open.append(crew)
        try:
            yield crew
        finally:
            _open.pop()


def map_actors(
    make: Callable[..., Worker], arguments: tuple[Any, ...], units: Sequence[Unit], pool: Pool
) -> Iterator[dict[str, Any]]:
    """Apply ``make(*arguments)`` to every unit in a pool of actors of its own, see ``Crew.map``."""
    with Crew(pool) as crew:
        yield from crew.map(make, arguments, units)


# A small model's files, bytes, and what a worker with one takes, GB.
SMALL, SMALL_GB = 2**26, 1.5


def expected_gb(config: Config) -> float:
    """What a worker is expected to take, for how many there may be: ``compute.worker_gb``, less with a small model."""
    path = config.model.path
    files = [entry for entry in os.scandir(path) if entry.is_file()] if os.path.isdir(path) else []
    small = bool(files) and sum(entry.stat().st_size for entry in files) < SMALL
    return min(SMALL_GB, config.compute.worker_gb) if small else config.compute.worker_gb
