"""Build and load TensorRT plans of the network with this project's plug-ins, without PyTorch.

A plan has two optimization profiles: one for decode steps, one for prompts.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorrt as trt

import qwen_plugins
from qwen_plugins import launch

from ...checkpoints.tensor_files import Framework, all_finite
from ...checkpoints.weights import WeightSpec, network_modules, too_large
from ...common.errors import OutOfMemoryError, QwenModelError
from ...common.log import Stopwatch, format_bytes
from ...common.progress import Progress, no_progress
from ...interface.back_end import ReadWeight
from ...interface.engine_config import EngineConfig, GemmKernels, Limits
from ...interface.memory import ITEM_SIZES, required_bytes
from ...network.decoder import Operations, decoder
from ...network.observed import ObservedOperations
from ...network.rotary import rotary_table
from ...tuning.choice import by_module
from ...tuning.choice import choose_kernels as measure_kernels
from . import compat
from . import cuda_runtime as cuda
from .executor import TensorRTExecutor
from .native_rotary import NativeRotaryOperations
from .observed_network import Taps, given_tensor
from .operations import TensorRTOperations
from .probe import ObservedExecutor, TensorRTProbe
from .timing_cache import TimingCache

LOG = logging.getLogger(__name__)
FRAMEWORK: Framework = "numpy"
PLAN = "model.plan"
DECODE, PREFILL = 0, 1  # optimization profiles
LOGIT_ROWS = 256
"""The most tokens of a chunk in which `prompt_logits` runs a prompt."""
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


@dataclass(frozen=True)
class Range:
    """Hold the range of an input's first dimension in a profile, and the size that the profile is optimized for."""

    min: int
    opt: int
    max: int


@dataclass(frozen=True)
class NetworkInput:
    """Describe an input: its type, its shape (-1: dynamic), and the range of its first dimension in each profile."""

    dtype: Any
    shape: tuple[int, ...]
    decode: Range | None = None
    prefill: Range | None = None


def network_inputs(config: EngineConfig) -> dict[str, NetworkInput]:
    """Return every input of the network, by name."""
    model, limits = config.model, config.limits
    batch, tokens = limits.max_batch_size, limits.max_batch_size * limits.max_input_len
    rows = logit_rows(config)
    sequences = NetworkInput(trt.int32, (-1,), Range(1, 1, batch), Range(1, 1, batch))
    inputs = {
        "input_ids": NetworkInput(trt.int32, (-1,), Range(1, 1, batch), Range(1, limits.max_input_len, tokens)),
        "cu_seqlens": NetworkInput(trt.int32, (-1,), Range(2, 2, batch + 1), Range(2, 2, batch + 1)),
        "past_lengths": sequences,
        "rotary_offsets": sequences,
        "last_token_ids": NetworkInput(trt.int32, (-1,), Range(1, 1, batch), Range(1, 1, rows)),
        "semaphores": NetworkInput(trt.int32, (batch, model.num_heads)),
    }
    table = rotary_table(model, limits.max_positions)
    table_rows = len(table.values)
    # A prompt table (see RotaryTable.prompt_table) has a row for each token of the prompts.
    most = max(table_rows, tokens) if model.rotary.scaling == "dynamic" else table_rows
    table_range = (Range(table_rows, table_rows, table_rows), Range(1, table_rows, most))
    inputs["rotary_table"] = NetworkInput(trt.float32, (-1, model.rotary.dim), *table_range)
    if table.query_scale is not None:
        inputs["query_scale"] = NetworkInput(trt.float32, (-1,), *table_range)
    cache = (batch, 2, model.num_kv_heads, limits.max_positions, model.head_size)
    for layer in range(model.num_layers):
        inputs[f"past_key_value_{layer}"] = NetworkInput(compat.dtypes()[config.dtype], cache)
    return inputs


def logit_rows(config: EngineConfig) -> int:
    """Return the largest number of rows of logits that one pass through the network computes."""
    return max(config.limits.max_batch_size, min(config.limits.max_input_len, LOGIT_ROWS))


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
    plan = _build_plan(config, _reporting(read_weight, config, progress), progress, cache)
    watch = Stopwatch(LOG)
    _write_plan(folder / PLAN, memoryview(plan), progress)
    watch.lap("plan written", memoryview(plan).nbytes)
    return cache.warnings


def _build_plan(
    config: EngineConfig, read_weight: ReadWeight, progress: Progress, cache: TimingCache, taps: Taps | None = None
) -> Any:
    """Build the plan, in host memory. `taps`: None, or what shows the result of each operation."""
    watch = Stopwatch(LOG)
    builder = trt.Builder(compat.LOG)
    network = compat.create_network(builder)
    watch.lap(f"TensorRT {trt.__version__} started")
    _define(network, config, read_weight, taps)
    inputs = network_inputs(config)
    if taps is not None:
        inputs |= _given_inputs(config, taps)
    watch.lap(f"weights read, and a network of {network.num_layers} layers defined")
    builder_config = compat.create_config(builder, network)
    _add_profiles(builder, builder_config, inputs)
    cache.load_into(builder_config)
    progress("TensorRT", 0, 0)
    compat.LOG.take()
    plan = builder.build_serialized_network(network, builder_config)
    if plan is None:
        raise QwenModelError(f"TensorRT built no engine. It says:\n{compat.LOG.take()}")
    watch.lap("plan built")
    cache.keep(builder_config)
    return plan


def _given_inputs(config: EngineConfig, taps: Taps) -> dict[str, NetworkInput]:
    """Return the inputs that go on in place of results, for one sequence."""
    dtype, tokens = compat.dtypes()[config.dtype], config.limits.max_input_len
    ranges = Range(1, 1, 1), Range(1, tokens, tokens)
    return {given_tensor(name): NetworkInput(dtype, (-1, columns), *ranges) for name, columns in taps.given.items()}


def _define(network: Any, config: EngineConfig, read_weight: ReadWeight, taps: Taps | None) -> None:
    inputs = {name: network.add_input(name, given.dtype, given.shape) for name, given in network_inputs(config).items()}
    dtype = compat.dtypes()[config.dtype]
    operations = NativeRotaryOperations if "rotary" in config.disabled_plugins else TensorRTOperations
    modules = network_modules(config.model, config.dtype)
    kernels = by_module(config.model, config.dtype, config.gemm_kernels)
    ops = operations(network, config.model, dtype, inputs, modules, read_weight, config.disabled_plugins, kernels)
    called: Operations[Any] = ops
    if taps is not None:
        taps.network = network
        called = ObservedOperations(ops, taps)
    outputs = {"logits": decoder(called, config.model, inputs["input_ids"])}
    outputs |= {f"present_key_value_{layer}": tensor for layer, tensor in enumerate(ops.present_key_values)}
    for name, tensor in outputs.items():
        tensor.name = name
        network.mark_output(tensor)
        compat.set_tensor_type(tensor, dtype, network)
    for tensor in (*inputs.values(), *outputs.values()):
        tensor.allowed_formats = 1 << int(trt.TensorFormat.LINEAR)


def _reporting(read_weight: ReadWeight, config: EngineConfig, progress: Progress) -> ReadWeight:
    """Wrap `read_weight`: convert to the weight's type in the engine, and report the bytes read."""
    total, _ = required_bytes(config.model, config.limits, config.dtype)
    done: dict[str, int] = {}

    def read(spec: WeightSpec) -> npt.NDArray[Any]:
        weight = as_dtype(read_weight(spec), compat.numpy_dtype(spec.dtype), spec.name)
        done[spec.name] = weight.nbytes
        progress("weights", sum(done.values()), total)
        return weight

    return read


def as_dtype(weight: npt.NDArray[Any], dtype: npt.DTypeLike, name: str) -> npt.NDArray[Any]:
    """Convert a weight to `dtype`.

    Raises:
        QwenModelError: a number is too large for the type.
    """
    with np.errstate(over="ignore"):
        converted = weight.astype(dtype, copy=False)
    if weight.dtype != converted.dtype and not all_finite(converted):
        raise QwenModelError(too_large(name, converted.dtype.name, float(np.abs(weight.astype(np.float64)).max())))
    return converted


def _add_profiles(builder: Any, builder_config: Any, inputs: dict[str, NetworkInput]) -> None:
    for kind in ("decode", "prefill"):  # DECODE, PREFILL
        profile = builder.create_optimization_profile()
        for name, given in inputs.items():
            extent: Range | None = getattr(given, kind)
            if extent is not None:
                profile.set_shape(name, *((size, *given.shape[1:]) for size in (extent.min, extent.opt, extent.max)))
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
        LOG.info("runs on %s, compute capability %s", *cuda.device_name_and_capability())
        watch = Stopwatch(LOG)
        engine = _read_plan(path)
        watch.lap(f"{path} read", path.stat().st_size)
        _check_limits(config, engine, path)
        _check_memory(config, "activations", compat.activation_bytes(engine))
        _log_memory(config, engine)
        return TensorRTExecutor(config, engine, DECODE, PREFILL, logit_rows(config))


def load_probe(
    engine_dir: Path,
    config: EngineConfig,
    device: str | None = None,
    read_weight: ReadWeight | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> TensorRTProbe:
    """Prepare an engine of the same options that shows its results, built when it runs; see `BackEnd`."""
    if read_weight is None:
        raise QwenModelError(
            f"{engine_dir} shows no results but its logits: give --model-dir, so that an engine that shows them can be "
            "built of the same checkpoint"
        )
    read, index = read_weight, _device_index(device)

    def build(prompt_length: int, isolated: bool) -> ObservedExecutor:
        with cuda.on_device(index):
            return _observed_executor(config, read, progress, prompt_length, isolated)

    def read_module(name: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
        module = network_modules(config.model, config.dtype)[name].map(read)
        return module.weight.astype(np.float32), None if module.bias is None else module.bias.astype(np.float32)

    return TensorRTProbe(build, read_module)


def _observed_executor(
    config: EngineConfig, read_weight: ReadWeight, progress: Progress, prompt_length: int, isolated: bool
) -> ObservedExecutor:
    """Build and load an engine for one prompt of this length, whose positions are those of `config`."""
    if prompt_length > LOGIT_ROWS:
        raise QwenModelError(
            f"a prompt of {prompt_length} tokens is too long for engines that show results: give at most {LOGIT_ROWS}"
        )
    limits = Limits(1, prompt_length, max(1, config.limits.max_positions - prompt_length))
    observed = dataclasses.replace(config, limits=limits)
    taps = Taps(observed, isolated)
    cache = TimingCache(None, timing_cache_name())
    plan = _build_plan(observed, _reporting(read_weight, observed, progress), progress, cache, taps)
    engine = _loaded(memoryview(plan), "the engine that shows results")
    return ObservedExecutor(observed, engine, DECODE, PREFILL, logit_rows(observed), taps)


def _log_memory(config: EngineConfig, engine: Any) -> None:
    """Log what an engine is about to allocate, and which cuBLASLt its GEMMs find, which loads it."""
    if not LOG.isEnabledFor(logging.INFO):
        return
    _, cache = required_bytes(config.model, config.limits, config.dtype)
    activations, free = compat.activation_bytes(engine), cuda.memory_info()[0]
    LOG.info(
        "key-value cache: %s; activations: %s; free memory: %s; cuBLASLt: %s",
        *map(format_bytes, (cache, activations, free)),
        launch.cublas_lt_status(),
    )


def _read_plan(path: Path) -> Any:
    if path.stat().st_size == 0:  # cannot be mapped
        raise QwenModelError(f"{path} is damaged: build the engine again. It is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        return _loaded(plan, str(path))


def _loaded(plan: Any, name: str) -> Any:
    """Make an engine of a plan, which is called `name` in errors."""
    compat.LOG.take()
    engine = trt.Runtime(compat.LOG).deserialize_cuda_engine(plan)
    if engine is None:
        said = compat.LOG.take()
        if compat.ran_out_of_memory(said):
            raise OutOfMemoryError(f"GPU memory ran out while {name} was loaded. TensorRT says:\n{said}")
        raise QwenModelError(f"{name} is damaged: build the engine again. TensorRT says:\n{said}")
    return engine


def _check_limits(config: EngineConfig, engine: Any, path: Path) -> None:
    """Check that the plan was built for the limits in `config.json`, which buffers are sized by."""
    names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    for name, expected in network_inputs(config).items():
        if name not in names:  # TensorRT removes inputs that no layer uses
            continue
        found = tuple(engine.get_tensor_shape(name))
        wrong = found not in (expected.shape, _fixed(expected)) or engine.get_tensor_dtype(name) != expected.dtype
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
    logits = logit_rows(config) * config.model.vocab_size * ITEM_SIZES[config.dtype]
    inputs = [given for name, given in network_inputs(config).items() if not name.startswith("past_key_value")]
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
