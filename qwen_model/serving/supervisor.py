"""Start a server's processes: the engine's and the HTTP processes, and end them together."""

from __future__ import annotations

import ctypes
import gc
import logging
import math
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import NoReturn

from ..checkpoints.tokenizer import load_tokenizer
from ..common.errors import QwenModelError
from ..common.log import show_log
from ..engine.session import Session
from ..interface.engine_config import EngineConfig
from .context import Context, ServerLimits
from .generation import ServerModel
from .stop_signals import StopSignals, hear_sigterm, starting_deaf

LOG = logging.getLogger(__name__)
READY = b"ready"
PR_SET_PDEATHSIG = 1  # linux/prctl.h
BACKLOG = 4096
SHUTDOWN_SECONDS = 30
INTERRUPTED_SECONDS = 5
"""An engine that loads has so many to end by itself, which it cannot within a call of C++."""


@dataclass(frozen=True)
class ServerOptions:
    """Hold the options of a server.

    engine_dir: has the engine's config.json and its tokenizer. load: loads the engine, in its own process; a function
    that pickle can name. drain_seconds: how long requests may go on after a first signal.
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
    """Run a server until a signal or the end of its engine, in the main thread; return the exit status.

    The first SIGINT, SIGTERM or SIGHUP lets running requests end, the second one ends all at once. While the engine
    loads, the first one ends it.

    Raises:
        QwenModelError: the engine cannot be loaded, or the address is not free.
    """
    listener = _listen(options.host, options.port)
    pairs = [socket.socketpair() for _ in range(options.http_processes)]
    with StopSignals() as signals, ExitStack() as started:  # whatever happens, no process is left
        connections = [ours for ours, _ in pairs]
        engine, receiver = _begin_engine(options.load, connections, options.limits.max_waiting, options.verbose)
        started.callback(_kill, engine)
        if signals.wait([receiver]) is None:
            engine.terminate()
            signals.wait([engine.sentinel], INTERRUPTED_SECONDS)
            return 0
        _finish_loading(engine, receiver)
        workers = _http_processes(options, [theirs for _, theirs in pairs], listener)
        for worker in workers:
            with starting_deaf():
                worker.start()
            started.callback(_kill, worker)
        for pair in pairs:
            for end in pair:
                end.close()
        address = listener.getsockname()
        print(f"serving {options.name} at http://{_shown_host(address[0])}:{address[1]}", file=sys.stderr, flush=True)
        return _supervise(signals, engine, workers, options.drain_seconds)


def start_engine(
    load: Callable[[], Session], connections: Sequence[socket.socket], max_waiting: int, verbose: bool = False
) -> BaseProcess:
    """Start the engine's process, and wait until it has loaded; it ends when the connections' other ends are closed.

    load: see `ServerOptions`. connections: one to each `EngineClient`; close them here afterwards.

    Raises:
        QwenModelError: the engine cannot be loaded.
    """
    engine, receiver = _begin_engine(load, connections, max_waiting, verbose)
    _finish_loading(engine, receiver)
    return engine


def _begin_engine(
    load: Callable[[], Session], connections: Sequence[socket.socket], max_waiting: int, verbose: bool
) -> tuple[BaseProcess, Connection]:
    """Start the engine's process; return it, and what says how loading ended."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    arguments = (load, connections, max_waiting, verbose, sender)
    engine = spawn.Process(target=_run_engine, args=arguments, name="engine")
    with starting_deaf():
        engine.start()
    sender.close()
    return engine, receiver


def _finish_loading(engine: BaseProcess, receiver: Connection) -> None:
    """Wait until the engine's process says that it is ready; raise QwenModelError with what it says otherwise."""
    try:
        said = receiver.recv_bytes()
    except EOFError:
        engine.join()
        raise QwenModelError(f"the engine's process ended while it loaded, with status {engine.exitcode}") from None
    if said != READY:
        engine.join()
        raise QwenModelError(said.decode())


def _http_processes(
    options: ServerOptions, connections: Sequence[socket.socket], listener: socket.socket
) -> list[BaseProcess]:
    """Make the HTTP processes, one for each connection to the engine; none is started."""
    spawn = multiprocessing.get_context("spawn")
    secret = os.urandom(16).hex()
    return [
        spawn.Process(target=_run_http, args=(options, connection, listener, secret), name=f"http-{number}")
        for number, connection in enumerate(connections)
    ]


def _kill(process: BaseProcess) -> None:
    """End a process that may have ended."""
    process.kill()
    process.join()


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


def _run_engine(
    load: Callable[[], Session],
    connections: Sequence[socket.socket],
    max_waiting: int,
    verbose: bool,
    sender: Connection,
) -> None:
    """Run the engine; the main function of its process."""
    signal.signal(signal.SIGTERM, _exit)
    hear_sigterm()
    _end_with_parent()
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
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from now on it ends when the HTTP processes have gone
    _say(sender, READY)
    loop.run()


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    """Raise SystemExit, once, so that half-written files are removed."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def _say(sender: Connection, message: bytes) -> None:
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
    hear_sigterm()
    _end_with_parent()
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
        timeout_graceful_shutdown=math.ceil(options.drain_seconds),  # uvicorn's are whole
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=1 << 16,
        server_header=False,
    )
    logging.getLogger("uvicorn.error").addFilter(_is_no_malformed_request)
    server = uvicorn.Server(config)

    def end() -> None:
        """End, and with that the whole server: without the engine this process would answer with errors for ever."""
        server.should_exit = True

    context.client.on_end = end
    server.run(sockets=[listener])  # in uvloop, where it is installed


def _is_no_malformed_request(record: logging.LogRecord) -> bool:
    """Tell whether a line of uvicorn's is worth showing: what anybody can send must not fill the log."""
    return record.levelno > logging.WARNING or "Invalid HTTP request" not in record.getMessage()


def _supervise(signals: StopSignals, engine: BaseProcess, workers: Sequence[BaseProcess], drain_seconds: float) -> int:
    """Wait for a signal or the end of a process, then let requests end; return the exit status.

    What still runs at the return, after a second signal or when the time is over, has to be killed.
    """
    processes = (engine, *workers)  # the first that has ended has ended the others
    ended = signals.wait([process.sentinel for process in processes])
    if ended is None:
        said = f"ending: running requests have {drain_seconds:g} s; a second signal ends them at once\n"
        with suppress(OSError):  # nobody may read it
            os.write(sys.stderr.fileno(), said.encode())
    else:
        name = next(process.name for process in processes if process.sentinel in ended)
        LOG.error("the process %s has ended by itself: the server ends, too", name)
    for worker in workers:
        worker.terminate()
    limit = time.monotonic() + drain_seconds + SHUTDOWN_SECONDS
    for process in (*workers, engine):  # the engine ends when all HTTP processes have gone
        if signals.wait([process.sentinel], max(0.0, limit - time.monotonic())) is None:
            break
    return 0 if ended is None else 1
