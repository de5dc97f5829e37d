"""The HTTP interface: requests and their limits, answers and errors, each as JSON, and the page."""

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from stride_ray import __version__
from stride_ray.report.page import service_page

# Bytes of a request's body; a query of a million characters is not one of a model's context.
BODY_BYTES = 2**20
DRAINED = 16 * BODY_BYTES
# Paths that need no token: the page asks for it, and monitors look at health.
OPEN = ("/", "/health")
# Names under which a service that is bound to loopback is reached; others belong to pages that would misuse it.
LOOPBACK = ["localhost", "127.0.0.1", "[::1]"]
# Answers a request (service.Service.answer): status and body.
Ask = Callable[[dict[str, Any]], Awaitable[tuple[int, dict[str, Any]]]]


@dataclass(frozen=True)
class Limits:
    """What requests may ask for.

    Attributes:
        candidates: most blocks to score exactly.
        blocks: most blocks to show at either end.
        token: that requests must carry as ``Authorization: Bearer``; empty: none.
        loopback: whether only loopback names are answered to.
    """

    candidates: int = 400
    blocks: int = 50
    token: str = ""
    loopback: bool = True


class Question(BaseModel):
    """A query, in the fields that ``attribute`` reads from a file, and what to show of the answer."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"example": {"prompt": "The capital of France is", "completion": " Paris."}}
    )
    text: str | None = Field(None, description="a text all of whose tokens count")
    prompt: str | list[dict[str, Any]] | None = Field(None, description="text, or messages, before the completion")
    completion: str | list[dict[str, Any]] | None = Field(None, description="what the model says; only it counts")
    messages: list[dict[str, Any]] | None = Field(None, description="a conversation; the assistant's turns count")
    contrast: str | list[dict[str, Any]] | None = Field(
        None, description="another completion, messages or text: why the first rather than this one?"
    )
    candidates: int | None = Field(None, ge=0, description="blocks to score exactly; null: the run's number")
    blocks: int = Field(8, ge=1, description="blocks to show at either end")
    sources: list[str] | None = Field(None, description="show only these sources; null: all")


# Their names, in messages.
FIELDS = ", ".join(Question.model_fields)


def build_api(limits: Limits, ask: Ask) -> FastAPI:
    """The application.

    Args:
        limits: of requests.
        ask: answers a request.
    """
    api = FastAPIOffline(
        title="stride_ray", version=__version__, description="Which training data made a language model say this."
    )
    if limits.loopback:
        api.add_middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK)

    @api.middleware("http")
    async def admit(request: Request, call_next: Callable[[Request], Awaitable[Any]]) -> Any:
        given, right = request.headers.get("authorization", "").encode(), f"Bearer {limits.token}".encode()
        if limits.token and request.url.path not in OPEN and not hmac.compare_digest(given, right):
            return _error(401, "Give the service's token, as in 'Authorization: Bearer TOKEN'.")
        return await call_next(request)

    @api.exception_handler(RequestValidationError)
    async def explain(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = next((part for part in first["loc"] if part in Question.model_fields), "")
        if first["type"] == "extra_forbidden":
            return _error(422, f"{first['loc'][-1]}: there is no such field; the fields are {FIELDS}.")
        if not where:
            return _error(422, f"The body is not a JSON object with a query ({first['msg']}).")
        return _error(422, f"{where}: {first['msg']}")

    @api.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, f"{error.detail}: {request.method} {request.url.path}")

    @api.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(service_page(bool(limits.token), limits.blocks), headers={"Cache-Control": "no-cache"})

    @api.get("/health")
    async def health() -> dict[str, str]:
        """Whether the service takes requests."""
        return {"status": "ok", "version": __version__}

    @api.post("/attribute")
    async def attribute(question: Question) -> JSONResponse:
        """Rank the training blocks by their influence on the loss of a completion."""
        if not (question.text or question.completion or question.messages):
            return _error(422, "There is no query: give a completion (and its prompt), a text, or messages.")
        for name in ("candidates", "blocks"):
            most = getattr(limits, name)
            if (getattr(question, name) or 0) > most:
                return _error(422, f"{name}: at most {most} here")
        status, body = await ask(question.model_dump())
        return JSONResponse(body, status, {"Retry-After": "5"} if status in (429, 503) else None)

    api.add_middleware(_SmallBodies)
    return api


def _error(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"error": sentence}, status)


class _SmallBodies:
    """ASGI middleware that refuses bodies above BODY_BYTES, which are never held.

    Up to DRAINED bytes are read all the same, since most clients listen only once they have sent everything.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        kept, size, more = list[Any](), 0, int(dict(scope["headers"]).get(b"content-length", 0)) <= DRAINED
        while more and size <= DRAINED:
            message = await receive()
            size += len(message.get("body", b""))
            more = message["type"] == "http.request" and message.get("more_body", False)
            kept = [*kept, message] if size <= BODY_BYTES else []
        if not kept:
            await _too_large()(scope, receive, send)
            return
        waiting = iter(kept)

        async def replay() -> Any:
            message = next(waiting, None)
            return message if message is not None else await receive()

        await self.app(scope, replay, send)


def _too_large() -> JSONResponse:
    return _error(413, f"The body has more than {BODY_BYTES} bytes; a query fits into a model's context.")
