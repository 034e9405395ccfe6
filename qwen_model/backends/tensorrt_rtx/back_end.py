"""Build plans with TensorRT-RTX, which needs no GPU for it, and load them by way of the TensorRT back end."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import qwen_plugins
from qwen_plugins._numbers import HEAD_SIZES

from ...checkpoints.tensor_files import Framework
from ...common.errors import QwenModelError
from ...common.extras import import_extra
from ...common.progress import Progress, no_progress
from ...interface.back_end import ReadWeight
from ...interface.engine_config import RTX_COMPUTE_CAPABILITIES, EngineConfig, GemmKernels, check_quantized_x
from ...interface.memory import GPU_MEMORY_UTILIZATION
from ...interface.probe import Probe
from ..tensorrt.package import package

if TYPE_CHECKING:
    from ..tensorrt.device import TensorRTDevice

FRAMEWORK: Framework = "numpy"
EXTRA = "tensorrt-rtx"
NEEDS_GPU = "an engine of TensorRT-RTX is built without a GPU, but runs on an NVIDIA GPU only"


def default_dtype(checkpoint_dtype: str) -> str:
    """Return the checkpoint's type: TensorRT-RTX has all."""
    return checkpoint_dtype


def versions(compute_capabilities: tuple[str, ...] = ()) -> dict[str, str]:
    """Return what a plan depends on, beside the compute capabilities that it is for."""
    return {"tensorrt_rtx": package("tensorrt_rtx").version, "qwen_plugins": qwen_plugins.__version__}


def choose_kernels(config: EngineConfig, progress: Progress) -> GemmKernels:
    """Return {}: the plan is for several cards, on each of which rules choose the GEMM kernels."""
    return {}


def write_engine(
    folder: Path,
    config: EngineConfig,
    read_weight: ReadWeight,
    progress: Progress,
    timing_cache: Path | None = None,
) -> list[str]:
    """Build the plan and write it to `folder`; see `BackEnd`. Return no warnings.

    read_weight: reads a weight of checkpoints/weights.py as a NumPy array of any floating-point type.
    timing_cache: not used: nothing is timed.

    Raises:
        QwenModelError: the plug-ins cannot run the model, or TensorRT-RTX builds no plan.
        OSError: `folder` cannot be written.
    """
    if config.model.head_size not in HEAD_SIZES:
        raise QwenModelError(
            f"the attention plug-in has heads of {', '.join(map(str, HEAD_SIZES))} elements, and this model has "
            f"{config.model.head_size}: use the torch back end"
        )
    check_quantized_x(config)
    import_extra("onnx", "building with TensorRT-RTX", extra=EXTRA)
    from . import builder

    builder.write_plan(package("tensorrt_rtx"), folder, config, read_weight, progress)
    return []


def load_device(
    engine_dir: Path,
    config: EngineConfig,
    device: str | None = None,
    tuning: bool = True,
    progress: Progress = no_progress,
    *,
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION,
    deterministic: bool = False,
) -> TensorRTDevice:
    """Load an engine's plan on `device`: "cuda", "cuda:1", ...; None: the first GPU. See `BackEnd` for errors.

    `tuning` is not used: rules choose the GEMM kernels, on whatever card the plan is.
    """
    import_extra("cuda.bindings", "running an engine of TensorRT-RTX", extra=EXTRA)
    from ..tensorrt import cuda_runtime, loading

    loading.check_not_deterministic(engine_dir, deterministic)

    def check_here() -> None:
        loading.check_versions(engine_dir, config, versions())
        name, capability = cuda_runtime.device_name_and_capability()
        if capability not in config.compute_capabilities:
            raise QwenModelError(
                f"{engine_dir} is for GPUs of compute capability {', '.join(config.compute_capabilities)}; {name} has "
                f"{capability}{_way_out(engine_dir, config, capability)}"
            )

    index = loading.device_index(device, NEEDS_GPU)
    rtx = package("tensorrt_rtx")
    return loading.load_device(rtx, engine_dir, config, index, check_here, gpu_memory_utilization)


def load_probe(
    engine_dir: Path,
    config: EngineConfig,
    device: str | None = None,
    read_weight: ReadWeight | None = None,
    progress: Progress = no_progress,
) -> Probe:
    """Raise QwenModelError: no engine of TensorRT-RTX shows the results of its operations."""
    raise QwenModelError(f"{engine_dir} is an engine of TensorRT-RTX: compare those of torch and tensorrt")


def _way_out(engine_dir: Path, config: EngineConfig, capability: str) -> str:
    """Return the end of an error: how to get an engine for a GPU of this compute capability."""
    if capability not in RTX_COMPUTE_CAPABILITIES:
        return ", which TensorRT-RTX does not support: use --backend tensorrt or torch there"
    wanted = dataclasses.replace(config, compute_capabilities=(*config.compute_capabilities, capability))
    return f": build it again with --compute-capability {capability} ({wanted.build_command(engine_dir)})"
