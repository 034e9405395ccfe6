"""Hide what differs between TensorRT 8.6, 10 and 11 in building engines; package.py hides it in running them."""

from __future__ import annotations

from typing import Any

import tensorrt as trt

from qwen_plugins.tensorrt import configure_builder, is_strongly_typed

from .package import package

PACKAGE = package("tensorrt")
LOG = PACKAGE.log
MAJOR = int(trt.__version__.split(".")[0])


def dtypes() -> dict[str, Any]:
    """Return the floating-point types that this TensorRT has, by name."""
    return PACKAGE.dtypes()


def create_network(builder: Any) -> Any:
    """Create a network with dynamic shapes, strongly typed from TensorRT 10 on."""
    flags = 0
    if MAJOR < 10:
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
    elif hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):  # all are, from 11 on
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return builder.create_network(flags)


def create_config(builder: Any, network: Any, hardware_compatible: bool = False) -> Any:
    """Create the builder configuration, without profiles and timing cache.

    hardware_compatible: for any GPU from Ampere on, not only for one like the builder's.
    """
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
    if hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
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
