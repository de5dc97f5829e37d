"""The paper's training loop on Ray Train: data-parallel over one or more workers.

The loop resumes from its own checkpoints, plain safetensors in the run directory at any fsspec URL, after a killed
worker (Ray Train restarts the group) as well as after a killed driver (rerun the same command). Ray Train therefore
needs no shared storage; it forms the process group, monitors the workers and collects the metrics.
"""

import logging
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import torch

from stride_ray.corpus.blocks import Blocks
from stride_ray.models.loading import load_run_model
from stride_ray.operators.membership import membership_of
from stride_ray.operators.stored import load_operators, save_operators
from stride_ray.operators.training.trainer import Loop, Ranks, run_loop
from stride_ray.runtime.config import Config
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Stage
from stride_ray.runtime.storage import Store
from stride_ray.runtime.tasks import RETRIES, WorkerAllocation, prepare_process
from stride_ray.runtime.urls import first_line

# Retries of a minute each while Ray Train waits for resources: as long as a cloud may take to provision a node.
MAX_STARTUP_RETRIES = 20


def train_distributed(config: Config, blocks: Blocks, stage: Stage, pool: WorkerAllocation) -> None:
    """Train the run's operators and publish them in ``trained/`` of the stage's folder, unless they exist.

    During training ``loop/`` holds the newest checkpoint; the metrics of each evaluation are kept in ``training.json``.

    Args:
        config: the run's configuration.
        blocks: the pool.
        stage: the operators stage; with fit.start = closed_form the loop starts from its ``fitted/``.
        pool: number of workers, and their device.

    Raises:
        StrideError: the loop raised it, the workers died repeatedly, or the cluster no longer has room for them.
    """
    if stage.store.exists("trained/manifest.json"):
        return
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    loop = stage.store.child("loop")
    loop.remove("error.json")
    backend, kind = ("nccl", "GPU") if pool.device == "cuda" else ("gloo", "CPU")
    with tempfile.TemporaryDirectory(prefix="stride_ray-") as scratch, _sigint_handler_restored():
        trainer = _without_dashboard_polling(TorchTrainer)(
            _worker,
            train_loop_config={
                "config": config,
                "blocks": blocks,
                "stage": stage.store,
                "device": pool.device,
                "folder": os.getcwd(),
            },
            torch_config=TorchConfig(backend=backend),
            scaling_config=ScalingConfig(
                num_workers=pool.workers,
                use_gpu=pool.device == "cuda",
                resources_per_worker={"CPU": 1} | ({"GPU": 1} if pool.device == "cuda" else {}),
            ),
            run_config=RunConfig(
                name=f"stride-{stage.identity}",
                storage_path=scratch,
                # Without a limit, Ray Train would wait forever for a lost node.
                failure_config=FailureConfig(max_failures=RETRIES, controller_failure_limit=MAX_STARTUP_RETRIES),  # type: ignore[call-arg]
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        try:
            trainer.fit()
        except Exception as error:
            if "startup timed out" in str(error) or "WorkerGroupStartup" in f"{error!r}{error.__cause__!r}":
                raise StrideError(
                    f"Ray Train found no room for {pool.workers} worker(s) with a {kind} each, "
                    f"{MAX_STARTUP_RETRIES + 1} times in a row (was a node lost?); the checkpoints are kept: run the "
                    "same command again when the nodes are back, or with a lower compute.workers."
                ) from error
            if not loop.exists("error.json"):
                raise StrideError(
                    f"The training workers failed more than {RETRIES} times (Ray Train: {first_line(error)}); the "
                    "checkpoints are kept: run the same command again to continue from the last one."
                ) from error
    if loop.exists("error.json"):
        raise StrideError(loop.read_json("error.json")["error"])
    stage.store.remove("loop")


def _worker(given: dict[str, Any]) -> None:
    """Ray Train's worker function: run one rank and hand its StrideError to the driver."""
    from ray import train

    prepare_process(given["folder"])
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train logs every report
    context = train.get_context()
    ranks = Ranks(context.get_world_rank(), context.get_world_size())
    stage: Store = given["stage"]
    store = stage.child("loop")
    # A StrideError would recur on a retry: the driver raises it, and all ranks stop.
    if store.exists("error.json"):
        return
    try:
        train_rank(given["config"], given["blocks"], stage, given["device"], ranks, train.report)
    except StrideError as error:
        store.write_json("error.json", {"error": str(error)})
        if ranks.world > 1:
            raise  # other ranks may be blocked in a collective


def train_rank(config: Config, blocks: Blocks, stage: Store, device: str, ranks: Ranks, report: Any = None) -> None:
    """Run one rank of train_distributed; the process group exists already if there are several ranks."""
    model = load_run_model(config, device)
    model.check_ids(torch.tensor([[blocks.manifest["max_token_id"]]]))
    start = load_operators(stage.child("fitted"))[0] if config.fit.start == "closed_form" else None
    loop = Loop(config, model, blocks, membership_of(config), start, ranks)
    log = run_loop(loop, stage.child("loop"), report)
    if ranks.rank == 0:
        stage.write_json("training.json", {"evaluations": log})
        save_operators(stage.child("trained"), loop.operators(), {"failed": sorted(loop.failed)})


@contextmanager
def _sigint_handler_restored() -> Iterator[None]:
    """Restore the SIGINT handler, which Ray Train replaces and does not restore."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def _without_dashboard_polling(trainer: type) -> type:
    """Without a Ray dashboard, remove the callback that polls it for the controller's state.

    The callback would log an error repeatedly. It guards against a controller that dies alone; a Ray instance without a
    dashboard was started for this command and ends with it.
    """
    if ray._private.worker.get_dashboard_url():
        return trainer

    class Quiet(trainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [each for each in callbacks if type(each).__name__ != "PlacementGroupCleanerCallback"]

    return Quiet
