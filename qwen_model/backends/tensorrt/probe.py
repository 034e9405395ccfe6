"""Run a network operation by operation in TensorRT, with an engine that shows and replaces the result of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ...interface.engine_config import EngineConfig
from ...interface.numpy_weights import numpy_dtype
from ...interface.probe import Array
from . import cuda_runtime as cuda
from .executor import TensorRTExecutor
from .observed_network import Taps, given_tensor, result_tensor


class ObservedExecutor(TensorRTExecutor):
    """Run an engine that `Taps` was called for, of one sequence at a time."""

    def __init__(
        self, config: EngineConfig, engine: Any, decode_profile: int, prefill_profile: int, logit_rows: int, taps: Taps
    ):
        """Allocate buffers for every result and every input in place of one; see `TensorRTExecutor`."""
        rows, dtype = config.limits.max_input_len, numpy_dtype(config.dtype)
        self._results = {name: cuda.DeviceArray((rows, columns), dtype) for name, columns in taps.results.items()}
        self._given = {name: cuda.DeviceArray((rows, columns), dtype) for name, columns in taps.given.items()}
        super().__init__(config, engine, decode_profile, prefill_profile, logit_rows)

    def _context(self, profile: int) -> Any:
        context = super()._context(profile)
        for name, array in self._results.items():
            context.set_tensor_address(result_tensor(name), array.address)
        return context

    def _bind(self, context: Any, batch: Any, tokens: int, sequences: int, rows: int) -> None:
        super()._bind(context, batch, tokens, sequences, rows)
        for name, array in self._given.items():
            self._bind_input(context, given_tensor(name), array, tokens)

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
            self._run_prompts([tokens], last_token_ids=np.arange(len(tokens)))
        else:
            self._decode.input_ids.upload(tokens, self.stream)
            self._decode.past_lengths.upload([past], self.stream)
            self._enqueue(self._decode_context(1))

    def _downloaded(self, start: int, end: int) -> dict[str, Array]:
        """Return the results of the tokens at these positions, in the engine's type."""
        count = end - start
        arrays = {**self._results, "lm_head": self._logits}
        found = {name: array.download(self.stream, count) for name, array in arrays.items()}
        for layer, cache in enumerate(self._cache):
            for name, heads in zip("kv", cache.download(self.stream)[0], strict=True):
                rows = heads[:, start:end].swapaxes(0, 1)  # [tokens, kv_heads, head_size]
                found[f"layers.{layer}.attention.{name}"] = rows.reshape(count, -1)
        return found


class TensorRTProbe:
    """Implement `Probe`. An engine is built when the prompt comes; q stays inside of the attention plug-in."""

    def __init__(
        self,
        build: Callable[[int, bool], ObservedExecutor],
        read_module: Callable[[str], tuple[Array, Array | None]],
    ):
        """Take what builds an engine for prompts of so many tokens, of isolated operations or not."""
        self._build = build
        self._read = read_module
        self._executor: ObservedExecutor | None = None

    def run(self, tokens: Sequence[int], past: int, given: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """See `Probe`."""
        if past == 0:
            self._executor = None  # before the next takes memory
            self._executor = self._build(len(tokens), given is not None)
        if self._executor is None:
            raise RuntimeError("the prompt comes first")
        return self._executor.run_observed(tokens, past, given)

    def module(self, name: str) -> tuple[Array, Array | None]:
        """See `Probe`; the plan has the checkpoint's weights in the engine's type."""
        return self._read(name)
