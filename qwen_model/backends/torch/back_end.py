"""Write and load engines of the PyTorch back end: one safetensors file for each group of weights."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
from torch import Tensor

from ...checkpoints.tensor_files import Framework, all_finite
from ...checkpoints.weights import WeightGroup, too_large, weight_groups
from ...common.errors import OutOfMemoryError, QwenModelError
from ...common.log import Stopwatch, format_bytes
from ...common.progress import Progress, no_progress
from ...interface.back_end import ReadWeight
from ...interface.engine_config import EngineConfig, GemmKernels
from ...interface.memory import GPU_MEMORY_UTILIZATION, check_utilization, pool_pages, step_bytes, weight_bytes
from ...tuning.choice import choose_kernels as measure_kernels
from .device import TorchDevice, memory_errors, uses_kernels
from .probe import TorchProbe

LOG = logging.getLogger(__name__)
FRAMEWORK: Framework = "torch"
CPU_CACHE_BYTES = 4 * 2**30
"""The most bytes of the key-value cache on a CPU, whose memory is for others, too."""
GRAPH_BYTES = 512 * 2**20
"""What CUDA graphs, and libraries with their first calls, take of a GPU's memory after the cache is allocated."""


def choose_kernels(config: EngineConfig, progress: Progress) -> GemmKernels:
    """Choose none: an engine may be built without a GPU, and chooses as it loads. See `BackEnd`."""
    return {}


def write_engine(
    folder: Path, config: EngineConfig, read_weight: ReadWeight, progress: Progress, timing_cache: Path | None = None
) -> list[str]:
    """Write one safetensors file for each group of weights to `folder`; see `BackEnd`. `timing_cache` is not used."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    (folder / "weights").mkdir()
    watch = Stopwatch(LOG)
    done, total = 0, weight_bytes(config.model, config.dtype, config.weight_formats)
    for group in weight_groups(config.model, config.dtype, config.weight_formats):
        tensors = {spec.name: as_dtype(read_weight(spec), spec.dtype, spec.name).contiguous() for spec in group.specs}
        if len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) < len(tensors):
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # safetensors refuses shared memory
        try:
            save_file(tensors, _weights_file(folder, group))
        except SafetensorError as error:  # a full disk is one of these
            raise OSError(str(error)) from error
        done += sum(tensor.nbytes for tensor in tensors.values())
        progress("weights", done, total)
    watch.lap("weights read, converted and written", done)
    return []


def _weights_file(engine_dir: Path, group: WeightGroup) -> Path:
    return engine_dir / "weights" / f"{group.name}.safetensors"


def as_dtype(weight: Tensor, dtype: str, name: str) -> Tensor:
    """Convert a weight to `dtype`.

    Raises:
        QwenModelError: a number is too large for the type.
    """
    converted = weight.to(getattr(torch, dtype))
    if not converted.is_floating_point():  # codes
        return converted
    if torch.finfo(converted.dtype).max < torch.finfo(weight.dtype).max and not all_finite(converted):
        raise QwenModelError(too_large(name, dtype, float(weight.abs().max())))
    return converted


@memory_errors()
def load_device(
    engine_dir: Path,
    config: EngineConfig,
    device: str | None = None,
    tuning: bool = True,
    progress: Progress = no_progress,
    *,
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION,
    deterministic: bool = False,
) -> TorchDevice:
    """Load an engine's weights on `device`: "cpu", "cuda", "cuda:1", ...; None: the GPU if there is one.

    See `BackEnd` for the others and for errors.
    """
    check_utilization(gpu_memory_utilization)
    target = choose_device(device)
    if deterministic:
        check_deterministic(config, target)
    check_memory(config, target, gpu_memory_utilization)
    LOG.info("runs on %s: %s", target, _why(device, target))
    kernels: GemmKernels = {}
    if tuning and not deterministic and "gemm" not in config.disabled_plugins and uses_kernels(config.model, target):
        with torch.cuda.device(target):  # before the weights take the memory that measuring needs
            kernels = measure_kernels(
                config.model, config.limits, config.dtype, progress, formats=config.weight_formats
            )
    watch, weights = Stopwatch(LOG), dict[str, Tensor]()
    for group in weight_groups(config.model, config.dtype, config.weight_formats):
        path = _weights_file(engine_dir, group)
        if not path.is_file():
            raise QwenModelError(f"{engine_dir} is incomplete: {path.name} is missing; build the engine again")
        weights.update(_read_weights(path, group, target))
        LOG.debug("read %s: %s", path, format_bytes(path.stat().st_size))
    watch.lap("weights read", sum(weight.nbytes for weight in weights.values()))
    return TorchDevice(
        config.model,
        config.limits,
        weights,
        num_pages=num_pages(config, target, gpu_memory_utilization),
        kv_cache_dtype=config.kv_cache_dtype,
        disabled_plugins=config.disabled_plugins,
        gemm_kernels=kernels,
        weight_formats=config.weight_formats,
        deterministic=deterministic,
    )


def _why(asked: str | None, device: torch.device) -> str:
    """Say what the device is, and why it was chosen, for the log."""
    if asked is not None:
        why = "as was asked for"
    elif device.type == "cuda":
        why = "the default where there is a GPU"
    else:
        built = "is built without CUDA" if torch.version.cuda is None else f"is built for CUDA {torch.version.cuda}"
        why = f"PyTorch {torch.__version__}, which {built}, finds no GPU"
    return f"{torch.cuda.get_device_name(device)}, {why}" if device.type == "cuda" else why


def load_probe(
    engine_dir: Path,
    config: EngineConfig,
    device: str | None = None,
    read_weight: ReadWeight | None = None,
    progress: Progress = no_progress,
) -> TorchProbe:
    """Load an engine to be run operation by operation; see `BackEnd`. `read_weight` is not needed."""
    return TorchProbe(load_device(engine_dir, config, device, progress=progress))


def _read_weights(path: Path, group: WeightGroup, device: torch.device) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(path, device=str(device))
    except (SafetensorError, OSError) as error:
        raise QwenModelError(f"{path} is damaged ({error}): build the engine again") from error
    expected = {spec.name: (spec.shape, getattr(torch, spec.dtype)) for spec in group.specs}
    found = {name: (tuple(weight.shape), weight.dtype) for name, weight in weights.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if found.get(name) != expected.get(name))
    if wrong:
        raise QwenModelError(
            f"{path} does not hold what config.json says ({', '.join(wrong)}: missing, unknown or of another shape or "
            "type): build the engine again"
        )
    return weights


def choose_device(name: str | None) -> torch.device:
    """Return the device of that name; None: the GPU if there is one, else the CPU.

    Raises:
        QwenModelError: there is no such device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise QwenModelError(f"device must be 'cpu' or 'cuda' or 'cuda:N', not {name!r}")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise QwenModelError(f"device {name!r} does not exist: PyTorch finds {torch.cuda.device_count()} GPUs")
    return device


def default_dtype(checkpoint_dtype: str) -> str:
    """Return the checkpoint's type where there is a GPU, else float32: CPUs are slow in 16-bit types."""
    return checkpoint_dtype if torch.cuda.is_available() else "float32"


def versions(compute_capabilities: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the versions of PyTorch and CUDA; an engine does not depend on them."""
    return {"torch": torch.__version__, "cuda": torch.version.cuda or "none"}


def check_deterministic(config: EngineConfig, device: torch.device) -> None:
    """Raise QwenModelError if results cannot be the same bits whatever is computed beside them."""
    if config.disabled_plugins:
        raise QwenModelError(
            f"deterministic (--deterministic) needs the plug-ins that the engine is built without: "
            f"{', '.join(config.disabled_plugins)}"
        )
    if not uses_kernels(config.model, device):
        raise QwenModelError(
            "deterministic (--deterministic) is for NVIDIA GPUs and head sizes that this project has kernels for, not "
            f"for {device} and {config.model.head_size}"
        )


def num_pages(config: EngineConfig, device: torch.device, utilization: float, weights: int = 0) -> int:
    """Return the pages of the cache in the memory that is free, less that of weights which are still to be loaded.

    Raises:
        OutOfMemoryError: one sequence does not fit.
    """
    available = _usable_bytes(device, utilization) - weights
    available -= step_bytes(config.model, config.limits, config.dtype)
    if device.type == "cuda":
        available -= GRAPH_BYTES
    else:
        available = min(available, CPU_CACHE_BYTES)
    return pool_pages(config.model, config.limits, config.dtype, config.kv_cache_dtype, available)


def check_memory(config: EngineConfig, device: torch.device, utilization: float) -> None:
    """Raise OutOfMemoryError if the weights, or the cache of one sequence beside them, exceed the free memory."""
    weights = weight_bytes(config.model, config.dtype, config.weight_formats)
    free, total = _memory(device)
    if weights > free:
        gib, kind = 2.0**30, "GPU memory" if device.type == "cuda" else "memory"
        raise OutOfMemoryError(
            f"not enough {kind}: the weights need {weights / gib:.2f} GiB, {free / gib:.2f} of {total / gib:.2f} GiB "
            "are free"
        )
    num_pages(config, device, utilization, weights)


def _usable_bytes(device: torch.device, utilization: float) -> float:
    """Return the bytes that may still be taken; a CPU's memory may be used whole."""
    free, total = _memory(device)
    return free - (1.0 - utilization) * total if device.type == "cuda" else free


def _memory(device: torch.device) -> tuple[int, int]:
    """Return free and total bytes. All of a CPU's memory counts as free: the system drops caches and swaps."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what PyTorch keeps for later allocations is not among what is free
        return torch.cuda.mem_get_info(device)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total, total
