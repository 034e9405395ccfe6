"""Run steps of a plan: a decode step is a CUDA graph of one of a few sizes; steps of prompts are not captured."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from qwen_plugins import launch

from ...common.errors import QwenModelError
from ...interface.device import Batch, Chosen, FloatArray, Int32Array, Start, TokenMask
from ...interface.engine_config import EngineConfig
from ...interface.memory import PAGE_SIZE, pool_pages, sequence_pages
from ...interface.numpy_weights import numpy_dtype
from ...network.inputs import cache_input, logit_rows
from ...network.rotary import PromptTable, rotary_table
from ...network.steps import StepLayout, aligned, chosen_rows, decode_sizes, pack, padded
from . import cuda_runtime as cuda
from .package import Package, activation_bytes, package
from .sampling import SlotSampler

LOG = logging.getLogger(__name__)

STEPS_IN_FLIGHT = 4
"""How many steps the host may describe before the device has read the first of them."""

WARM_UP_TOKENS = 256
"""Enough rows that the GEMMs are those of long prompts, which cuBLASLt computes."""

MAX_BEST = 128
"""The most of the most likely tokens whose log-probabilities the kernel finds."""


class _Uploads:
    """Own pinned arrays, in which the host writes steps in turn, and know where on the device they are copied to."""

    def __init__(self, address: int, size: int, stream: cuda.Stream):
        self._address, self._stream = address, stream
        self._ring = [(cuda.PinnedArray((size,), np.int32), cuda.Event()) for _ in range(STEPS_IN_FLIGHT)]
        self._next = 0

    def begin(self) -> Int32Array:
        """Return an array to write the next step into, once the device has read what was in it."""
        pinned, copied = self._ring[self._next]
        copied.synchronize()
        return pinned.array

    def send(self, size: int) -> None:
        """Start copying the first `size` elements of that array."""
        pinned, copied = self._ring[self._next]
        pinned.copy_to(self._address, 4 * size, self._stream)
        copied.record(self._stream)
        self._next = (self._next + 1) % len(self._ring)


class _PendingChoice:
    """Hold a choice that is being copied to the host."""

    def __init__(self, downloads: _Downloads, count: int, num_best: int | None):
        self._downloads, self._count, self._num_best = downloads, count, num_best
        self._place = downloads.take(_choice_size(count, num_best))

    def wait(self) -> Chosen:
        """See `PendingChoice`."""
        pinned, copied = self._place
        copied.synchronize()
        found = pinned.array[: _choice_size(self._count, self._num_best)].copy()
        self._downloads.give_back(self._place)
        tokens = found[: self._count].astype(np.int64)
        if self._num_best is None:
            return Chosen(tokens)
        start, best = aligned(self._count), self._count * self._num_best
        logprobs = found[start : start + self._count].view(np.float32)
        best_tokens = found[2 * start : 2 * start + best].astype(np.int64)
        best_logprobs = found[2 * start + aligned(best) :][:best].view(np.float32)
        shape = (self._count, self._num_best)
        return Chosen(tokens, logprobs, best_tokens.reshape(shape), best_logprobs.reshape(shape))


def _choice_size(count: int, num_best: int | None) -> int:
    """Return the words of a choice: tokens, and with `num_best` log-probabilities, best tokens and theirs.

    Each part begins at a multiple of `steps.ALIGNMENT`.
    """
    return aligned(count) if num_best is None else 2 * (aligned(count) + aligned(count * num_best))


class _Downloads:
    """Own the place on the device where choices are, and the pinned arrays that they are copied to."""

    def __init__(self, max_sequences: int, stream: cuda.Stream):
        self.memory = cuda.DeviceArray((_choice_size(max_sequences, MAX_BEST),), np.int32)
        self._stream = stream
        self._free: list[tuple[cuda.PinnedArray, cuda.Event]] = []

    def take(self, size: int) -> tuple[cuda.PinnedArray, cuda.Event]:
        """Start copying the first `size` words; return where they will be, once the event has happened."""
        found = next((place for place in self._free if len(place[0].array) >= size), None)
        if found is None:
            found = cuda.PinnedArray((size,), np.int32), cuda.Event()
        else:
            self._free.remove(found)
        pinned, copied = found
        pinned.copy_from(self.memory.address, 4 * size, self._stream)
        copied.record(self._stream)
        return found

    def give_back(self, place: tuple[cuda.PinnedArray, cuda.Event]) -> None:
        """Let a pinned array that was read be used again."""
        self._free.append(place)


Rotary = tuple[cuda.DeviceArray, cuda.DeviceArray | None]
"""A rotary table and its query scale."""
P = ParamSpec("P")
R = TypeVar("R")


def _on_its_gpu(method: Callable[Concatenate[TensorRTDevice, P], R]) -> Callable[Concatenate[TensorRTDevice, P], R]:
    """Make the device's GPU the current one during a call: the caller's thread may have another."""

    @wraps(method)
    def on_its_gpu(self: TensorRTDevice, *args: P.args, **kwargs: P.kwargs) -> R:
        with cuda.on_device(self.device):
            return method(self, *args, **kwargs)

    return on_its_gpu


class TensorRTDevice:
    """Implement `qwen_model.interface.device.Device`."""

    runs_ahead = True
    mixes = False  # an engine has a profile for prompts and one for decode tokens
    page_size = PAGE_SIZE

    def __init__(
        self,
        config: EngineConfig,
        engine: Any,
        decode_profile: int,
        prefill_profile: int,
        gpu_memory_utilization: float,
        tensorrt: Package | None = None,
    ):
        """Allocate every buffer. `engine` is an `ICudaEngine` on the current GPU, which the device stays on.

        decode_profile, prefill_profile: indices of the engine's optimization profiles.
        gpu_memory_utilization: see `interface.memory`: the cache takes what is left of it.
        tensorrt: the package that the engine is of; None: TensorRT.

        Raises:
            OutOfMemoryError: what is left does not hold the longest sequence.
        """
        model, limits = config.model, config.limits
        self.config = config
        self.engine = engine
        self.gemm_kernels = None if "gemm" in config.disabled_plugins else config.gemm_kernels
        self.tensorrt = tensorrt or package("tensorrt")
        self._runtime_config = self.tensorrt.runtime_config(engine, cuda.device_name_and_capability()[0])
        self.device = cuda.current_device()
        self.stream = cuda.Stream()
        self.max_sequences, self.max_tokens = limits.max_batch_size, limits.step_tokens
        self.max_logit_rows = logit_rows(limits)
        self._decode_profile, self._prefill_profile = decode_profile, prefill_profile
        self._sizes = decode_sizes(self.max_sequences)
        self._max_pages = sequence_pages(limits)
        # The tokens chosen last, by slot, and then a step: what the ids of its tokens are gathered from.
        self._first_row = aligned(self.max_sequences + 1)
        step_size = StepLayout(self.max_tokens, self.max_sequences, self.max_logit_rows, self._max_pages).size
        self._token_table = cuda.DeviceArray((self._first_row + step_size,), np.int32)
        self._token_table.fill(0, self.stream)
        self._step_inputs = self._token_table.address + 4 * self._first_row
        self._uploads = _Uploads(self._step_inputs, step_size, self.stream)
        self._downloads = _Downloads(self.max_sequences, self.stream)
        self._input_ids = cuda.DeviceArray((self.max_tokens,), np.int32)
        self._logits = cuda.DeviceArray((self.max_logit_rows, model.vocab_size), numpy_dtype(config.dtype))
        self._table = rotary_table(model, limits.max_positions)
        self._rotary = self._on_device(self._table.values, self._table.query_scale)
        self._prompt_rotary = self._rotary  # the last prompts' own, if they needed one
        self._semaphores = cuda.DeviceArray((self.max_sequences, model.num_heads), np.int32)
        self._semaphores.fill(0, self.stream)
        self._activations = cuda.DeviceMemory(activation_bytes(engine))
        last_tokens = self._token_table.address
        self._sampler = SlotSampler(self.max_sequences, model.vocab_size, config.dtype, self.stream, last_tokens)
        self.num_pages, self._cache = self._allocate_cache(gpu_memory_utilization)
        self._prefill_context = self._context(prefill_profile)
        self._graphs: dict[int, cuda.Graph] = {}  # by the number of sequences
        self._contexts: dict[int, Any] = {}  # that the graphs were captured of
        self._to_choose: tuple[Int32Array, int] | None = None  # of the last step: slots of its rows, and their address
        self.stream.synchronize()

    @_on_its_gpu
    def prepare(self, num_sequences: int) -> None:
        """See `Device`; capture the CUDA graphs of decode steps that there are none yet of."""
        for size in self._sizes:
            if size <= padded(num_sequences, self._sizes):
                self._graph(size)

    @_on_its_gpu
    def start(self, sequences: Sequence[Start]) -> None:
        """See `Device`."""
        self._sampler.start(sequences)

    @_on_its_gpu
    def forward(self, batch: Batch) -> None:
        """See `Device`."""
        layout = self._run(batch, chosen_rows(batch))
        self._to_choose = batch.slots[batch.chooses], self._address(layout, "slots")

    @_on_its_gpu
    def choose(self, masks: Mapping[int, TokenMask] | None = None, num_best: int | None = None) -> _PendingChoice:
        """See `Device`."""
        if self._to_choose is None:
            raise RuntimeError("forward comes first")
        slots, address = self._to_choose
        count, tokens = len(slots), self._downloads.memory.address
        self._sampler.set_masks(masks or {})
        variant = self._sampler.variant(slots, bool(masks))
        self._sampler.choose(self._logits.address, address, count, variant, tokens)
        if num_best is not None:
            logprobs = tokens + 4 * aligned(count)
            best_tokens = logprobs + 4 * aligned(count)
            best_logprobs = best_tokens + 4 * aligned(count * num_best)
            best = logprobs, best_tokens, best_logprobs
            self._sampler.logprobs(self._logits.address, tokens, count, num_best, *best)
        return _PendingChoice(self._downloads, count, num_best)

    @_on_its_gpu
    def logits(self, batch: Batch, rows: Int32Array) -> FloatArray:
        """See `Device`."""
        self._to_choose = None
        self._run(batch, rows)
        return self._logits.download(self.stream, len(rows)).astype(np.float32)

    @_on_its_gpu
    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See `Device`."""
        for cache in self._cache:
            size = cache.num_bytes // self.num_pages
            for source, target in pairs:
                cuda.copy_within(cache.address + target * size, cache.address + source * size, size, self.stream)

    @_on_its_gpu
    def measure_layers(self, prompts: Sequence[Sequence[int]], repeats: int) -> dict[str, dict[str, float]]:
        """Return the median milliseconds of each layer in the "prefill" of the prompts and in a "decode" step after it.

        TensorRT times each layer on its own, so that a step takes less than their sum. The prompts are one step.
        Nothing that was in the cache is kept.
        """
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        each = int(lengths.max()) // PAGE_SIZE + 1
        if lengths.sum() > self.max_tokens or len(prompts) * each >= self.num_pages:
            raise QwenModelError(
                f"prompts of {lengths.sum()} tokens in all are too many for one step, which has {self.max_tokens}, or "
                f"for the cache, which has {(self.num_pages - 1) * PAGE_SIZE}"
            )
        pages = 1 + np.arange(len(prompts) * each, dtype=np.int32).reshape(len(prompts), each)
        prefill = _batch(np.concatenate(prompts), lengths, np.zeros_like(lengths), pages)
        decode = _batch(np.zeros_like(lengths), np.ones_like(lengths), lengths, pages)
        found = {}
        steps = ("prefill", self._prefill_profile, prefill), ("decode", self._decode_profile, decode)
        for name, profile, batch in steps:
            times, context = self.tensorrt.layer_times(), self._context(profile)
            context.profiler = times
            for _ in range(repeats + 1):  # the first is to warm up
                self._run_now(batch, chosen_rows(batch), context)
                self.stream.synchronize()
            found[name] = times.medians()
        return found

    def _run(self, batch: Batch, rows: Int32Array) -> StepLayout:
        """Run the network, and return the step's layout; the logits of these rows, and of padding, are in `_logits`."""
        if not batch.is_decode or len(rows) != len(batch.lengths):
            return self._run_now(batch, rows, self._prefill_context)
        size = padded(len(rows), self._sizes)
        graph = self._graph(size)
        layout = self._decode_layout(size)
        if self._upload(batch, layout, rows) is not None:  # a prompt of one token, with a rotary table of its own
            return self._run_now(batch, rows, self._prefill_context)
        graph.launch()
        return layout

    def _run_now(self, batch: Batch, rows: Int32Array, context: Any) -> StepLayout:
        """Run the network on a batch in a context of any profile, without a graph."""
        count = max(len(rows), 1)  # the network computes at least one row
        layout = StepLayout(len(batch.tokens), len(batch.lengths), count, self._max_pages)
        own = self._upload(batch, layout, rows)
        if own is not None:  # kept: the device reads it later
            self._prompt_rotary = self._on_device(own.values, own.query_scale)
        self._bind(context, layout, self._rotary if own is None else self._prompt_rotary)
        self._enqueue(context, layout)
        return layout

    def _upload(self, batch: Batch, layout: StepLayout, rows: Int32Array) -> PromptTable | None:
        """Send a step to the device; return the rotary table of its prompts, if they need one of their own."""
        into, spare = self._uploads.begin(), self.max_sequences
        own = pack(batch, layout, self._table, into, rows=rows, spare_slot=spare, first_row=self._first_row)
        self._uploads.send(layout.size)
        return own

    def _decode_layout(self, size: int) -> StepLayout:
        return StepLayout(size, size, size, self._max_pages)

    def _graph(self, size: int) -> cuda.Graph:
        """Return the graph of decode steps of `size` sequences; capture it if need be."""
        if size in self._graphs:
            return self._graphs[size]
        start = time.perf_counter()
        if not self._graphs:
            self._warm_up()
        layout = self._decode_layout(size)
        context = self._contexts[size] = self._context(self._decode_profile)
        self._bind(context, layout, self._rotary)
        none = np.zeros(0, np.int32)
        nothing = _batch(none, none, none, none.reshape(0, 1))
        self._upload(nothing, layout, none)
        self._enqueue(context, layout)  # in its first run for a shape TensorRT does work that cannot be captured
        self.stream.synchronize()
        self._graphs[size] = cuda.Graph(self.stream, lambda: self._enqueue(context, layout))
        self.tensorrt.keep_kernels()
        LOG.info("CUDA graph of %d sequences captured: %.3f s", size, time.perf_counter() - start)
        return self._graphs[size]

    def _warm_up(self) -> None:
        """Let libraries initialise themselves before the first prompts; keys and values go to UNUSED_PAGE."""
        length = min(self.max_tokens, self.config.limits.max_positions, WARM_UP_TOKENS)
        zero = np.zeros(1, np.int32)
        batch = _batch(np.zeros(length, np.int32), zero + length, zero, zero.reshape(1, 1))
        self._run_now(batch, chosen_rows(batch), self._prefill_context)
        self.stream.synchronize()

    def _context(self, profile: int) -> Any:
        """Create an execution context with what all steps share bound; `_bind` binds the rest."""
        memory = self._activations
        context = self.tensorrt.create_context(
            self.engine, profile, memory.address, memory.num_bytes, self.stream.handle, self._runtime_config
        )
        fixed = {"semaphores": self._semaphores, "logits": self._logits}
        for name, array in fixed.items():
            context.set_tensor_address(name, array.address)
        for layer, cache in enumerate(self._cache):
            self._bind_input(context, f"past_key_value_{layer}", cache.address, cache.shape)
            context.set_tensor_address(f"present_key_value_{layer}", cache.address)
        return context

    def _bind(self, context: Any, layout: StepLayout, rotary: Rotary) -> None:
        """Bind the inputs of a step of this layout, and a rotary table with its query scale."""
        self._bind_input(context, "input_ids", self._input_ids.address, (layout.tokens,))
        for name in ("cu_seqlens", "past_lengths", "pages", "rotary_offsets", "last_token_ids"):
            self._bind_input(context, name, self._address(layout, name), layout.shapes[name])
        table, query_scale = rotary
        self._bind_input(context, "rotary_table", table.address, table.shape)
        if query_scale is not None:
            self._bind_input(context, "query_scale", query_scale.address, query_scale.shape)

    def _bind_input(self, context: Any, name: str, address: int, shape: tuple[int, ...]) -> None:
        context.set_tensor_address(name, address)
        if not context.set_input_shape(name, shape):
            raise self.tensorrt.refusal(f"TensorRT refused {name} of shape {list(shape)}")

    def _address(self, layout: StepLayout, name: str) -> int:
        """Return the address of a part of the step that is on the device."""
        return self._step_inputs + 4 * layout.starts[name]

    def _enqueue(self, context: Any, layout: StepLayout) -> None:
        """Run the network on the step that is on the device."""
        launch.gather_rows(
            table=self._token_table.address,
            ids=self._address(layout, "token_rows"),
            y=self._input_ids.address,
            table_rows=self._token_table.shape[0],
            row_size=1,
            rows=layout.tokens,
            dtype=launch.DataType.float32,  # of 4 bytes, as a token id has
            stream=self.stream.handle,
        )
        if not context.execute_async_v3(self.stream.handle):
            raise self.tensorrt.refusal("TensorRT refused to run")

    def _allocate_cache(self, gpu_memory_utilization: float) -> tuple[int, list[cuda.DeviceArray]]:
        """Return the number of pages, and the cache of each layer."""
        config = self.config
        free, total = cuda.memory_info()
        available = gpu_memory_utilization * total - (total - free)
        described = config.model, config.limits, config.dtype, config.kv_cache_dtype
        given = cache_input(*described)
        assert given.decode is not None
        pages = min(pool_pages(*described, available), given.decode.max)
        dtype = np.dtype(np.int32) if given.dtype == "int32" else numpy_dtype(given.dtype)
        caches = [cuda.DeviceArray((pages, *given.shape[1:]), dtype) for _ in range(config.model.num_layers)]
        for cache in caches:
            cache.fill(0, self.stream)  # attention over positions that nothing was written to must not meet NaN
        return pages, caches

    def _on_device(self, values: FloatArray, scale: FloatArray | None) -> Rotary:
        """Upload a rotary table and its query scale."""
        return self._uploaded(values), None if scale is None else self._uploaded(scale)

    def _uploaded(self, array: npt.NDArray[Any]) -> cuda.DeviceArray:
        memory = cuda.DeviceArray(array.shape, array.dtype)
        memory.upload(array, self.stream)
        return memory


def _batch(tokens: Int32Array, lengths: Int32Array, past_lengths: Int32Array, pages: Int32Array) -> Batch:
    """Return a batch of sequences in the first slots, which all choose."""
    slots, prompts = np.arange(len(lengths), dtype=np.int32), past_lengths + lengths
    tokens = np.asarray(tokens, np.int32)
    return Batch(tokens, slots, lengths, past_lengths, prompts, pages, np.ones(len(lengths), bool))
