"""Define what a back end is: the functions and the constant of each module `backends/NAME/back_end.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ..checkpoints.tensor_files import Framework
from ..checkpoints.weights import WeightSpec
from ..common.progress import Progress, no_progress
from .device import Device
from .engine_config import EngineConfig, GemmKernels
from .memory import GPU_MEMORY_UTILIZATION
from .probe import Probe

ReadWeight = Callable[[WeightSpec], Any]
"""Read a weight of a checkpoint, of any floating-point type, as an array of the back end's `FRAMEWORK`."""


class BackEnd(Protocol):
    """Write and load engines. A module with these names is a back end."""

    @property
    def FRAMEWORK(self) -> Framework:  # noqa: N802 (a constant of the module)
        """Return the library whose arrays `write_engine` takes."""

    def default_dtype(self, checkpoint_dtype: str) -> str:
        """Return the engine's type where the user names none, for a checkpoint of this type."""

    def versions(self, compute_capabilities: tuple[str, ...] = ()) -> dict[str, str]:
        """Return names and versions of the software, and of the GPU where an engine depends on it.

        compute_capabilities: see `EngineConfig`.
        """

    def choose_kernels(self, config: EngineConfig, progress: Progress) -> GemmKernels:
        """Return the GEMM kernels to build into an engine, measured on this GPU; {}: the engine chooses as it loads."""

    def write_engine(
        self,
        folder: Path,
        config: EngineConfig,
        read_weight: ReadWeight,
        progress: Progress,
        timing_cache: Path | None = None,
    ) -> list[str]:
        """Write the weights, or the plan built from them, to `folder`, and return warnings for the user.

        timing_cache: file with the measurements of a builder that times kernels; None: the back end's default.

        Raises:
            QwenModelError: the engine cannot be built.
            OSError: `folder` cannot be written.
        """

    def load_device(
        self,
        engine_dir: Path,
        config: EngineConfig,
        device: str | None = None,
        tuning: bool = True,
        progress: Progress = no_progress,
        *,
        gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION,
        deterministic: bool = False,
    ) -> Device:
        """Load an engine on the device of that name; None: the back end's default.

        tuning: measure GEMM kernels that the engine has no choice of yet; if not, rules choose them.
        gpu_memory_utilization: see `interface.memory`.
        deterministic: what is computed for a sequence has the same bits whatever other sequences are computed with it.

        Raises:
            QwenModelError: the engine is damaged, or the device does not exist or has too little memory.
        """

    def load_probe(
        self,
        engine_dir: Path,
        config: EngineConfig,
        device: str | None = None,
        read_weight: ReadWeight | None = None,
        progress: Progress = no_progress,
    ) -> Probe:
        """Load an engine to be run operation by operation.

        read_weight: reads the checkpoint's weights, for a back end whose engine does not show its results.
        progress: of building what shows them.

        Raises:
            QwenModelError: as `load_device`; or `read_weight` is needed.
        """
