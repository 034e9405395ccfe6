"""Test the engine's process beside HTTP processes that read slowly, or not at all."""

from __future__ import annotations

import dataclasses
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import qwen_model
from qwen_model import SamplingOptions
from qwen_model.serving import engine_loop
from qwen_model.serving.engine_loop import EngineLoop
from qwen_model.serving.wire import FRAME_DECODER, Add, Ask, Frame, Frames, Text, framed

SECONDS = 60
SEQUENCES, TOKENS = 16, 100


class HttpProcess:
    """Stand for an HTTP process: it sends requests, and reads when it is told to."""

    def __init__(self) -> None:
        self.engine_end, self._connection = socket.socketpair()
        self._connection.settimeout(SECONDS)
        self.engine_end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least that Linux gives
        self._frames = Frames()

    def ask_for_tokens(self) -> None:
        """Send the requests for `SEQUENCES` outputs of `TOKENS` tokens, with what makes them large."""
        sampling = {**dataclasses.asdict(SamplingOptions()), "logit_bias": {}}
        for number in range(1, SEQUENCES + 1):
            self._connection.sendall(framed(Add(number, [1, 2, 3], TOKENS, [], sampling, num_best=20)))

    def generated_tokens(self) -> int:
        """Return how many tokens the engine has generated for all, from its metrics."""
        self._connection.sendall(framed(Ask(1 << 20)))
        text = next(answer.text for frame in self.frames() for answer in frame.answers if isinstance(answer, Text))
        return int(float(text.partition("\nvllm:generation_tokens_total ")[2].split()[0]))

    def frames(self) -> Iterator[Frame]:
        """Yield what the engine says, until it has closed the connection."""
        while data := self._connection.recv(1 << 18):
            yield from map(FRAME_DECODER.decode, self._frames.push(data))

    def read_tokens(self) -> int:
        """Read until all outputs have ended or the connection is closed; return the number of tokens."""
        left, count = SEQUENCES, 0
        for frame in self.frames():
            count += len(frame.tokens)
            left -= sum(token.finish_reason == "length" for token in frame.tokens)
            if left == 0:
                break
        return count

    def close(self) -> None:
        """End the connection."""
        self._connection.close()


@pytest.fixture
def run_loop(packaged_engine: Path) -> Iterator[Callable[[], tuple[HttpProcess, HttpProcess]]]:
    """Start a loop between an engine and two HTTP processes; it must have ended when they have."""
    processes = HttpProcess(), HttpProcess()
    session = qwen_model.load_engine(packaged_engine, device="cpu")
    loop = EngineLoop(session, [process.engine_end for process in processes], max_waiting=SEQUENCES)
    thread = threading.Thread(target=loop.run, daemon=True)

    def start() -> tuple[HttpProcess, HttpProcess]:
        thread.start()
        return processes

    yield start
    for process in processes:
        process.close()
    thread.join(SECONDS)
    assert not thread.is_alive()


def test_the_engine_waits_for_an_http_process_that_is_slower(
    run_loop: Callable[[], tuple[HttpProcess, HttpProcess]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_loop, "MOST_UNSENT", 0)
    slow, other = run_loop()
    slow.ask_for_tokens()
    before, generated = -1, 0
    while before < generated or generated == 0:
        time.sleep(0.2)
        before, generated = generated, other.generated_tokens()
    assert generated < SEQUENCES * TOKENS
    assert slow.read_tokens() == SEQUENCES * TOKENS


def test_an_http_process_that_does_not_read_is_given_up(
    run_loop: Callable[[], tuple[HttpProcess, HttpProcess]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(engine_loop, "MOST_UNSENT", 0)
    monkeypatch.setattr(engine_loop, "MOST_UNREAD_SECONDS", 0.2)
    silent, other = run_loop()
    silent.ask_for_tokens()
    with caplog.at_level(logging.ERROR):
        deadline = time.monotonic() + SECONDS
        while "does not read" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.02)
    assert "does not read" in caplog.text
    monkeypatch.setattr(engine_loop, "MOST_UNREAD_SECONDS", SECONDS)
    other.ask_for_tokens()
    assert other.read_tokens() == SEQUENCES * TOKENS  # the engine goes on
    assert silent.read_tokens() < SEQUENCES * TOKENS
