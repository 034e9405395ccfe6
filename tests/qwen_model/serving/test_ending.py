"""Test how a server ends: by signals of any order and number, to the command alone or to all its processes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from qwen_model.serving.engine_client import EngineClient
from qwen_model.serving.stop_signals import StopSignals

from .server_process import ServerProcess, child_processes

AT_ONCE = 10
"""Seconds, far fewer than running requests have."""
ENDLESS = {"prompt": "x", "max_tokens": 500, "n": 32, "stream": True, "ignore_eos": True}
SLOW_TO_LOAD = """
import sys, time
from functools import partial
from pathlib import Path
from qwen_model.command_line import run_command
from qwen_model.serving.context import ServerLimits
from qwen_model.serving.supervisor import ServerOptions, serve
load = partial(time.sleep, 600)
options = ServerOptions(Path(), "slow", load, "127.0.0.1", 0, 1, (), (), (), ServerLimits(), 30.0, False)
run_command(lambda arguments: sys.exit(serve(options)))
"""
IMPATIENT = """
from qwen_model.command_line import run_command
from qwen_model.serve import main
from qwen_model.serving import engine_loop
engine_loop.MOST_UNSENT, engine_loop.MOST_UNREAD_SECONDS = 1 << 18, 0.5  # in the processes that are started, too
if __name__ == "__main__":
    run_command(main)
"""


@pytest.mark.parametrize("numbers", [(signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)])
def test_signals_of_one_instant_come_one_by_one(numbers: tuple[int, ...]) -> None:
    before = [signal.getsignal(number) for number in numbers]
    reader, writer = os.pipe()
    os.write(writer, b"x")
    with StopSignals() as signals:
        assert signals.wait([reader]) == [reader]
        for number in numbers:
            os.kill(os.getpid(), number)
        assert signals.wait([reader]) is None
        assert signals.wait([reader]) is None
        assert signals.wait([], 0.0) == []
    assert [signal.getsignal(number) for number in numbers] == before
    os.close(reader)
    os.close(writer)


def test_an_http_process_hears_that_the_engine_has_given_it_up() -> None:
    async def run() -> bool:
        ours, theirs = socket.socketpair()
        client, ended = EngineClient(), asyncio.Event()
        client.on_end = ended.set
        await client.connect(ours)
        assert client.alive
        theirs.close()
        await asyncio.wait_for(ended.wait(), AT_ONCE)
        return client.alive

    assert not asyncio.run(run())


def test_an_ignored_hangup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.wait([], 0.0) == []
    finally:
        signal.signal(signal.SIGHUP, before)


def _send(process: subprocess.Popen[str], number: int, to_all: bool) -> None:
    """Send a signal to a command, or as a terminal does to all processes of its group."""
    (os.killpg if to_all else os.kill)(process.pid, number)


def _are_gone(processes: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in processes)


def _wait(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + AT_ONCE
    while not (value := found()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return value


@contextmanager
def _streaming(
    engine_dir: Path, *server_options: str, program: Sequence[str] = ("-m", "qwen_model.serve"), **options: Any
) -> Iterator[tuple[ServerProcess, Iterator[str]]]:
    """Yield a server with a request that takes long, and the lines of its stream; no process may be left at the end."""
    server = ServerProcess(engine_dir, *server_options, program=program)
    children = list(server.children())
    try:
        with server.http.stream("POST", "/v1/completions", json={**ENDLESS, **options}) as response:
            lines = filter(None, response.iter_lines())
            next(lines)
            yield server, lines
        assert _wait(lambda: _are_gone(children)), "processes are left"
        assert "Traceback" not in server.log
    finally:
        server.process.kill()


@pytest.mark.server
@pytest.mark.parametrize("to_all", [False, True], ids=["command", "group"])
@pytest.mark.parametrize("numbers", [(signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)])
def test_a_second_signal_of_the_same_instant_ends_at_once(
    packaged_engine: Path, numbers: tuple[int, ...], to_all: bool
) -> None:
    with _streaming(packaged_engine) as (server, _):
        for number in numbers:
            _send(server.process, number, to_all)
        assert server.process.wait(AT_ONCE) == 0


@pytest.mark.server
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_same_signal_again_ends_at_once(packaged_engine: Path, number: int) -> None:
    with _streaming(packaged_engine) as (server, lines):
        _send(server.process, number, to_all=False)
        assert server.wait_for(lambda: "ending: running requests have 30 s" in server.log)
        next(lines)  # they do go on
        _send(server.process, number, to_all=False)
        assert server.process.wait(AT_ONCE) == 0


@pytest.mark.server
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_one_signal_to_all_processes_lets_requests_end(packaged_engine: Path, number: int) -> None:
    with _streaming(packaged_engine, max_tokens=100, n=4) as (server, lines):
        _send(server.process, number, to_all=True)
        rest = list(lines)
        assert rest[-1] == "data: [DONE]"
        reasons = [json.loads(line.removeprefix("data: "))["choices"][0]["finish_reason"] for line in rest[:-1]]
        assert reasons.count("length") == 4
        assert server.process.wait(AT_ONCE) == 0


@pytest.mark.server
def test_a_signal_ends_a_server_whose_log_nobody_reads(packaged_engine: Path) -> None:
    command = [sys.executable, "-m", "qwen_model.serve", "--engine-dir", str(packaged_engine), "--port", "0"]
    with subprocess.Popen([*command, "--device", "cpu"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        url = re.search(r"at (http://\S+)", process.stderr.readline())
        assert url is not None
        assert httpx.get(f"{url[1]}/health", timeout=60).status_code == 200
        process.stderr.close()
        process.terminate()
        try:
            assert process.wait(AT_ONCE) == 0
        finally:
            process.kill()


@pytest.mark.server
def test_http_processes_that_do_not_read_end_the_server(packaged_engine: Path, tmp_path: Path) -> None:
    """Only the one with the stream has anything to read: the other one learns of it by the end of the server."""
    script = tmp_path / "impatient.py"
    script.write_text(IMPATIENT)
    options = {"n": 64, "logprobs": 20}
    with _streaming(packaged_engine, "--http-processes", "2", program=[str(script)], **options) as (server, lines):
        workers = [pid for pid, part in server.children().items() if part == "http"]
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        said = server.wait_for(lambda: "does not read" in server.log)
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
        assert said, server.log
        assert "the engine has ended" in list(lines)[-2]
        assert server.process.wait(AT_ONCE) == 1


# While the engine loads.


@contextmanager
def _loading() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Yield a command whose engine takes very long to load, and the engine's process; none may be left at the end."""
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_TO_LOAD], stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        engine = _wait(lambda: child_processes(process.pid, "spawn_main"))[0]
        try:
            yield process, engine
            assert _wait(lambda: _are_gone([engine])), "the engine goes on to load"
            assert process.stderr is not None
            assert "Traceback" not in process.stderr.read()
        finally:
            for pid in (process.pid, engine):
                if Path(f"/proc/{pid}").exists():
                    os.kill(pid, signal.SIGKILL)


@pytest.mark.server
@pytest.mark.parametrize("to_all", [False, True], ids=["command", "group"])
@pytest.mark.parametrize("after", [0.0, 2.0])  # also while the engine's process is born
@pytest.mark.parametrize(
    "numbers", [(signal.SIGINT,), (signal.SIGTERM,), (signal.SIGHUP,), (signal.SIGINT, signal.SIGTERM)]
)
def test_a_signal_ends_a_server_that_loads(numbers: tuple[int, ...], to_all: bool, after: float) -> None:
    with _loading() as (process, _):
        time.sleep(after)
        for number in numbers:
            _send(process, number, to_all)
        assert process.wait(AT_ONCE) == 0


@pytest.mark.server
def test_the_command_is_killed_while_the_engine_loads() -> None:
    with _loading() as (process, _):
        time.sleep(2)
        process.kill()
        assert process.wait(AT_ONCE) == -signal.SIGKILL
