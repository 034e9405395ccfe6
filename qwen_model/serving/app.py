"""Make the HTTP application: its paths, its errors, and what guards it."""

from __future__ import annotations

import asyncio
import base64
import hmac
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..common.version import package_version
from .chat_api import chat_completions
from .completions_api import completions
from .context import CLIENT_LEFT, Context, error_response, json_response
from .errors import ApiError
from .field_errors import field_error
from .hosts import is_own_host
from .responses_api import responses
from .schemas import ChatRequest, CompletionRequest, DetokenizeRequest, ResponsesRequest, TokenizeRequest
from .tokenize_api import detokenize, tokenize

LOG = logging.getLogger(__name__)
PAGE = Path(__file__).with_name("page")
OPEN_PATHS = ("/health", "/health/live", "/health/ready")
BODY_SECONDS = 30
"""A body must be there after so many: half a request does not hold memory for ever."""
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def make_app(
    context: Context,
    connect: Callable[[], Any] | None = None,
    allowed_origins: tuple[str, ...] = (),
    allowed_hosts: tuple[str, ...] = (),
) -> FastAPI:
    """Return the application of an HTTP process.

    connect: returns an awaitable that connects `context.client`; awaited at the start.
    allowed_origins: sites whose pages may use the API from a browser; none by default.
    allowed_hosts: names that requests may be sent to if there is no API key, beside localhost and addresses.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if connect is not None:
            await connect()
        yield
        await context.client.close()

    app = FastAPI(title="qwen_model", version=package_version(), lifespan=lifespan, docs_url=None, redoc_url=None)
    _add_errors(app)
    _add_api(app, context)
    _add_rest(app, context)
    if allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(allowed_origins), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(
        _Guard,
        api_keys=context.api_keys,
        allowed_hosts=allowed_hosts,
        max_body_bytes=context.limits.max_body_bytes,
    )
    return app


def _add_api(app: FastAPI, context: Context) -> None:
    """Add the paths that generate, and those about tokens and the model."""
    answers: dict[int | str, dict[str, Any]] = {
        status: {"description": text}
        for status, text in (
            (400, "A field is wrong"),
            (401, "The API key is missing or wrong"),
            (404, "The model does not exist"),
            (408, "The request took too long"),
            (413, "The body is too large"),
            (429, "Too many requests wait"),
            (503, "The engine has ended"),
        )
    }
    post: Callable[..., Any] = partial(app.post, responses=answers, response_model=None)

    @post("/v1/chat/completions")
    async def chat_path(body: ChatRequest, request: Request) -> Response:
        return await chat_completions(context, body, request)

    @post("/v1/completions")
    async def completions_path(body: CompletionRequest, request: Request) -> Response:
        return await completions(context, body, request)

    @post("/v1/responses")
    async def responses_path(body: ResponsesRequest, request: Request) -> Response:
        return await responses(context, body, request)

    @post("/tokenize")
    async def tokenize_path(body: TokenizeRequest) -> Response:
        return await tokenize(context, body)

    @post("/detokenize")
    async def detokenize_path(body: DetokenizeRequest) -> Response:
        return await detokenize(context, body)

    @app.get("/v1/models", responses=answers, response_model=None)
    async def models_path() -> Response:
        return json_response({"object": "list", "data": [_model(context)]})

    @app.get("/v1/models/{name:path}", responses=answers, response_model=None)
    async def model_path(name: str) -> Response:
        context.model.check_name(name)
        return json_response(_model(context))


def _model(context: Context) -> dict[str, Any]:
    model = context.model
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "qwen_model",
        "max_model_len": model.config.limits.max_positions,
    }


def _add_rest(app: FastAPI, context: Context) -> None:
    """Add what tells of the server's state, and the page."""

    @app.get("/health", response_model=None)
    @app.get("/health/ready", response_model=None)
    async def ready_path() -> Response:
        alive = context.client.alive
        return json_response({"status": "ready" if alive else "the engine has ended"}, 200 if alive else 503)

    @app.get("/health/live", response_model=None)
    async def live_path() -> Response:
        return json_response({"status": "live"})

    @app.get("/version", response_model=None)
    async def version_path() -> Response:
        return json_response({"version": package_version()})

    @app.get("/metrics", response_model=None)
    async def metrics_path() -> Response:
        return PlainTextResponse(await context.client.metrics(), media_type="text/plain; version=0.0.4")

    for path, name in (("/", "index.html"), ("/page.js", "page.js"), ("/page.css", "page.css")):
        app.add_api_route(path, _file(PAGE / name), include_in_schema=False, response_model=None)


def _file(path: Path) -> Callable[[], Any]:
    async def send_file() -> Response:
        return FileResponse(path, headers={**SECURITY_HEADERS, "Cache-Control": "no-cache"})

    return send_file


def _add_errors(app: FastAPI) -> None:
    """Answer every error with OpenAI's error object, and none with a traceback."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return Response(status_code=CLIENT_LEFT) if error.status == CLIENT_LEFT else error_response(error)

    @app.exception_handler(RequestValidationError)
    async def wrong_field(request: Request, error: RequestValidationError) -> Response:
        return error_response(field_error(error, request.headers.get("content-type")))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return error_response(ApiError(error.status_code, str(error.detail), code=_code(error.status_code)))

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return error_response(ApiError(500, "the server failed on this request; its log says why", kind="server_error"))


def _code(status: int) -> str | None:
    return {404: "not_found", 405: "method_not_allowed"}.get(status)


class _Guard:
    """Refuse requests without the API key or to other sites' names, and large bodies, before anything is read."""

    def __init__(self, app: ASGIApp, api_keys: tuple[str, ...], allowed_hosts: tuple[str, ...], max_body_bytes: int):
        self._app = app
        self._keys = [key.encode() for key in api_keys]
        self._allowed_hosts = frozenset(map(str.lower, allowed_hosts))
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self._keys and scope["path"] not in OPEN_PATHS and not self._is_allowed(headers.get(b"authorization", b"")):
            error = ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
            await error_response(error)(scope, receive, send)
            return
        host = headers.get(b"host", b"").decode("latin-1")
        if not self._keys and scope["path"] not in OPEN_PATHS and not is_own_host(host, self._allowed_hosts):
            message = f"this server is not {host!r:.100}: --allowed-host NAME or an API key lets it answer there"
            await error_response(ApiError(403, message, code="host_not_allowed"))(scope, receive, send)
            return
        too_large = ApiError(413, f"the body has more than this server's limit of {self._max_body_bytes} bytes")
        too_slow = ApiError(408, f"the body did not come within {BODY_SECONDS} s", kind="timeout_error")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_body_bytes:
            await error_response(too_large)(scope, receive, send)
            return
        received, complete = 0, False
        refusal: ApiError | None = None

        async def limited() -> Message:
            nonlocal received, complete, refusal
            if complete:  # what comes now is that the client has gone
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), BODY_SECONDS)
            except asyncio.TimeoutError:
                refusal = too_slow
                raise refusal from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > self._max_body_bytes:
                refusal = too_large
                raise refusal
            return message

        async def answer(message: Message) -> None:
            if refusal is None:  # else the application says that it cannot read the body
                await send(message)

        await self._app(scope, limited, answer)
        if refusal is not None:
            await error_response(refusal)(scope, receive, send)

    def _is_allowed(self, header: bytes) -> bool:
        """Tell whether a header has one of the keys, as Bearer's token or Basic's password, in constant time."""
        kind, _, given = header.partition(b" ")
        if kind.lower() == b"basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except ValueError:
                return False
        elif kind.lower() != b"bearer":
            return False
        found = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        return any(found)
