"""Keep the timings of TensorRT's builder in a file, for later builds."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ...common.errors import QwenModelError
from ...common.files import cache_folder, write_whole
from . import compat

LOG = logging.getLogger(__name__)


class TimingCache:
    """Read and write a timing cache: a file that the user named, or the default one, whose problems only cost time.

    `warnings` lists what failed: a cache is no reason to lose an engine.
    """

    def __init__(self, given: Path | None, name: str):
        """Read the file `given`; None: the file called `name` in the user's cache folder, if there is such a folder.

        Raises:
            QwenModelError: the given file exists and cannot be read.
        """
        self.warnings: list[str] = []
        self._given = given is not None
        folder = cache_folder()
        self._path = folder / name if given is None and folder is not None else given
        self._content = b""
        try:
            self._content = b"" if self._path is None else self._path.read_bytes()
        except FileNotFoundError:
            pass
        except OSError as error:
            if self._given:
                raise QwenModelError(f"the timing cache {given} cannot be read: {error.strerror}") from error

    def load_into(self, builder_config: Any) -> None:
        """Give the builder the timings of earlier builds, unless they are of another GPU or TensorRT."""
        if compat.set_timing_cache(builder_config, self._content):
            found = f"{len(self._content):,} bytes of timings are used" if self._content else "no timings yet"
            LOG.info("timing cache %s: %s", self._path or "of this build alone", found)
            return
        what = f"the timing cache {self._path} is damaged, or of another GPU or TensorRT"
        if self._given and self._content:  # it may be a file of something else
            self.warnings.append(f"{what}: it is not changed; give another file, or remove this one")
            self._path = None
        else:
            self.warnings.append(f"{what}: it is replaced")

    def keep(self, builder_config: Any) -> None:
        """Write the builder's timings, whole or not at all."""
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            content = compat.timing_cache_bytes(builder_config)
            write_whole(self._path, content)
            LOG.info("timing cache %s: %s", self._path, _change(len(self._content), len(content)))
        except OSError as error:
            if self._given:
                self.warnings.append(f"the timing cache {self._path} cannot be written: {error.strerror}")


def _change(before: int, after: int) -> str:
    """Say whether the builder had to measure anything, for the log."""
    return "the builder measured nothing new" if before == after else f"now {after:,} bytes, {before:,} before"
