"""What a back end is: four functions and a constant, which each module `backends/NAME/back_end.py` has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ..checkpoints.weights import Framework, WeightSpec
from ..common.progress import Progress
from .engine_config import EngineConfig
from .executor import Executor

ReadWeight = Callable[[WeightSpec], Any]
"""Gives a weight of a checkpoint, of any floating-point type, as an array of the back end's `FRAMEWORK`."""


class BackEnd(Protocol):
    """Writes engines and loads them. A module with these names is one."""

    @property
    def FRAMEWORK(self) -> Framework:  # noqa: N802 (a constant of the module)
        """Whose arrays `write_engine` takes: "torch" or "numpy"."""

    def default_dtype(self, checkpoint_dtype: str) -> str:
        """The engine's type where the user names none, for a checkpoint of this type."""

    def versions(self) -> dict[str, str]:
        """What is to be remembered of the software and the GPU that an engine is built with."""

    def write_engine(
        self,
        folder: Path,
        config: EngineConfig,
        read_weight: ReadWeight,
        progress: Progress,
        timing_cache: Path | None = None,
    ) -> list[str]:
        """Write the weights, or what is made of them, to `folder`. Returns what the user should know, if anything.

        timing_cache: file with what a builder that measures has measured; None: a default one, or none.
        """

    def load_executor(self, engine_dir: Path, config: EngineConfig, device: str | None = None) -> Executor:
        """Load an engine on the device of that name; None: the back end's default."""
