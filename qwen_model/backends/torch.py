"""The PyTorch back end: the network runs now, on a CPU or a GPU; on a GPU a decode step is one CUDA graph."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..config import ModelConfig
from ..engine_config import EngineConfig, Limits
from ..errors import QwenModelError
from ..executor import FloatArray, IntArray
from ..extras import require_kernels
from ..memory import required_bytes
from ..network import decoder
from ..rotary import rotary_table
from ..sampling import Choice, SamplingOptions
from ..weights import WeightGroup, WeightSpec, too_large, weight_groups
from .torch_operations import Batch, TorchOperations
from .torch_sampling import KernelSampler, TorchSampler

if TYPE_CHECKING:
    from ..engine import Progress

ONE_THREAD_WORK = 8e6
"""Multiplications in a layer up to which a CPU's threads cost more, in waiting for each other, than they save."""


@contextmanager
def _memory_errors() -> Iterator[None]:
    """A GPU whose memory runs out is an error in one line: what was needed and what is free, as PyTorch says it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        sentences = re.split(r"\.\s+", str(error))  # of several; the first say it, the rest is about the allocator
        raise QwenModelError(
            f"{'. '.join(sentences[:3])}; use a smaller batch or shorter prompts, or build with a smaller "
            "--max-batch-size, --max-input-len or --max-output-len"
        ) from error


def write_engine(
    folder: Path, config: EngineConfig, read_weight: Callable[[WeightSpec], Tensor], progress: Progress
) -> list[str]:
    """Write one safetensors file for each group of weights to `folder`. Returns what the user should know: nothing.

    read_weight: gives each weight of weights.py, of any floating-point type.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    (folder / "weights").mkdir()
    done, (total, _) = 0, required_bytes(config.model, config.limits, config.dtype)
    for group in weight_groups(config.model):
        tensors = {spec.name: as_dtype(read_weight(spec), config.dtype, spec.name).contiguous() for spec in group.specs}
        if len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) < len(tensors):
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # safetensors refuses shared memory
        try:
            save_file(tensors, _weights_file(folder, group))
        except SafetensorError as error:  # a full disk, too
            raise OSError(str(error)) from error
        done += sum(tensor.nbytes for tensor in tensors.values())
        progress("weights", done, total)
    return []


def _weights_file(engine_dir: Path, group: WeightGroup) -> Path:
    return engine_dir / "weights" / f"{group.name}.safetensors"


def as_dtype(weight: Tensor, dtype: str, name: str) -> Tensor:
    """Of that type; an error if it has numbers that are too large for it."""
    converted = weight.to(getattr(torch, dtype))
    if weight.dtype != converted.dtype == torch.float16 and not converted.isfinite().all():
        raise QwenModelError(too_large(name, dtype, float(weight.abs().max())))
    return converted


@_memory_errors()
def load_executor(engine_dir: Path, config: EngineConfig, device: str | None = None) -> TorchExecutor:
    """Load an engine's weights on `device`: "cpu", "cuda", "cuda:1", ...; None: the GPU if there is one."""
    target = choose_device(device)
    check_memory(config.model, config.limits, config.dtype, target)
    weights: dict[str, Tensor] = {}
    for group in weight_groups(config.model):
        path = _weights_file(engine_dir, group)
        if not path.is_file():
            raise QwenModelError(f"{engine_dir} is not whole: {path.name} is missing; build the engine again")
        weights.update(_read_weights(path, group, config.dtype, target))
    return TorchExecutor(config.model, config.limits, weights, config.rmsnorm_plugin)


def _read_weights(path: Path, group: WeightGroup, dtype: str, device: torch.device) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(path, device=str(device))
    except (SafetensorError, OSError) as error:
        raise QwenModelError(f"{path} is damaged ({error}): build the engine again") from error
    expected = {spec.name: (spec.shape, getattr(torch, dtype)) for spec in group.specs}
    found = {name: (tuple(weight.shape), weight.dtype) for name, weight in weights.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if found.get(name) != expected.get(name))
    if wrong:
        raise QwenModelError(
            f"{path} does not hold what config.json says ({', '.join(wrong)}: missing, unknown or of another shape or "
            "type): build the engine again"
        )
    return weights


def choose_device(name: str | None) -> torch.device:
    """The device of that name; None: the GPU if there is one."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise QwenModelError(f"device must be 'cpu' or 'cuda' or 'cuda:N', not {name!r}")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise QwenModelError(f"device {name!r} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return device


def default_dtype(checkpoint_dtype: str) -> str:
    """The checkpoint's type where there is a GPU; a CPU is slow in the half-precision types."""
    return checkpoint_dtype if torch.cuda.is_available() else "float32"


def versions() -> dict[str, str]:
    """What an engine's `config.json` says about the software that built it."""
    return {"torch": torch.__version__, "cuda": torch.version.cuda or "none"}


def activation_bytes(config: ModelConfig, limits: Limits, dtype: str) -> int:
    """About what the largest prefill needs: the widest moment of a layer, in the MLP, beside the residual."""
    columns = 3 * config.intermediate_size + 3 * config.hidden_size
    return limits.max_batch_size * limits.max_input_len * columns * getattr(torch, dtype).itemsize


def check_memory(config: ModelConfig, limits: Limits, dtype: str, device: torch.device) -> None:
    """Say what is needed before the memory runs out half-way."""
    weights, cache = required_bytes(config, limits, dtype)
    activations = activation_bytes(config, limits, dtype)
    free, total = _memory(device)
    if weights + cache + activations > free:
        gib = 2.0**30
        kind = "GPU memory" if device.type == "cuda" else "memory"
        raise QwenModelError(
            f"not enough {kind}: {weights / gib:.2f} GiB of weights, {cache / gib:.2f} GiB of key-value cache "
            f"({limits.max_batch_size} sequences of {limits.max_positions} tokens) and about {activations / gib:.2f} "
            f"GiB for prompts are needed, {free / gib:.2f} of {total / gib:.2f} GiB are free; build with a smaller "
            "--max-batch-size, --max-input-len or --max-output-len"
        )


def _memory(device: torch.device) -> tuple[int, int]:
    """Bytes that are free and that there are. A CPU gives up caches and swaps for us: all of it counts as free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total, total


class _Tokens:
    """Tokens on their way to the host."""

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
    """A decode step for one number of sequences, captured once and then replayed.

    The steps of an executor share a memory pool: they never run at the same time, and nothing in a pool, the logits
    either, is needed once a step of another size runs.
    """

    def __init__(self, step: Callable[[], Tensor], pool: Any):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # libraries initialise themselves in the first call, which must not be captured
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self.logits = step()

    def replay(self) -> Tensor:
        self._graph.replay()
        return self.logits


class TorchExecutor:
    """See `qwen_model.executor.Executor`. Not for use by several threads at a time."""

    def __init__(
        self,
        config: ModelConfig,
        limits: Limits,
        weights: Mapping[str, Tensor],
        rmsnorm_plugin: bool = True,
        use_kernels: bool | None = None,
    ):
        """Weights by the names of weights.py, all on one device and of one type.

        use_kernels: the operations by our CUDA kernels, and decode steps as CUDA graphs; None: on a GPU, if there are
            kernels for the model.
        """
        self.config = config
        self.limits = limits
        embedding = weights["embedding.weight"]
        self.device, self.dtype = embedding.device, embedding.dtype
        on_gpu = self.device.type == "cuda"
        use_kernels = on_gpu and _has_kernels(config) if use_kernels is None else use_kernels
        self.runs_ahead = on_gpu
        self._layer_size = sum(weight.numel() for name, weight in weights.items() if name.startswith("layers.0."))

        shape = (config.num_layers, limits.max_batch_size, 2, config.num_kv_heads, limits.max_positions)
        # Zeros, not empty: attention over rows that nothing was written to must not meet NaN.
        self.cache = torch.zeros(*shape, config.head_size, dtype=self.dtype, device=self.device)
        self._ops = _operations(config, dict(weights), self.cache, rmsnorm_plugin, use_kernels)
        self._table = rotary_table(config, limits.max_positions)
        self._rotary = torch.from_numpy(self._table.values).to(self.device)
        scale = self._table.query_scale
        self._query_scale = None if scale is None else torch.from_numpy(scale).to(self.device)

        self._graphs: dict[tuple[int, Choice], _StepGraph] | None = {} if use_kernels else None
        self._graph_pool: Any = torch.cuda.graph_pool_handle() if use_kernels else None
        token_dtype = torch.int32 if use_kernels else torch.int64
        self._tokens = torch.zeros(limits.max_batch_size, dtype=token_dtype, device=self.device)
        self._past = torch.zeros(limits.max_batch_size, dtype=torch.int32, device=self.device)
        self._offsets = torch.zeros(limits.max_batch_size, dtype=torch.int32, device=self.device)
        self._host_past: list[int] = []
        self._choice = Choice.of(SamplingOptions())
        self._kernel_sampler: KernelSampler | None = None
        if use_kernels:
            self._kernel_sampler = KernelSampler(limits.max_batch_size, config.vocab_size, self.device)
        self._sampler: TorchSampler | None = None  # without kernels
        self._beam_logits: Tensor | None = None

    @_memory_errors()
    @torch.inference_mode()
    def prepare(self, num_sequences: int, sampling: SamplingOptions) -> None:
        """See `Executor`: captures the graph of such a step, which the next ones are."""
        self._choice = Choice.of(sampling)
        if self._graphs is None or (num_sequences, self._choice) in self._graphs:
            return
        for state in (self._past, self._offsets, self._tokens):
            state.zero_()
        with torch.cuda.device(self.device):
            graph = _StepGraph(lambda: self._step(num_sequences), self._graph_pool)
        self._graphs[num_sequences, self._choice] = graph

    @_memory_errors()
    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], sampling: SamplingOptions) -> _Tokens:
        """See `Executor`."""
        self.prepare(len(prompts), sampling)
        packed = self._packed(prompts)
        logits = self._prefill_logits(prompts, packed)
        if self._kernel_sampler is None:
            self._sampler = TorchSampler(sampling, prompts, self.config.vocab_size, self.device)
        else:
            self._kernel_sampler.begin(sampling, packed, self._ops.batch.cu_seqlens)
        self._choose(logits)
        return _Tokens(self._tokens[: len(prompts)])

    @_memory_errors()
    @torch.inference_mode()
    def decode(self) -> _Tokens:
        """See `Executor`."""
        logits = self._decode_logits()
        return _Tokens(self._tokens[: len(logits)])

    @_memory_errors()
    @torch.inference_mode()
    def prompt_logits(self, prompt: Sequence[int]) -> FloatArray:
        """See `Executor`."""
        logits = self._prefill_logits([prompt], self._packed([prompt]), last_token_only=False)
        return logits.float().cpu().numpy()

    @_memory_errors()
    @torch.inference_mode()
    def begin_beams(self, prompts: Sequence[Sequence[int]], num_beams: int) -> None:
        """See `Executor`."""
        self.prepare(len(prompts) * num_beams, SamplingOptions())
        self._sampler = None
        logits = self._prefill_logits(prompts, self._packed(prompts))
        rows = torch.arange(len(prompts), device=self.device).repeat_interleave(num_beams)
        self._reorder(rows)
        self._beam_logits = logits[rows]

    @_memory_errors()
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

    @_memory_errors()
    @torch.inference_mode()
    def decode_beams(self, rows: IntArray, tokens: IntArray) -> None:
        """See `Executor`."""
        if not np.array_equal(rows, np.arange(len(rows))):
            self._reorder(torch.from_numpy(rows).to(self.device))
        self._tokens[: len(tokens)] = torch.from_numpy(tokens).to(self.device)
        self._beam_logits = self._decode_logits()

    def _choose(self, logits: Tensor, past_lengths: Tensor | None = None) -> None:
        """Leave the tokens on the device for the next step, and add 1 to the lengths."""
        tokens = self._tokens[: len(logits)]
        if self._kernel_sampler is not None:
            self._kernel_sampler(logits, self._choice, tokens, past_lengths)
            return
        if self._sampler is not None:  # beam search chooses its tokens itself
            tokens.copy_(self._sampler(logits))
        if past_lengths is not None:
            past_lengths += 1

    def _packed(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The prompts' tokens one after the other, on the device."""
        packed = np.concatenate([np.asarray(prompt, dtype=np.int64) for prompt in prompts])
        return torch.from_numpy(packed).to(self._tokens.dtype).to(self.device)

    def _prefill_logits(self, prompts: Sequence[Sequence[int]], packed: Tensor, last_token_only: bool = True) -> Tensor:
        lengths = [len(prompt) for prompt in prompts]
        offsets = [self._table.offset(length) for length in lengths]
        table, scale, starts = self._prompt_rotary(lengths, offsets)
        count = len(lengths)
        past = torch.zeros(count, dtype=torch.int32, device=self.device)
        with self._running(len(packed)):
            self._ops.begin(Batch(lengths, [0] * count, table, starts, scale, past, decoding=False))
            logits = decoder(self._ops, self.config, packed, last_token_only)
        self._host_past = lengths
        self._past[:count] = torch.tensor(lengths, dtype=torch.int32)
        self._offsets[:count] = torch.tensor(offsets, dtype=torch.int32)
        return logits

    def _prompt_rotary(self, lengths: list[int], offsets: list[int]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Table, query scale and each prompt's first row: the engine's, or those of a table for this batch."""
        table, scale, starts = self._rotary, self._query_scale, offsets
        if (own := self._table.prompt_table(lengths)) is not None:
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
        """One token for each sequence, from `_tokens`. On a GPU this is captured: no host value that changes."""
        past = self._past[:count]
        offsets, scale = self._offsets[:count], self._query_scale
        with self._running(count):
            self._ops.begin(Batch([1] * count, self._host_past, self._rotary, offsets, scale, past, decoding=True))
            logits = decoder(self._ops, self.config, self._tokens[:count])
            self._choose(logits, past)
        return logits

    @contextmanager
    def _running(self, num_tokens: int) -> Iterator[None]:
        """On a GPU it is the current one; on a CPU small products get one thread, and afterwards all is as before."""
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
        """Row i of the cache and of the lengths becomes what row `rows[i]` was."""
        order = rows.tolist()
        self._host_past = [self._host_past[row] for row in order]
        longest = max(self._host_past)
        for layer in self.cache:
            layer[: len(rows), :, :, :longest] = layer[rows, :, :, :longest]
        for state in (self._past, self._offsets):
            state[: len(rows)] = state[rows]


def _has_kernels(config: ModelConfig) -> bool:
    require_kernels()
    from .torch_kernels import supported

    return supported(config)


def _operations(
    config: ModelConfig, weights: dict[str, Tensor], cache: Tensor, rmsnorm_plugin: bool, use_kernels: bool
) -> TorchOperations:
    if not use_kernels:
        return TorchOperations(config, weights, cache, rmsnorm_plugin)
    from .torch_kernels import KernelOperations

    return KernelOperations(config, weights, cache, rmsnorm_plugin)
