"""Implement benchmarks.generate with PyTorch: our torch back end, transformers, vLLM, and the GEMMs alone."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.generate import COMMON, SHAPES, Implementation, Load, QwenModel
from benchmarks.timing import capture
from benchmarks.vllm_weights import LARGEST_INPUT, WEIGHT_SCALE, fill_codes
from qwen_model import build_engine, load_engine
from qwen_model.backends.torch.back_end import num_pages
from qwen_model.backends.torch.device import TorchDevice
from qwen_model.checkpoints.config import ModelConfig, read_config
from qwen_model.checkpoints.eight_bit_weight import LARGEST_CODES
from qwen_model.checkpoints.module_weights import NOT_QUANTIZED, Formats
from qwen_model.checkpoints.weights import weight_groups
from qwen_model.common.progress import no_progress
from qwen_model.engine.scheduler import Scheduler
from qwen_model.engine.session import Session
from qwen_model.interface.engine_config import EngineConfig, Limits
from qwen_model.interface.memory import GPU_MEMORY_UTILIZATION
from qwen_model.quantization.formats import own_formats
from qwen_model.quantization.options import QuantizationOptions
from qwen_model.quantization.published import quantization_config
from qwen_model.tuning.choice import choose_kernels

IMPLEMENTATIONS = ("qwen_model", "products", "transformers", "vllm")


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def reset_memory() -> None:
    """Release unused memory, and reset the peak of memory in use."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory_gib(implementation: str) -> float | None:
    """Return the peak of memory in use since `reset_memory`, in GiB; None if it is not known."""
    # vLLM takes a fixed share of the memory, in a process of its own.
    on_gpu = torch.cuda.is_available() and implementation != "vllm"
    return torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None


def random_weights(
    config: ModelConfig, dtype: torch.dtype, device: str, formats: Formats = NOT_QUANTIZED
) -> dict[str, Tensor]:
    """Return weights by the names of checkpoints/weights.py; formats: of the quantized modules."""
    weights = {}
    for group in weight_groups(config, str(dtype).removeprefix("torch."), formats):
        for module in group.modules.values():
            deviation = 1.0  # of what the codes stand for
            for spec in module.tensors:
                weight = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=device)
                if spec is module.weight and module.format.bits:
                    deviation = fill_codes(weight, module.format.bits)
                elif spec is module.scales:
                    weight.fill_(WEIGHT_SCALE / deviation)
                elif spec is module.input_scale:
                    weight.fill_(LARGEST_INPUT / LARGEST_CODES[module.format.kind])
                elif spec is module.zeros:
                    weight.fill_(1 << module.format.bits - 1)
                elif weight.dim() == 1:
                    weight.fill_(1.0)
                else:
                    weight.normal_(0.0, WEIGHT_SCALE)
                weights[spec.name] = weight
    return weights


class Products(Implementation):
    """Products run only the GEMMs of a decode step."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor]):
        self.vocab_size = config.vocab_size
        self._weights = [weight for name, weight in weights.items() if weight.dim() == 2 and name != "embedding.weight"]

    def generate(self, prompts: list[list[int]], new_tokens: int) -> None:
        """Products generate nothing: see `measure`."""
        raise NotImplementedError

    def measure(self, load: Load, repeats: int) -> tuple[float | None, float]:
        """Return no first token; each replay of the graph counts as one token per sequence."""
        sizes = {weight.shape[1] for weight in self._weights}
        like = self._weights[0]
        inputs = {n: torch.randn(load.batch_size, n, dtype=like.dtype, device=like.device) for n in sizes}

        def step() -> None:
            for weight in self._weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)

        graph = capture(step)
        rates = []
        for _ in range(repeats + 1):  # the first is to warm up
            start = time.perf_counter()
            for _ in range(load.new_tokens):
                graph.replay()
            torch.cuda.synchronize()
            rates.append(load.batch_size * load.new_tokens / (time.perf_counter() - start))
        return None, statistics.median(rates[1:])


class Transformers(Implementation):
    """Transformers runs Hugging Face's `generate` at its defaults."""

    def __init__(self, values: dict[str, Any], dtype: torch.dtype, device: str):
        import transformers

        settings = {key: value for key, value in values.items() if key not in ("architectures", "model_type")}
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                self._model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**settings)).eval()
        finally:
            torch.set_default_dtype(before)
        self._model.generation_config.eos_token_id = None
        self.vocab_size = values["vocab_size"]

    def generate(self, prompts: list[list[int]], new_tokens: int) -> None:
        """See `Implementation`."""
        ids = torch.tensor(prompts, device=self._model.device)
        self._model.generate(ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        if ids.device.type == "cuda":
            torch.cuda.synchronize()


class Vllm(Implementation):
    """Vllm runs vLLM, with weights drawn as ours are."""

    def __init__(self, values: dict[str, Any], largest: Load, options: argparse.Namespace):
        import vllm

        self.vocab_size = values["vocab_size"]
        self._sampling = vllm.SamplingParams
        positions = largest.prompt_tokens + largest.new_tokens
        self._engine = vllm_engine(
            vllm_values(values, options),
            options.dtype,
            positions,
            largest.batch_size,
            kv_cache_dtype=options.kv_cache_dtype,
        )

    def generate(self, prompts: list[list[int]], new_tokens: int) -> None:
        """See `Implementation`."""
        options = self._sampling(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        self._engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], options, use_tqdm=False)


def vllm_values(values: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Return a config.json for vLLM, whose layers are quantized as ours; its head stays as it is."""
    if options.quantization is None:
        return values
    own = dataclasses.replace(quantization_options(options), head=None)
    return {**values, "quantization_config": quantization_config("compressed-tensors", own)}


def vllm_engine(
    values: dict[str, Any],
    dtype: str,
    max_model_len: int,
    max_num_seqs: int,
    gpu_memory_utilization: float = 0.78,
    kv_cache_dtype: str = "auto",
) -> Any:
    """Return a vLLM engine of this shape, with weights drawn as ours are."""
    import vllm

    # A process that has used the GPU, as this one may have, cannot be forked.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps({**values, "torch_dtype": dtype}))
    engine = vllm.LLM(
        str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        gpu_memory_utilization=gpu_memory_utilization,
        enable_prefix_caching=False,
        kv_cache_dtype=kv_cache_dtype,
        worker_extension_cls="benchmarks.vllm_weights.WorkerExtension",
    )
    if not all(engine.collective_rpc("fill_weights")):
        raise RuntimeError("vLLM's model has no weights to fill")
    return engine


def random_session(
    config: ModelConfig,
    weights: dict[str, Tensor],
    limits: Limits,
    kv_cache_dtype: str = "auto",
    formats: Formats = NOT_QUANTIZED,
) -> Session:
    """Return a session over these weights, whose cache takes what they leave of the GPU's memory."""
    embedding = weights["embedding.weight"]
    dtype = str(embedding.dtype).removeprefix("torch.")
    engine = EngineConfig(
        "torch", dtype, limits, config, (), 0, {}, kv_cache_dtype=kv_cache_dtype, weight_formats=formats
    )
    kernels = choose_kernels(config, limits, dtype, no_progress, formats=formats) if embedding.is_cuda else {}
    pages = num_pages(engine, embedding.device, GPU_MEMORY_UTILIZATION)
    device = TorchDevice(
        config,
        limits,
        weights,
        num_pages=pages,
        kv_cache_dtype=kv_cache_dtype,
        gemm_kernels=kernels,
        weight_formats=formats,
    )
    return Session(engine, Scheduler(device))


def random_formats(options: argparse.Namespace, config: ModelConfig) -> Formats:
    """Return the formats that --quantization and the options beside it ask for."""
    if options.quantization is None:
        return NOT_QUANTIZED
    return own_formats(quantization_options(options), config, options.dtype)


def quantization_options(options: argparse.Namespace) -> QuantizationOptions:
    """Return what --quantization and the options beside it say."""
    head = None if options.head_quantization == "none" else options.head_quantization
    kind, group_size = options.quantization, options.group_size
    own = {"per_token": options.per_token, "per_channel": True}
    return QuantizationOptions(kind, group_size, not options.asymmetric, head, **own)


def packaged_session(dtype: str, device: str, largest: Load) -> Session:
    """Return a session of the packaged model that does not stop at its end tokens."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "engine"
        build_engine(
            output_dir=target,
            dtype=dtype,
            max_batch_size=largest.batch_size,
            max_input_len=largest.prompt_tokens,
            max_output_len=largest.new_tokens,
        )
        session = load_engine(target, device=device)
    session.config = dataclasses.replace(session.config, end_token_ids=())
    return session


def loaded(options: argparse.Namespace, shape: str, largest: Load) -> Iterator[tuple[str, Implementation]]:
    """Yield each implementation in turn; the one before must be released by then."""
    dtype = getattr(torch, options.dtype)
    if shape == "packaged":
        yield "qwen_model", QwenModel(packaged_session(options.dtype, options.device, largest))
        return
    values = {**COMMON, **SHAPES[shape]}
    config = read_config(values)
    formats = random_formats(options, config)
    weights: dict[str, Tensor] = {}
    if {"qwen_model", "products"} & set(options.implementations):
        weights = random_weights(config, dtype, options.device, formats)
    if "qwen_model" in options.implementations:
        limits = Limits(largest.batch_size, largest.prompt_tokens, largest.new_tokens)
        yield "qwen_model", QwenModel(random_session(config, weights, limits, options.kv_cache_dtype, formats))
    if "products" in options.implementations and options.device != "cpu":
        yield "products", Products(config, weights)
    weights.clear()
    for name, make in (
        ("transformers", lambda: Transformers(values, dtype, options.device)),
        ("vllm", lambda: Vllm(values, largest, options)),
    ):
        if name in options.implementations and importlib.util.find_spec(name) is not None:
            yield name, make()
