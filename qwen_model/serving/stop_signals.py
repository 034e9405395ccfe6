"""Receive the signals that end a server one by one, and keep them from its other processes."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Mean that a command shall end. A terminal, and some supervisors, send them to all processes of a command at once."""


class StopSignals:
    """Receive `STOP_SIGNALS` within the context, in the main thread; SIGHUP not where it was ignored.

    Python runs handlers between any two instructions, and in the order of the signals' numbers where two have come. So
    the handlers do nothing here: each signal leaves a byte in a socket, which `wait` watches beside the processes.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def __enter__(self) -> StopSignals:
        hangup_is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # by nohup
        numbers = [number for number in STOP_SIGNALS if number != signal.SIGHUP or not hangup_is_ignored]
        self._wakeup_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._handlers_before = {number: signal.signal(number, _do_nothing) for number in numbers}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._reader.close()
        self._writer.close()

    def wait(self, others: Sequence[Any], timeout: float | None = None) -> list[Any] | None:
        """Wait for a signal, or for what `multiprocessing.connection.wait` takes; return None for a signal.

        Else return which of the others are ready: none of them, if the seconds of `timeout` are over.
        """
        ready = wait([self._reader, *others], timeout)
        try:
            self._reader.recv(1)
        except BlockingIOError:
            return ready
        return None  # also where it came together with what ends because of it


def _do_nothing(number: int, frame: FrameType | None) -> None:
    pass


@contextmanager
def starting_deaf() -> Iterator[None]:
    """Block `STOP_SIGNALS` in the processes that this thread starts within the context, from their birth on.

    So the command alone decides, and no process ends half-started; see `hear_sigterm`.
    """
    resource_tracker.ensure_running()  # multiprocessing would start it with the first process, and unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def hear_sigterm() -> None:
    """Unblock the signal by which the command ends a process, in this one: it does now what its handler says."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))
