"""Run a plan: prompts in one pass, each decode step as one CUDA graph, all on buffers that are allocated once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from ...interface.engine_config import EngineConfig
from ...interface.executor import FloatArray, IntArray, last_rows
from ...interface.numpy_weights import numpy_dtype
from ...interface.sampling import Choice, SamplingOptions
from ...network.rotary import rotary_table
from . import cuda_runtime as cuda
from .batch_sampling import DeviceSampler
from .package import Package, activation_bytes, package

LOG = logging.getLogger(__name__)

STEPS_IN_FLIGHT = 4
"""The number of steps whose tokens can wait to be read. A session starts at most two before it reads the first."""

WARM_UP_TOKENS = 256
"""Enough rows that the GEMMs are those of long prompts, which cuBLASLt computes."""


class _PendingTokens:
    """Hold tokens that are being copied to the host."""

    def __init__(self, slot: cuda.PinnedArray, event: cuda.Event, count: int):
        self._slot, self._event, self._count = slot, event, count

    def wait(self) -> IntArray:
        self._event.synchronize()
        return self._slot.array[: self._count].astype(np.int64)


class _TokenRing:
    """Own pinned memory for the tokens of the last few steps; the slots are used in turn."""

    def __init__(self, max_batch_size: int):
        self._slots = [(cuda.PinnedArray((max_batch_size,), np.int32), cuda.Event()) for _ in range(STEPS_IN_FLIGHT)]
        self._next = 0

    def fetch(self, tokens: cuda.DeviceArray, count: int, stream: cuda.Stream) -> _PendingTokens:
        """Start copying the first `count` tokens to the host."""
        slot, event = self._slots[self._next]
        self._next = (self._next + 1) % STEPS_IN_FLIGHT
        slot.copy_from(tokens.address, count * tokens.dtype.itemsize, stream)
        event.record(stream)
        return _PendingTokens(slot, event, count)


@dataclass
class _Batch:
    """Own the inputs that describe the packed tokens of one pass, on the device."""

    input_ids: cuda.DeviceArray
    cu_seqlens: cuda.DeviceArray
    past_lengths: cuda.DeviceArray
    rotary_offsets: cuda.DeviceArray
    last_token_ids: cuda.DeviceArray

    @classmethod
    def allocate(cls, tokens: int, sequences: int, rows: int) -> _Batch:
        sizes = (tokens, sequences + 1, sequences, sequences, rows)
        return cls(*(cuda.DeviceArray((size,), np.int32) for size in sizes))


P = ParamSpec("P")
R = TypeVar("R")


def _on_its_device(
    method: Callable[Concatenate[TensorRTExecutor, P], R],
) -> Callable[Concatenate[TensorRTExecutor, P], R]:
    """Make the executor's device the current one during a call: the caller's thread may have another."""

    @wraps(method)
    def on_its_device(self: TensorRTExecutor, *args: P.args, **kwargs: P.kwargs) -> R:
        with cuda.on_device(self.device):
            return method(self, *args, **kwargs)

    return on_its_device


class TensorRTExecutor:
    """Implement `qwen_model.interface.executor.Executor`; an executor is not for use by several threads at a time."""

    runs_ahead = True

    def __init__(
        self,
        config: EngineConfig,
        engine: Any,
        decode_profile: int,
        prefill_profile: int,
        logit_rows: int,
        tensorrt: Package | None = None,
    ):
        """Allocate every buffer. `engine` is an `ICudaEngine` on the current device, which the executor stays on.

        decode_profile, prefill_profile: indices of the engine's optimization profiles.
        logit_rows: the most rows of logits that the prefill profile gives.
        tensorrt: the package that the engine is of; None: TensorRT.
        """
        model, limits = config.model, config.limits
        batch = limits.max_batch_size
        dtype = numpy_dtype(config.dtype)
        self.config = config
        self.engine = engine
        self.gemm_kernels = None if "gemm" in config.disabled_plugins else config.gemm_kernels
        self.tensorrt = tensorrt or package("tensorrt")
        self._runtime_config = self.tensorrt.runtime_config(engine, cuda.device_name_and_capability()[0])
        self.device = cuda.current_device()
        self.stream = cuda.Stream()
        self._decode_profile, self._prefill_profile, self._logit_rows = decode_profile, prefill_profile, logit_rows
        self._decode = _Batch.allocate(batch, batch, batch)
        self._prompts = _Batch.allocate(batch * limits.max_input_len, batch, logit_rows)
        self._logits = cuda.DeviceArray((logit_rows, model.vocab_size), dtype)
        cache = (batch, 2, model.num_kv_heads, limits.max_positions, model.head_size)
        self._cache = [cuda.DeviceArray(cache, dtype) for _ in range(model.num_layers)]
        self._scratch: cuda.DeviceArray | None = None  # as large as a layer of the cache, for beam search
        self._table = rotary_table(model, limits.max_positions)
        self._rotary = self._on_device(self._table.values)
        scale = self._table.query_scale
        self._query_scale = None if scale is None else self._on_device(scale)
        self._prompt_rotary: list[cuda.DeviceArray] = []  # the last prompts' own table and scale, if they needed them
        self._semaphores = cuda.DeviceArray((batch, model.num_heads), np.int32)
        self._activations = cuda.DeviceMemory(activation_bytes(engine))
        self._sampler = DeviceSampler(batch, model.vocab_size, config.dtype, self.stream)
        self._tokens = cuda.DeviceArray((batch,), np.int32)  # as chosen; the next step's input has 0 for NO_TOKEN
        self._ring = _TokenRing(batch)
        self._prefill_context = self._context(prefill_profile)
        self._decode_contexts: dict[int, Any] = {}  # by the number of sequences
        self._graphs: dict[tuple[int, Choice], cuda.Graph] = {}
        self._host_past: list[int] = []
        self._choice = Choice.of(SamplingOptions())
        self._beam_logits: FloatArray | None = None
        self._clear()

    @_on_its_device
    def prepare(self, num_sequences: int, sampling: SamplingOptions) -> None:
        """See `Executor`; capture the CUDA graph of a decode step of this kind, if there is none yet."""
        self._choice = Choice.of(sampling)
        if (num_sequences, self._choice) in self._graphs:
            return
        start = time.perf_counter()
        if not self._graphs:
            self._warm_up()
        context = self._decode_context(num_sequences)
        for state in (self._decode.input_ids, self._decode.past_lengths, self._decode.rotary_offsets):
            state.fill(0, self.stream)

        def step() -> None:
            self._enqueue(context)
            self._choose(num_sequences, self._decode.past_lengths)

        step()  # in its first run for a shape TensorRT does work that cannot be captured
        self.stream.synchronize()
        self._graphs[num_sequences, self._choice] = cuda.Graph(self.stream, step)
        self.tensorrt.keep_kernels()
        self._end_batch()
        LOG.info("CUDA graph of %d sequences captured: %.3f s", num_sequences, time.perf_counter() - start)

    @_on_its_device
    def prefill(self, prompts: Sequence[Sequence[int]], sampling: SamplingOptions) -> _PendingTokens:
        """See `Executor`."""
        self.prepare(len(prompts), sampling)
        self._sampler.begin(sampling, prompts)
        self._run_prompts(prompts)
        self._choose(len(prompts), None)
        return self._chosen()

    @_on_its_device
    def decode(self) -> _PendingTokens:
        """See `Executor`."""
        self._step()
        return self._chosen()

    @_on_its_device
    def prompt_logits(self, prompt: Sequence[int]) -> FloatArray:
        """See `Executor`. A long prompt is run in chunks, each after those before it in the cache."""
        chunks = []
        for start in range(0, len(prompt), self._logit_rows):
            rows = np.arange(min(self._logit_rows, len(prompt) - start))
            self._run_prompts([prompt[start : start + len(rows)]], start, len(prompt), rows)
            chunks.append(self._logits.download(self.stream, len(rows)).astype(np.float32))
        self._host_past = []
        return np.concatenate(chunks)

    @_on_its_device
    def last_logits(self, prompts: Sequence[Sequence[int]], counts: Sequence[int]) -> FloatArray:
        """See `Executor`. Prompts with more rows of logits than the prefill profile gives are run one by one."""
        rows = last_rows(prompts, counts)
        if len(rows) > self._logit_rows:
            each = zip(prompts, counts, strict=True)
            return np.concatenate([self.prompt_logits(prompt)[-count:] for prompt, count in each])
        self._run_prompts(prompts, last_token_ids=rows)
        logits = self._logits.download(self.stream, len(rows)).astype(np.float32)
        self._host_past = []
        return logits

    @_on_its_device
    def begin_beams(self, prompts: Sequence[Sequence[int]], num_beams: int) -> None:
        """See `Executor`."""
        self.prepare(len(prompts) * num_beams, SamplingOptions())
        self._run_prompts(prompts)
        rows = np.repeat(np.arange(len(prompts)), num_beams)
        logits = self._logits.download(self.stream, len(prompts))
        self._reorder(rows)
        self._beam_logits = logits[rows].astype(np.float32)

    def beam_candidates(self, scores: FloatArray, count: int) -> tuple[FloatArray, IntArray, IntArray]:
        """See `Executor`."""
        if self._beam_logits is None:
            raise RuntimeError("begin_beams comes first")
        largest = self._beam_logits.max(-1, keepdims=True)  # NaN where one is
        with np.errstate(invalid="ignore"):
            logits = self._beam_logits - largest
        sums = logits - np.log(np.exp(logits).sum(-1, keepdims=True)) + scores.reshape(-1, 1)
        sums = sums.reshape(len(scores), -1)
        places = np.sort(np.argpartition(-sums, count - 1)[:, :count])  # of equal sums the lower index comes first
        order = np.argsort(-np.take_along_axis(sums, places, -1), kind="stable")
        places = np.take_along_axis(places, order, -1)
        best = np.take_along_axis(sums, places, -1)
        best[~np.isfinite(largest).reshape(len(scores), -1).all(-1)] = np.nan
        return best, places // self.config.model.vocab_size, places % self.config.model.vocab_size

    @_on_its_device
    def decode_beams(self, rows: IntArray, tokens: IntArray) -> None:
        """See `Executor`."""
        self._reorder(rows)
        self._decode.input_ids.upload(tokens, self.stream)
        self._step()
        self._beam_logits = self._logits.download(self.stream, len(rows)).astype(np.float32)

    def _warm_up(self) -> None:
        """Let libraries initialise themselves before the first prompts."""
        length = min(self.config.limits.max_input_len, WARM_UP_TOKENS)
        self._run_prompts([[0] * length])
        self.stream.synchronize()

    @_on_its_device
    def measure_layers(self, prompts: Sequence[Sequence[int]], repeats: int) -> dict[str, dict[str, float]]:
        """Return the median milliseconds of each layer in the "prefill" of the prompts and in a "decode" step after it.

        TensorRT times each layer on its own, so that a step takes less than their sum. This ends the current batch.
        """
        found = {}
        prefill, decode = self.tensorrt.layer_times(), self.tensorrt.layer_times()
        context = self._context(self._prefill_profile)
        context.profiler = prefill
        for _ in range(repeats + 1):  # the first is to warm up
            self._run_prompts(prompts, context=context)
            self.stream.synchronize()
        found["prefill"] = prefill.medians()
        context = self._context(self._decode_profile)
        self._bind(context, self._decode, len(prompts), len(prompts), len(prompts))
        self._decode.input_ids.fill(0, self.stream)  # any token takes the same time
        context.profiler = decode
        for _ in range(repeats + 1):
            self._enqueue(context)
            self.stream.synchronize()
        found["decode"] = decode.medians()
        self._end_batch()
        return found

    def _context(self, profile: int) -> Any:
        """Create an execution context with semaphores, logits and cache bound; `_bind` binds the rest."""
        memory = self._activations
        context = self.tensorrt.create_context(
            self.engine, profile, memory.address, memory.num_bytes, self.stream.handle, self._runtime_config
        )
        fixed = {"semaphores": self._semaphores, "logits": self._logits}
        for layer, cache in enumerate(self._cache):
            fixed |= {f"past_key_value_{layer}": cache, f"present_key_value_{layer}": cache}
        for name, array in fixed.items():
            context.set_tensor_address(name, array.address)
        return context

    def _decode_context(self, num_sequences: int) -> Any:
        """Return the context for steps of `num_sequences`, which their CUDA graphs use."""
        if num_sequences not in self._decode_contexts:
            context = self._context(self._decode_profile)
            self._bind(context, self._decode, num_sequences, num_sequences, num_sequences)
            self._decode_contexts[num_sequences] = context
        return self._decode_contexts[num_sequences]

    def _bind(self, context: Any, batch: _Batch, tokens: int, sequences: int, rows: int) -> None:
        """Bind the inputs of a batch of this size, and the engine's rotary table."""
        self._bind_input(context, "input_ids", batch.input_ids, tokens)
        self._bind_input(context, "cu_seqlens", batch.cu_seqlens, sequences + 1)
        self._bind_input(context, "past_lengths", batch.past_lengths, sequences)
        self._bind_input(context, "rotary_offsets", batch.rotary_offsets, sequences)
        self._bind_input(context, "last_token_ids", batch.last_token_ids, rows)
        self._bind_rotary(context, self._rotary, self._query_scale)

    def _bind_rotary(self, context: Any, table: cuda.DeviceArray, query_scale: cuda.DeviceArray | None) -> None:
        self._bind_input(context, "rotary_table", table, table.shape[0])
        if query_scale is not None:
            self._bind_input(context, "query_scale", query_scale, query_scale.shape[0])

    def _bind_input(self, context: Any, name: str, array: cuda.DeviceArray, size: int) -> None:
        context.set_tensor_address(name, array.address)
        if not context.set_input_shape(name, (size, *array.shape[1:])):
            raise self.tensorrt.refusal(f"TensorRT refused {size} rows of {name}")

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self.stream.handle):
            raise self.tensorrt.refusal("TensorRT refused to run")

    def _choose(self, count: int, past_lengths: cuda.DeviceArray | None) -> None:
        """Choose the next tokens, which stay on the device as the next step's input."""
        self._sampler.choose(self._logits, self._choice, count, self._tokens, self._decode.input_ids, past_lengths)

    def _chosen(self) -> _PendingTokens:
        """Start copying the tokens of the last step to the host."""
        return self._ring.fetch(self._tokens, len(self._host_past), self.stream)

    def _step(self) -> None:
        self._graphs[len(self._host_past), self._choice].launch()
        self._host_past = [past + 1 for past in self._host_past]

    def _run_prompts(
        self,
        prompts: Sequence[Sequence[int]],
        past: int = 0,
        prompt_length: int | None = None,
        last_token_ids: npt.NDArray[Any] | None = None,
        context: Any = None,
    ) -> None:
        """Compute the logits after the prompts, and set the state from which decoding continues.

        past, prompt_length, last_token_ids: given for a chunk of one prompt: the number of tokens before it, the length
            of the whole prompt, and the rows of the chunk whose logits are computed. Without them each prompt is whole,
            and the logits are those after its last token.
        context: None: the context for prompts.
        """
        self._end_batch()
        lengths = [len(prompt) for prompt in prompts]
        whole = lengths if prompt_length is None else [prompt_length]
        ends = np.cumsum(lengths)
        rows = ends - 1 if last_token_ids is None else last_token_ids
        batch, context, stream = self._prompts, context or self._prefill_context, self.stream
        self._bind(context, batch, int(ends[-1]), len(lengths), len(rows))
        batch.input_ids.upload(np.concatenate([np.asarray(prompt, np.int32) for prompt in prompts]), stream)
        batch.cu_seqlens.upload([0, *ends], stream)
        batch.past_lengths.upload([past] * len(lengths), stream)
        batch.last_token_ids.upload(rows, stream)
        offsets = [self._table.offset(length) for length in whole]
        batch.rotary_offsets.upload(self._bind_own_rotary(context, whole) or offsets, stream)
        self._decode.past_lengths.upload(lengths, stream)
        self._decode.rotary_offsets.upload(offsets, stream)
        self._enqueue(context)
        self._host_past = lengths

    def _bind_own_rotary(self, context: Any, lengths: list[int]) -> list[int] | None:
        """Bind a table of the prompts' own if they need one; return where each prompt begins in it, else None."""
        own = self._table.prompt_table(lengths, [0] * len(lengths), lengths)
        if own is None:
            return None
        table = self._on_device(own.values)
        scale = None if own.query_scale is None else self._on_device(own.query_scale)
        self._prompt_rotary = [table] if scale is None else [table, scale]  # keep them: the device reads them later
        self._bind_rotary(context, table, scale)
        return own.starts

    def _reorder(self, rows: IntArray) -> None:
        """Make row i of the cache and of the lengths what row `rows[i]` was."""
        moved = [(target, int(source)) for target, source in enumerate(rows) if target != source]
        past = [self._host_past[row] for row in rows]
        if moved:
            self._move_cache_rows(moved, max(past))
            offsets = self._decode.rotary_offsets.download(self.stream)
            self._decode.rotary_offsets.upload(offsets[rows], self.stream)
            self._decode.past_lengths.upload(past, self.stream)
        self._host_past = past

    def _move_cache_rows(self, moved: list[tuple[int, int]], positions: int) -> None:
        """Copy rows of each layer's cache, the first `positions` of each, by way of a buffer of one layer's size."""
        if self._scratch is None:
            self._scratch = cuda.DeviceArray(self._cache[0].shape, self._cache[0].dtype)
        _, _, heads, max_positions, head_size = self._scratch.shape
        pitch = max_positions * head_size * self._scratch.dtype.itemsize
        width, height = positions * head_size * self._scratch.dtype.itemsize, 2 * heads
        row_bytes = pitch * height
        scratch = self._scratch.address
        for cache in self._cache:
            for i, (_, source) in enumerate(moved):
                cuda.copy_rows(
                    scratch + i * row_bytes,
                    pitch,
                    cache.address + source * row_bytes,
                    pitch,
                    width,
                    height,
                    self.stream,
                )
            for i, (target, _) in enumerate(moved):
                cuda.copy_rows(
                    cache.address + target * row_bytes,
                    pitch,
                    scratch + i * row_bytes,
                    pitch,
                    width,
                    height,
                    self.stream,
                )

    def _on_device(self, array: npt.NDArray[Any]) -> cuda.DeviceArray:
        memory = cuda.DeviceArray(array.shape, array.dtype)
        memory.upload(array, self.stream)
        return memory

    def _clear(self) -> None:
        """Initialise what the first request reads."""
        for cache in self._cache:
            cache.fill(0, self.stream)  # attention over rows that nothing was written to must not meet NaN
        self._semaphores.fill(0, self.stream)
        batch = self.config.limits.max_batch_size
        self._decode.cu_seqlens.upload(np.arange(batch + 1), self.stream)
        self._decode.last_token_ids.upload(np.arange(batch), self.stream)
        self.stream.synchronize()

    def _end_batch(self) -> None:
        """End the current batch: nothing of it can be continued."""
        self._host_past = []
        self._beam_logits = None
