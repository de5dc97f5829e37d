"""The service on Ray Serve: a gateway that speaks HTTP, before replicas that hold the model and the operator rows.

The gateway bounds the requests that wait, and repeats one whose replica died: answers depend on nothing but the request
and the run, so a repetition is the same answer. A change of the run's directory (``serve deploy`` with another ``run``)
starts new replicas before it stops the old ones.
"""

import os
import socket
import time
from typing import Any, TextIO

import ray.exceptions
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.options import ComputeConfig
from stride_ray.runtime.run import Run
from stride_ray.runtime.tasks import connected, prepare_process
from stride_ray.runtime.urls import first_line, redact_url
from stride_ray.serve.api import Limits, build_api

# Environment variable with the token that requests must carry.
TOKEN = "STRIDE_RAY_TOKEN"
LOOPBACK_HOSTS = ("127.0.0.1", "localhost")
# Name of the application in Ray Serve.
APPLICATION = "stride_ray"
# Of Ray Serve's logs, what a person should read.
QUIET = {"log_level": "ERROR", "enable_access_log": False}
# Times that a request is repeated after its replica died.
REPEATS = 5


class Options(BaseModel):
    """Options of the service: the ``args`` of a Ray Serve configuration, and flags of ``stride-ray serve``."""

    model_config = ConfigDict(extra="forbid")
    run: str = Field(description="run directory: a path or any fsspec URL")
    replicas: int = Field(1, ge=1, description="copies of the model, each answering one request at a time")
    queue: int = Field(32, ge=1, description="requests that may wait; further ones are told to come back (429)")
    candidates: int = Field(default=400, ge=0, description="most blocks that a request may have scored exactly")
    device: str = Field("cpu", description="cpu, or cuda for a GPU per replica")
    host: str = Field("127.0.0.1", description="address that it listens at; beyond loopback it asks for a token")


def build(options: Options) -> serve.Application:
    """The application, for ``serve.run`` and, as ``stride_ray.serve.application:build``, for ``serve deploy``."""
    resources = {"num_cpus": 1, "num_gpus": 1 if options.device == "cuda" else 0}
    replica: Any = serve.deployment(
        name="attributor",
        num_replicas=options.replicas,
        max_ongoing_requests=1,
        max_queued_requests=options.queue,
        ray_actor_options=resources,
        max_surge_percent=100,
        health_check_period_s=2,
    )(_Replica)
    gateway: Any = serve.deployment(
        name="gateway",
        max_ongoing_requests=10_000,  # those that wait and those that are told to come back
        ray_actor_options={"num_cpus": 0},
        max_surge_percent=100,
        health_check_period_s=2,
    )(serve.ingress()(_Gateway))
    return gateway.bind(
        replica.bind(options.run, options.device),
        {"candidates": options.candidates, "loopback": options.host in LOOPBACK_HOSTS},
    )


def run_service(options: Options, port: int, compute: ComputeConfig, out: TextIO) -> None:
    """Start the service and wait until it is interrupted; then stop it.

    Args:
        options: of the service.
        port: that it listens at.
        compute: of which the Ray address counts.
        out: stream for what a person reads.

    Raises:
        StrideError: the run has no operators that answer one query at a time, no token is set for an address that
            others reach, the port is taken, or no Ray is there.
    """
    from stride_ray.serve.attributor import servable_operators  # torch, which the gateway does without

    servable_operators(Run(options.run))
    _token(options.host in LOOPBACK_HOSTS)
    _check_free(options.host, port)
    with connected(compute):
        if serve.status().proxies:
            raise StrideError(
                "Ray Serve already runs in this cluster; add the application stride_ray.serve.application:build to its "
                "configuration and 'serve deploy' it (cluster/README.md)."
            )
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": options.host, "port": port},
            logging_config=QUIET,
        )
        try:
            print(f"Loading {redact_url(options.run)} …", file=out, flush=True)
            try:
                serve.run(build(options), name=APPLICATION, logging_config=QUIET)
            except RuntimeError as error:
                raise StrideError(f"The service did not start: {first_line(error)}") from None
            print(f"Ask at http://{options.host}:{port}/ (Ctrl-C stops the service).", file=out, flush=True)
            while True:
                time.sleep(1)
        finally:
            serve.shutdown()


def _token(loopback: bool) -> str:
    """The token that requests must carry; empty if there is none.

    Raises:
        StrideError: there is none, and other machines reach the service.
    """
    token = os.environ.get(TOKEN, "")
    if not (token or loopback):
        raise StrideError(f"Other machines can reach this service: set {TOKEN} to a token that requests must carry.")
    return token


def _check_free(host: str, port: int) -> None:
    """Raise StrideError if the port is taken, which Ray Serve would only say in its log."""
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise StrideError(f"Cannot listen at {host}:{port} ({error.strerror}); choose another --port.") from None


class _Replica:
    """Holds the model and the operator rows; answers one request at a time."""

    def __init__(self, run: str, device: str) -> None:
        from stride_ray.serve.service import Service

        prepare_process(os.getcwd())
        self.service = Service(run, device)

    def __call__(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Answer a request: HTTP status and body."""
        from stride_ray.serve.service import InvalidQueryError

        try:
            return 200, self.service.answer(request)
        except InvalidQueryError as error:
            return 422, {"error": str(error)}
        except StrideError as error:
            return 503, {"error": str(error)}


class _Gateway:
    """Passes requests to replicas."""

    def __init__(self, replicas: Any, limits: dict[str, Any]) -> None:
        # From this process's environment: what is deployed is stored in the cluster for all to read.
        self.replicas, self.limits = replicas, Limits(**limits, token=_token(limits["loopback"]))

    def __serve_build_asgi_app__(self) -> Any:
        return build_api(self.limits, self._ask)

    async def _ask(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        for _ in range(REPEATS + 1):
            try:
                return await self.replicas.remote(request)
            except BackPressureError as error:
                waiting = f"{error.args[0]} requests are waiting"
                return 429, {"error": f"{waiting}, as many as may; ask again in some seconds."}
            except (ray.exceptions.RayActorError, DeploymentUnavailableError):
                continue
        return 503, {"error": "Replicas died while they answered this; look at Ray's logs, and ask again."}
