"""Build and load TensorRT plans of the network with this project's plug-ins, without PyTorch.

A plan has two optimization profiles: one for decode steps, one for prompts.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorrt as trt

import qwen_plugins

from ...checkpoints.tensor_files import Framework
from ...checkpoints.weights import network_modules
from ...common.errors import QwenModelError
from ...common.log import Stopwatch
from ...common.progress import Progress, no_progress
from ...interface.back_end import ReadWeight
from ...interface.engine_config import EngineConfig, GemmKernels, Limits, check_quantized_x
from ...interface.memory import GPU_MEMORY_UTILIZATION, weight_bytes
from ...interface.numpy_weights import reporting_reader
from ...interface.weight_formats import dequantized
from ...network.decoder import Operations, decoder
from ...network.inputs import LOGIT_ROWS, NetworkInput, Range, network_inputs
from ...network.observed import ObservedOperations
from ...tuning.choice import by_module
from ...tuning.choice import choose_kernels as measure_kernels
from . import compat, loading
from . import cuda_runtime as cuda
from .device import TensorRTDevice
from .loading import check_versions, device_count, device_index
from .native_rotary import NativeRotaryOperations
from .observed_network import Taps, given_tensor
from .operations import TensorRTOperations
from .package import PLAN
from .probe import ObservedDevice, TensorRTProbe
from .profiles import add_profiles
from .timing_cache import TimingCache

LOG = logging.getLogger(__name__)
FRAMEWORK: Framework = "numpy"
NEEDS_GPU = "the TensorRT back end needs an NVIDIA GPU, for building too"
WRITE_BYTES = 64 << 20


def default_dtype(checkpoint_dtype: str) -> str:
    """Return the checkpoint's type, or float16 for bfloat16 where this TensorRT has no bfloat16."""
    return checkpoint_dtype if checkpoint_dtype in compat.dtypes() else "float16"


def _check_dtype(dtype: str) -> None:
    if dtype not in compat.dtypes():
        raise QwenModelError(f"TensorRT {trt.__version__} has no {dtype}: use --dtype {' or '.join(compat.dtypes())}")


def versions(compute_capabilities: tuple[str, ...] = ()) -> dict[str, str]:
    """Return what a plan depends on: it runs only where all of these are the same as when it was built.

    compute_capabilities: see `EngineConfig`; where it names any, the plan does not depend on the GPU's model.
    """
    device_count(NEEDS_GPU)
    found = {"tensorrt": trt.__version__, "qwen_plugins": qwen_plugins.__version__}
    if compute_capabilities:
        return found
    name, capability = cuda.device_name_and_capability()
    return {**found, "gpu": name, "compute_capability": capability}


def choose_kernels(config: EngineConfig, progress: Progress) -> GemmKernels:
    """Measure the GEMM kernels of the linear layers on the first GPU, unless the plan is for others; see `BackEnd`."""
    if "gemm" in config.disabled_plugins or config.compute_capabilities:
        return {}
    return measure_kernels(config.model, config.limits, config.dtype, progress, formats=config.weight_formats)


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
    check_quantized_x(config)
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
    inputs = _inputs(config)
    if taps is not None:
        inputs |= _given_inputs(config, taps)
    watch.lap(f"weights read, and a network of {network.num_layers} layers defined")
    builder_config = compat.create_config(builder, network, bool(config.compute_capabilities))
    add_profiles(builder, builder_config, inputs)
    cache.load_into(builder_config)
    progress("TensorRT", 0, 0)
    compat.LOG.take()
    plan = builder.build_serialized_network(network, builder_config)
    if plan is None:
        raise QwenModelError(f"TensorRT built no engine. It says:\n{compat.LOG.take()}")
    watch.lap("plan built")
    cache.keep(builder_config)
    return plan


def _reporting(read_weight: ReadWeight, config: EngineConfig, progress: Progress) -> ReadWeight:
    return reporting_reader(read_weight, weight_bytes(config.model, config.dtype, config.weight_formats), progress)


def _given_inputs(config: EngineConfig, taps: Taps) -> dict[str, NetworkInput]:
    """Return the inputs that go on in place of results, for one sequence."""
    tokens = config.limits.max_input_len
    ranges = Range(1, 1, 1), Range(1, tokens, tokens)
    return {
        given_tensor(name): NetworkInput(config.dtype, (-1, columns), *ranges) for name, columns in taps.given.items()
    }


def _define(network: Any, config: EngineConfig, read_weight: ReadWeight, taps: Taps | None) -> None:
    inputs = {
        name: network.add_input(name, compat.PACKAGE.data_type(given.dtype), given.shape)
        for name, given in _inputs(config).items()
    }
    dtype = compat.dtypes()[config.dtype]
    operations = NativeRotaryOperations if "rotary" in config.disabled_plugins else TensorRTOperations
    modules = network_modules(config.model, config.dtype, config.weight_formats)
    kernels = by_module(config.model, config.dtype, config.gemm_kernels, config.weight_formats)
    ops = operations(
        network,
        config.model,
        dtype,
        inputs,
        modules,
        read_weight,
        config.disabled_plugins,
        kernels,
        config.kv_cache_dtype,
        config.limits.step_tokens,
    )
    called: Operations[Any] = ops
    if taps is not None:
        taps.network = network
        called = ObservedOperations(ops, taps)
    outputs = {"logits": decoder(called, config.model, inputs["input_ids"])}
    outputs |= {f"present_key_value_{layer}": tensor for layer, tensor in enumerate(ops.present_key_values)}
    cache_type = inputs["past_key_value_0"].dtype
    for name, tensor in outputs.items():
        tensor.name = name
        network.mark_output(tensor)
        compat.set_tensor_type(tensor, dtype if name == "logits" else cache_type, network)
    for tensor in (*inputs.values(), *outputs.values()):
        tensor.allowed_formats = 1 << int(trt.TensorFormat.LINEAR)


def _inputs(config: EngineConfig) -> dict[str, NetworkInput]:
    return network_inputs(config.model, config.limits, config.dtype, config.kv_cache_dtype)


def _write_plan(path: Path, plan: memoryview, progress: Progress) -> None:
    with path.open("wb") as file:
        for start in range(0, plan.nbytes, WRITE_BYTES):
            file.write(plan[start : start + WRITE_BYTES])
            progress("plan", min(start + WRITE_BYTES, plan.nbytes), plan.nbytes)


def timing_cache_name() -> str:
    """Return the name of the timing cache's file, one for each TensorRT version and GPU."""
    gpu, _ = cuda.device_name_and_capability()
    return f"tensorrt-{trt.__version__}-{gpu.replace(' ', '-')}.timing"


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

    `tuning` is not used: the plan holds the choice of GEMM kernels.
    """
    loading.check_not_deterministic(engine_dir, deterministic)

    def check_here() -> None:
        check_versions(engine_dir, config, versions(config.compute_capabilities))
        _, capability = cuda.device_name_and_capability()
        if config.compute_capabilities and int(capability.split(".")[0]) < 8:
            raise QwenModelError(
                f"{engine_dir} is for GPUs of compute capability 8.0 or later; this one has {capability}"
            )

    index = device_index(device, NEEDS_GPU)
    return loading.load_device(compat.PACKAGE, engine_dir, config, index, check_here, gpu_memory_utilization)


def load_probe(
    engine_dir: Path,
    config: EngineConfig,
    device: str | None = None,
    read_weight: ReadWeight | None = None,
    progress: Progress = no_progress,
) -> TensorRTProbe:
    """Prepare an engine of the same options that shows its results, built when it runs; see `BackEnd`."""
    if read_weight is None:
        raise QwenModelError(
            f"{engine_dir} shows no results but its logits: give --model-dir, so that an engine that shows them can be "
            "built of the same checkpoint"
        )
    if compat.MAJOR < 10 and "rotary" in config.disabled_plugins:  # 8.6.0 built none of five
        raise QwenModelError(
            f"{engine_dir} was built with --disable-plugin rotary, and TensorRT {trt.__version__} builds no such engine"
            " that shows its results: compare one that was built without this option"
        )
    read, index = read_weight, device_index(device, NEEDS_GPU)

    def build(prompt_length: int, isolated: bool) -> ObservedDevice:
        with cuda.on_device(index):
            return _observed_device(config, read, progress, prompt_length, isolated)

    def read_module(name: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
        module = network_modules(config.model, config.dtype, config.weight_formats)[name].map(read)
        weight = dequantized(module) if module.format.bits else module.weight.astype(np.float32)
        return weight, None if module.bias is None else module.bias.astype(np.float32)

    return TensorRTProbe(build, read_module)


def _observed_device(
    config: EngineConfig, read_weight: ReadWeight, progress: Progress, prompt_length: int, isolated: bool
) -> ObservedDevice:
    """Build and load an engine for one prompt of this length, whose positions are those of `config`."""
    if prompt_length > LOGIT_ROWS:
        raise QwenModelError(
            f"a prompt of {prompt_length} tokens is too long for engines that show results: give at most {LOGIT_ROWS}"
        )
    limits = Limits(1, prompt_length, max(1, config.limits.max_positions - prompt_length), prompt_length)
    observed = dataclasses.replace(config, limits=limits)
    taps = Taps(observed, isolated)
    cache = TimingCache(None, timing_cache_name())
    plan = _build_plan(observed, _reporting(read_weight, observed, progress), progress, cache, taps)
    name = "the engine that shows results"
    engine, said = loading.deserialized_plan(compat.PACKAGE, memoryview(plan), name)
    if engine is None:
        raise QwenModelError(f"TensorRT does not load {name}. It says:\n{said}")
    return ObservedDevice(observed, engine, loading.DECODE, loading.PREFILL, taps)
