"""Run a network operation by operation in TensorRT, with an engine that shows and replaces the result of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ...interface.device import Batch
from ...interface.engine_config import EngineConfig
from ...interface.memory import GPU_MEMORY_UTILIZATION, sequence_pages
from ...interface.numpy_weights import numpy_dtype
from ...interface.probe import Array
from ...network.steps import StepLayout
from . import cuda_runtime as cuda
from .device import Rotary, TensorRTDevice
from .observed_network import Taps, given_tensor, result_tensor


class ObservedDevice(TensorRTDevice):
    """Run an engine that `Taps` was called for, of one sequence, whose cache has the engine's type."""

    def __init__(self, config: EngineConfig, engine: Any, decode_profile: int, prefill_profile: int, taps: Taps):
        """Allocate buffers for every result and every input in place of one; see `TensorRTDevice`."""
        rows, dtype = config.limits.max_input_len, numpy_dtype(config.dtype)
        self._results = {name: cuda.DeviceArray((rows, columns), dtype) for name, columns in taps.results.items()}
        self._given = {name: cuda.DeviceArray((rows, columns), dtype) for name, columns in taps.given.items()}
        self._prompt_length = 0
        super().__init__(config, engine, decode_profile, prefill_profile, GPU_MEMORY_UTILIZATION)

    def _context(self, profile: int) -> Any:
        context = super()._context(profile)
        for name, array in self._results.items():
            context.set_tensor_address(result_tensor(name), array.address)
        return context

    def _bind(self, context: Any, layout: StepLayout, rotary: Rotary) -> None:
        super()._bind(context, layout, rotary)
        for name, array in self._given.items():
            self._bind_input(context, given_tensor(name), array.address, (layout.tokens, *array.shape[1:]))

    def run_observed(self, tokens: Sequence[int], past: int, given: Mapping[str, Array] | None) -> dict[str, Array]:
        """Run the prompt, after 0 tokens, or one token after the other; return every result, float32."""
        with cuda.on_device(self.device):
            self._run_once(tokens, past, given or {})
            found = self._downloaded(past, past + len(tokens))
        return {name: array.astype(np.float32) for name, array in found.items()}

    def _run_once(self, tokens: Sequence[int], past: int, given: Mapping[str, Array]) -> None:
        for name, array in self._given.items():
            array.upload(given[name], self.stream)
        if past == 0:
            self._prompt_length = len(tokens)
        slot, length, past_length, prompt = np.array([[0], [len(tokens)], [past], [self._prompt_length]], np.int32)
        pages = np.arange(1, sequence_pages(self.config.limits) + 1, dtype=np.int32)[None]
        batch = Batch(np.array(tokens, np.int32), slot, length, past_length, prompt, pages, np.array([True]))
        if past == 0:
            self._run_now(batch, np.arange(len(tokens), dtype=np.int32), self._prefill_context)
        else:
            self._run_now(batch, np.zeros(1, np.int32), self._context(self._decode_profile))

    def _downloaded(self, start: int, end: int) -> dict[str, Array]:
        """Return the results of the tokens at these positions."""
        count = end - start
        arrays = {**self._results, "lm_head": self._logits}
        found = {name: array.download(self.stream, count) for name, array in arrays.items()}
        for layer, cache in enumerate(self._cache):
            pages = cache.download(self.stream, 1 + sequence_pages(self.config.limits))[1:]
            _, _, kv_heads, _, head_size = pages.shape
            for name, heads in zip("kv", pages.swapaxes(0, 1), strict=True):
                rows = heads.swapaxes(1, 2).reshape(-1, kv_heads * head_size)  # one for each position
                found[f"layers.{layer}.attention.{name}"] = rows[start:end]
        return found


class TensorRTProbe:
    """Implement `Probe`. An engine is built when the prompt comes; q stays inside of the attention plug-in."""

    def __init__(
        self,
        build: Callable[[int, bool], ObservedDevice],
        read_module: Callable[[str], tuple[Array, Array | None]],
    ):
        """Take what builds an engine for prompts of so many tokens, of isolated operations or not."""
        self._build = build
        self._read = read_module
        self._device: ObservedDevice | None = None

    def run(self, tokens: Sequence[int], past: int, given: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """See `Probe`."""
        if past == 0:
            self._device = None  # before the next takes memory
            self._device = self._build(len(tokens), given is not None)
        if self._device is None:
            raise RuntimeError("the prompt comes first")
        return self._device.run_observed(tokens, past, given)

    def module(self, name: str) -> tuple[Array, Array | None]:
        """See `Probe`; the plan has the checkpoint's weights in the engine's type."""
        return self._read(name)
