"""Ray, in one place: connecting, checking that a request can ever be met, and mapping a worker over units of work.

Stages hand over a plain callable class and a list of units; here it becomes a Ray Data pipeline, a pool of actors
or a stream of tasks. Units in flight are bounded, killed workers are replaced and their units redone, and results
come back in whatever order they finish: nothing that a stage writes depends on it.
"""

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import ray
import ray.exceptions
from ray._private import state as ray_state
from ray._private.grpc_utils import init_grpc_channel
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put
from tqdm import tqdm

from stride_ray.runtime import costs, metrics
from stride_ray.runtime.errors import StrideError, Terminated
from stride_ray.runtime.memory import keep_freed
from stride_ray.runtime.options import ComputeConfig
from stride_ray.runtime.urls import first_line

RETRIES = 5
# Seconds without any result, until that is said.
PATIENCE = 60.0
# Where in Ray's store of keys and values ours are.
NAMESPACE = "stride_ray"
# Keys of a result: a StrideError's sentence; what the result cost its worker.
_SENTENCE, _COST = "stride_error", "stride_cost"
Unit = Any
Worker = Callable[[Unit], dict[str, Any]]


@dataclass(frozen=True)
class WorkerAllocation:
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
    stop = signal.getsignal(signal.SIGTERM)
    try:
        if address and address not in ("auto", "local"):
            _check_answers(address)
        ray.init(address=address or "local", include_dashboard=None if address else False, logging_level=logging.ERROR)
    except SystemExit:  # what Ray makes of SIGTERM while it starts
        raise Terminated from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise StrideError(f"No Ray at address {address!r}: {first_line(error)}; start one or leave it out.") from None
    except Exception as error:
        if type(error) is not Exception:  # Ray's own about a start that took too long is of no class of its own
            raise
        raise StrideError(f"Ray did not start here ({first_line(error)}); run the same command again.") from None
    # Ray's own way to be stopped leaves its native calls by an abort; the command line's (cli/exits.py) does not.
    if callable(stop) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Ray itself keeps trying for minutes; a connection of our own tells within seconds."""
    place = address.removeprefix("ray://")
    host, _, port = place.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        # Something listens: does it speak gRPC, as Ray does?
        with init_grpc_channel(place) as channel:
            grpc.channel_ready_future(channel).result(timeout=10)
    except (OSError, ValueError, grpc.FutureTimeoutError) as error:
        told = {grpc.FutureTimeoutError: "what listens there is no Ray", ValueError: "an address is host:port"}
        why = told.get(type(error), error)
        raise StrideError(
            f"No Ray answers at address {address!r} ({why}); start one there ('ray start --head'), or leave the "
            "address out to run locally."
        ) from None


def allocate_workers(compute: ComputeConfig, units: int, worker_gb: float = 0.0) -> WorkerAllocation:
    """The workers that a stage with ``units`` pieces of work gets.

    Where their number is left open there are no more than the cluster's memory holds at ``worker_gb`` each; that
    changes no result.

    Raises:
        StrideError: for more workers or GPUs than the cluster has or can scale to, saying both numbers.
    """
    have = ray.cluster_resources()
    limit = ray_state.state.get_max_resources_from_cluster_config() or {}
    most = {kind: max(have.get(kind, 0), limit.get(kind, 0)) for kind in ("CPU", "GPU")}
    device = compute.device
    if device == "auto":
        device = "cuda" if most["GPU"] >= 1 else "cpu"
    kind = "GPU" if device == "cuda" else "CPU"
    asked = compute.workers or max(1, int(most[kind]))
    if not compute.workers and device == "cpu" and worker_gb and have.get("CPU") and have.get("memory"):
        memory = have["memory"] * most["CPU"] / have["CPU"]
        asked = min(asked, max(1, int(memory / (worker_gb * 2**30))))
    if asked > most[kind]:
        raise StrideError(
            f"compute asks for {asked} worker(s) with a {kind} each; the Ray cluster has {have.get(kind, 0):g} {kind}s "
            f"and can scale to {most[kind]:g}: lower compute.workers, change compute.device or add nodes."
        )
    return WorkerAllocation(max(1, min(asked, units)), device)


def capture_errors(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What ``work`` returns and what it cost; a StrideError as a result too, for Ray would bury it in tracebacks."""
    began = costs.begun()
    try:
        return {**work(*arguments), _COST: costs.result_cost(began)}
    except StrideError as error:
        return {_SENTENCE: str(error)}


def _result_or_raise(result: dict[str, Any]) -> dict[str, Any]:
    if _SENTENCE in result:
        raise StrideError(result[_SENTENCE])
    costs.add_result_cost(result.pop(_COST, None))
    return result


def use_threads(count: int) -> None:
    """As many threads as that, for what is imported already and for what is later."""
    # torch takes seconds to import, and not all work needs it: it reads this when it is.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(count))
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(count)


def prepare_process(folder: str, threads: int = 1) -> None:
    """Make this process the driver's equal: its working folder, where relative paths start, its threads, its memory.

    Floating-point sums depend on the number of threads, so every worker has one, wherever it runs.
    """
    import pandas  # noqa: F401 -- pyarrow would import it at its first array and bill it to the first unit

    use_threads(threads)
    keep_freed()
    if os.path.isdir(folder):
        os.chdir(folder)


def hide_gpus(device: str) -> None:
    """Before torch looks: a worker that was given no GPU must not find one all the same."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def map_tasks(
    function: Callable[..., dict[str, Any]], arguments: tuple[Any, ...], units: Sequence[Unit], pool: WorkerAllocation
) -> Iterator[dict[str, Any]]:
    """Apply ``function(*arguments, unit)`` to every unit as Ray tasks, two per worker in flight.

    Raises:
        StrideError: the function's own, or that a unit killed its workers again and again.
    """
    task: Any = ray.remote(_task).options(**pool.options, max_retries=RETRIES)
    waiting, running, since = list(reversed(units)), set[Any](), time.monotonic()
    while waiting or running:
        while waiting and len(running) < 2 * pool.workers:
            running.add(task.remote(os.getcwd(), function, arguments, waiting.pop()))
        for reference in ready_of(running, since):
            running.remove(reference)
            since = time.monotonic()
            yield result_of(reference)


def _task(
    folder: str, function: Callable[..., dict[str, Any]], arguments: tuple[Any, ...], unit: Unit
) -> dict[str, Any]:
    prepare_process(folder)
    return capture_errors(function, *arguments, unit)


def map_dataset(
    make: Callable[..., Worker], arguments: tuple[Any, ...], units: Sequence[dict[str, Any]], pool: WorkerAllocation
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
    given = [{"at": at, "unit": json.dumps(unit)} for at, unit in enumerate(units)]
    rows = ray.data.from_items(given, override_num_blocks=len(units))
    row: Any = _Row
    tries = f"tries/{uuid.uuid4().hex}/"
    results = rows.map(
        row,
        fn_constructor_args=(make, arguments, os.getcwd(), tries),
        compute=ray.data.ActorPoolStrategy(size=pool.workers),
        num_cpus=pool.options["num_cpus"],
    )
    try:
        for row in results.iter_rows():
            yield _result_or_raise(json.loads(row["result"]))
    except ray.exceptions.RayError as error:
        raise _sentence_for(error) from None
    finally:
        _internal_kv_del(tries, del_by_prefix=True, namespace=NAMESPACE)


class _Row:
    """A worker as Ray Data wants it: rows in, rows out; JSON, since Arrow would unify the dicts' fields.

    It is made on the first row: what a constructor raises reaches nobody but as an actor's death. Ray Data tries a row
    for ever, which a node that is lost and not yet known to be wants; how often a row was begun is kept in Ray's own
    store, so that one which kills its worker each time ends.
    """

    def __init__(self, make: Callable[..., Worker], arguments: tuple[Any, ...], folder: str, tries: str) -> None:
        prepare_process(folder)
        self.make, self.arguments, self.tries = make, arguments, tries
        self.worker: Worker | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"result": json.dumps(capture_errors(self._begun, f"{self.tries}{row['at']}", json.loads(row["unit"])))}

    def _begun(self, key: str, unit: Unit) -> dict[str, Any]:
        tried = int(_internal_kv_get(key, namespace=NAMESPACE) or 0)
        if tried > RETRIES:
            raise lethal_unit_error(f"It was begun {tried} times.")
        _internal_kv_put(key, str(tried + 1), namespace=NAMESPACE)
        return self._work(unit)

    def _work(self, unit: Unit) -> dict[str, Any]:
        if self.worker is None:
            began = time.monotonic()
            self.worker = self.make(*self.arguments)
            costs.record_separately(costs.START, time.monotonic() - began)
        return self.worker(unit)


def ready_of(running: Collection[Any], since: float) -> list[Any]:
    """What is done of the references; nothing, and a line that says so, after PATIENCE (a cluster is scaling up)."""
    ready, _ = ray.wait(list(running), num_returns=1, timeout=PATIENCE)
    if not ready:
        free = ray.available_resources()
        tqdm.write(
            f"still waiting after {time.monotonic() - since:.0f} s: {len(running)} unit(s) submitted; free in the "
            f"cluster: {free.get('CPU', 0):g} CPUs, {free.get('GPU', 0):g} GPUs",
            file=sys.stderr,
        )
    return ready


def result_of(reference: Any) -> dict[str, Any]:
    """A finished unit's result.

    Raises:
        StrideError: the worker's own, or that the unit killed its workers again and again.
    """
    try:
        return _result_or_raise(ray.get(reference))
    except ray.exceptions.RayError as error:
        raise _sentence_for(error) from None


def lethal_unit_error(why: str) -> StrideError:
    """The sentence for a unit that nobody survives."""
    return StrideError(
        f"A unit of work killed its worker {RETRIES} times and more (out of memory?); lower compute.worker_gb or "
        f"compute.workers and run the same command again: what is done is kept. {why}"
    )


def _sentence_for(error: BaseException) -> BaseException:
    """A sentence for what happens to workers from outside; anything else is a defect and keeps its traceback."""
    if isinstance(error, (ray.exceptions.ActorDiedError, ray.exceptions.WorkerCrashedError)):
        return lethal_unit_error(f"Ray says: {first_line(error)}")
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return StrideError(f"Ray killed workers for lack of memory; lower compute.workers. {first_line(error)}")
    if isinstance(error, ray.exceptions.LocalRayletDiedError):
        return StrideError(
            "Ray on the node that this command runs on has ended; run the same command again on a node that is up: "
            "what is done is kept."
        )
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
    bar = tqdm(total=total, desc=label, unit=f" {unit}", mininterval=interval, file=sys.stderr, smoothing=0.1)
    with bar, costs.phase(label, unit, total):
        for result in results:
            collected.append(result)
            metrics.report(label, result)
            bar.update(count(result))
    return collected
