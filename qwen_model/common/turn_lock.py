"""Let threads take turns."""

from __future__ import annotations

import threading
from types import TracebackType


class TurnLock:
    """Lock reentrantly, and fairly: a thread that gives the lock up gets it back only after one that waits for it."""

    def __init__(self) -> None:
        self._lock, self._next = threading.Lock(), threading.Lock()
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        if self._owner != threading.get_ident():
            with self._next:  # is held by the first that waits
                self._lock.acquire()
            self._owner = threading.get_ident()
        self._depth += 1

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self._lock.release()
