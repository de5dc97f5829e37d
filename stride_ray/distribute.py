"""Ray, in one place: connecting, checking that a request can ever be met, and mapping a worker over units of work.

Stages hand over a plain callable class and a list of units; here it becomes a Ray Data pipeline, a pool of actors
or a stream of tasks. Units in flight are bounded, killed workers are replaced and their units redone, and results
come back in whatever order they finish: nothing that a stage writes depends on it.
"""

import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
from ray._private import state as ray_state
from tqdm import tqdm

from stride_ray.config import ComputeConfig
from stride_ray.errors import StrideError
from stride_ray.storage import first_line

RETRIES = 5
Unit = Any
Worker = Callable[[Unit], dict[str, Any]]


@dataclass(frozen=True)
class Pool:
    """What a stage may use: a number of workers with one CPU each, and a GPU each on ``cuda``."""

    workers: int
    device: str

    @property
    def options(self) -> dict[str, float]:
        """Ray's resource request of one worker."""
        return {"num_cpus": 1, "num_gpus": 1 if self.device == "cuda" else 0}


@contextmanager
def connected(compute: ComputeConfig) -> Iterator[None]:
    """A connection to Ray: the one that is open already, the address's, or a local Ray that ends with the block.

    Raises:
        StrideError: within seconds, for an address where nothing answers.
    """
    if ray.is_initialized():
        yield
        return
    address = compute.address or os.environ.get("RAY_ADDRESS", "")
    try:
        if address and address not in ("auto", "local"):
            _check_answers(address)
        ray.init(address=address or "local", include_dashboard=None if address else False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise StrideError(f"No Ray at address {address!r}: {first_line(error)}; start one or leave it out.") from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Ray itself keeps trying for minutes; a plain connection tells within seconds."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise StrideError(
            f"No Ray answers at address {address!r} ({error}); start one there ('ray start --head'), or leave the "
            "address out to run locally."
        ) from None


def pool(compute: ComputeConfig, units: int) -> Pool:
    """The workers that a stage with ``units`` pieces of work gets.

    Raises:
        StrideError: for more workers or GPUs than the cluster has or can scale to, saying both numbers.
    """
    have = ray.cluster_resources()
    limit = ray_state.state.get_max_resources_from_cluster_config() or {}
    most = {kind: max(have.get(kind, 0), limit.get(kind, 0)) for kind in ("CPU", "GPU")}
    device = compute.device
    if device == "auto":
        device = "cuda" if most["GPU"] >= 1 else "cpu"
    kind = "GPU" if device.startswith("cuda") else "CPU"
    asked = compute.workers or max(1, int(most[kind]))
    if asked > most[kind]:
        raise StrideError(
            f"compute asks for {asked} worker(s) with a {kind} each; the Ray cluster has {have.get(kind, 0):g} {kind}s "
            f"and can scale to {most[kind]:g}: lower compute.workers, change compute.device or add nodes."
        )
    return Pool(max(1, min(asked, units)), "cuda" if kind == "GPU" else "cpu")


class _Actor:
    """Makes the stage's worker once, on its first unit, and applies it to units.

    Not in the constructor: Ray turns what a constructor raises into an actor's death without its cause.
    """

    def __init__(self, make: Callable[..., Worker], arguments: tuple[Any, ...]) -> None:
        one_thread()
        self.make, self.arguments = make, arguments
        self.worker: Worker | None = None

    def work(self, unit: Unit) -> dict[str, Any]:
        self.worker = self.worker or self.make(*self.arguments)
        assert self.worker is not None
        return self.worker(unit)


def one_thread() -> None:
    """Floating-point sums depend on the number of threads, so every worker has one, wherever it runs."""
    import torch

    torch.set_num_threads(1)


def map_actors(
    make: Callable[..., Worker], arguments: tuple[Any, ...], units: Sequence[Unit], pool: Pool
) -> Iterator[dict[str, Any]]:
    """Apply ``make(*arguments)`` to every unit in a pool of actors that each make it once.

    Raises:
        StrideError: the worker's own, or that a unit killed its workers again and again.
    """
    options = {**pool.options, "max_restarts": RETRIES * len(units), "max_task_retries": RETRIES}
    actor: Any = ray.remote(_Actor)
    actors = [actor.options(**options).remote(make, arguments) for _ in range(pool.workers)]
    waiting, running = list(reversed(units)), dict[Any, Any]()
    try:
        # Two units an actor: the next one is there when the first is done.
        for each in [*actors, *actors]:
            if waiting:
                running[each.work.remote(waiting.pop())] = each
        while running:
            for reference in _ready(running):
                each = running.pop(reference)
                yield _result(reference)
                if waiting:
                    running[each.work.remote(waiting.pop())] = each
    finally:
        for each in actors:
            ray.kill(each)


def map_tasks(
    function: Callable[..., dict[str, Any]], arguments: tuple[Any, ...], units: Sequence[Unit], pool: Pool
) -> Iterator[dict[str, Any]]:
    """Apply ``function(*arguments, unit)`` to every unit as Ray tasks, two per worker in flight.

    Raises:
        StrideError: the function's own, or that a unit killed its workers again and again.
    """
    task: Any = ray.remote(_task).options(**pool.options, max_retries=RETRIES)
    waiting, running = list(reversed(units)), dict[Any, Any]()
    while waiting or running:
        while waiting and len(running) < 2 * pool.workers:
            running[task.remote(function, arguments, waiting.pop())] = None
        for reference in _ready(running):
            del running[reference]
            yield _result(reference)


def _task(function: Callable[..., dict[str, Any]], arguments: tuple[Any, ...], unit: Unit) -> dict[str, Any]:
    one_thread()
    return function(*arguments, unit)


def map_dataset(
    make: Callable[..., Worker], arguments: tuple[Any, ...], units: Sequence[dict[str, Any]], pool: Pool
) -> Iterator[dict[str, Any]]:
    """Apply ``make(*arguments)`` to every unit as a Ray Data pipeline; a unit and a result are JSON-like dicts.

    Raises:
        StrideError: the worker's own.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = ray.data.from_items([{"unit": json.dumps(unit)} for unit in units], override_num_blocks=len(units))
    row: Any = _Row
    results = rows.map(
        row,
        fn_constructor_args=(make, arguments),
        compute=ray.data.ActorPoolStrategy(size=pool.workers),
        num_cpus=pool.options["num_cpus"],
    )
    try:
        for row in results.iter_rows():
            yield json.loads(row["result"])
    except ray.exceptions.RayError as error:
        raise _told(error) from None


class _Row(_Actor):
    """The row form of a worker, as Ray Data wants it; JSON, since Arrow would unify the dicts' fields."""

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"result": json.dumps(self.work(json.loads(row["unit"])))}


def _ready(running: dict[Any, Any]) -> list[Any]:
    """Block until something is done; say so where nothing moves for a minute (a cluster that is scaling up)."""
    since = time.monotonic()
    while True:
        ready, _ = ray.wait(list(running), num_returns=1, timeout=60)
        if ready:
            return ready
        free = ray.available_resources()
        tqdm.write(
            f"still waiting after {time.monotonic() - since:.0f} s: {len(running)} unit(s) submitted; free in the "
            f"cluster: {free.get('CPU', 0):g} CPUs, {free.get('GPU', 0):g} GPUs",
            file=sys.stderr,
        )


def _result(reference: Any) -> dict[str, Any]:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        raise _told(error) from None


def _told(error: BaseException) -> BaseException:
    """The sentence inside Ray's error, where a worker raised one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, StrideError):
            return StrideError(str(cause))
        cause = getattr(cause, "cause", None) or cause.__cause__
    if isinstance(error, (ray.exceptions.ActorDiedError, ray.exceptions.WorkerCrashedError)):
        return StrideError(
            f"A unit of work killed its worker {RETRIES} times and more (out of memory?); lower "
            f"compute.batch_tokens or compute.workers and run the same command again: what is done is kept. "
            f"Ray says: {first_line(error)}"
        )
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return StrideError(f"Ray killed workers for lack of memory; lower compute.workers. {first_line(error)}")
    return error


def progress(
    results: Iterable[dict[str, Any]], label: str, total: int, unit: str, count: Callable[[dict[str, Any]], int]
) -> list[dict[str, Any]]:
    """Collect results under a progress line: what, how far, how fast, how long still.

    Args:
        results: as the mapping functions yield them.
        label: the stage.
        total: the count that means finished.
        unit: what is counted.
        count: how many of them a result stands for.
    """
    interval = 0.5 if sys.stderr.isatty() else 5.0
    collected = []
    with tqdm(total=total, desc=label, unit=f" {unit}", mininterval=interval, file=sys.stderr, smoothing=0.1) as bar:
        for result in results:
            collected.append(result)
            bar.update(count(result))
    return collected
