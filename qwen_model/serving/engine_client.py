"""Reach the engine's process from an HTTP process: requests go out, tokens come back to whoever waits for them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import TracebackType

from .errors import ApiError
from .wire import FRAME_DECODER, Add, Ask, Cancel, Failed, Frames, Request, Score, Scored, Text, Token, framed

READ_SIZE = 1 << 18
ENGINE_ENDED = ApiError(503, "the engine has ended: try again later", kind="server_error")


def timed_out(timeout: float) -> ApiError:
    """Return the error of a request that took too long."""
    return ApiError(408, f"the request took longer than {timeout:g} s", kind="timeout_error")


class Subscription:
    """Receive what the engine says of the sequences of one request. Leaving the context ends those that still run."""

    def __init__(self, client: EngineClient, timeout: float):
        """Take the connection, and the seconds after which the request fails."""
        self._client = client
        self._timer = asyncio.get_running_loop().call_later(timeout, self.fail, timed_out(timeout))
        self._running: set[int] = set()
        self._tokens: list[Token] = []
        self._error: ApiError | None = None
        self._ready = asyncio.Event()

    async def __aenter__(self) -> Subscription:
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._timer.cancel()
        for sequence in tuple(self._running):
            self.cancel(sequence)

    def add(self, request: Add) -> int:
        """Send a request, whose id is set here; return the id."""
        self._client.check()
        request.id = self._client.register(self)
        self._running.add(request.id)
        self._client.send(request)
        return request.id

    def cancel(self, sequence: int, stopped: bool = False) -> None:
        """End a sequence, because of a stop string if `stopped`; do nothing if it has ended."""
        if sequence in self._running:
            self._forget(sequence)
            self._client.send(Cancel(sequence, stopped))

    async def tokens(self) -> list[Token]:
        """Wait for the next tokens of any of the sequences; return all that there are.

        Raises:
            ApiError: the engine refuses a request or has ended, or the time is over.
        """
        while not self._tokens:
            if self._error is not None:
                raise self._error
            self._ready.clear()
            await self._ready.wait()
        found, self._tokens = self._tokens, []
        return found

    def take(self, token: Token) -> None:
        """Receive a token, from the client."""
        if token.finish_reason is not None:
            self._forget(token.id)
        if self._error is None:
            self._tokens.append(token)
            self._ready.set()

    def fail(self, error: ApiError) -> None:
        """Receive an error, from the client or the timer: `tokens` raises it after what came before it."""
        self._error = self._error or error
        self._ready.set()

    def _forget(self, sequence: int) -> None:
        self._running.discard(sequence)
        self._client.unregister(sequence)


class EngineClient:
    """Send requests to the engine's process over a socket, and hand what comes back to the subscriptions.

    on_end: is called when the engine's process has ended, or has given this connection up.
    """

    def __init__(self) -> None:
        self._next = 0
        self._subscriptions: dict[int, Subscription] = {}
        self._answers: dict[int, asyncio.Future[Scored | Text]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self.alive = False
        self.on_end: Callable[[], None] = lambda: None

    async def connect(self, connection: socket.socket) -> None:
        """Begin to use a connected socket, in the running event loop."""
        reader, self._writer = await asyncio.open_connection(sock=connection)
        self.alive = True
        self._reading = asyncio.create_task(self._read(reader))

    async def close(self) -> None:
        """End the connection."""
        if self._writer is not None:
            self._writer.close()
        if self._reading is not None:
            self._reading.cancel()

    def check(self) -> None:
        """Raise ApiError if the engine has ended."""
        if not self.alive:
            raise ENGINE_ENDED

    def register(self, subscription: Subscription) -> int:
        """Return a new id, whose tokens go to the subscription."""
        self._next += 1
        self._subscriptions[self._next] = subscription
        return self._next

    def unregister(self, sequence: int) -> None:
        """Give up an id: what is still said of it is dropped."""
        self._subscriptions.pop(sequence, None)

    def send(self, request: Request) -> None:
        """Send a message; do nothing if the engine has ended."""
        if self.alive and self._writer is not None:
            self._writer.write(framed(request))

    async def score(self, prompt: list[int], num_best: int | None, outputs: int, timeout: float) -> Scored:
        """Return the log-probabilities of a prompt's tokens; see `Score`.

        Raises:
            ApiError: the prompt is refused, the engine has ended, or the time is over.
        """
        try:
            answer = await asyncio.wait_for(self._ask(Score(0, prompt, num_best, outputs)), timeout)
        except asyncio.TimeoutError as error:
            raise timed_out(timeout) from error
        assert isinstance(answer, Scored)
        return answer

    async def metrics(self) -> str:
        """Return the text of /metrics."""
        answer = await self._ask(Ask(0))
        assert isinstance(answer, Text)
        return answer.text

    async def _ask(self, request: Score | Ask) -> Scored | Text:
        self.check()
        self._next += 1
        request.id = self._next
        answer = self._answers[request.id] = asyncio.get_running_loop().create_future()
        try:
            self.send(request)
            return await answer
        finally:
            del self._answers[request.id]
            if not answer.done() or answer.cancelled():
                self.send(Cancel(request.id))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        frames = Frames()
        try:
            while data := await reader.read(READ_SIZE):
                for content in frames.push(data):
                    self._dispatch(content)
        except OSError:
            pass  # the engine's process ended
        self.alive = False
        for subscription in tuple(self._subscriptions.values()):
            subscription.fail(ENGINE_ENDED)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(ENGINE_ENDED)
        self.on_end()

    def _dispatch(self, content: bytes) -> None:
        frame = FRAME_DECODER.decode(content)
        for token in frame.tokens:
            subscription = self._subscriptions.get(token.id)
            if subscription is not None:
                subscription.take(token)
        for answer in frame.answers:
            if isinstance(answer, Failed):
                self._fail(answer)
            elif (waiting := self._answers.get(answer.id)) is not None and not waiting.done():
                waiting.set_result(answer)

    def _fail(self, failed: Failed) -> None:
        kind = "invalid_request_error" if failed.status < 500 else "server_error"
        error = ApiError(failed.status, failed.message, kind="rate_limit_error" if failed.status == 429 else kind)
        if (subscription := self._subscriptions.pop(failed.id, None)) is not None:
            subscription.fail(error)
        elif (waiting := self._answers.get(failed.id)) is not None and not waiting.done():
            waiting.set_exception(error)
