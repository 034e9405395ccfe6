"""Talk with a chat model of a server with OpenAI's API, of any make, with the standard library alone."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..common.errors import QwenModelError

LONGEST_ERROR = 1 << 16  # bytes


class PromptTooLongError(QwenModelError):
    """The server says that a conversation is longer than its model takes."""


class ChatClient:
    """Send conversations to /v1/chat/completions of one server."""

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 600.0):
        """Take the server's address, with or without "/v1", and ask it for the name of its model.

        Raises:
            QwenModelError: the address is none, or no such server answers there.
        """
        if not url.startswith(("http://", "https://")):
            raise QwenModelError(f"the URL of a server begins with http:// or https://, not {url!r}")
        self._base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout = timeout
        try:
            with self._open("/models") as response:
                self.model = str(json.load(response)["data"][0]["id"])
        except QwenModelError:  # is a ValueError, too
            raise
        except (ValueError, LookupError, TypeError) as error:
            raise QwenModelError(f"{url} does not name its model: is it a server with OpenAI's API?") from error

    def stream(self, messages: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Iterator[str]:
        """Yield the answer's text piece by piece, with reasoning and tool calls between their tags.

        settings: other fields of the request.

        Raises:
            PromptTooLongError: see there.
            QwenModelError: the server refuses the request, or does not end the answer.
        """
        body = {"model": self.model, "messages": messages, "stream": True, **settings}
        text = _TaggedText()
        try:
            with self._open("/chat/completions", body) as response:
                for line in response:
                    if line.startswith(b"data: {"):
                        yield text.take(_delta(json.loads(line[6:])))
                    elif line.startswith(b"data: [DONE]"):
                        yield text.end()
                        return
        except QwenModelError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise QwenModelError(f"the answer of {self._base} broke off: {error or type(error).__name__}") from error
        raise QwenModelError(f"{self._base} closed the connection before the end of the answer")

    def _open(self, path: str, body: Any = None) -> Any:
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, content, self._headers)
        try:
            return urllib.request.urlopen(request, timeout=self._timeout)
        except urllib.error.HTTPError as error:
            raise _refusal(error.code, error.read(LONGEST_ERROR)) from error
        except (OSError, http.client.HTTPException) as error:
            raise QwenModelError(f"{self._base} cannot be reached: {error}") from error


def _refusal(status: int, content: bytes) -> QwenModelError:
    try:
        error = json.loads(content)["error"]
        kind = PromptTooLongError if error.get("code") == "context_length_exceeded" else QwenModelError
        return kind(f"the server refuses this: {error['message']}")
    except (ValueError, LookupError, TypeError, AttributeError):
        return QwenModelError(f"the server answers with HTTP {status}: {content[:200].decode(errors='replace')}")


def _delta(event: dict[str, Any]) -> dict[str, Any]:
    if event.get("error"):
        raise QwenModelError(f"the server failed: {event['error'].get('message')}")
    choices = event.get("choices") or [{}]
    delta: dict[str, Any] = choices[0].get("delta") or {}
    return delta


class _TaggedText:
    """Write deltas as the model wrote them: reasoning and tool calls between tags."""

    def __init__(self) -> None:
        self._open = ""  # the tag that is open

    def take(self, delta: Mapping[str, Any]) -> str:
        text = ""
        if reasoning := delta.get("reasoning_content") or delta.get("reasoning"):
            text += ("" if self._open else "<think>\n") + reasoning
            self._open = "\n</think>\n\n"
        if content := delta.get("content"):
            text += self.end() + content
        for call in delta.get("tool_calls") or ():
            function = call.get("function") or {}
            if function.get("name"):
                text += f'{self.end()}<tool_call>\n{{"name": {json.dumps(function["name"])}, "arguments": '
                self._open = "}\n</tool_call>\n"
            text += function.get("arguments") or ""
        return text

    def end(self) -> str:
        text, self._open = self._open, ""
        return text
