"""Hide what differs between TensorRT 8.6, 10 and 11 in building and running engines."""

from __future__ import annotations

from collections import deque
from typing import Any

import tensorrt as trt

from qwen_plugins.tensorrt import configure_builder, is_strongly_typed

from ...common.errors import QwenModelError

MAJOR = int(trt.__version__.split(".")[0])


class Log(trt.ILogger):
    """Keep TensorRT's last errors and warnings."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: deque[str] = deque(maxlen=100)

    def log(self, severity: Any, message: str) -> None:
        """Keep a message of severity WARNING or higher."""
        if severity <= trt.ILogger.WARNING:
            self.messages.append(message)

    def take(self) -> str:
        """Return the last messages since the last call, at most 8, and clear them."""
        text = "\n".join(list(self.messages)[-8:])
        self.messages.clear()
        return text or "TensorRT said nothing"


# TensorRT keeps the first logger of a process for whatever has no logger of its own.
LOG = Log()


def dtypes() -> dict[str, Any]:
    """Return the floating-point types that this TensorRT has, by name."""
    found = {"float32": trt.float32, "float16": trt.float16}
    return {**found, "bfloat16": trt.bfloat16} if hasattr(trt, "bfloat16") else found


def create_network(builder: Any) -> Any:
    """Create a network with dynamic shapes, strongly typed from TensorRT 10 on."""
    flags = 0
    if MAJOR < 10:
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
    elif hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):  # all are, from 11 on
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return builder.create_network(flags)


def create_config(builder: Any, network: Any) -> Any:
    """Create the builder configuration, without profiles and timing cache."""
    config = builder.create_builder_config()
    configure_builder(config, network)
    if hasattr(config, "set_tactic_sources"):
        # Without cuBLAS and cuDNN: the network does not need them, and 8.6 fails where they are not installed.
        config.set_tactic_sources(0)
    if hasattr(trt, "PreviewFeature") and hasattr(trt.PreviewFeature, "PROFILE_SHARING_0806"):
        # Lets several contexts use one profile, which later versions always allow.
        config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)
    if MAJOR < 10:
        config.set_flag(trt.BuilderFlag.DIRECT_IO)  # no copies of inputs and outputs: the cache is both
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    return config


def set_type(layer: Any, dtype: Any, network: Any) -> Any:
    """Return the layer's output after setting its type; in a strongly typed network the inputs determine it."""
    output = layer.get_output(0)
    if not is_strongly_typed(network):
        layer.precision = dtype
        layer.set_output_type(0, dtype)
        output.dtype = dtype
    return output


def set_tensor_type(tensor: Any, dtype: Any, network: Any) -> None:
    """Set the type of a network output, which TensorRT 8.6 makes float32 when the output is marked."""
    if not is_strongly_typed(network):
        tensor.dtype = dtype


def set_timing_cache(config: Any, content: bytes) -> bool:
    """Set the builder's timing cache; return False, and set an empty one, if TensorRT does not accept the content."""
    cache = config.create_timing_cache(content)  # None: damaged
    if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
        return True
    config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    return False


def timing_cache_bytes(config: Any) -> bytes:
    """Return the serialised timing cache."""
    return bytes(config.get_timing_cache().serialize())


def ran_out_of_memory(messages: str) -> bool:
    """Tell whether TensorRT's messages say that memory ran out; nothing else does."""
    said = messages.lower().replace(" ", "")
    return any(words in said for words in ("outofmemory", "memoryallocation", "couldnotbeallocated"))


def refusal(what: str) -> Exception:
    """Return the exception to raise, with TensorRT's messages: QwenModelError if memory ran out, else RuntimeError."""
    said = LOG.take()
    if ran_out_of_memory(said):
        return QwenModelError(f"the GPU's memory ran out; use a smaller batch or engine. {what}:\n{said}")
    return RuntimeError(f"{what}:\n{said}")


def activation_bytes(engine: Any) -> int:
    """Return the bytes of device memory that an execution context needs, for the profile that needs most."""
    return int(engine.device_memory_size_v2 if hasattr(engine, "device_memory_size_v2") else engine.device_memory_size)


def create_context(engine: Any, profile: int, address: int, num_bytes: int, stream: int) -> Any:
    """Create an execution context of a profile in the caller's device memory.

    Contexts that run on one stream may share that memory.
    """
    if hasattr(trt, "ExecutionContextAllocationStrategy"):
        context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    else:
        context = engine.create_execution_context_without_device_memory()
    if context is None or not context.set_optimization_profile_async(profile, stream):
        raise refusal("TensorRT made no execution context")
    if hasattr(context, "set_device_memory"):
        context.set_device_memory(address, num_bytes)
    else:
        context.device_memory = address
    return context
