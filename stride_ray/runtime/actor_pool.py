"""An actor pool with speculative execution: idle actors re-execute the units of slow or dead ones.

A unit may run twice. That is safe: what it publishes has the same bytes, whole files at a time, and the first result
counts.

Example: units 0 to 3 on actors A and B; A holds 0 and 2 when its node dies. B does 1 and 3, has nothing left to do, and
after PATIENCE seconds without a result gets 0 and then 2. When Ray brings A back, whatever it still answers is ignored.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.exceptions
from ray._private import state as ray_state

from stride_ray.runtime import metrics
from stride_ray.runtime.config import Config
from stride_ray.runtime.memory import expected_gb
from stride_ray.runtime.tasks import (
    PATIENCE,
    RETRIES,
    Unit,
    Worker,
    WorkerAllocation,
    allocate_workers,
    capture_errors,
    connected,
    lethal_unit_error,
    prepare_process,
    ready_of,
    result_of,
)

# Units that an actor holds: the next one is there when the first is done.
QUEUED_PER_ACTOR = 2
# After this many times the longest unit's time without a result, idle actors get units that others hold.
STRAGGLER_FACTOR = 3
# Seconds until a call is made again for which the actor could not be reached.
RETRY_SECONDS = 1.0


@dataclass(frozen=True)
class _Call:
    """A unit submitted to an actor."""

    actor: Any
    unit_index: int
    map_number: int
    submitted_at: float


@dataclass
class _Progress:
    """What a map knows: units that wait, units without a result, and when the last result came."""

    waiting: list[int]
    unfinished: set[int]
    last_result_at: float = field(default_factory=time.monotonic)
    longest_seconds: float = 0.0
    restarts_at_last_result: dict[Any, int] = field(default_factory=dict)  # of actors that could not be reached since

    @property
    def stalled(self) -> bool:
        patience = max(PATIENCE, STRAGGLER_FACTOR * self.longest_seconds)
        return time.monotonic() - self.last_result_at >= patience

    def finish(self, call: _Call) -> None:
        self.last_result_at = time.monotonic()
        self.restarts_at_last_result = {}
        self.longest_seconds = max(self.longest_seconds, self.last_result_at - call.submitted_at)
        self.unfinished.remove(call.unit_index)


class ActorPool:
    """Actors for the length of a ``with`` block, for one or several maps over units of work.

    Actors outlive a map, so that what a process keeps (the model, see ``loading.load_run_model``) serves the next one.
    An actor whose node is lost comes back where there is room. Until then, and where one is far slower than the
    others, idle actors get its units too: after PATIENCE seconds, or STRAGGLER_FACTOR times what the longest unit took,
    without a result.
    """

    def __init__(self, allocation: WorkerAllocation) -> None:
        self.allocation, self.device = allocation, allocation.device
        self._actors: list[Any] = []
        self._in_flight: dict[Any, _Call] = {}
        self._maps = 0

    def __enter__(self) -> "ActorPool":
        options = {**self.allocation.options, "max_restarts": -1, "max_task_retries": RETRIES}
        actor: Any = ray.remote(_PoolActor)
        self._actors = [actor.options(**options).remote(os.getcwd()) for _ in range(self.allocation.workers)]
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            ray.kill(actor)

    def map(
        self, make: Callable[..., Worker], arguments: tuple[Any, ...], units: Sequence[Unit]
    ) -> Iterator[dict[str, Any]]:
        """Apply ``make(*arguments)`` to every unit; each actor that gets one makes it once.

        Raises:
            StrideError: the worker's own, or that a unit killed its workers again and again.
        """
        self._maps += 1
        job = ray.put((make, arguments))
        progress = _Progress(list(reversed(range(len(units)))), set(range(len(units))))
        while progress.unfinished:
            self._submit(job, units, progress)
            for reference in ready_of(list(self._in_flight), progress.last_result_at):
                call = self._in_flight.pop(reference)
                if call.map_number != self._maps or call.unit_index not in progress.unfinished:
                    continue  # an earlier map's, or another actor was faster
                try:
                    result = result_of(reference)
                except ray.exceptions.ActorUnavailableError:
                    self._retry(call, progress)
                    continue
                progress.finish(call)
                yield result

    def _submit(self, job: Any, units: Sequence[Unit], progress: _Progress) -> None:
        """Give every actor with room the next unit; in a stall, every idle one a unit that others hold."""
        stalled = progress.stalled
        for actor in self._actors:
            held = sum(call.actor is actor for call in self._in_flight.values())
            while (progress.waiting and held < QUEUED_PER_ACTOR) or (stalled and not held and progress.unfinished):
                index = progress.waiting.pop() if progress.waiting else self._least_replicated(progress.unfinished)
                reference = actor.work.remote(self._maps, job, units[index])
                self._in_flight[reference] = _Call(actor, index, self._maps, time.monotonic())
                held += 1

    def _least_replicated(self, unfinished: set[int]) -> int:
        """Of the units without a result, the one that the fewest actors hold."""
        held = [call.unit_index for call in self._in_flight.values() if call.map_number == self._maps]
        return min(unfinished, key=lambda index: (held.count(index), index))

    def _retry(self, call: _Call, progress: _Progress) -> None:
        """Its node is lost and Ray has not noticed yet: try again, the unit is not to blame.

        But where the actor's process was started more than RETRIES times without a single result, the unit kills it.
        """
        # Ray's public state API asks the dashboard, which a local Ray is started without.
        restarts = ray_state.actors(call.actor._actor_id.hex())["NumRestarts"]
        if restarts - progress.restarts_at_last_result.setdefault(call.actor, restarts) > RETRIES:
            raise lethal_unit_error(f"Ray started the worker again {restarts} times") from None
        progress.waiting.append(call.unit_index)
        metrics.count_unavailable_call()
        time.sleep(RETRY_SECONDS)


class _PoolActor:
    """An actor of a pool: holds the worker of the map that it is in."""

    def __init__(self, folder: str) -> None:
        prepare_process(folder)
        self.map_number = 0
        self.worker: Worker | None = None

    def work(self, map_number: int, job: tuple[Callable[..., Worker], tuple[Any, ...]], unit: Unit) -> dict[str, Any]:
        if map_number != self.map_number or self.worker is None:
            self.worker = None  # frees the last map's first: two models may not fit
            outcome = capture_errors(self._make_worker, *job)
            if self.worker is None:
                return outcome  # the error
            self.map_number = map_number
        return capture_errors(self.worker, unit)

    def _make_worker(self, make: Callable[..., Worker], arguments: tuple[Any, ...]) -> dict[str, Any]:
        self.worker = make(*arguments)
        return {}


_open: list[ActorPool] = []  # the pool of the enclosing ``shared_actor_pool`` block


@contextmanager
def shared_actor_pool(config: Config, units: int) -> Iterator[ActorPool]:
    """The enclosing block's actor pool, whatever the arguments; if there is none, Ray and a pool for ``units`` units.

    Stages that follow each other within a block thus share processes, which take seconds to start and load a model.

    Raises:
        StrideError: as connected and allocate_workers.
    """
    if _open:
        yield _open[-1]
        return
    with (
        connected(config.compute),
        ActorPool(allocate_workers(config.compute, units, expected_gb(config))) as actors,
    ):
        _open.append(actors)
        try:
            yield actors
        finally:
            _open.pop()


def map_actors(
    make: Callable[..., Worker], arguments: tuple[Any, ...], units: Sequence[Unit], allocation: WorkerAllocation
) -> Iterator[dict[str, Any]]:
    """Apply ``make(*arguments)`` to every unit in an actor pool of its own, see ``ActorPool.map``."""
    with ActorPool(allocation) as actors:
        yield from actors.map(make, arguments, units)
