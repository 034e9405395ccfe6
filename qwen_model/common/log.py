"""Log through Python's logging, under the names `qwen_model` and `qwen_plugins`; only the commands add a handler."""

from __future__ import annotations

import logging
import os
import resource
import sys
import time
from typing import TextIO

from .errors import QwenModelError

VARIABLE = "QWEN_MODEL_LOG"
LEVELS = ("debug", "info", "warning", "error", "critical")
PACKAGES = ("qwen_model", "qwen_plugins")
TENSORRT = "qwen_model.tensorrt"
"""The logger of TensorRT's own messages. Commands show them only where a level was asked for."""


class _StandardError(logging.StreamHandler):
    """Write to what `sys.stderr` is when a record comes, since it may have been replaced."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr


class _Format(logging.Formatter):
    """Begin warnings and errors with their level alone, and details with the time and where they come from."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        text, level = super().format(record), record.levelname.lower()
        if record.levelno >= logging.WARNING and record.name != TENSORRT:
            return f"{level}: {text}"
        return f"{self.formatTime(record, '%H:%M:%S')}.{int(record.msecs):03} {level} {record.name}: {text}"


_HANDLER = _StandardError()
_HANDLER.setFormatter(_Format())


def show_log(verbose: bool = False) -> None:
    """Show the log on standard error, from the level on that QWEN_MODEL_LOG names; "warning" if it is not set.

    verbose: show "info" and all above it, even if QWEN_MODEL_LOG names a higher level.

    Raises:
        QwenModelError: QWEN_MODEL_LOG is no level.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked and asked.lower() not in LEVELS:
        raise QwenModelError(f"{VARIABLE} must be one of {', '.join(LEVELS)}, not {asked!r}")
    level: int = getattr(logging, (asked or "warning").upper())
    level = min(level, logging.INFO) if verbose else level
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.addHandler(_HANDLER)  # only once, however often this is called
    # Our errors quote what TensorRT said; on its own, a part of what it says would only alarm.
    logging.getLogger(TENSORRT).setLevel(level if asked or verbose else logging.CRITICAL + 1)


class Stopwatch:
    """Log how long the phases of some work take, at the level "info"."""

    def __init__(self, logger: logging.Logger):
        self._logger = logger
        self._start = time.perf_counter()

    def lap(self, phase: str, num_bytes: int | None = None) -> None:
        """Log the seconds since the last lap, and the process's peak memory; `num_bytes`: what the phase handled."""
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        if not self._logger.isEnabledFor(logging.INFO):
            return
        size = "" if num_bytes is None else f"{format_bytes(num_bytes)} in "
        self._logger.info("%s: %s%.2f s, peak memory %s", phase, size, seconds, format_bytes(_peak_bytes()))


def format_bytes(num_bytes: int) -> str:
    """Return a number of bytes in MiB or GiB."""
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:.2f} GiB"


def _peak_bytes() -> int:
    """Return the most memory that the process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
