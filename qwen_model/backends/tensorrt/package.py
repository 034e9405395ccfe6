"""Hide what differs between TensorRT 8.6, 10, 11 and TensorRT-RTX in loading and running engines."""

from __future__ import annotations

import importlib
import logging
import statistics
from collections import deque
from functools import cache
from typing import Any

from ...common.errors import OutOfMemoryError
from ...common.files import cache_folder
from ...common.log import TENSORRT
from .kernel_cache import KernelCache

PLAN = "model.plan"
"""The name of the plan in an engine's folder."""
TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}


@cache
def package(name: str) -> Package:
    """Return the installed package of that name, a key of `TITLES`: one object for a process, as its log must be."""
    return Package(name)


class Package:
    """Hold a package's module, `trt`, and the log of all that this process does with it."""

    def __init__(self, name: str):
        """Import the package."""
        self.name = name
        self.title = TITLES[name]
        self.trt: Any = importlib.import_module(name)
        self.version = str(self.trt.__version__)
        self.log = _new_log(self.trt)
        self._kernel_caches: dict[str, KernelCache] = {}  # of TensorRT-RTX, by the GPU's name

    @property
    def is_rtx(self) -> bool:
        """Tell whether this is TensorRT-RTX, which compiles kernels just in time."""
        return self.name == "tensorrt_rtx"

    def dtypes(self) -> dict[str, Any]:
        """Return the floating-point types that there are, by name."""
        found = {"float32": self.trt.float32, "float16": self.trt.float16}
        return {**found, "bfloat16": self.trt.bfloat16} if hasattr(self.trt, "bfloat16") else found

    def data_type(self, name: str) -> Any:
        """Return "int32" or a floating-point type as `DataType`."""
        return self.trt.int32 if name == "int32" else self.dtypes()[name]

    def register_own_plugins(self) -> None:
        """Register the plug-ins that come with the package, which plans of others may have."""
        if hasattr(self.trt, "init_libnvinfer_plugins"):
            self.trt.init_libnvinfer_plugins(self.log, "")

    def refusal(self, what: str) -> Exception:
        """Return the exception to raise, with the log: OutOfMemoryError if memory ran out, else RuntimeError."""
        said = self.log.take()
        if ran_out_of_memory(said):
            return OutOfMemoryError(f"the GPU's memory ran out; use a smaller batch or engine. {what}:\n{said}")
        return RuntimeError(f"{what}:\n{said}")

    def runtime_config(self, engine: Any, gpu: str) -> Any:
        """Return what the contexts of an engine are created with in TensorRT-RTX; None in TensorRT.

        gpu: name of the current device, whose compiled kernels are kept in a file.
        """
        if not self.is_rtx:
            return None
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        # Its own kernels only gather rows: not worth compiling them for each length of a prompt.
        config.dynamic_shapes_kernel_specialization_strategy = self.trt.DynamicShapesKernelSpecializationStrategy.NONE
        if gpu not in self._kernel_caches:
            folder, name = cache_folder(), f"tensorrt-rtx-{self.version}-{gpu.replace(' ', '-')}.kernels"
            path = None if folder is None else folder / name
            self._kernel_caches[gpu] = KernelCache(config.create_runtime_cache(), path)
        config.set_runtime_cache(self._kernel_caches[gpu].cache)
        return config

    def keep_kernels(self) -> None:
        """Write what TensorRT-RTX has compiled to the user's cache folder."""
        for kernels in self._kernel_caches.values():
            kernels.keep()

    def create_context(
        self, engine: Any, profile: int, address: int, num_bytes: int, stream: int, runtime_config: Any = None
    ) -> Any:
        """Create an execution context of a profile in the caller's device memory.

        runtime_config: from `runtime_config`.

        Contexts that run on one stream may share that memory.
        """
        if runtime_config is not None:
            context = engine.create_execution_context(runtime_config)
        elif hasattr(self.trt, "ExecutionContextAllocationStrategy"):
            context = engine.create_execution_context(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        else:
            context = engine.create_execution_context_without_device_memory()
        if context is None or not context.set_optimization_profile_async(profile, stream):
            raise self.refusal(f"{self.title} made no execution context")
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(address, num_bytes)
        else:
            context.device_memory = address
        return context

    def layer_times(self) -> Any:
        """Return an `IProfiler` that collects the times which a context reports for its layers."""

        class LayerTimes(self.trt.IProfiler):  # type: ignore[name-defined]
            def __init__(self) -> None:
                super().__init__()
                self._times: dict[str, list[float]] = {}

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                """Record the milliseconds of a layer; TensorRT calls this for each layer of each run."""
                self._times.setdefault(layer_name, []).append(ms)

            def medians(self) -> dict[str, float]:
                """Return the median milliseconds of each layer over all runs but the first."""
                return {name: statistics.median(times[1:]) for name, times in self._times.items()}

        return LayerTimes()


def _new_log(trt: Any) -> Any:
    levels = {
        trt.ILogger.INTERNAL_ERROR: logging.CRITICAL,
        trt.ILogger.ERROR: logging.ERROR,
        trt.ILogger.WARNING: logging.WARNING,
        trt.ILogger.INFO: logging.INFO,
        trt.ILogger.VERBOSE: logging.DEBUG,
    }

    class Log(trt.ILogger):
        """Keep TensorRT's last errors and warnings, and pass all its messages on to Python's logging."""

        def __init__(self) -> None:
            super().__init__()
            self.messages: deque[str] = deque(maxlen=100)
            self._logger = logging.getLogger(TENSORRT)
            self._last = ""

        def log(self, severity: Any, message: str) -> None:
            """Pass a message on, and keep it if its severity is WARNING or higher."""
            if message != self._last:  # 8.6 repeats some of its warnings for every tensor
                self._logger.log(levels.get(severity, logging.DEBUG), "%s", message)
            self._last = message
            if severity <= trt.ILogger.WARNING:
                self.messages.append(message)

        def take(self) -> str:
            """Return the last messages since the last call, at most 8, and clear them."""
            text = "\n".join(list(self.messages)[-8:])
            self.messages.clear()
            return text or "TensorRT said nothing"

    return Log()


def ran_out_of_memory(messages: str) -> bool:
    """Tell whether TensorRT's messages say that memory ran out; nothing else does."""
    said = messages.lower().replace(" ", "")
    return any(words in said for words in ("outofmemory", "memoryallocation", "couldnotbeallocated"))


def activation_bytes(engine: Any) -> int:
    """Return the bytes of device memory that an execution context needs, for the profile that needs most."""
    return int(engine.device_memory_size_v2 if hasattr(engine, "device_memory_size_v2") else engine.device_memory_size)
