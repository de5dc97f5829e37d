"""The HTTP interface: request schema and limits, responses and errors as JSON, and the page."""

import asyncio
import hmac
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from stride_ray import __version__
from stride_ray.report.page import service_page

# Maximum bytes of a body, larger than any model's context; bytes of a larger one that are read before it is refused;
# seconds to wait for each piece of a body.
BODY_BYTES, DRAIN_BYTES, BODY_SECONDS = 2**20, 2**24, 30.0
# Paths that need no token: the page, which asks for it, probes, and the documentation of this interface.
OPEN_PATHS, OPEN_FOLDERS = ("/", "/health", "/docs", "/redoc", "/openapi.json"), ("/static-offline-docs/",)
# Names of loopback, and the allowed Host headers there: others would belong to a DNS-rebinding attack.
LOOPBACK_NAMES = ["localhost", "127.0.0.1"]
# Answers a request (fields of AttributeRequest) with a status and a body.
Handler = Callable[[dict[str, Any]], Awaitable[tuple[int, dict[str, Any]]]]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What requests may ask for.

    Attributes:
        candidates: maximum number of blocks to score exactly.
        blocks: maximum number of blocks to show at either end, and to find by their text.
        token: that requests must carry as ``Authorization: Bearer``; empty: none.
        loopback: whether to refuse Host headers other than LOOPBACK_NAMES.
    """

    candidates: int = 1600
    blocks: int = 50
    token: str = ""
    loopback: bool = True


class AttributeRequest(BaseModel):
    """A query, in the fields that ``attribute`` reads from a file, and what to show of its attribution."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"example": {"prompt": "The capital of France is", "completion": " Paris."}}
    )
    text: str | None = Field(None, description="a text; all of its tokens carry loss")
    prompt: str | list[dict[str, Any]] | None = Field(None, description="text or messages before the completion")
    completion: str | list[dict[str, Any]] | None = Field(None, description="text or messages that carry loss")
    messages: list[dict[str, Any]] | None = Field(None, description="a conversation; assistant turns carry loss")
    contrast: str | list[dict[str, Any]] | None = Field(
        None, description="another completion, messages or text: why the first rather than this one?"
    )
    candidates: int | None = Field(None, ge=0, description="blocks to score exactly; null: the run's number")
    blocks: int = Field(8, ge=1, description="blocks to show at either end")
    matches: int | None = Field(
        None, ge=0, description="blocks to find by their text (BM25), with their exact influence; null: 3"
    )
    sources: list[str] | None = Field(None, description="show only blocks of these sources; null: all")


class Problem(BaseModel):
    """The body of every response that is not an answer."""

    error: str = Field(description="what is wrong and what to do, in one sentence")


FIELDS = ", ".join(AttributeRequest.model_fields)
PROBLEMS: dict[int | str, dict[str, Any]] = {status: {"model": Problem} for status in (401, 413, 422, 429, 500, 503)}


def build_api(limits: Limits, handler: Handler) -> FastAPI:
    """The application.

    Args:
        limits: of requests.
        handler: answers requests within the limits.
    """
    api = FastAPIOffline(
        title="stride_ray", version=__version__, description="Which training data made a language model say this."
    )
    # The first is the innermost: a body is read only after host and token have been checked.
    api.add_middleware(_SmallBodies)
    api.add_middleware(_Token, token=limits.token)
    if limits.loopback:
        api.add_middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK_NAMES)

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "extra_forbidden":
            return _problem(422, f"There is no field {first['loc'][-1]!a}; the fields are {FIELDS}.")
        field = next((part for part in first["loc"] if part in AttributeRequest.model_fields), "")
        if not field:
            return _problem(422, f"The body is not a JSON object with a query ({first['msg']}).")
        return _problem(422, f"{field}: {first['msg']}")

    @api.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return _problem(error.status_code, f"{error.detail}: {request.method} {request.scope['path']!a}")

    @api.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        _log.error("a request failed", exc_info=error)
        return _problem(500, "The service failed on this request; its log says why.")

    @api.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(service_page(bool(limits.token), limits.blocks), headers={"Cache-Control": "no-cache"})

    @api.get("/health")
    async def health() -> dict[str, str]:
        """Liveness of the HTTP gateway; requests wait until a replica has loaded the run."""
        return {"status": "ok", "version": __version__}

    @api.post("/attribute", responses=PROBLEMS, dependencies=[Depends(HTTPBearer(auto_error=False))])
    async def attribute(request: AttributeRequest) -> JSONResponse:
        """Rank the training blocks by their influence on the loss of a completion."""
        fields = request.model_dump()
        fault = _fault(fields, limits)
        if fault:
            return _problem(422, fault)
        status, body = await handler(fields)
        return JSONResponse(body, status, {"Retry-After": "5"} if status in (429, 503) else None)

    return api


def _fault(fields: dict[str, Any], limits: Limits) -> str:
    """What is wrong with a request whose types are right; empty if nothing is."""
    if not (fields["text"] or fields["completion"] or fields["messages"]):
        return "There is no query: give a completion (and its prompt), a text, or messages."
    if isinstance(fields["contrast"], str) and not fields["contrast"].strip():
        return "contrast: is empty; leave it out to ask about the completion alone."
    for name, most in (("candidates", limits.candidates), ("blocks", limits.blocks), ("matches", limits.blocks)):
        if (fields[name] or 0) > most:
            return f"{name}: at most {most} here."
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "The query contains an invalid character (a lone surrogate)."
    return ""


def _problem(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"error": sentence}, status)


class _Token:
    """ASGI middleware that refuses requests without the token, except for OPEN_PATHS and OPEN_FOLDERS."""

    def __init__(self, app: Any, token: str) -> None:
        self.app, self.expected = app, f"Bearer {token}".encode() if token else b""

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        is_open = scope["type"] != "http" or scope["path"] in OPEN_PATHS or scope["path"].startswith(OPEN_FOLDERS)
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        if not (is_open or not self.expected or hmac.compare_digest(given, self.expected)):
            sentence = "Give the service's token, as in 'Authorization: Bearer TOKEN'."
            await _problem(401, sentence)(scope, receive, send)
            return
        await self.app(scope, receive, send)


class _SmallBodies:
    """ASGI middleware that refuses bodies above BODY_BYTES.

    Up to DRAIN_BYTES are read and dropped first: most clients read the response only after sending the whole body.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        kept, size, more = list[Any](), 0, int(dict(scope["headers"]).get(b"content-length", 0)) <= DRAIN_BYTES
        while more and size <= DRAIN_BYTES:
            try:
                message = await asyncio.wait_for(receive(), BODY_SECONDS)
            except asyncio.TimeoutError:
                await _problem(408, f"No more of the body came for {BODY_SECONDS:g} s.")(scope, receive, send)
                return
            size += len(message.get("body", b""))
            more = message["type"] == "http.request" and message.get("more_body", False)
            kept.append(message)
            if size > BODY_BYTES:
                kept.clear()
        if not kept:
            sentence = f"The body has more than {BODY_BYTES} bytes, larger than any model's context."
            await _problem(413, sentence)(scope, receive, send)
            return
        waiting = iter(kept)

        async def replay() -> Any:
            message = next(waiting, None)
            return message if message is not None else await receive()

        await self.app(scope, replay, send)
