"""Build and load TensorRT plans of the network with this project's plug-ins, without PyTorch.

A plan has two optimization profiles: one for decode steps, one for prompts.
"""

from __future__ import annotations

import math
import mmap
from pathlib import Path
from typing import Any

import tensorrt as trt

import qwen_plugins

from ...checkpoints.tensor_files import Framework
from ...checkpoints.weights import network_modules
from ...common.errors import OutOfMemoryError, QwenModelError
from ...common.progress import Progress, no_progress
from ...interface.back_end import ReadWeight
from ...interface.engine_config import EngineConfig, GemmKernels
from ...interface.memory import ITEM_SIZES, required_bytes
from ...interface.numpy_weights import reporting_reader
from ...network.decoder import decoder
from ...network.inputs import NetworkInput, logit_rows, network_inputs, profile_shapes
from ...tuning.choice import by_module
from ...tuning.choice import choose_kernels as measure_kernels
from . import compat
from . import cuda_runtime as cuda
from .executor import TensorRTExecutor
from .native_rotary import NativeRotaryOperations
from .operations import TensorRTOperations
from .timing_cache import TimingCache

FRAMEWORK: Framework = "numpy"
PLAN = "model.plan"
DECODE, PREFILL = 0, 1  # optimization profiles
WRITE_BYTES = 64 << 20


def default_dtype(checkpoint_dtype: str) -> str:
    """Return the checkpoint's type, or float16 for bfloat16 where this TensorRT has no bfloat16."""
    return checkpoint_dtype if checkpoint_dtype in compat.dtypes() else "float16"


def _check_dtype(dtype: str) -> None:
    if dtype not in compat.dtypes():
        raise QwenModelError(f"TensorRT {trt.__version__} has no {dtype}: use --dtype {' or '.join(compat.dtypes())}")


def versions() -> dict[str, str]:
    """Return what a plan depends on: it runs only where all of these are the same as when it was built."""
    _device_count()
    name, capability = cuda.device_name_and_capability()
    return {
        "tensorrt": trt.__version__,
        "qwen_plugins": qwen_plugins.__version__,
        "gpu": name,
        "compute_capability": capability,
    }


def choose_kernels(config: EngineConfig, progress: Progress) -> GemmKernels:
    """Measure the GEMM kernels of the linear layers on the first GPU; see `BackEnd`."""
    if "gemm" in config.disabled_plugins:
        return {}
    return measure_kernels(config.model, config.limits, config.dtype, progress)


def write_engine(
    folder: Path,
    config: EngineConfig,
    read_weight: ReadWeight,
    progress: Progress,
    timing_cache: Path | None = None,
) -> list[str]:
    """Build the plan and write it to `folder`; see `BackEnd`. Return warnings for the user.

    read_weight: reads a weight of checkpoints/weights.py as a NumPy array of any floating-point type.
    timing_cache: file with the builder's timings; None: one for this TensorRT and GPU in the user's cache folder.

    Raises:
        QwenModelError: TensorRT has not the engine's type, or builds no plan.
        OSError: `folder` cannot be written.
    """
    _check_dtype(config.dtype)
    cache = TimingCache(timing_cache, timing_cache_name())
    builder = trt.Builder(compat.LOG)
    network = compat.create_network(builder)
    total, _ = required_bytes(config.model, config.limits, config.dtype)
    _define(network, config, reporting_reader(read_weight, total, progress))
    builder_config = compat.create_config(builder, network)
    _add_profiles(builder, builder_config, _inputs(config))
    cache.load_into(builder_config)
    progress("TensorRT", 0, 0)
    compat.LOG.take()
    plan = builder.build_serialized_network(network, builder_config)
    if plan is None:
        raise QwenModelError(f"TensorRT built no engine. It says:\n{compat.LOG.take()}")
    cache.keep(builder_config)
    del network, builder_config, builder  # frees the weights
    _write_plan(folder / PLAN, memoryview(plan), progress)
    return cache.warnings


def _define(network: Any, config: EngineConfig, read_weight: ReadWeight) -> None:
    inputs = {name: network.add_input(name, _type(given), given.shape) for name, given in _inputs(config).items()}
    dtype = compat.dtypes()[config.dtype]
    operations = NativeRotaryOperations if "rotary" in config.disabled_plugins else TensorRTOperations
    modules = network_modules(config.model, config.dtype)
    kernels = by_module(config.model, config.dtype, config.gemm_kernels)
    ops = operations(network, config.model, dtype, inputs, modules, read_weight, config.disabled_plugins, kernels)
    outputs = {"logits": decoder(ops, config.model, inputs["input_ids"])}
    outputs |= {f"present_key_value_{layer}": tensor for layer, tensor in enumerate(ops.present_key_values)}
    for name, tensor in outputs.items():
        tensor.name = name
        network.mark_output(tensor)
        compat.set_tensor_type(tensor, dtype, network)
    for tensor in (*inputs.values(), *outputs.values()):
        tensor.allowed_formats = 1 << int(trt.TensorFormat.LINEAR)


def _inputs(config: EngineConfig) -> dict[str, NetworkInput]:
    return network_inputs(config.model, config.limits, config.dtype)


def _type(given: NetworkInput) -> Any:
    return trt.int32 if given.dtype == "int32" else compat.dtypes()[given.dtype]


def _add_profiles(builder: Any, builder_config: Any, inputs: dict[str, NetworkInput]) -> None:
    for shapes in profile_shapes(inputs):  # DECODE, PREFILL
        profile = builder.create_optimization_profile()
        for name, (least, typical, most) in shapes.items():
            profile.set_shape(name, least, typical, most)
        builder_config.add_optimization_profile(profile)


def _write_plan(path: Path, plan: memoryview, progress: Progress) -> None:
    with path.open("wb") as file:
        for start in range(0, plan.nbytes, WRITE_BYTES):
            file.write(plan[start : start + WRITE_BYTES])
            progress("plan", min(start + WRITE_BYTES, plan.nbytes), plan.nbytes)


def timing_cache_name() -> str:
    """Return the name of the timing cache's file, one for each TensorRT version and GPU."""
    gpu, _ = cuda.device_name_and_capability()
    return f"tensorrt-{trt.__version__}-{gpu.replace(' ', '-')}.timing"


def load_executor(
    engine_dir: Path,
    config: EngineConfig,
    device: str | None = None,
    tuning: bool = True,
    progress: Progress = no_progress,
) -> TensorRTExecutor:
    """Load an engine's plan on `device`: "cuda", "cuda:1", ...; None: the first GPU. See `BackEnd` for errors.

    `tuning` is not used: the plan holds the choice of GEMM kernels.
    """
    with cuda.on_device(_device_index(device)):
        _check_versions(engine_dir, config)
        path = engine_dir / PLAN
        if not path.is_file():
            raise QwenModelError(f"{engine_dir} is incomplete: {PLAN} is missing; build the engine again")
        _check_memory(config, "the plan", path.stat().st_size)
        engine = _read_plan(path)
        _check_limits(config, engine, path)
        _check_memory(config, "activations", compat.activation_bytes(engine))
        return TensorRTExecutor(config, engine, DECODE, PREFILL, logit_rows(config.limits))


def _read_plan(path: Path) -> Any:
    compat.LOG.take()
    runtime = trt.Runtime(compat.LOG)
    engine = None
    if path.stat().st_size > 0:  # an empty file cannot be mapped
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        said = compat.LOG.take()
        if compat.ran_out_of_memory(said):
            raise OutOfMemoryError(f"GPU memory ran out while {path} was loaded. TensorRT says:\n{said}")
        raise QwenModelError(f"{path} is damaged: build the engine again. TensorRT says:\n{said}")
    return engine


def _check_limits(config: EngineConfig, engine: Any, path: Path) -> None:
    """Check that the plan was built for the limits in `config.json`, which buffers are sized by."""
    names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    for name, expected in _inputs(config).items():
        if name not in names:  # TensorRT removes inputs that no layer uses
            continue
        found = (tuple(engine.get_tensor_shape(name)), engine.get_tensor_dtype(name))
        wrong = found != (expected.shape, _type(expected))
        for profile, extent in ((DECODE, expected.decode), (PREFILL, expected.prefill)):
            if extent is not None and not wrong:
                least, _, most = engine.get_tensor_profile_shape(name, profile)
                wrong = (least[0], most[0]) != (extent.min, extent.max)
        if wrong:
            raise QwenModelError(
                f"{path} was not built for what config.json says ({name} differs): build the engine again"
            )


def _device_index(device: str | None) -> int:
    count = _device_count()
    kind, _, index = (device or "cuda").partition(":")
    if kind != "cuda" or not (index or "0").isdigit():
        raise QwenModelError(f"a TensorRT engine runs on a GPU: device must be 'cuda' or 'cuda:N', not {device!r}")
    if int(index or 0) >= count:
        raise QwenModelError(f"device {device!r} does not exist: the driver finds {count} GPUs")
    return int(index or 0)


def _device_count() -> int:
    try:
        return cuda.device_count()
    except cuda.NoDeviceError as error:
        raise QwenModelError(f"the TensorRT back end needs an NVIDIA GPU, for building too: {error}") from error


def _check_versions(engine_dir: Path, config: EngineConfig) -> None:
    here = versions()
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
    """Raise QwenModelError with a list of what is needed if `num_bytes`, cache and buffers exceed the free memory."""
    _, cache = required_bytes(config.model, config.limits, config.dtype)
    buffers = _buffer_bytes(config)
    free, total = cuda.memory_info()
    if num_bytes + cache + buffers > free:
        gib = 2.0**30
        raise QwenModelError(
            f"not enough GPU memory: {num_bytes / gib:.2f} GiB for {what}, {cache / gib:.2f} GiB of key-value cache "
            f"({config.limits.max_batch_size} sequences of {config.limits.max_positions} tokens) and "
            f"{buffers / gib:.2f} GiB for prompts and logits are needed, {free / gib:.2f} of {total / gib:.2f} GiB are "
            "free; build with a smaller --max-batch-size, --max-input-len or --max-output-len"
        )
