"""The service on Ray Serve: an HTTP gateway in front of replicas that hold the model and the operator rows.

The gateway bounds the queue, and repeats a request whose replica died: an answer depends on the request and the run
only. Deploying with another ``run`` (``serve deploy``) starts new replicas before it stops the old ones.
"""

import asyncio
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TextIO

import ray.exceptions
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.memory import retain_freed_memory
from stride_ray.runtime.options import ComputeConfig
from stride_ray.runtime.run import Run
from stride_ray.runtime.tasks import allocate_workers, connected, use_threads
from stride_ray.runtime.urls import anchored, first_line, redact_url
from stride_ray.serve.api import LOOPBACK_NAMES, Limits, build_api

# Environment variable with the token that requests must carry.
TOKEN = "STRIDE_RAY_TOKEN"
# Name of the application in Ray Serve.
APPLICATION = "stride_ray"
# Log level of Ray Serve: errors only.
QUIET = {"log_level": "ERROR", "enable_access_log": False}
# How often a request is repeated after its replica died; it may be the request that kills them.
REPEATS = 2
# Seconds that a replica being replaced gets to finish its queue, and between checks of a running service.
DRAIN_SECONDS, CHECK_SECONDS = 600.0, 5.0


class Options(BaseModel):
    """Options of the service; also the ``args`` of the application in a Ray Serve configuration."""

    model_config = ConfigDict(extra="forbid")
    run: str = Field(description="run directory: a path or any fsspec URL")
    replicas: int = Field(1, ge=1, description="copies of the model, each answering one request at a time")
    queue: int = Field(32, ge=1, description="maximum number of waiting requests; further requests get 429")
    device: str = Field(default="cpu", description="cpu, or cuda for a GPU per replica")
    host: str = Field("127.0.0.1", description="listening address; any other than loopback needs a token")


def build(options: Options) -> serve.Application:
    """The application, for ``serve.run`` and, as ``stride_ray.serve.application:build``, for ``serve deploy``."""
    shared: dict[str, Any] = {
        "max_surge_percent": 100,
        "health_check_period_s": 2,
        "graceful_shutdown_timeout_s": DRAIN_SECONDS,
    }
    replica: Any = serve.deployment(
        name="attributor",
        num_replicas=options.replicas,
        max_ongoing_requests=1,
        max_queued_requests=options.queue,
        ray_actor_options={"num_cpus": 1, "num_gpus": 1 if options.device == "cuda" else 0},
        **shared,
    )(_Replica)
    gateway: Any = serve.deployment(
        name="gateway",
        max_ongoing_requests=10_000,  # also counts requests that wait or are about to get 429
        ray_actor_options={"num_cpus": 0},
        **shared,
    )(serve.ingress()(_Gateway))
    loopback = options.host in LOOPBACK_NAMES
    # Whether there is a token, not the token: Ray Serve stores what is deployed where every client of Ray can read it.
    return gateway.bind(
        replica.bind(anchored(options.run), options.device), loopback, bool(_token(needed=not loopback))
    )


def run_service(options: Options, port: int, compute: ComputeConfig, out: TextIO) -> None:
    """Start the service and wait until it is interrupted; then stop it.

    Args:
        options: of the service; its device is replaced by that of ``compute``.
        port: to listen at.
        compute: address and device.
        out: stream for messages.

    Raises:
        StrideError: the run has no operators that answer one query at a time; the address is not loopback and there is
            no token; the port is taken; or Ray has too few CPUs or GPUs, stops, or already runs Ray Serve.
    """
    from stride_ray.serve.attributor import servable_operators  # imports torch, which the gateway does without

    servable_operators(Run(options.run))
    _token(needed=options.host not in LOOPBACK_NAMES)
    _check_free(options.host, port)
    with connected(compute):
        if serve.status().proxies:
            raise StrideError(
                "Ray Serve already runs in this cluster; add the application stride_ray.serve.application:build to its "
                "configuration and 'serve deploy' it (cluster/README.md)."
            )
        allocation = allocate_workers(replace(compute, workers=options.replicas), options.replicas)
        application = build(options.model_copy(update={"device": allocation.device}))
        serve.start(proxy_location="HeadOnly", http_options={"host": options.host, "port": port}, logging_config=QUIET)
        try:
            print(f"Loading {redact_url(options.run)} …", file=out, flush=True)
            serve.run(application, name=APPLICATION, logging_config=QUIET)
            print(f"Ask at http://{options.host}:{port}/ (Ctrl-C stops the service).", file=out, flush=True)
            while _is_deployed():
                time.sleep(CHECK_SECONDS)
            raise StrideError("The service failed and was not restarted; Ray's logs say why.")
        except (RuntimeError, ray.exceptions.RayError) as error:
            raise StrideError(f"The service stopped: {first_line(error)}") from None
        finally:
            serve.shutdown()


def _is_deployed() -> bool:
    """Whether the application is there and Ray Serve has not given up on it."""
    application = serve.status().applications.get(APPLICATION)
    return application is not None and application.status != "DEPLOY_FAILED"


def _token(needed: bool) -> str:
    """The token that requests must carry; empty if there is none.

    Raises:
        StrideError: there is none although one is needed, or it cannot be sent in a header.
    """
    token = os.environ.get(TOKEN, "").strip()
    if needed and not token:
        raise StrideError(f"Other machines can reach this service: set {TOKEN} to a token that requests must carry.")
    if not (token.isascii() and token.isprintable()):
        raise StrideError(f"{TOKEN} has characters that a header cannot carry; use letters and digits.")
    return token


def _check_free(host: str, port: int) -> None:
    """Raise StrideError if the port is taken, which Ray Serve would only log."""
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        raise StrideError(f"Cannot listen at {host}:{port} ({why}); choose another --port.") from None


class _Replica:
    """Holds the model and the operator rows; answers one request at a time."""

    def __init__(self, run: str, device: str) -> None:
        from stride_ray.serve.service import Service

        use_threads(1)  # as attribute's workers, whose bits this repeats
        retain_freed_memory()
        self.service = Service(run, device)
        # A cancelled request leaves its thread running, so that a second thread would share the model's hooks.
        self.thread = ThreadPoolExecutor(1)

    async def __call__(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Answer a request: HTTP status and body."""
        answer = await asyncio.get_running_loop().run_in_executor(self.thread, self._answer, request)
        self.thread.submit(self.service.follow_run)
        return answer

    def _answer(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        from stride_ray.serve.service import InvalidQueryError

        try:
            return 200, self.service.answer(request)
        except InvalidQueryError as error:
            return 422, {"error": str(error)}
        except StrideError as error:
            return 503, {"error": str(error)}


class _Gateway:
    """Passes requests to replicas."""

    def __init__(self, replicas: Any, loopback: bool, has_token: bool) -> None:
        self.replicas = replicas
        # From this process's environment, which for a cluster's Ray is the cluster's.
        self.limits = Limits(loopback=loopback, token=_token(needed=has_token or not loopback))

    def __serve_build_asgi_app__(self) -> Any:
        return build_api(self.limits, self._handle)

    async def _handle(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        deaths = 0
        while deaths <= REPEATS:
            try:
                return await self.replicas.remote(request)
            except BackPressureError as error:
                if not deaths:  # a request that was accepted once is not refused
                    waiting = f"{error.args[0]} requests are waiting, the maximum"
                    return 429, {"error": f"{waiting}; ask again in some seconds."}
            except ray.exceptions.RayActorError:
                deaths += 1
            except DeploymentUnavailableError:
                return 503, {"error": "No replica could be started; Ray's logs say why."}
            await asyncio.sleep(1)
        return 503, {"error": "The replicas that answered this request died; Ray's logs say why."}
