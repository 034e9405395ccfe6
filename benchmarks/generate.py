"""Compare generation with vLLM and transformers, on random weights in the shapes of published models.

    python -m benchmarks.generate [--shapes qwen-7b qwen2.5-7b] [--implementations qwen_model transformers ...]
    python -m benchmarks.generate --backend tensorrt [--implementations tensorrt native_norms ...]
    python -m benchmarks.generate --shapes packaged --device cpu

Each line has the time to the first token (of a call that generates one token), the tokens per second of the whole
batch after it, and the device memory. `products` is the GEMMs of a decode step alone, by cuBLAS in one CUDA graph. The
results of an implementation for a shape are a file, generate_SHAPE_IMPLEMENTATION.json, with --quantization
int4_SHAPE_IMPLEMENTATION.json and so on; vLLM's head has 16 bits whatever ours has. Implementations that are not
installed are left out. `--backend tensorrt` needs no PyTorch; `native_norms`, `native_rotary` and `native_gemm` are the
same engine with RMSNorm, the rotary embedding or the linear layers in TensorRT's own layers.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import statistics
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, add_quantization_arguments, require_tensorrt, require_torch, write_results
from qwen_model import Session
from qwen_model.interface.engine_config import KV_CACHE_DTYPES

# Settings of a config.json of Qwen2. Qwen-7B is Qwen v1: the GEMMs are the same, with as many key-value heads as heads.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen-7b": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "qwen2.5-7b": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
}
COMMON = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A Measurement is one line of the results."""

    shape: str
    implementation: str
    dtype: str
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    first_token_ms: float | None
    decode_tokens_per_second: float
    memory_gib: float | None


@dataclasses.dataclass(frozen=True)
class Load:
    """A Load is the batch size, prompt length and output length of a measurement."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int

    def prompts(self, vocab_size: int, seed: int) -> list[list[int]]:
        """Return random prompts, different for each seed."""
        tokens: list[list[int]] = (
            np.random.default_rng(seed).integers(0, vocab_size, (self.batch_size, self.prompt_tokens)).tolist()
        )
        return tokens


class Implementation(ABC):
    """An Implementation generates, with the weights of one shape loaded."""

    vocab_size: int

    @abstractmethod
    def generate(self, prompts: list[list[int]], new_tokens: int) -> None:
        """Generate `new_tokens` tokens for each prompt, and return when they are computed."""

    def time(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
        """Return the seconds until the first token, and the seconds of all further tokens."""
        seconds = []
        for count in (1, new_tokens):
            start = time.perf_counter()
            self.generate(prompts, count)
            seconds.append(time.perf_counter() - start)
        return seconds[0], seconds[1] - seconds[0]

    def measure(self, load: Load, repeats: int) -> tuple[float | None, float]:
        """Return the medians of milliseconds to the first token and of decoded tokens per second."""
        self.generate(load.prompts(self.vocab_size, seed=0), min(load.new_tokens, 8))
        times = [self.time(load.prompts(self.vocab_size, seed), load.new_tokens) for seed in range(1, repeats + 1)]
        first = statistics.median(first for first, _ in times) * 1e3
        decoded = load.batch_size * (load.new_tokens - 1)
        return first, decoded / statistics.median(rest for _, rest in times)


class QwenModel(Implementation):
    """A QwenModel generates with a session of this project, of either back end, without its prefix cache."""

    def __init__(self, session: Session):
        self.vocab_size = session.config.model.vocab_size
        self._session = session

    def generate(self, prompts: list[list[int]], new_tokens: int) -> None:
        """See `Implementation`."""
        self._session.scheduler.forget_prefixes()
        self._session.generate(prompts, max_new_tokens=new_tokens)


def run(options: argparse.Namespace, module: Any) -> None:
    largest = Load(max(options.batch_sizes), max(options.prompt_tokens), options.new_tokens)
    for shape in options.shapes:
        for name, implementation in module.loaded(options, shape, largest):
            results = []
            for batch_size in options.batch_sizes:
                for prompt_tokens in options.prompt_tokens:
                    load = Load(batch_size, prompt_tokens, options.new_tokens)
                    first, rate = implementation.measure(load, options.repeats)
                    sizes = (load.batch_size, load.prompt_tokens, load.new_tokens)
                    memory = module.memory_gib(name)
                    results.append(Measurement(shape, name, weights_text(options, name), *sizes, first, rate, memory))
                    print(line(results[-1]), flush=True)
            del implementation
            module.reset_memory()
            kinds = [options.quantization or "generate", "per_token" if options.per_token else "", shape, name]
            kinds += ["16_bit_head"] if options.quantization and options.head_quantization == "none" else []
            kinds += [] if options.kv_cache_dtype == "auto" else [f"{options.kv_cache_dtype}_cache"]
            path = options.results / f"{'_'.join(filter(None, kinds))}.json"
            write_results(path, [dataclasses.asdict(result) for result in results])
            print(path, flush=True)


def weights_text(options: argparse.Namespace, implementation: str) -> str:
    """Return what the results of an implementation call its weights and cache: vLLM's head has 16 bits."""
    texts = [options.dtype]
    if options.quantization is not None:
        head = "none" if implementation == "vllm" else options.head_quantization
        texts += [options.quantization, *(["per token"] if options.per_token else [])]
        texts.append("16-bit head" if head == "none" else f"{head} head")
    if options.kv_cache_dtype != "auto":
        texts.append(f"{options.kv_cache_dtype} cache")
    return ", ".join(texts)


def line(result: Measurement) -> str:
    first = f"{result.first_token_ms:10.1f} ms" if result.first_token_ms is not None else f"{'–':>13}"
    memory = f"{result.memory_gib:8.1f} GiB" if result.memory_gib is not None else ""
    return (
        f"{result.shape:12} {result.implementation:14} batch {result.batch_size:3} prompt {result.prompt_tokens:5}"
        f"{first} {result.decode_tokens_per_second:10.1f} tokens/s{memory}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["torch", "tensorrt"], default="torch")
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES, "packaged"], default=list(SHAPES))
    parser.add_argument("--implementations", nargs="+", help="default: all of the back end")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--prompt-tokens", nargs="+", type=int, default=[128, 1024])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", help="default: float16 on a GPU, else float32")
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder")
    add_quantization_arguments(parser)
    parser.add_argument("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto")
    options = parser.parse_args()
    if options.quantization is not None:
        options.implementations = options.implementations or ["qwen_model"]
        others = set(options.implementations) - {"qwen_model", "vllm"}
        if options.backend != "torch" or others or "packaged" in options.shapes:
            parser.error("--quantization is for --backend torch --implementations qwen_model vllm, not for packaged")
    if options.per_token and options.quantization not in ("smoothquant", "fp8"):
        parser.error("--per-token is for --quantization smoothquant and fp8")
    if options.kv_cache_dtype != "auto" and (options.backend != "torch" or "packaged" in options.shapes):
        parser.error("--kv-cache-dtype is for --backend torch, and not for packaged")
    (require_tensorrt if options.backend == "tensorrt" else require_torch)()
    module = importlib.import_module(f"benchmarks.generate_{options.backend}")
    options.implementations = options.implementations or module.IMPLEMENTATIONS
    if unknown := set(options.implementations) - set(module.IMPLEMENTATIONS):
        parser.error(f"--implementations of {options.backend}: {', '.join(module.IMPLEMENTATIONS)}, not {unknown}")
    if options.device is None and module.default_device() == "cpu" and options.shapes != ["packaged"]:
        parser.error("there is no GPU, and 7B models take hours on a CPU: give --shapes packaged, or --device cpu")
    options.device = options.device or module.default_device()
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "float16")
    run(options, module)


if __name__ == "__main__":
    main()
