"""Run the network in PyTorch, on a CPU or a GPU; on a GPU a decode step is one CUDA graph."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...checkpoints.config import ModelConfig
from ...checkpoints.module_weights import ModuleWeights
from ...checkpoints.weights import network_modules
from ...common.errors import OutOfMemoryError
from ...common.extras import require_kernels
from ...common.log import format_bytes
from ...interface.engine_config import GemmKernels, KernelChoices, Limits
from ...interface.executor import FloatArray, IntArray, last_rows
from ...interface.sampling import Choice, SamplingOptions
from ...network.decoder import decoder
from ...network.observed import ObservedOperations
from ...network.rotary import rotary_table
from ...tuning.choice import by_module
from .batch_sampling import KernelSampler, TorchSampler
from .operations import Batch, TorchOperations

LOG = logging.getLogger(__name__)

ONE_THREAD_WORK = 8e6
"""The most multiplications of a layer for which one CPU thread is faster than several, which wait for each other."""


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn PyTorch's out-of-memory error into ours, of one line: what was needed and what is free."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        sentences = re.split(r"\.\s+", str(error))  # the first say what happened, the rest is about the allocator
        raise OutOfMemoryError(
            f"{'. '.join(sentences[:3])}; use a smaller batch or shorter prompts, or build with a smaller "
            "--max-batch-size, --max-input-len or --max-output-len"
        ) from error


class _PendingTokens:
    """Hold tokens that are being copied to the host."""

    def __init__(self, tokens: Tensor):
        self._event: torch.cuda.Event | None = None
        if tokens.device.type != "cuda":
            self._host = tokens.clone()
            return
        self._host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        self._host.copy_(tokens, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(tokens.device))

    def wait(self) -> IntArray:
        if self._event is not None:
            self._event.synchronize()
        return self._host.long().numpy()


class _StepGraph:
    """Capture a decode step for one number of sequences as a CUDA graph, and replay it.

    The graphs of an executor share a memory pool: they never run at the same time, and nothing in the pool, the logits
    included, is needed after another graph has run.
    """

    def __init__(self, step: Callable[[], Tensor], pool: Any):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # in their first call libraries do work that cannot be captured
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self.logits = step()

    def replay(self) -> Tensor:
        self._graph.replay()
        return self.logits


class TorchExecutor:
    """Implement `qwen_model.interface.executor.Executor`; an executor is not for use by several threads at a time."""

    def __init__(
        self,
        config: ModelConfig,
        limits: Limits,
        weights: Mapping[str, Tensor],
        disabled_plugins: Collection[str] = (),
        use_kernels: bool | None = None,
        gemm_kernels: GemmKernels | None = None,
    ):
        """Take the weights by the names of checkpoints/weights.py, all on one device and of one type.

        use_kernels: compute the operations with our CUDA kernels, and decode steps as CUDA graphs. None: on a GPU, if
            there are kernels for the model.
        gemm_kernels: those of the linear layers, see tuning/choice.py; None: rules choose them.
        """
        self.config = config
        self.limits = limits
        embedding = weights["embedding.weight"]
        self.device, self.dtype = embedding.device, embedding.dtype
        on_gpu = self.device.type == "cuda"
        use_kernels = uses_kernels(config, self.device) if use_kernels is None else use_kernels
        self.runs_ahead = on_gpu
        self._layer_size = sum(weight.numel() for name, weight in weights.items() if name.startswith("layers.0."))

        shape = (config.num_layers, limits.max_batch_size, 2, config.num_kv_heads, limits.max_positions)
        # Zeros, not empty: attention over rows that nothing was written to must not meet NaN.
        self.cache = torch.zeros(*shape, config.head_size, dtype=self.dtype, device=self.device)
        LOG.info("key-value cache: %s; %s", format_bytes(self.cache.nbytes), _kernels_used(use_kernels, on_gpu))
        modules = _module_weights(config, self.dtype, weights)
        ours = use_kernels and "gemm" not in disabled_plugins
        self.gemm_kernels: GemmKernels | None = (gemm_kernels or {}) if ours else None
        chosen = by_module(config, modules["lm_head"].format.kind, self.gemm_kernels or {})
        self.operations = _operations(config, modules, self.cache, disabled_plugins, use_kernels, chosen)
        self._table = rotary_table(config, limits.max_positions)
        self._rotary = torch.from_numpy(self._table.values).to(self.device)
        scale = self._table.query_scale
        self._query_scale = None if scale is None else torch.from_numpy(scale).to(self.device)

        self._graphs: dict[tuple[int, Choice], _StepGraph] | None = {} if use_kernels else None
        self._graph_pool: Any = torch.cuda.graph_pool_handle() if use_kernels else None
        token_dtype = torch.int32 if use_kernels else torch.int64
        self._tokens = torch.zeros(limits.max_batch_size, dtype=token_dtype, device=self.device)  # as chosen
        self._input_ids = torch.zeros_like(self._tokens)  # of the next step: the same, with 0 for NO_TOKEN
        self._past = torch.zeros(limits.max_batch_size, dtype=torch.int32, device=self.device)
        self._offsets = torch.zeros(limits.max_batch_size, dtype=torch.int32, device=self.device)
        self._host_past: list[int] = []
        self._choice = Choice.of(SamplingOptions())
        self._kernel_sampler: KernelSampler | None = None
        if use_kernels:
            self._kernel_sampler = KernelSampler(limits.max_batch_size, config.vocab_size, self.device)
        self._sampler: TorchSampler | None = None  # without kernels
        self._beam_logits: Tensor | None = None

    @memory_errors()
    @torch.inference_mode()
    def prepare(self, num_sequences: int, sampling: SamplingOptions) -> None:
        """See `Executor`; capture the CUDA graph of a decode step of this kind, if there is none yet."""
        self._choice = Choice.of(sampling)
        if self._graphs is None or (num_sequences, self._choice) in self._graphs:
            return
        for state in (self._past, self._offsets, self._input_ids):
            state.zero_()
        start = time.perf_counter()
        with torch.cuda.device(self.device):
            graph = _StepGraph(lambda: self._step(num_sequences), self._graph_pool)
        self._graphs[num_sequences, self._choice] = graph
        LOG.info("CUDA graph of %d sequences captured: %.3f s", num_sequences, time.perf_counter() - start)

    @memory_errors()
    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], sampling: SamplingOptions) -> _PendingTokens:
        """See `Executor`."""
        self.prepare(len(prompts), sampling)
        packed = self._packed(prompts)
        logits = self._prefill_logits(prompts, packed)
        if self._kernel_sampler is None:
            self._sampler = TorchSampler(sampling, prompts, self.config.vocab_size, self.device)
        else:
            self._kernel_sampler.begin(sampling, packed, self.operations.batch.cu_seqlens)
        self._choose(logits)
        return _PendingTokens(self._tokens[: len(prompts)])

    @memory_errors()
    @torch.inference_mode()
    def decode(self) -> _PendingTokens:
        """See `Executor`."""
        logits = self._decode_logits()
        return _PendingTokens(self._tokens[: len(logits)])

    def prompt_logits(self, prompt: Sequence[int]) -> FloatArray:
        """See `Executor`."""
        return self.last_logits([prompt], [len(prompt)])

    @memory_errors()
    @torch.inference_mode()
    def last_logits(self, prompts: Sequence[Sequence[int]], counts: Sequence[int]) -> FloatArray:
        """See `Executor`."""
        logits = self._prefill_logits(prompts, self._packed(prompts), last_token_only=False)
        rows = torch.from_numpy(last_rows(prompts, counts)).to(self.device)
        return logits[rows].float().cpu().numpy()

    @memory_errors()
    @torch.inference_mode()
    def begin_beams(self, prompts: Sequence[Sequence[int]], num_beams: int) -> None:
        """See `Executor`."""
        self.prepare(len(prompts) * num_beams, SamplingOptions())
        self._sampler = None
        logits = self._prefill_logits(prompts, self._packed(prompts))
        rows = torch.arange(len(prompts), device=self.device).repeat_interleave(num_beams)
        self._reorder(rows)
        self._beam_logits = logits[rows]

    @memory_errors()
    @torch.inference_mode()
    def beam_candidates(self, scores: FloatArray, count: int) -> tuple[FloatArray, IntArray, IntArray]:
        """See `Executor`."""
        if self._beam_logits is None:
            raise RuntimeError("begin_beams comes first")
        sums = self._beam_logits.float().log_softmax(-1)
        sums += torch.from_numpy(scores).to(self.device).view(-1, 1)
        best, places = sums.view(len(scores), -1).topk(count)
        found = places.cpu().numpy()
        return best.cpu().numpy(), found // self.config.vocab_size, found % self.config.vocab_size

    @memory_errors()
    @torch.inference_mode()
    def decode_beams(self, rows: IntArray, tokens: IntArray) -> None:
        """See `Executor`."""
        if not np.array_equal(rows, np.arange(len(rows))):
            self._reorder(torch.from_numpy(rows).to(self.device))
        self._input_ids[: len(tokens)] = torch.from_numpy(tokens).to(self.device)
        self._beam_logits = self._decode_logits()

    @memory_errors()
    @torch.inference_mode()
    def run_observed(self, tokens: Sequence[int], past: int, observe: Callable[[str, Tensor], Tensor]) -> None:
        """Run one sequence, its prompt after 0 tokens and then one after the other; end the current batch.

        observe: sees each operation's result, and returns what goes on; see `qwen_model.network.observed`.
        """
        packed = self._packed([tokens])
        self._host_past = []
        if past == 0:
            batch = self._prompt_batch([len(tokens)])
        else:
            batch = self._decode_batch([past], torch.tensor([past], dtype=torch.int32, device=self.device))
        with self._running(len(tokens)):
            self.operations.begin(batch)
            decoder(ObservedOperations(self.operations, observe), self.config, packed, last_token_only=False)

    def _choose(self, logits: Tensor, past_lengths: Tensor | None = None) -> None:
        """Choose the next tokens, which stay on the device, and add 1 to the past lengths, if given."""
        tokens, input_ids = self._tokens[: len(logits)], self._input_ids[: len(logits)]
        if self._kernel_sampler is not None:
            self._kernel_sampler(logits, self._choice, tokens, input_ids, past_lengths)
            return
        if self._sampler is not None:  # beam search chooses its tokens itself
            tokens.copy_(self._sampler(logits))
            torch.clamp(tokens, min=0, out=input_ids)
        if past_lengths is not None:
            past_lengths += 1

    def _packed(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Return the prompts' tokens one after the other, on the device: [tokens]."""
        packed = np.concatenate([np.asarray(prompt, dtype=np.int64) for prompt in prompts])
        return torch.from_numpy(packed).to(self._tokens.dtype).to(self.device)

    def _prefill_logits(self, prompts: Sequence[Sequence[int]], packed: Tensor, last_token_only: bool = True) -> Tensor:
        lengths = [len(prompt) for prompt in prompts]
        with self._running(len(packed)):
            self.operations.begin(self._prompt_batch(lengths))
            logits = decoder(self.operations, self.config, packed, last_token_only)
        self._host_past = lengths
        self._past[: len(lengths)] = torch.tensor(lengths, dtype=torch.int32)
        return logits

    def _prompt_batch(self, lengths: list[int]) -> Batch:
        """Describe prompts of these lengths, and keep where the rows of their decode steps begin in the table."""
        offsets = [self._table.offset(length) for length in lengths]
        table, scale, starts = self._prompt_rotary(lengths, offsets)
        self._offsets[: len(lengths)] = torch.tensor(offsets, dtype=torch.int32)
        past = torch.zeros(len(lengths), dtype=torch.int32, device=self.device)
        return Batch(lengths, [0] * len(lengths), table, starts, scale, past, decoding=False)

    def _prompt_rotary(self, lengths: list[int], offsets: list[int]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return rotary table, query scale and first row of each prompt: the engine's, or those of a prompt table."""
        table, scale, starts = self._rotary, self._query_scale, offsets
        if (own := self._table.prompt_table(lengths, [0] * len(lengths), lengths)) is not None:
            table = torch.from_numpy(own.values).to(self.device)
            scale = None if own.query_scale is None else torch.from_numpy(own.query_scale).to(self.device)
            starts = own.starts
        return table, scale, torch.tensor(starts, dtype=torch.int32).to(self.device)

    def _decode_logits(self) -> Tensor:
        count = len(self._host_past)
        if self._graphs is None:
            logits = self._step(count)
        else:
            with torch.cuda.device(self.device):
                logits = self._graphs[count, self._choice].replay()
        self._host_past = [past + 1 for past in self._host_past]
        return logits

    def _step(self, count: int) -> Tensor:
        """Run the network on `_input_ids`, one token of each sequence, and choose the next ones.

        With kernels this is captured in a CUDA graph, so it must not read host values that change between steps.
        """
        past = self._past[:count]
        with self._running(count):
            self.operations.begin(self._decode_batch(self._host_past, past))
            logits = decoder(self.operations, self.config, self._input_ids[:count])
            self._choose(logits, past)
        return logits

    def _decode_batch(self, host_past: list[int], past: Tensor) -> Batch:
        """Describe a decode step of sequences that have `past` tokens, int32 [sequences], which the host knows, too."""
        count = len(past)
        offsets, scale = self._offsets[:count], self._query_scale
        return Batch([1] * count, host_past, self._rotary, offsets, scale, past, decoding=True)

    @contextmanager
    def _running(self, num_tokens: int) -> Iterator[None]:
        """Make the executor's GPU the current one; on a CPU, use one thread for small products. Undo it at the end."""
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

    def _reorder(self, rows: Tensor) -> None:
        """Make row i of the cache and of the lengths what row `rows[i]` was."""
        order = rows.tolist()
        self._host_past = [self._host_past[row] for row in order]
        longest = max(self._host_past)
        for layer in self.cache:
            layer[: len(rows), :, :, :longest] = layer[rows, :, :, :longest]
        for state in (self._past, self._offsets):
            state[: len(rows)] = state[rows]


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
    config: ModelConfig, dtype: torch.dtype, weights: Mapping[str, Tensor]
) -> dict[str, ModuleWeights[Tensor]]:
    """Return the tensors of every module that the network calls, by its name."""
    modules = network_modules(config, str(dtype).removeprefix("torch."))
    return {name: module.map(lambda spec: weights[spec.name]) for name, module in modules.items()}


def _operations(
    config: ModelConfig,
    modules: Mapping[str, ModuleWeights[Tensor]],
    cache: Tensor,
    disabled: Collection[str],
    use_kernels: bool,
    gemm_kernels: Mapping[str, KernelChoices],
) -> TorchOperations:
    if not use_kernels:
        return TorchOperations(config, modules, cache, disabled)
    from .kernel_operations import KernelOperations

    return KernelOperations(config, modules, cache, disabled, gemm_kernels)
