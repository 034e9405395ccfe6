"""Hold what the handlers of an HTTP process share."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from .engine_client import EngineClient
from .errors import ApiError
from .generation import ServerModel, TokenizerThread

R = TypeVar("R")
SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
CLIENT_LEFT = 499


@dataclass(frozen=True)
class ServerLimits:
    """Hold what a server allows. Seconds, bytes and numbers; see the options of `qwen-model serve`."""

    max_body_bytes: int = 4 << 20
    max_waiting: int = 1024
    timeout: float = 600.0


@dataclass
class Context:
    """Hold the model, the connection to the engine, the limits and the keys."""

    model: ServerModel
    limits: ServerLimits
    api_keys: tuple[str, ...] = ()
    client: EngineClient = field(default_factory=EngineClient)
    tokenizer_thread: TokenizerThread = field(default_factory=TokenizerThread)
    salt: str = field(default_factory=lambda: secrets.token_hex(16))

    def salt_of(self, request: Request) -> str:
        """Return the salt of a request's shared prefixes: another one for each API key, unknown to clients."""
        key = request.headers.get("authorization", "")
        return hashlib.sha256(f"{self.salt}:{key}".encode()).hexdigest()[:32]


def new_id(prefix: str) -> str:
    """Return a random identifier."""
    return f"{prefix}-{secrets.token_hex(16)}"


def now() -> int:
    """Return the seconds since 1970."""
    return int(time.time())


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a response of JSON."""
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    """Return the response of an error."""
    return json_response(error.body, error.status, error.headers)


def sse(value: Any, event: str | None = None) -> bytes:
    """Return a server-sent event."""
    name = b"" if event is None else b"event: " + event.encode() + b"\n"
    return name + b"data: " + msgspec.json.encode(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"


async def streamed(request: Request, events: AsyncIterator[bytes], done: bytes = DONE) -> Response:
    """Return a stream of events; an error before the first is an ordinary response, later ones are events.

    It ends when the client goes away, also before the first event.

    Raises:
        ApiError: the request is refused.
    """
    first = await whole(request, lambda: _first(events))

    async def all_events() -> AsyncIterator[bytes]:
        yield first
        try:
            async for event in events:
                yield event
        except ApiError as error:
            yield sse(error.body)
        finally:
            await events.aclose()  # type: ignore[attr-defined]
        yield done

    return StreamingResponse(all_events(), headers=SSE_HEADERS, media_type="text/event-stream")


async def _first(events: AsyncIterator[bytes]) -> bytes:
    return await anext(events, b"")


async def whole(request: Request, work: Callable[[], Awaitable[R]]) -> R:
    """Return what the work returns; end it when the client goes away.

    Raises:
        ApiError: the work's.
    """
    task = asyncio.ensure_future(work())
    watch = asyncio.ensure_future(_until_disconnected(request))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(CLIENT_LEFT, "the client has gone")
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _until_disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
