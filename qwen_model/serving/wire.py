"""Define what the HTTP processes and the engine's process say to each other: frames of MessagePack over a socket."""

from __future__ import annotations

import struct
from typing import Any, Literal

import msgspec

LENGTH = struct.Struct("<I")
"""Begins a frame: the bytes that follow."""


class Add(msgspec.Struct, tag=True, omit_defaults=True):
    """Ask for the continuation of a prompt.

    sampling: the fields of a `SamplingOptions`. draws: number of the sequence among those of one request.
    num_best: also return log-probabilities, and those of this many most likely tokens; None: tokens alone.
    grammar: llguidance's, that the output must follow. salt: prefixes are shared only within the same one.
    parent: the id of another sequence of the same prompt, whose pages it shares; 0: none.
    """

    id: int
    prompt: list[int]
    max_new_tokens: int
    end_token_ids: list[int]
    sampling: dict[str, Any]
    draws: int = 0
    num_best: int | None = None
    grammar: str | None = None
    salt: str = ""
    parent: int = 0


class Score(msgspec.Struct, tag=True, omit_defaults=True):
    """Ask for the log-probability of each token of a prompt but the first, and those of the most likely tokens.

    num_best: so many most likely ones; None: nothing is computed.
    outputs: how many outputs, of the prompt alone, /metrics shall count; 0: others are, for which an `Add` asks.
    """

    id: int
    prompt: list[int]
    num_best: int | None = None
    outputs: int = 0


class Cancel(msgspec.Struct, tag=True, omit_defaults=True):
    """End a sequence; nothing more is said of it. stopped: because of a stop string, which the engine does not see."""

    id: int
    stopped: bool = False


class Ask(msgspec.Struct, tag=True):
    """Ask for the text of /metrics."""

    id: int


Request = Add | Score | Cancel | Ask


class Token(msgspec.Struct, array_like=True):
    """Say the next token of a sequence.

    finish_reason: "stop" or "length" with the last one. best: the most likely tokens and their log-probabilities.
    cached: with the first token, the number of the prompt's tokens that were in the cache already.
    """

    id: int
    token: int
    finish_reason: Literal["stop", "length"] | None = None
    logprob: float | None = None
    best: list[tuple[int, float]] | None = None
    cached: int | None = None


class Failed(msgspec.Struct, tag=True):
    """Say that a request cannot be served, with a status of HTTP and a message for its sender."""

    id: int
    status: int
    message: str


class Scored(msgspec.Struct, tag=True):
    """Answer a `Score`: one entry for each token but the first, or none if nothing was to be computed."""

    id: int
    logprobs: list[float]
    best: list[list[tuple[int, float]]]


class Text(msgspec.Struct, tag=True):
    """Answer an `Ask`."""

    id: int
    text: str


Answer = Failed | Scored | Text


class Frame(msgspec.Struct, array_like=True):
    """Hold what the engine's process says after a step to one of the HTTP processes."""

    tokens: list[Token] = []
    answers: list[Answer] = []


ENCODER = msgspec.msgpack.Encoder()
REQUEST_DECODER = msgspec.msgpack.Decoder(Request)
FRAME_DECODER = msgspec.msgpack.Decoder(Frame)


def framed(message: Any) -> bytes:
    """Return the frame of a message."""
    content = ENCODER.encode(message)
    return LENGTH.pack(len(content)) + content


class Frames:
    """Divide a stream of bytes into the contents of its frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def push(self, data: bytes) -> list[bytes]:
        """Take the next bytes; return the frames that they complete."""
        self._buffer += data
        found = []
        while len(self._buffer) >= LENGTH.size:
            end = LENGTH.size + LENGTH.unpack_from(self._buffer)[0]
            if len(self._buffer) < end:
                break
            found.append(bytes(self._buffer[LENGTH.size : end]))
            del self._buffer[:end]
        return found
