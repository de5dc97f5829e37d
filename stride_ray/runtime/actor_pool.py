"""An actor pool with speculative execution: idle actors re-execute the units of slow or dead ones.

A unit may run twice. This is safe: both runs publish whole files with identical bytes, and only the first result
counts.

Example: units 0 to 3 on actors A and B. A's node dies while A holds 0 and 2. B finishes 1 and 3 and becomes idle; after
PATIENCE seconds without a result it gets 0 and then 2. Late results from A, once Ray has restarted it, are ignored.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
import ray.exceptions
from ray._private import state as ray_state

from stride_ray.runtime.config import Config
from stride_ray.runtime.memory import expected_gb, release_freed_memory
from stride_ray.runtime.progress import count_unavailable_call
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
    result_of,
    wait_for_result,
)

# Units submitted to an actor at a time: one running and one queued, so that it never waits for the driver.
QUEUED_PER_ACTOR = 2
# A map without a result for this many times its longest unit is stalled: idle actors get units that others hold.
STRAGGLER_FACTOR = 3
# Seconds before a call to an unreachable actor is repeated.
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
    """State of one map over units.

    Attributes:
        waiting: indices of units that no actor holds; the next one is last.
        unfinished: indices of units without a result.
        last_result_at: time.monotonic() of the last result.
        longest_seconds: largest time from submitting a unit to its result.
        restarts_at_last_result: restart counts of the actors that became unreachable since the last result.
    """

    waiting: list[int]
    unfinished: set[int]
    last_result_at: float = field(default_factory=time.monotonic)
    longest_seconds: float = 0.0
    restarts_at_last_result: dict[Any, int] = field(default_factory=dict)

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
    """Actors that live for a ``with`` block and serve one or several maps over units of work.

    Actors outlive a map, so what a process caches (the model, see ``loading.load_run_model``) is there for the next
    map. Ray restarts an actor whose node is lost wherever there is room. Meanwhile, or if an actor is far slower than
    the others, idle actors re-execute its units: after PATIENCE seconds, or STRAGGLER_FACTOR times the longest unit,
    whichever is longer, without a result.
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
        """Apply the worker ``make(*arguments)`` to every unit; each actor constructs it once per map.

        Yields results in order of completion.

        Raises:
            StrideError: from the worker, or because a unit repeatedly killed its worker.
        """
        self._maps += 1
        job = ray.put((make, arguments))
        progress = _Progress(list(reversed(range(len(units)))), set(range(len(units))))
        while progress.unfinished:
            self._submit(job, units, progress)
            for reference in wait_for_result(list(self._in_flight), progress.last_result_at):
                call = self._in_flight.pop(reference)
                if call.map_number != self._maps or call.unit_index not in progress.unfinished:
                    continue  # from an earlier map, or another actor was faster
                try:
                    result = result_of(reference)
                except ray.exceptions.ActorUnavailableError:
                    self._retry(call, progress)
                    continue
                progress.finish(call)
                yield result

    def map_function(
        self, function: Callable[..., dict[str, Any]], arguments: tuple[Any, ...], units: Sequence[Unit]
    ) -> Iterator[dict[str, Any]]:
        """Apply ``function(*arguments, unit)`` to every unit, as ``map`` does a worker."""
        return self.map(partial, (function, *arguments), units)

    def _submit(self, job: Any, units: Sequence[Unit], progress: _Progress) -> None:
        """Fill the queue of every actor; in a stall, give every idle actor a unit that others hold."""
        stalled = progress.stalled
        held = Counter(call.actor for call in self._in_flight.values())
        for actor in self._actors:
            while (progress.waiting and held[actor] < QUEUED_PER_ACTOR) or (stalled and not held[actor]):
                index = progress.waiting.pop() if progress.waiting else self._least_replicated(progress.unfinished)
                reference = actor.work.remote(self._maps, job, units[index])
                self._in_flight[reference] = _Call(actor, index, self._maps, time.monotonic())
                held[actor] += 1

    def _least_replicated(self, unfinished: set[int]) -> int:
        """The unfinished unit held by the fewest actors."""
        held = [call.unit_index for call in self._in_flight.values() if call.map_number == self._maps]
        return min(unfinished, key=lambda index: (held.count(index), index))

    def _retry(self, call: _Call, progress: _Progress) -> None:
        """Resubmit a unit whose actor is unreachable: usually its node is lost and Ray has not noticed yet.

        If Ray has restarted the actor more than RETRIES times since the last result, the unit itself is killing it.
        """
        # Ray's public state API needs the dashboard, which a local Ray is started without.
        restarts = ray_state.actors(call.actor._actor_id.hex())["NumRestarts"]
        if restarts - progress.restarts_at_last_result.setdefault(call.actor, restarts) > RETRIES:
            raise lethal_unit_error(f"Ray restarted the worker {restarts} times.") from None
        progress.waiting.append(call.unit_index)
        count_unavailable_call()
        time.sleep(RETRY_SECONDS)


class _PoolActor:
    """An actor of a pool; holds the worker of the current map."""

    def __init__(self, folder: str) -> None:
        prepare_process(folder)
        self.map_number = 0
        self.worker: Worker | None = None

    def work(self, map_number: int, job: tuple[Callable[..., Worker], tuple[Any, ...]], unit: Unit) -> dict[str, Any]:
        if map_number != self.map_number or self.worker is None:
            self.worker = None  # free the previous map's worker first: two models may not fit
            release_freed_memory()
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
    """Yield the enclosing block's actor pool or, without one, connect to Ray and yield a new pool for ``units`` units.

    Stages within one block share worker processes, which take seconds to start and to load a model. With an enclosing
    block, the arguments are ignored.

    Raises:
        StrideError: see ``connected`` and ``allocate_workers``.
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
    """Apply ``make(*arguments)`` to every unit in a new actor pool; see ``ActorPool.map``."""
    with ActorPool(allocation) as actors:
        yield from actors.map(make, arguments, units)
