"""Drive a server with OpenAI's API: send streaming requests, and time the events of each stream."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from ..common.errors import QwenModelError
from .load import Record
from .workload import Request

if TYPE_CHECKING:
    from ..checkpoints.tokenizer import Tokenizer

Endpoint = Literal["completions", "chat"]
PATHS = {"completions": "/completions", "chat": "/chat/completions"}
LONGEST_REPLY = 4096  # bytes of an error's text


class _ServerError(Exception):
    """A server's reply is an error, or not what the API says."""


class Server:
    """Implement `RequestTarget`; each request has a connection of its own."""

    def __init__(
        self,
        url: str,
        tokenizer: Tokenizer,
        endpoint: Endpoint = "completions",
        model: str | None = None,
        ignore_eos: bool = True,
        timeout: float = 600.0,
    ):
        """Take the address of a server; without `model`, ask it for the name of its first model.

        url: "http://host:port", with or without "/v1".
        tokenizer: makes the text of each prompt, and counts tokens where the server does not report their number.
        endpoint: completions, or chat with the prompt as the user's message.
        ignore_eos: ask the server to go on at end tokens, an extension of vLLM, SGLang and others to the API.
        timeout: seconds to wait for a connection and for each event.

        Raises:
            QwenModelError: the URL is none, or the server does not name its model.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise QwenModelError(f"the URL of a server begins with http:// or https://, not {url!r}")
        connections = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        self._connect = connections[parts.scheme]
        try:
            self._address = (parts.hostname, parts.port)
        except ValueError as error:
            raise QwenModelError(f"{url!r} has no valid port: {error}") from error
        path = parts.path.rstrip("/")
        self._base = path if path.endswith("/v1") else f"{path}/v1"
        self._tokenizer, self._endpoint, self._ignore_eos, self._timeout = tokenizer, endpoint, ignore_eos, timeout
        self.url = url
        self.model = model or self._first_model()

    def send(self, request: Request) -> Record:
        """See `RequestTarget`."""
        text = self._tokenizer.decode(request.prompt, skip_special_tokens=False)
        body = self._body(text, request.new_tokens)
        stream = _Stream()
        error = None
        sent = time.perf_counter()
        try:
            for event in self._events(body):
                stream.take(event)
            stream.check_end()
        except (OSError, http.client.HTTPException, _ServerError) as failure:
            error = f"{failure or type(failure).__name__}"
            if stream.arrivals:
                error += f" (after {len(stream.arrivals)} events)"
        prompt_tokens = stream.reported("prompt_tokens") or len(self._tokenizer.encode(text))
        generated = stream.reported("completion_tokens")
        if generated is None:
            generated = len(self._tokenizer.encode(stream.text, add_special_tokens=False)) if stream.text else 0
        return Record(prompt_tokens, generated, sent, stream.arrivals, error)

    def _body(self, text: str, new_tokens: int) -> dict[str, Any]:
        prompt: dict[str, Any] = {"prompt": text}
        if self._endpoint == "chat":
            prompt = {"messages": [{"role": "user", "content": text}]}
        settings = {
            "model": self.model,
            "max_tokens": new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return {**settings, **prompt, **({"ignore_eos": True} if self._ignore_eos else {})}

    def _events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Send a request, and yield each event of the stream that answers it, without the [DONE] at its end."""
        connection = self._connect(*self._address, timeout=self._timeout)
        try:
            content = json.dumps(body).encode()
            headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
            connection.request("POST", self._base + PATHS[self._endpoint], content, headers)
            response = connection.getresponse()
            if response.status != 200:
                raise _ServerError(f"HTTP {response.status}: {_error_text(response.read(LONGEST_REPLY))}")
            for line in response:
                if line.startswith(b"data:"):
                    data = line.removeprefix(b"data:").strip()
                    if data == b"[DONE]":
                        return
                    yield _parsed(data)
        finally:
            connection.close()

    def _first_model(self) -> str:
        connection = self._connect(*self._address, timeout=self._timeout)
        try:
            connection.request("GET", f"{self._base}/models")
            response = connection.getresponse()
            content = response.read()
            if response.status != 200:
                raise _ServerError(f"HTTP {response.status}: {_error_text(content)}")
            return str(_parsed(content)["data"][0]["id"])
        except (OSError, http.client.HTTPException, _ServerError, KeyError, IndexError, TypeError) as error:
            raise QwenModelError(
                f"{self.url} does not name its model ({error or type(error).__name__}): is it the address of a server "
                "with OpenAI's API? --model gives the name"
            ) from error
        finally:
            connection.close()


class _Stream:
    """Collect the events of one answer."""

    def __init__(self) -> None:
        self.arrivals: list[float] = []
        self.text = ""
        self._finished = False
        self._usage: dict[str, Any] = {}

    def take(self, event: dict[str, Any]) -> None:
        """Take an event that has just arrived."""
        now = time.perf_counter()
        if event.get("error"):
            raise _ServerError(_error_text(json.dumps(event).encode()))
        if isinstance(event.get("usage"), dict):
            self._usage = event["usage"]
        try:
            for choice in event.get("choices") or ():
                self._take_choice(choice, now)
        except (AttributeError, TypeError) as error:
            raise _ServerError(f"the server sent an event that is not one of the API: {event!r}"[:200]) from error

    def _take_choice(self, choice: dict[str, Any], now: float) -> None:
        delta = choice.get("delta") or {}
        texts = (choice.get("text"), *(delta.get(key) for key in ("content", "reasoning_content", "reasoning")))
        text = next((text for text in texts if text), "")
        if text:
            self.text += text
            self.arrivals.append(now)
        self._finished = self._finished or choice.get("finish_reason") is not None

    def check_end(self) -> None:
        """Raise _ServerError if the stream ended before the answer did, or there was no answer."""
        if not self._finished:
            raise _ServerError("the server closed the connection before the end of the answer")
        if not self.arrivals:
            raise _ServerError("the answer is empty")

    def reported(self, name: str) -> int | None:
        """Return a number of tokens that the server reported; None if it did not."""
        value = self._usage.get(name)
        return value if isinstance(value, int) and value > 0 else None


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise _ServerError(f"the server sent {data[:80]!r} where a JSON object is expected")
    return value


def _error_text(content: bytes) -> str:
    """Return the message of an error that a server sent as JSON, or its text."""
    text = content.decode(errors="replace")
    try:
        value = json.loads(text)
        found = value.get("error", value.get("detail", value))  # "detail": FastAPI's own errors
        return str(found["message"] if isinstance(found, dict) else found)
    except (ValueError, AttributeError, KeyError, RecursionError):
        return text
