"""Run steps of the network in PyTorch, on a CPU or a GPU; on a GPU a decode step is a CUDA graph."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any, TypeVar
from weakref import finalize

import numpy as np
import torch
from torch import Tensor

from ...checkpoints.config import ModelConfig
from ...checkpoints.module_weights import NOT_QUANTIZED, Formats, ModuleWeights
from ...checkpoints.weights import network_modules
from ...common.errors import OutOfMemoryError
from ...common.extras import require_kernels
from ...common.log import format_bytes
from ...interface.device import Batch, Chosen, FloatArray, Int32Array, Start, TokenMask
from ...interface.engine_config import GemmKernels, KernelChoices, Limits
from ...interface.memory import PAGE_SIZE, sequence_pages
from ...network.decoder import decoder
from ...network.inputs import logit_rows
from ...network.observed import ObservedOperations
from ...network.rotary import PromptTable, rotary_table
from ...network.steps import StepLayout, aligned, chosen_rows, decode_sizes, pack, padded
from ...tuning.choice import by_module
from .eight_bit import Activations
from .operations import Step, TorchOperations
from .paged_cache import PagedCache
from .quantized import unpacked_modules
from .sampling import KernelSampler, TorchSampler

LOG = logging.getLogger(__name__)

ONE_THREAD_WORK = 8e6
"""The most multiplications of a layer for which one CPU thread is faster than several, which wait for each other."""
step_layout = lru_cache(maxsize=256)(StepLayout)
"""Return the layout of a step of this size; those of decode steps are needed again and again."""
STEPS_IN_FLIGHT = 4
"""How many steps the host may describe before the GPU has read the first of them."""


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn PyTorch's out-of-memory error into ours, of one line: what was needed and what is free."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        sentences = re.split(r"\.\s+", str(error))  # the first say what happened, the rest is about the allocator
        raise OutOfMemoryError(
            f"{'. '.join(sentences[:3])}; give a smaller --gpu-memory-utilization, or build with a smaller "
            "--max-num-tokens or --max-batch-size"
        ) from error


class CallersStreams:
    """Order what is launched on the current streams of several threads, of which only one launches at a time."""

    def __init__(self, device: torch.device):
        """Take a GPU, and the stream that is current now as the first."""
        self._device = device
        self._first = self._last = torch.cuda.current_stream(device)

    def follow(self) -> None:
        """Let the current stream wait for what was launched on the one before, if that was another."""
        current = torch.cuda.current_stream(self._device)
        if current != self._last:
            current.wait_stream(self._last)
            self._last = current

    def finish(self) -> None:
        """Wait until memory that was allocated on the first stream can be given back to it."""
        if self._last != self._first:
            self._last.synchronize()


_Method = TypeVar("_Method", bound=Callable[..., Any])


def _in_order(method: _Method) -> _Method:
    """Let a method of `TorchDevice` launch behind the methods called before, whatever the threads and their streams."""

    @wraps(method)
    def ordered(self: TorchDevice, *args: Any, **options: Any) -> Any:
        if self.streams is not None:
            self.streams.follow()
        return method(self, *args, **options)

    return ordered  # type: ignore[return-value]


class _PendingChoice:
    """Hold a choice that is being copied to the host."""

    def __init__(self, found: Sequence[Tensor], copies: torch.cuda.Stream | None):
        """Take tokens, and their log-probabilities and the best tokens with theirs, if they are wanted.

        copies: the stream to copy them on, so that the next step does not wait; None: they are on the CPU.
        """
        self._event: torch.cuda.Event | None = None
        if copies is None:
            self._host = [tensor.clone() for tensor in found]
            return
        self._host = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in found]
        copies.wait_stream(torch.cuda.current_stream(copies.device))
        with torch.cuda.stream(copies):
            for host, tensor in zip(self._host, found, strict=True):
                host.copy_(tensor, non_blocking=True)
                tensor.record_stream(copies)
        self._event = copies.record_event()

    def wait(self) -> Chosen:
        """See `PendingChoice`."""
        if self._event is not None:
            self._event.synchronize()
        tokens, *best = self._host
        if not best:
            return Chosen(tokens.long().numpy())
        logprobs, best_tokens, best_logprobs = best
        return Chosen(tokens.long().numpy(), logprobs.numpy(), best_tokens.long().numpy(), best_logprobs.numpy())


class _Uploads:
    """Write steps on the host and copy them to one place on the device, in their order.

    On a GPU the host writes into a ring of pinned buffers, so that it need not wait for the copy before.
    """

    def __init__(self, target: Tensor, use_kernels: bool):
        """Take where steps are copied to, int32 [elements], and whether our kernels may be used."""
        self._target = target
        self._use_kernels = use_kernels
        if use_kernels:
            self._row_numbers = torch.arange(len(target), dtype=torch.int32, device=target.device)
        self._next = 0
        on_gpu = target.device.type == "cuda"
        places = range(STEPS_IN_FLIGHT if on_gpu else 0)
        self._hosts = [torch.zeros(target.shape, dtype=target.dtype, pin_memory=True) for _ in places]
        self._copied = [torch.cuda.Event() for _ in places]

    def begin(self) -> Int32Array:
        """Return where the next step is written."""
        if not self._copied:
            host: Int32Array = self._target.numpy()
            return host
        self._copied[self._next].synchronize()
        return self._hosts[self._next].numpy()

    def send(self, count: int) -> None:
        """Copy the first `count` elements that were written, on the current stream."""
        if not self._copied:
            return
        host, target = self._hosts[self._next][:count], self._target[:count]
        if self._use_kernels:
            from .kernel_operations import copy_from_host

            copy_from_host(host, target, self._row_numbers)
        else:
            target.copy_(host, non_blocking=True)
        self._copied[self._next].record(torch.cuda.current_stream(target.device))
        self._next = (self._next + 1) % len(self._hosts)


class _StepGraph:
    """Capture a decode step for one number of sequences as a CUDA graph, and replay it.

    The graphs of a device share a memory pool: they never run at the same time, and nothing in the pool, the logits
    included, is needed after another graph has run.
    """

    def __init__(self, step: Callable[[], Tensor], pool: Any):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # in their first call libraries do work that cannot be captured
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may allocate memory meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.logits = step()

    def replay(self) -> Tensor:
        self._graph.replay()
        return self.logits


class TorchDevice:
    """Implement `qwen_model.interface.device.Device`. On a GPU it runs on the current stream of the caller's thread."""

    def __init__(
        self,
        config: ModelConfig,
        limits: Limits,
        weights: Mapping[str, Tensor],
        *,
        num_pages: int,
        kv_cache_dtype: str = "auto",
        disabled_plugins: Collection[str] = (),
        use_kernels: bool | None = None,
        gemm_kernels: GemmKernels | None = None,
        weight_formats: Formats = NOT_QUANTIZED,
        deterministic: bool = False,
    ):
        """Take the weights by the names of checkpoints/weights.py, all on one device; unless quantized, of one type.

        num_pages: of the cache, UNUSED_PAGE among them. kv_cache_dtype: see `EngineConfig`.
        use_kernels: compute the operations with our CUDA kernels, and decode steps as CUDA graphs. None: on a GPU, if
            there are kernels for the model.
        gemm_kernels: those of the linear layers, see tuning/choice.py; None: rules choose them.
        weight_formats: of the quantized modules.
        deterministic: see `BackEnd.load_device`; only with kernels.
        """
        self.config = config
        embedding = weights["embedding.weight"]
        self.device, dtype = embedding.device, embedding.dtype
        on_gpu = self.device.type == "cuda"
        use_kernels = uses_kernels(config, self.device) if use_kernels is None else use_kernels
        self.max_sequences, self.max_tokens = limits.max_batch_size, limits.step_tokens
        self.max_logit_rows = logit_rows(limits)
        self.page_size, self.num_pages = PAGE_SIZE, num_pages
        self.runs_ahead = on_gpu
        self.mixes = use_kernels  # PyTorch's own attention would go through such a step sequence by sequence
        self._max_pages = sequence_pages(limits)
        self._layer_size = sum(weight.numel() for name, weight in weights.items() if name.startswith("layers.0."))

        self.cache = PagedCache(config, num_pages, dtype, kv_cache_dtype, self.device)
        LOG.info(
            "key-value cache: %d pages of %d tokens, %s; %s",
            num_pages,
            PAGE_SIZE,
            format_bytes(self.cache.data.nbytes),
            _kernels_used(use_kernels, on_gpu),
        )
        modules = _module_weights(config, dtype, weights, weight_formats)
        ours = use_kernels and "gemm" not in disabled_plugins
        if not ours:
            modules = unpacked_modules(modules)
        self.gemm_kernels: GemmKernels | None = (gemm_kernels or {}) if ours else None
        chosen = by_module(config, str(dtype).removeprefix("torch."), self.gemm_kernels or {}, weight_formats)
        self._sizes = decode_sizes(self.max_sequences)
        self._deterministic = deterministic
        if use_kernels:
            options = {"max_sequences": self.max_sequences, "deterministic": deterministic}
            self.operations = _kernel_operations(config, modules, self.cache, disabled_plugins, chosen, **options)
        else:
            self.operations = TorchOperations(config, modules, self.cache, disabled_plugins)
        self._table = rotary_table(config, limits.max_positions)
        self._rotary = self._on_device(self._table.values, self._table.query_scale)

        # The tokens chosen last, by slot, and then a step: what the ids of its tokens are gathered from.
        self._first_row = aligned(self.max_sequences + 1)
        self._token_table = torch.zeros(self._first_row + self._largest_step(), dtype=torch.int32, device=self.device)
        last_tokens = self._token_table[: self.max_sequences + 1]
        self._step_inputs = self._token_table[self._first_row :]
        self._uploads = _Uploads(self._step_inputs, use_kernels)
        self._copies = torch.cuda.Stream(self.device) if on_gpu else None
        self.streams = CallersStreams(self.device) if on_gpu else None
        if self.streams is not None:
            finalize(self, self.streams.finish).atexit = False
        make_sampler = KernelSampler if use_kernels else TorchSampler
        self.sampler = make_sampler(self.max_sequences, config.vocab_size, self.device, last_tokens)
        self._graphs: dict[int, _StepGraph] | None = {} if use_kernels else None
        self._graph_pool: Any = torch.cuda.graph_pool_handle() if use_kernels else None
        # Of the last step: logits, slots of their rows, and these on the device.
        self._to_choose: tuple[Tensor, Int32Array, Tensor] | None = None
        self._probed_prompt = 0

    @memory_errors()
    @torch.inference_mode()
    @_in_order
    def prepare(self, num_sequences: int) -> None:
        """See `Device`; capture the CUDA graphs of decode steps that there are none yet of."""
        if self._graphs is None:
            return
        for size in self._sizes:
            if size <= padded(num_sequences, self._sizes):
                self._graph(size)

    @memory_errors()
    @torch.inference_mode()
    @_in_order
    def start(self, sequences: Sequence[Start]) -> None:
        """See `Device`."""
        self.sampler.start(sequences)

    @memory_errors()
    @torch.inference_mode()
    @_in_order
    def forward(self, batch: Batch) -> None:
        """See `Device`."""
        rows = chosen_rows(batch)
        logits, layout = self._run(batch, rows)
        self._to_choose = logits[: len(rows)], batch.slots[batch.chooses], self._part(layout, "slots")[: len(rows)]

    @memory_errors()
    @torch.inference_mode()
    @_in_order
    def choose(self, masks: Mapping[int, TokenMask] | None = None, num_best: int | None = None) -> _PendingChoice:
        """See `Device`."""
        if self._to_choose is None:
            raise RuntimeError("forward comes first")
        logits, slots, device_slots = self._to_choose
        self.sampler.set_masks(masks or {})
        tokens = self.sampler.choose(logits, device_slots, self.sampler.variant(slots, bool(masks)))
        best = () if num_best is None else self.sampler.logprobs(logits, tokens, num_best)
        return _PendingChoice((tokens, *best), self._copies)

    @memory_errors()
    @torch.inference_mode()
    @_in_order
    def logits(self, batch: Batch, rows: Int32Array) -> FloatArray:
        """See `Device`."""
        self._to_choose = None
        found: FloatArray = self._run(batch, rows)[0][: len(rows)].float().cpu().numpy()
        return found

    @memory_errors()
    @torch.inference_mode()
    @_in_order
    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See `Device`."""
        if pairs:
            self.cache.copy_pages(pairs)

    @memory_errors()
    @torch.inference_mode()
    @_in_order
    def run_observed(
        self, tokens: Sequence[int], past: int, observe: Callable[[str, Activations], Activations]
    ) -> None:
        """Run one sequence, its prompt after 0 tokens and then one after the other, in slot 0 and `probe_pages`.

        observe: sees each operation's result, and returns what goes on; see `qwen_model.network.observed`.
        """
        if past == 0:
            self._probed_prompt = len(tokens)
        numbers = np.array([0, len(tokens), past, self._probed_prompt], dtype=np.int32)
        slot, length, before, whole = numbers.reshape(4, 1)
        pages, chooses = self.probe_pages[None], np.array([past > 0])
        batch = Batch(np.array(tokens, np.int32), slot, length, before, whole, pages, chooses)
        no_rows = np.zeros(0, np.int32)  # of the last layer all are computed, and none is gathered
        with self._running(len(tokens)):
            layout, own = self._packed(batch, no_rows, 1, pages.shape[1])
            observed = ObservedOperations(self.operations, observe)
            self._begin([len(tokens)], [past], layout, own, decoding=past > 0)
            decoder(observed, self.config, self._token_ids(layout), last_token_only=False)

    @property
    def probe_pages(self) -> Int32Array:
        """Return the pages that `run_observed` uses, in the order of positions."""
        return np.arange(1, min(self._max_pages, self.num_pages - 1) + 1, dtype=np.int32)

    def _run(self, batch: Batch, rows: Int32Array) -> tuple[Tensor, StepLayout]:
        """Run the network; return the logits of these rows, and of padding behind them, and the step's layout."""
        decoding = self._decodes(batch) and len(rows) == len(batch.lengths)
        count = len(batch.lengths)
        graph = None
        if decoding and batch.num_decoding:  # the prompts have one token each: they decode, too
            batch = dataclasses.replace(batch, num_decoding=0)
        if decoding and self._graphs is not None:
            count = padded(count, self._sizes)
            graph = self._graph(count)
        with self._running(len(batch.tokens)):
            # A graph's page table has room for the longest sequences.
            max_pages = batch.pages.shape[1] if graph is None else self._max_pages
            layout, own = self._packed(batch, rows, count, max_pages)
            if graph is not None and own is None:
                return graph.replay(), layout
            self._begin(batch.lengths.tolist(), batch.past_lengths.tolist(), layout, own, decoding)
            return self._decoded(layout), layout

    def _decodes(self, batch: Batch) -> bool:
        """Tell whether a batch runs as a decode step, in other kernels than prompts do."""
        if not batch.is_decode:
            return False
        # What runs a prompt's last token must not depend on whether the other sequences are prompts, too.
        return not self._deterministic or bool((batch.past_lengths >= batch.prompt_lengths).all())

    def _packed(
        self, batch: Batch, rows: Int32Array, sequences: int, max_pages: int
    ) -> tuple[StepLayout, PromptTable | None]:
        """Send a step to the device; return its layout, and the rotary table of its prompts if they have their own.

        sequences: of the step, in which the sequences behind those of the batch are padding.
        max_pages: columns of the step's page table.
        """
        padding = sequences - len(batch.lengths)
        rows = rows if len(rows) else np.zeros(1, np.int32)  # the network computes at least one row of logits
        tokens, num_rows = len(batch.tokens) + padding, len(rows) + padding
        layout = step_layout(tokens, sequences, num_rows, max_pages, batch.num_decoding)
        spare = {"spare_slot": self.max_sequences, "first_row": self._first_row}
        own = pack(batch, layout, self._table, self._uploads.begin(), rows=rows, **spare)
        self._uploads.send(layout.size)
        return layout, own

    def _begin(
        self, lengths: list[int], past_lengths: list[int], layout: StepLayout, own: PromptTable | None, decoding: bool
    ) -> None:
        """Begin a pass over the step that lies in `_step_inputs`.

        The host's lengths are for PyTorch's own operations, which no step is padded for; kernels do not look at them.
        """
        table, query_scale = self._rotary if own is None else self._on_device(own.values, own.query_scale)
        self.operations.begin(
            Step(
                lengths=lengths,
                past_lengths=past_lengths,
                cu_seqlens=self._part(layout, "cu_seqlens"),
                device_past_lengths=self._part(layout, "past_lengths"),
                pages=self._part(layout, "pages"),
                rotary_table=table,
                rotary_offsets=self._part(layout, "rotary_offsets"),
                query_scale=query_scale,
                logit_rows=self._part(layout, "last_token_ids"),
                decoding=decoding,
                num_decoding=layout.num_decoding,
                prompt_cu_seqlens=self._part(layout, "prompt_cu_seqlens") if layout.num_decoding else None,
            )
        )

    def _decoded(self, layout: StepLayout) -> Tensor:
        """Run the network on the step that `_begin` was called for, and return its logits."""
        logits = decoder(self.operations, self.config, self._token_ids(layout))
        assert isinstance(logits, Tensor)  # of 16 bits or more
        return logits

    def _token_ids(self, layout: StepLayout) -> Tensor:
        """Gather the ids of a step's tokens, some of which only the device knows: int32 [tokens]."""
        return self.operations.token_ids(self._token_table, self._part(layout, "token_rows"))

    def _part(self, layout: StepLayout, name: str) -> Tensor:
        """Return a part of the step on the device, as `StepLayout.part` does of an array."""
        start, shape = layout.starts[name], layout.shapes[name]
        return self._step_inputs[start : start + math.prod(shape)].view(shape)

    def _graph(self, size: int) -> _StepGraph:
        """Return the graph of decode steps of `size` sequences; capture it if need be."""
        graphs = self._graphs
        assert graphs is not None
        if size not in graphs:
            start = time.perf_counter()
            layout = step_layout(size, size, size, self._max_pages)

            def step() -> Tensor:
                self._begin([1] * size, [0] * size, layout, None, decoding=True)
                return self._decoded(layout)

            with torch.cuda.device(self.device):
                self._step_inputs[: layout.size] = 0  # the first run writes to UNUSED_PAGE
                graphs[size] = _StepGraph(step, self._graph_pool)
            LOG.info("CUDA graph of %d sequences captured: %.3f s", size, time.perf_counter() - start)
        return graphs[size]

    def _largest_step(self) -> int:
        """Return the elements of the largest step."""
        rows = max(self.max_sequences, self.max_logit_rows)
        return StepLayout(self.max_tokens, self.max_sequences, rows, self._max_pages, num_decoding=1).size

    def _on_device(self, values: FloatArray, scale: FloatArray | None) -> tuple[Tensor, Tensor | None]:
        """Return a rotary table and its query scale on the device."""
        on_device = torch.from_numpy(values).to(self.device)
        return on_device, None if scale is None else torch.from_numpy(scale).to(self.device)

    @contextmanager
    def _running(self, num_tokens: int) -> Iterator[None]:
        """Make the device's GPU the current one; on a CPU, use one thread for small products. Undo it at the end."""
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                yield
            return
        threads = torch.get_num_threads()
        if threads == 1 or self._layer_size * num_tokens > ONE_THREAD_WORK:
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _kernels_used(use_kernels: bool, on_gpu: bool) -> str:
    """Say whether our kernels compute the operations, for the log. It loads cuBLASLt, if the log is shown."""
    if not use_kernels:
        return "PyTorch's operations, " + ("since there are no kernels for this model" if on_gpu else "on a CPU")
    if not LOG.isEnabledFor(logging.INFO):
        return ""
    from qwen_plugins import launch

    return f"kernels of qwen_plugins, cuBLASLt: {launch.cublas_lt_status()}"


def uses_kernels(config: ModelConfig, device: torch.device) -> bool:
    """Tell whether a model runs with our CUDA kernels on this device.

    Raises:
        QwenModelError: it is a GPU, and the kernels cannot be loaded.
    """
    if device.type != "cuda":
        return False
    require_kernels()
    from .kernel_operations import supported

    return supported(config)


def _module_weights(
    config: ModelConfig, dtype: torch.dtype, weights: Mapping[str, Tensor], formats: Formats
) -> dict[str, ModuleWeights[Tensor]]:
    """Return the tensors of every module that the network calls, by its name."""
    modules = network_modules(config, str(dtype).removeprefix("torch."), formats)
    return {name: module.map(lambda spec: weights[spec.name]) for name, module in modules.items()}


def _kernel_operations(
    config: ModelConfig,
    modules: Mapping[str, ModuleWeights[Tensor]],
    cache: PagedCache,
    disabled: Collection[str],
    gemm_kernels: Mapping[str, KernelChoices],
    **options: Any,
) -> TorchOperations:
    """Return the operations of our kernels; options: their other keywords."""
    from .kernel_operations import KernelOperations

    return KernelOperations(config, modules, cache, disabled, gemm_kernels, **options)
