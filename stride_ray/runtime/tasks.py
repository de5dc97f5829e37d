"""All use of Ray: connecting, checking resource requests, and mapping a worker over units of work.

Stages provide a callable and a list of units, which are run as a Ray Data pipeline, an actor pool (actor_pool.py) or a
stream of tasks. Units in flight are bounded, killed workers are replaced and their units repeated. Results arrive in
order of completion, and no stage's output depends on that order.
"""

import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import ray
import ray.exceptions
from ray._private import state as ray_state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm

from stride_ray.runtime import costs
from stride_ray.runtime.errors import StrideError, Terminated
from stride_ray.runtime.memory import retain_freed_memory
from stride_ray.runtime.options import ComputeConfig
from stride_ray.runtime.urls import first_line

RETRIES = 5
# Seconds without a result before a message is printed.
PATIENCE = 60.0
# The longest path of a socket below Ray's folder, without the process id at its end; and the limit of such a path.
RAY_SOCKET = "/ray/session_2026-01-31_12-00-00_000000_/sockets/plasma_store"
SOCKET_BYTES = 107 if sys.platform == "linux" else 103
# Reserved keys of a result: the message of a StrideError, and the cost (costs.Cost).
_SENTENCE, _COST = "stride_error", "stride_cost"
Unit = Any
Worker = Callable[[Unit], dict[str, Any]]


@dataclass(frozen=True)
class WorkerAllocation:
    """The workers of a stage, each with one CPU and, on ``cuda``, one GPU."""

    workers: int
    device: str

    @property
    def options(self) -> dict[str, float]:
        """Ray's resource request for one worker."""
        return {"num_cpus": 1, "num_gpus": 1 if self.device == "cuda" else 0}


@contextmanager
def connected(compute: ComputeConfig) -> Iterator[None]:
    """Connect to Ray within the block: an open connection is reused, else the address's, else a new local Ray.

    Raises:
        StrideError: no Ray at the address (detected within seconds), or a local Ray did not start.
    """
    if ray.is_initialized():
        yield
        return
    address = compute.address or os.environ.get("RAY_ADDRESS", "")
    stop = signal.getsignal(signal.SIGTERM)
    try:
        if address and address not in ("auto", "local"):
            _check_reachable(address)
        elif not os.access(os.path.expanduser("~"), os.W_OK):
            # Ray would write the token that its processes share to the home folder.
            os.environ.setdefault("RAY_AUTH_TOKEN", uuid.uuid4().hex)
        folder: Any = {"_temp_dir": _session_folder()} if address in ("", "local") else {}
        dashboard = None if address else False
        start_ray(address=address or "local", include_dashboard=dashboard, logging_level=logging.ERROR, **folder)
    except SystemExit:  # raised by Ray on SIGTERM during its start
        raise Terminated from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise StrideError(f"No Ray at address {address!r}: {first_line(error)}; start one or leave it out.") from None
    except OSError as error:
        raise StrideError(
            f"Ray cannot start here ({first_line(error)}); set RAY_TMPDIR to a writable folder that has a short path "
            "and free space."
        ) from None
    except Exception as error:
        if not _timed_out(error):
            raise
        raise StrideError(f"Ray did not start here ({first_line(error)}); run the same command again.") from None
    # ray.init installs a SIGTERM handler that aborts in native calls; restore that of the command line (cli/exits.py).
    if callable(stop) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        ray.shutdown()


def start_ray(**options: Any) -> None:
    """Call ray.init, and once more if it times out: Ray gives up after half a minute, which no option changes."""
    try:
        ray.init(**options)
    except Exception as error:
        if not _timed_out(error):
            raise
        ray.init(**options)


def _timed_out(error: Exception) -> bool:
    """Whether Ray's start timed out, the only case in which it raises a bare Exception."""
    return type(error) is Exception


def _session_folder() -> str | None:
    """Return the folder for a local Ray's session; None for Ray's default.

    Batch systems put the names of cluster, user and job into TMPDIR, which may then be too long for sockets.

    Raises:
        StrideError: RAY_TMPDIR is too long.
    """
    given = os.environ.get("RAY_TMPDIR", "")
    folder = os.path.abspath(given or tempfile.gettempdir())
    most = SOCKET_BYTES - len(f"{RAY_SOCKET}{os.getpid()}")
    if (length := len(os.fsencode(folder))) > most:
        if given:
            raise StrideError(
                f"RAY_TMPDIR is a path of {length} bytes, {given}, too long for Ray's sockets; set it to a path of at "
                f"most {most} bytes, or unset it."
            )
        folder = "/tmp"
    usual = given or os.environ.get("TMPDIR") or "/tmp"
    return None if folder == usual else os.path.join(folder, "ray")


def _check_reachable(address: str) -> None:
    """Raise StrideError within seconds if no Ray listens at the address; Ray itself would retry for minutes."""
    place = address.removeprefix("ray://")
    host, _, port = place.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        # Something listens; check that it speaks gRPC, as Ray does (with TLS it has certificates of its own).
        if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
            with grpc.insecure_channel(place) as channel:
                grpc.channel_ready_future(channel).result(timeout=10)
    except (OSError, ValueError, grpc.FutureTimeoutError) as error:
        reasons = {grpc.FutureTimeoutError: "the server there is not Ray", ValueError: "an address is host:port"}
        why = reasons.get(type(error), error)
        raise StrideError(
            f"No Ray answers at address {address!r} ({why}); start one there ('ray start --head'), or leave the "
            "address out to run locally."
        ) from None


def allocate_workers(compute: ComputeConfig, units: int, worker_gb: float = 0.0) -> WorkerAllocation:
    """The workers for a stage with ``units`` units of work.

    Unless ``compute.workers`` is set, the number of CPU workers is limited to what the cluster's memory holds at
    ``worker_gb`` each. Results do not depend on it.

    Raises:
        StrideError: more workers or GPUs than the cluster has or can scale to; the message gives both numbers.
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
    """Return the result of ``work`` with its cost, or a StrideError as a result: Ray would bury it in tracebacks."""
    began = costs.start_result_timer()
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
    """Set the number of threads for torch and BLAS, whether or not torch is imported already."""
    # torch takes seconds to import and not all workers need it; if imported later, it reads these variables.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(count))
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(count)


def prepare_process(folder: str, threads: int = 1) -> None:
    """Set up a worker process: the driver's working directory (for relative paths), threads and memory retention.

    Floating-point sums depend on the number of threads, so workers use one thread on every machine.
    """
    import pandas  # noqa: F401 -- else pyarrow imports it with its first array, in the first unit's time

    use_threads(threads)
    retain_freed_memory()
    if os.path.isdir(folder):
        os.chdir(folder)


def hide_gpus(device: str) -> None:
    """Hide the GPUs from a CPU worker; must be called before torch initialises CUDA."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def map_tasks(
    function: Callable[..., dict[str, Any]],
    arguments: tuple[Any, ...],
    units: Sequence[Unit],
    allocation: WorkerAllocation,
) -> Iterator[dict[str, Any]]:
    """Apply ``function(*arguments, unit)`` to every unit as Ray tasks, no more at a time than there are workers.

    Raises:
        StrideError: from the function, or because a unit repeatedly killed its worker.
    """
    task: Any = ray.remote(_task).options(**allocation.options, max_retries=RETRIES)
    waiting, running, since = list(reversed(units)), set[Any](), time.monotonic()
    while waiting or running:
        while waiting and len(running) < allocation.workers:
            running.add(task.remote(os.getcwd(), function, arguments, waiting.pop()))
        for reference in wait_for_result(running, since):
            running.remove(reference)
            since = time.monotonic()
            yield result_of(reference)


def _task(
    folder: str, function: Callable[..., dict[str, Any]], arguments: tuple[Any, ...], unit: Unit
) -> dict[str, Any]:
    prepare_process(folder)
    return capture_errors(function, *arguments, unit)


def map_dataset(
    make: Callable[..., Worker],
    arguments: tuple[Any, ...],
    units: Sequence[dict[str, Any]],
    allocation: WorkerAllocation,
) -> Iterator[dict[str, Any]]:
    """Apply the worker ``make(*arguments)`` to every unit in a Ray Data pipeline; units and results are JSON dicts.

    Raises:
        StrideError: from the worker, or because a unit repeatedly killed its worker.
    """
    # Otherwise Ray Data starts an actor that only collects usage statistics, which takes seconds.
    os.environ.setdefault("RAY_DATA_USAGE_DISABLED", "1")
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    given = [{"at": at, "unit": json.dumps(unit)} for at, unit in enumerate(units)]
    rows = ray.data.from_items(given, override_num_blocks=len(units))
    row: Any = _RowWorker
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    counter: Any = ray.remote(_AttemptCounter)
    attempts = counter.options(num_cpus=0, scheduling_strategy=here).remote()
    results = rows.map(
        row,
        fn_constructor_args=(make, arguments, os.getcwd(), attempts),
        compute=ray.data.ActorPoolStrategy(size=allocation.workers),
        num_cpus=allocation.options["num_cpus"],
    )
    try:
        for row in results.iter_rows():
            yield _result_or_raise(json.loads(row["result"]))
    except ray.exceptions.RayError as error:
        raise translated_ray_error(error) from None
    finally:
        ray.kill(attempts)


class _AttemptCounter:
    """An actor on the driver's node that counts how often work on each row was started."""

    def __init__(self) -> None:
        self.attempts = Counter[int]()

    def begin(self, row: int) -> int:
        self.attempts[row] += 1
        return self.attempts[row]


class _RowWorker:
    """A worker as a Ray Data row function. Rows hold JSON because Arrow would unify the fields of the dicts.

    The worker is constructed on the first row: an exception in an actor's constructor would only surface as the actor's
    death. Ray Data retries a row forever, which is needed until Ray notices that a node is lost. Attempts per row are
    counted by an actor beside the driver, so a row that repeatedly kills its worker fails.
    """

    def __init__(self, make: Callable[..., Worker], arguments: tuple[Any, ...], folder: str, attempts: Any) -> None:
        prepare_process(folder)
        self.make, self.arguments, self.attempts = make, arguments, attempts
        self.worker: Worker | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"result": json.dumps(capture_errors(self._count_and_work, row["at"], json.loads(row["unit"])))}

    def _count_and_work(self, row: int, unit: Unit) -> dict[str, Any]:
        attempt = ray.get(self.attempts.begin.remote(row))
        if attempt > RETRIES + 1:
            raise lethal_unit_error(f"The unit was started {attempt - 1} times.")
        return self._work(unit)

    def _work(self, unit: Unit) -> dict[str, Any]:
        if self.worker is None:
            began = time.monotonic()
            self.worker = self.make(*self.arguments)
            costs.record_separately(costs.START, time.monotonic() - began)
        return self.worker(unit)


def wait_for_result(running: Collection[Any], since: float) -> list[Any]:
    """Wait for a finished reference; returns an empty list, with a message, after PATIENCE seconds.

    That is no error: a cluster may be scaling up. ``since`` is the time.monotonic() of the last result.
    """
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
    """The result of a finished unit.

    Raises:
        StrideError: from the worker, or because the unit repeatedly killed its worker.
    """
    try:
        return _result_or_raise(ray.get(reference))
    except ray.exceptions.RayError as error:
        raise translated_ray_error(error) from None


def lethal_unit_error(why: str) -> StrideError:
    """The error for a unit that repeatedly kills its worker."""
    return StrideError(
        f"A unit of work killed its worker more than {RETRIES} times (out of memory?); lower compute.worker_gb or "
        f"compute.workers and run the same command again: finished work is kept. {why}"
    )


def translated_ray_error(error: BaseException) -> BaseException:
    """A StrideError for external failures of workers; any other exception is a bug and is returned unchanged."""
    if isinstance(error, (ray.exceptions.ActorDiedError, ray.exceptions.WorkerCrashedError)):
        return lethal_unit_error(f"Ray says: {first_line(error)}")
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return StrideError(f"Ray killed workers for lack of memory; lower compute.workers. {first_line(error)}")
    if isinstance(error, ray.exceptions.LocalRayletDiedError):
        return StrideError(
            "Ray on this command's node has stopped; run the same command again on a running node: finished work is "
            "kept."
        )
    return error
