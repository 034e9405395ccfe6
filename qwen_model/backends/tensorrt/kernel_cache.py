"""Keep the kernels that TensorRT-RTX compiles just in time in a file, so that later processes need not."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from ...common.files import write_whole


class KernelCache:
    """Own an `IRuntimeCache`, and read and write its file. What is wrong with the file only costs time."""

    def __init__(self, cache: Any, path: Path | None):
        """Fill the cache from the file, unless it is of another GPU, driver or TensorRT-RTX; None: keep nothing."""
        self.cache = cache
        self._path = path
        self._kept = b""
        with suppress(OSError):
            content = b"" if path is None else path.read_bytes()
            if content and cache.deserialize(content):
                self._kept = content

    def keep(self) -> None:
        """Write the file, whole or not at all, if there is anything new."""
        if self._path is None:
            return
        content = bytes(self.cache.serialize())
        if content == self._kept:
            return
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, content)
            self._kept = content
