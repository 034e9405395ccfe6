"""Keep the times of GEMM kernels in a file of the user's cache folder, for the same GPU and libraries."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.errors import QwenModelError
from ..common.files import cache_folder, read_json_object, write_whole
from .linear_layers import LinearShape

FORMAT = "qwen_model.gemm_timings"
VERSION = 1
LOG = logging.getLogger(__name__)

Microseconds = dict[str, float]
"""The time of each kernel by its name; empty where none could be measured."""


class GemmTimings:
    """Hold measured times by the shape of a linear layer and the rows of x, and keep them in a file.

    A file holds the times of one environment: GPU, driver, cuBLASLt and version of the kernels. What is wrong with it
    is logged and costs a new measurement, never an error.
    """

    def __init__(self, environment: Mapping[str, str | int], folder: Path | None):
        """Read the environment's file in `folder`; None: there is no such folder, and nothing is kept."""
        self._environment = dict(environment)
        name = "-".join(re.sub(r"\W+", "_", str(value)) for value in environment.values())
        self._path = None if folder is None else folder / f"gemm-{name}.json"
        self._times = self._read()
        self._changed = False

    def get(self, shape: LinearShape, rows: int) -> Microseconds | None:
        """Return the times of this shape and number of rows; None: they have not been measured."""
        return self._times.get(shape.text, {}).get(rows)

    def put(self, shape: LinearShape, rows: int, microseconds: Microseconds) -> None:
        """Add what was measured."""
        self._times.setdefault(shape.text, {})[rows] = microseconds
        self._changed = True

    def keep(self) -> None:
        """Write the file, whole or not at all, together with what another process has added to it meanwhile."""
        if self._path is None or not self._changed:
            return
        for shape, by_rows in self._read().items():
            self._times[shape] = {**by_rows, **self._times.get(shape, {})}
        content = {
            "format": FORMAT,
            "version": VERSION,
            "environment": self._environment,
            "microseconds": self._times,
        }
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, (json.dumps(content, indent=1) + "\n").encode())
        except OSError as error:
            LOG.warning("the times of GEMM kernels cannot be kept in %s: %s", self._path, error.strerror)
        self._changed = False

    def _read(self) -> dict[str, dict[int, Microseconds]]:
        if self._path is None or not self._path.exists():
            return {}
        try:
            return self._parse(read_json_object(self._path))
        except (QwenModelError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            LOG.warning("%s is damaged and will be replaced: %s", self._path, error)
            return {}

    def _parse(self, content: Mapping[str, Any]) -> dict[str, dict[int, Microseconds]]:
        header = (content["format"], content["version"], content["environment"])
        if header != (FORMAT, VERSION, self._environment):
            raise ValueError("it was written by another version, or for another GPU")
        found: dict[str, dict[int, Microseconds]] = {}
        for shape, by_rows in content["microseconds"].items():
            for rows, times in by_rows.items():
                found.setdefault(shape, {})[int(rows)] = {name: _time(value) for name, value in times.items()}
        return found


def _time(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
        raise ValueError(f"a time must be a positive number of microseconds, not {value!r}")
    return float(value)


def user_timings(environment: Mapping[str, str | int]) -> GemmTimings:
    """Return the times in the user's cache folder."""
    return GemmTimings(environment, cache_folder())
