"""Generation on random weights in the shapes of published models, ours beside others in one run.

    python -m benchmarks.generate [--shapes qwen-7b qwen2.5-7b] [--implementations qwen_model transformers ...]
    python -m benchmarks.generate --shapes packaged --device cpu

Each line: time to the first token, tokens decoded per second after it (of the whole batch), device memory. `products`
is no implementation but a floor: the matrix products of a decode step, by cuBLAS, in one CUDA graph, and nothing else.
An implementation that is not installed is left out. Weights are made on the device; nothing is written but the results.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import json
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import write_results
from qwen_model.backends.torch import TorchExecutor
from qwen_model.config import ModelConfig, read_config
from qwen_model.engine import build_engine, load_engine
from qwen_model.engine_config import EngineConfig, Limits
from qwen_model.session import Session
from qwen_model.weights import weight_groups

# As a config.json of Qwen2. Qwen-7B itself is Qwen v1: the same products, with as many key-value heads as heads.
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
    """One line of the results."""

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
    """What is asked of an implementation."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int

    def prompts(self, vocab_size: int, seed: int) -> list[list[int]]:
        """Other prompts for each seed, so that no cache of prefixes can help."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, vocab_size, (self.batch_size, self.prompt_tokens), generator=generator).tolist()


class Implementation(ABC):
    """One way to generate, with the weights of one shape loaded."""

    vocab_size: int

    @abstractmethod
    def generate(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
        """Seconds to the first token, and seconds from it to the last."""

    def measure(self, load: Load, repeats: int) -> tuple[float | None, float]:
        """Medians of milliseconds to the first token and of decoded tokens per second."""
        self.generate(load.prompts(self.vocab_size, seed=0), min(load.new_tokens, 8))
        times = [self.generate(load.prompts(self.vocab_size, seed), load.new_tokens) for seed in range(1, repeats + 1)]
        first = statistics.median(first for first, _ in times) * 1e3
        decoded = load.batch_size * (load.new_tokens - 1)
        return first, decoded / statistics.median(rest for _, rest in times)


def random_weights(config: ModelConfig, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    weights = {}
    for group in weight_groups(config):
        for spec in group.specs:
            weight = torch.empty(spec.shape, dtype=dtype, device=device)
            weights[spec.name] = weight.fill_(1.0) if weight.dim() == 1 else weight.normal_(0.0, 0.02)
    return weights


class QwenModel(Implementation):
    """This project's torch back end."""

    def __init__(self, session: Session):
        self.vocab_size = session.config.model.vocab_size
        self._session = session

    def generate(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
        """See `Implementation`."""
        timing = self._session.generate(prompts, max_new_tokens=new_tokens).timing
        return timing.prefill_seconds, timing.decode_seconds


class Products(Implementation):
    """The matrix products of a decode step alone."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor]):
        self.vocab_size = config.vocab_size
        self._weights = [weight for name, weight in weights.items() if weight.dim() == 2 and name != "embedding.weight"]

    def generate(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
        """Products generate nothing: see `measure`."""
        raise NotImplementedError

    def measure(self, load: Load, repeats: int) -> tuple[float | None, float]:
        """There is no first token; each replay of the graph counts as a token a sequence."""
        sizes = {weight.shape[1] for weight in self._weights}
        like = self._weights[0]
        inputs = {n: torch.randn(load.batch_size, n, dtype=like.dtype, device=like.device) for n in sizes}

        def step() -> None:
            for weight in self._weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)

        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        rates = []
        for _ in range(repeats + 1):  # the first is to warm up
            start = time.perf_counter()
            for _ in range(load.new_tokens):
                graph.replay()
            torch.cuda.synchronize()
            rates.append(load.batch_size * load.new_tokens / (time.perf_counter() - start))
        return None, statistics.median(rates[1:])


class Transformers(Implementation):
    """Hugging Face transformers, as `generate` runs by default."""

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

    def generate(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
        """The first token's time is that of generating one."""
        ids = torch.tensor(prompts, device=self._model.device)
        times = []
        for count in (1, new_tokens):
            start = time.perf_counter()
            self._model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
            if ids.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return times[0], times[1] - times[0]


class Vllm(Implementation):
    """vLLM with random weights of its own making."""

    def __init__(self, values: dict[str, Any], dtype: str, largest: Load):
        import vllm

        folder = Path(tempfile.mkdtemp())
        (folder / "config.json").write_text(json.dumps({**values, "torch_dtype": dtype}))
        self.vocab_size = values["vocab_size"]
        self._sampling = vllm.SamplingParams
        self._engine = vllm.LLM(
            str(folder),
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype=dtype,
            max_model_len=largest.prompt_tokens + largest.new_tokens,
            max_num_seqs=largest.batch_size,
            gpu_memory_utilization=0.7,
            enable_prefix_caching=False,
        )

    def generate(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
        """The first token's time is that of generating one."""
        times = []
        for count in (1, new_tokens):
            options = self._sampling(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
            start = time.perf_counter()
            self._engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], options, use_tqdm=False)
            times.append(time.perf_counter() - start)
        return times[0], times[1] - times[0]


def random_session(config: ModelConfig, weights: dict[str, Tensor], largest: Load) -> Session:
    limits = Limits(largest.batch_size, largest.prompt_tokens, largest.new_tokens)
    engine = EngineConfig("torch", "", True, limits, config, (), 0, {})
    return Session(engine, TorchExecutor(config, limits, weights, rmsnorm_plugin=True))


def packaged_session(dtype: str, device: str, largest: Load) -> Session:
    """The model in the package, which does not stop at its end tokens."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "engine"
        build_engine(
            output_dir=target,
            dtype=dtype,
            rmsnorm_plugin=True,
            max_batch_size=largest.batch_size,
            max_input_len=largest.prompt_tokens,
            max_output_len=largest.new_tokens,
        )
        session = load_engine(target, device=device)
    session.config = dataclasses.replace(session.config, end_token_ids=())
    return session


def loaded(options: argparse.Namespace, shape: str, largest: Load) -> Iterator[tuple[str, Implementation]]:
    """Each implementation in turn; the one before must be let go by then."""
    dtype = getattr(torch, options.dtype)
    if shape == "packaged":
        yield "qwen_model", QwenModel(packaged_session(options.dtype, options.device, largest))
        return
    values = {**COMMON, **SHAPES[shape]}
    config = read_config(values)
    weights: dict[str, Tensor] = {}
    if {"qwen_model", "products"} & set(options.implementations):
        weights = random_weights(config, dtype, options.device)
    if "qwen_model" in options.implementations:
        yield "qwen_model", QwenModel(random_session(config, weights, largest))
    if "products" in options.implementations and options.device != "cpu":
        yield "products", Products(config, weights)
    weights.clear()
    for name, make in (
        ("transformers", lambda: Transformers(values, dtype, options.device)),
        ("vllm", lambda: Vllm(values, options.dtype, largest)),
    ):
        if name in options.implementations and importlib.util.find_spec(name) is not None:
            yield name, make()


def run(options: argparse.Namespace) -> list[Measurement]:
    results = []
    largest = Load(max(options.batch_sizes), max(options.prompt_tokens), options.new_tokens)
    for shape in options.shapes:
        for name, implementation in loaded(options, shape, largest):
            for batch_size in options.batch_sizes:
                for prompt_tokens in options.prompt_tokens:
                    load = Load(batch_size, prompt_tokens, options.new_tokens)
                    results.append(measure(options, shape, name, implementation, load))
                    print(line(results[-1]), flush=True)
            del implementation
            gc.collect()
            torch.cuda.empty_cache()
    return results


def measure(
    options: argparse.Namespace, shape: str, name: str, implementation: Implementation, load: Load
) -> Measurement:
    on_gpu = options.device != "cpu"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    first, rate = implementation.measure(load, options.repeats)
    # vLLM takes a fixed share of the memory, in a process of its own.
    memory = torch.cuda.max_memory_allocated() / 2**30 if on_gpu and name != "vllm" else None
    sizes = (load.batch_size, load.prompt_tokens, load.new_tokens)
    return Measurement(shape, name, options.dtype, *sizes, first, rate, memory)


def line(result: Measurement) -> str:
    first = f"{result.first_token_ms:10.1f} ms" if result.first_token_ms is not None else f"{'–':>13}"
    memory = f"{result.memory_gib:8.1f} GiB" if result.memory_gib is not None else ""
    return (
        f"{result.shape:12} {result.implementation:14} batch {result.batch_size:3} prompt {result.prompt_tokens:5}"
        f"{first} {result.decode_tokens_per_second:10.1f} tokens/s{memory}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    names = ["qwen_model", "products", "transformers", "vllm"]
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES, "packaged"], default=list(SHAPES))
    parser.add_argument("--implementations", nargs="+", choices=names, default=names)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--prompt-tokens", nargs="+", type=int, default=[128, 1024])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float16" if on_gpu else "float32")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/generate.json"))
    options = parser.parse_args()
    write_results(options.results, [dataclasses.asdict(result) for result in run(options)])
    print(options.results)


if __name__ == "__main__":
    main()
