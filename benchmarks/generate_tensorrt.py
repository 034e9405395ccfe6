"""Implement benchmarks.generate with TensorRT engines, without PyTorch."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.generate import COMMON, SHAPES, Implementation, Load, QwenModel
from qwen_model.backends.tensorrt import back_end, cuda_runtime
from qwen_model.checkpoints.checkpoint import Checkpoint
from qwen_model.checkpoints.config import ModelConfig, read_config
from qwen_model.checkpoints.weights import WeightSpec
from qwen_model.common.progress import no_progress
from qwen_model.engine.scheduler import Scheduler
from qwen_model.engine.session import Session
from qwen_model.interface.back_end import ReadWeight
from qwen_model.interface.engine_config import EngineConfig, Limits
from qwen_model.interface.numpy_weights import numpy_dtype
from qwen_model.packaged_model import packaged_model_dir

DISABLED_PLUGINS = {
    "tensorrt": (),
    "native_norms": ("rms_norm",),
    "native_rotary": ("rotary",),
    "native_gemm": ("gemm",),
}
IMPLEMENTATIONS = tuple(DISABLED_PLUGINS)
NUMBERS = 1 << 24


def default_device() -> str:
    return "cuda"


def reset_memory() -> None:
    """Release unused memory."""
    gc.collect()


def memory_gib(implementation: str) -> float:
    """Return the device memory in use by all processes, in GiB."""
    free, total = cuda_runtime.memory_info()
    return (total - free) / 2**30


class RandomWeights:
    """RandomWeights are normally distributed and repeat the same numbers: drawing each weight would take minutes."""

    def __init__(self, dtype: str):
        numbers = np.random.default_rng(0).standard_normal(NUMBERS, np.float32) * 0.02
        self._numbers = numbers.astype(numpy_dtype(dtype))
        self._start = 0

    def read(self, spec: WeightSpec) -> npt.NDArray[Any]:
        """See `qwen_model.backends.tensorrt.back_end.write_engine`; norms multiply by 1."""
        if len(spec.shape) == 1:
            return np.ones(spec.shape, self._numbers.dtype)
        self._start = (self._start + 7919) % NUMBERS  # a different offset for each weight
        return np.resize(np.roll(self._numbers, self._start), spec.shape)


def new_session(name: str, shape: str, dtype: str, device: str, largest: Load) -> Session:
    """Build and load an engine of that shape that does not stop at end tokens; print how long both took."""
    read: ReadWeight
    if shape == "packaged":
        folder = packaged_model_dir()
        model, read = ModelConfig.from_model_dir(folder), Checkpoint(folder, back_end.FRAMEWORK).read
    else:
        model, read = read_config({**COMMON, **SHAPES[shape]}), RandomWeights(dtype).read
    tokens = min(Limits.max_num_tokens, largest.batch_size * largest.prompt_tokens)
    limits = Limits(largest.batch_size, largest.prompt_tokens, largest.new_tokens, tokens)
    config = EngineConfig("tensorrt", dtype, limits, model, (), 0, back_end.versions(), DISABLED_PLUGINS[name])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        start = time.perf_counter()
        config = dataclasses.replace(config, gemm_kernels=back_end.choose_kernels(config, no_progress))
        back_end.write_engine(folder, config, read, no_progress)
        built = time.perf_counter()
        scheduler = Scheduler(back_end.load_device(folder, config, device))
        size = (folder / back_end.PLAN).stat().st_size / 2**30
    loaded = time.perf_counter()
    print(
        f"{shape} {name}: built in {built - start:.1f} s, {size:.2f} GiB, loaded in {loaded - built:.1f} s", flush=True
    )
    return Session(config, scheduler)


def loaded(options: argparse.Namespace, shape: str, largest: Load) -> Iterator[tuple[str, Implementation]]:
    """Yield each implementation in turn; the one before must be released by then."""
    for name in options.implementations:
        yield name, QwenModel(new_session(name, shape, options.dtype, options.device, largest))
