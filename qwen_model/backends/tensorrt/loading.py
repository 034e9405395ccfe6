"""Load plans of the network, built by TensorRT or by TensorRT-RTX, and check that they fit engine and GPU."""

from __future__ import annotations

import logging
import math
import mmap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qwen_plugins import launch

from ...common.errors import OutOfMemoryError, QwenModelError
from ...common.log import Stopwatch, format_bytes
from ...interface.engine_config import EngineConfig
from ...interface.memory import ITEM_SIZES, check_utilization, page_bytes, sequence_pages
from ...network.inputs import NetworkInput, logit_rows, network_inputs
from . import cuda_runtime as cuda
from .device import TensorRTDevice
from .package import PLAN, Package, activation_bytes, ran_out_of_memory

LOG = logging.getLogger(__name__)
DECODE, PREFILL = 0, 1  # optimization profiles


def load_device(
    tensorrt: Package,
    engine_dir: Path,
    config: EngineConfig,
    device: int,
    check_here: Callable[[], None],
    gpu_memory_utilization: float,
) -> TensorRTDevice:
    """Load an engine's plan on the GPU of that index.

    check_here: raises QwenModelError unless the engine is for this package and the current GPU.
    gpu_memory_utilization: see `interface.memory`.

    Raises:
        QwenModelError: as it says, or the plan is damaged or not of this engine, or there is too little memory.
    """
    check_utilization(gpu_memory_utilization)
    with cuda.on_device(device):
        check_here()
        path = engine_dir / PLAN
        if not path.is_file():
            raise QwenModelError(f"{engine_dir} is incomplete: {PLAN} is missing; build the engine again")
        _check_memory(config, "the plan", path.stat().st_size)
        LOG.info("runs on %s, compute capability %s", *cuda.device_name_and_capability())
        watch = Stopwatch(LOG)
        engine = _read_plan(tensorrt, path)
        watch.lap(f"{path} read", path.stat().st_size)
        _check_limits(tensorrt, config, engine, path)
        _check_memory(config, "activations", activation_bytes(engine))
        loaded = TensorRTDevice(config, engine, DECODE, PREFILL, gpu_memory_utilization, tensorrt)
        _log_memory(config, loaded)
        return loaded


def check_not_deterministic(engine_dir: Path, deterministic: bool) -> None:
    """Raise QwenModelError if results are to have the same bits in any company: plans have kernels by rows."""
    if deterministic:
        raise QwenModelError(
            f"{engine_dir} is an engine of TensorRT, whose kernels depend on the number of sequences in a step: for "
            "--deterministic build one for the torch back end"
        )


def _log_memory(config: EngineConfig, device: TensorRTDevice) -> None:
    """Log what was allocated, and which cuBLASLt the GEMMs find, which loads it."""
    if not LOG.isEnabledFor(logging.INFO):
        return
    cache = device.num_pages * page_bytes(config.model, config.dtype, config.kv_cache_dtype)
    activations, free = activation_bytes(device.engine), cuda.memory_info()[0]
    LOG.info(
        "key-value cache: %d pages of %d tokens, %s; activations: %s; free memory: %s; cuBLASLt: %s",
        device.num_pages,
        device.page_size,
        *map(format_bytes, (cache, activations, free)),
        launch.cublas_lt_status(),
    )


def _read_plan(tensorrt: Package, path: Path) -> Any:
    engine, said = deserialized(tensorrt, path)
    if engine is None:
        raise QwenModelError(f"{path} is damaged: build the engine again. TensorRT says:\n{said}")
    return engine


def deserialized(tensorrt: Package, path: Path) -> tuple[Any, str]:
    """Return the engine of a plan, and ""; or None, and what TensorRT says.

    Raises:
        OutOfMemoryError: the GPU's memory ran out.
        OSError: the file cannot be read.
    """
    if path.stat().st_size == 0:  # it cannot be mapped
        return None, "the file is empty"
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        return deserialized_plan(tensorrt, plan, str(path))


def deserialized_plan(tensorrt: Package, plan: Any, name: str) -> tuple[Any, str]:
    """Return the engine of a plan in memory, which is called `name` in errors; see `deserialized`."""
    tensorrt.log.take()
    engine = tensorrt.trt.Runtime(tensorrt.log).deserialize_cuda_engine(plan)
    if engine is not None:
        return engine, ""
    said = tensorrt.log.take()
    if ran_out_of_memory(said):
        raise OutOfMemoryError(f"GPU memory ran out while {name} was loaded. TensorRT says:\n{said}")
    return None, said


def _check_limits(tensorrt: Package, config: EngineConfig, engine: Any, path: Path) -> None:
    """Check that the plan was built for the limits in `config.json`, which buffers are sized by."""
    names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    for name, expected in _inputs(config).items():
        if name not in names:  # TensorRT removes inputs that no layer uses
            continue
        found, dtype = tuple(engine.get_tensor_shape(name)), engine.get_tensor_dtype(name)
        wrong = found not in (expected.shape, _fixed(expected)) or dtype != tensorrt.data_type(expected.dtype)
        for profile, extent in ((DECODE, expected.decode), (PREFILL, expected.prefill)):
            if extent is not None and not wrong:
                least, _, most = engine.get_tensor_profile_shape(name, profile)
                wrong = (least[0], most[0]) != (extent.min, extent.max)
        if wrong:
            raise QwenModelError(
                f"{path} was not built for what config.json says ({name} differs): build the engine again"
            )


def _fixed(given: NetworkInput) -> tuple[int, ...]:
    """Return an input's shape as TensorRT 8.6 reports it: static if all profiles give it one size."""
    extents = [extent for extent in (given.decode, given.prefill) if extent is not None]
    sizes = {size for extent in extents for size in (extent.min, extent.max)}
    return (*sizes, *given.shape[1:]) if len(sizes) == 1 else given.shape


def _inputs(config: EngineConfig) -> dict[str, NetworkInput]:
    return network_inputs(config.model, config.limits, config.dtype, config.kv_cache_dtype)


def device_index(device: str | None, needed_for: str) -> int:
    """Return the index of the GPU "cuda", "cuda:1", ...; None: of the first.

    needed_for: what needs a GPU, as the error says it where there is none: "a TensorRT engine runs on an NVIDIA GPU".

    Raises:
        QwenModelError: there is no such GPU.
    """
    count = device_count(needed_for)
    kind, _, index = (device or "cuda").partition(":")
    if kind != "cuda" or not (index or "0").isdigit():
        raise QwenModelError(f"a TensorRT engine runs on a GPU: device must be 'cuda' or 'cuda:N', not {device!r}")
    if int(index or 0) >= count:
        raise QwenModelError(f"device {device!r} does not exist: the driver finds {count} GPUs")
    return int(index or 0)


def device_count(needed_for: str) -> int:
    """Return the number of GPUs, at least 1; see `device_index`."""
    try:
        return cuda.device_count()
    except cuda.NoDeviceError as error:
        raise QwenModelError(f"{needed_for}: {error}") from error


def check_versions(engine_dir: Path, config: EngineConfig, here: Mapping[str, str]) -> None:
    """Raise QwenModelError if any of these versions is another than the one in `config.json`."""
    other = [
        f"{name} {config.versions.get(name)}, here {now}"
        for name, now in here.items()
        if config.versions.get(name) != now
    ]
    if other:
        raise QwenModelError(
            f"{engine_dir} was built for {'; '.join(other)}: build it again here from its checkpoint, with the same "
            f"options ({config.build_command(engine_dir)})"
        )


def _buffer_bytes(config: EngineConfig) -> int:
    """Return the bytes of the logits and of all inputs except the key-value cache."""
    logits = logit_rows(config.limits) * config.model.vocab_size * ITEM_SIZES[config.dtype]
    inputs = [given for name, given in _inputs(config).items() if not name.startswith("past_key_value")]
    rows = (given.shape[0] if given.prefill is None else given.prefill.max for given in inputs)
    return logits + sum(4 * count * math.prod(given.shape[1:]) for count, given in zip(rows, inputs, strict=True))


def _check_memory(config: EngineConfig, what: str, num_bytes: int) -> None:
    """Raise OutOfMemoryError if `num_bytes`, buffers and the cache of one sequence exceed the free memory."""
    cache = (sequence_pages(config.limits) + 1) * page_bytes(config.model, config.dtype, config.kv_cache_dtype)
    buffers = _buffer_bytes(config)
    free, total = cuda.memory_info()
    if num_bytes + cache + buffers > free:
        gib = 2.0**30
        raise OutOfMemoryError(
            f"not enough GPU memory: {num_bytes / gib:.2f} GiB for {what}, {cache / gib:.2f} GiB of key-value cache "
            f"(one sequence of {config.limits.max_positions} tokens) and {buffers / gib:.2f} GiB for steps and logits "
            f"are needed, {free / gib:.2f} of {total / gib:.2f} GiB are free; build with a smaller --max-num-tokens, "
            "--max-batch-size, --max-input-len or --max-output-len"
        )
