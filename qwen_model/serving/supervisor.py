"""Start a server's processes: the engine's and the HTTP processes, and end them together."""

from __future__ import annotations

import ctypes
import gc
import logging
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from ..checkpoints.tokenizer import load_tokenizer
from ..common.errors import QwenModelError
from ..common.log import show_log
from ..engine.session import Session
from ..interface.engine_config import EngineConfig
from .context import Context, ServerLimits
from .generation import ServerModel

LOG = logging.getLogger(__name__)
READY = b"ready"
PR_SET_PDEATHSIG = 1  # linux/prctl.h
BACKLOG = 4096
SHUTDOWN_SECONDS = 30


@dataclass(frozen=True)
class ServerOptions:
    """Hold the options of a server.

    engine_dir: has the engine's config.json and its tokenizer. load: loads the engine, in its own process; a function
    that pickle can name. drain_seconds: how long requests may go on after SIGTERM.
    """

    engine_dir: Path
    name: str
    load: Callable[[], Session]
    host: str
    port: int
    http_processes: int
    api_keys: tuple[str, ...]
    allowed_origins: tuple[str, ...]
    allowed_hosts: tuple[str, ...]
    limits: ServerLimits
    drain_seconds: float
    verbose: bool


def default_http_processes() -> int:
    """Return how many HTTP processes serve an engine that fills a GPU: one for four cores, at most four."""
    return max(1, min(4, (os.cpu_count() or 1) // 4))


def serve(options: ServerOptions) -> int:
    """Run a server until a signal or the end of its engine; return the exit status.

    Raises:
        QwenModelError: the engine cannot be loaded, or the address is not free.
    """
    listener = _listen(options.host, options.port)
    spawn = multiprocessing.get_context("spawn")
    pairs = [socket.socketpair() for _ in range(options.http_processes)]
    engine = start_engine(options.load, [ours for ours, _ in pairs], options.limits.max_waiting, options.verbose)
    secret = os.urandom(16).hex()
    workers = [
        spawn.Process(target=_run_http, args=(options, theirs, listener, secret), name=f"http-{number}")
        for number, (_, theirs) in enumerate(pairs)
    ]
    for worker in workers:
        worker.start()
    for pair in pairs:
        for end in pair:
            end.close()
    address = listener.getsockname()
    print(f"serving {options.name} at http://{_shown_host(address[0])}:{address[1]}", file=sys.stderr, flush=True)
    return _supervise(engine, workers, options.drain_seconds)


def start_engine(
    load: Callable[[], Session], connections: Sequence[socket.socket], max_waiting: int, verbose: bool = False
) -> BaseProcess:
    """Start the engine's process, and wait until it has loaded; it ends when the connections' other ends are closed.

    load: see `ServerOptions`. connections: one to each `EngineClient`; close them here afterwards.

    Raises:
        QwenModelError: the engine cannot be loaded.
    """
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    arguments = (load, connections, max_waiting, verbose, sender)
    engine = spawn.Process(target=_run_engine, args=arguments, name="engine")
    engine.start()
    sender.close()
    _wait_until_loaded(engine, receiver)
    return engine


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise QwenModelError(f"cannot listen on {host}:{port}: {error}") from error
    listener.setblocking(False)
    return listener


def _shown_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _wait_until_loaded(engine: BaseProcess, receiver: Any) -> None:
    """Wait until the engine's process says that it is ready; raise QwenModelError with what it says otherwise."""
    try:
        said = receiver.recv_bytes()
    except EOFError:
        engine.join()
        raise QwenModelError(f"the engine's process ended while it loaded, with status {engine.exitcode}") from None
    if said != READY:
        engine.join()
        raise QwenModelError(said.decode())


def _run_engine(
    load: Callable[[], Session], connections: Sequence[socket.socket], max_waiting: int, verbose: bool, sender: Any
) -> None:
    """Run the engine; the main function of its process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends when the HTTP processes have gone
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    show_log(verbose)
    from .engine_loop import EngineLoop

    try:
        session = load()
        session.device.prepare(session.device.max_sequences)
        loop = EngineLoop(session, connections, max_waiting)
    except QwenModelError as error:
        _say(sender, str(error).encode())
        return
    gc.collect()
    gc.freeze()  # what is loaded stays: a collection need not look at it between two steps
    _say(sender, READY)
    loop.run()


def _say(sender: Any, message: bytes) -> None:
    """Tell the command how loading ended; it may have been interrupted, and then nobody listens."""
    with suppress(OSError):
        sender.send_bytes(message)
    sender.close()


def _end_with_parent() -> None:
    """Let this process get SIGTERM when the command's process ends, however that ends: Linux's PR_SET_PDEATHSIG."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it ended before
        sys.exit(1)


def _run_http(options: ServerOptions, connection: socket.socket, listener: socket.socket, secret: str) -> None:
    """Serve HTTP; the main function of one of the processes that do."""
    _end_with_parent()  # the engine's process ends when all HTTP processes have
    show_log(options.verbose)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection is an open file; often 1024 are allowed
    import uvicorn

    from .app import make_app

    tokenizer = load_tokenizer(options.engine_dir)
    model = ServerModel(options.name, EngineConfig.read(options.engine_dir), tokenizer, int(time.time()))
    context = Context(model, options.limits, options.api_keys, salt=secret)
    app = make_app(context, lambda: context.client.connect(connection), options.allowed_origins, options.allowed_hosts)
    config = uvicorn.Config(
        app,
        log_level="info" if options.verbose else "warning",
        access_log=False,
        timeout_graceful_shutdown=max(1, int(options.drain_seconds)),
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=1 << 16,
        server_header=False,
    )
    logging.getLogger("uvicorn.error").addFilter(_is_no_malformed_request)
    uvicorn.Server(config).run(sockets=[listener])  # in uvloop, where it is installed


def _is_no_malformed_request(record: logging.LogRecord) -> bool:
    """Tell whether a line of uvicorn's is worth showing: what anybody can send must not fill the log."""
    return record.levelno > logging.WARNING or "Invalid HTTP request" not in record.getMessage()


def _supervise(engine: BaseProcess, workers: Sequence[BaseProcess], drain_seconds: float) -> int:
    """Wait for a signal or the end of a process, then end all; return the exit status."""
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        again, stopping = stopping, True
        if not again:
            said = f"ending: running requests have {drain_seconds:g} s; a second signal ends them at once\n"
            os.write(sys.stderr.fileno(), said.encode())
        for worker in workers:
            if worker.pid is not None and worker.is_alive():
                os.kill(worker.pid, signal.SIGINT if again else signal.SIGTERM)  # uvicorn's second SIGINT is at once

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    ended = wait([engine.sentinel, *(worker.sentinel for worker in workers)])
    expected = stopping
    if not expected:
        name = next(each.name for each in (engine, *workers) if each.sentinel in ended)
        LOG.error("the process %s has ended by itself: the server ends, too", name)
        stop(signal.SIGTERM, None)
    limit = time.monotonic() + drain_seconds + SHUTDOWN_SECONDS
    for process in (*workers, engine):  # the engine ends when all HTTP processes have gone
        process.join(max(0.0, limit - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return 0 if expected else 1
