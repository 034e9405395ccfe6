"""Compare the offline throughput of many requests with vLLM's, on random weights in the shape of a published model.

    python -m benchmarks.throughput_offline [--requests 1000] [--implementations qwen_model vllm]

All requests are given at once; what is measured is the time until the last is done. Their lengths are drawn once, from
the seed 0, like those of ShareGPT's conversations: log-normal, of mean 250 and sigma 1 for prompts and mean 190 and
sigma 0.8 for outputs, cut to 4 to 1024 tokens, which leaves means of 220 and 189. Tokens are random, an
output has its length whatever its tokens are, and the choice is greedy. Both implementations have as many sequences at
a time, and as much of the GPU's memory, and no prefix cache. The results are a file, throughput_offline.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, require_gpu, write_results

MEAN_PROMPT, SIGMA_PROMPT = 250, 1.0
MEAN_OUTPUT, SIGMA_OUTPUT = 190, 0.8
SHORTEST, LONGEST = 4, 1024


@dataclasses.dataclass(frozen=True)
class Request:
    """A Request is a prompt, and how many tokens are generated for it."""

    prompt: list[int]
    new_tokens: int


@dataclasses.dataclass(frozen=True)
class Throughput:
    """A Throughput is one line of the results."""

    shape: str
    implementation: str
    dtype: str
    kv_cache_dtype: str
    max_batch_size: int
    requests: int
    prompt_tokens: int
    new_tokens: int
    seconds: float
    requests_per_second: float
    new_tokens_per_second: float


def requests(count: int, vocab_size: int) -> list[Request]:
    """Draw requests, the same for each implementation."""
    generator = np.random.default_rng(0)

    def lengths(mean: float, sigma: float) -> list[int]:
        drawn = generator.lognormal(math.log(mean) - sigma**2 / 2, sigma, count)
        return [int(length) for length in np.clip(np.rint(drawn), SHORTEST, LONGEST)]

    pairs = zip(lengths(MEAN_PROMPT, SIGMA_PROMPT), lengths(MEAN_OUTPUT, SIGMA_OUTPUT), strict=True)
    return [Request(generator.integers(0, vocab_size, prompt).tolist(), output) for prompt, output in pairs]


class QwenModel:
    """A QwenModel gives the requests to our scheduler, as `Session.generate` does."""

    def __init__(self, options: argparse.Namespace, values: dict[str, Any]):
        import torch

        from benchmarks.generate_torch import random_session, random_weights
        from qwen_model.checkpoints.config import read_config
        from qwen_model.interface.engine_config import Limits

        config = read_config(values)
        weights = random_weights(config, getattr(torch, options.dtype), "cuda")
        limits = Limits(options.max_batch_size, LONGEST, LONGEST)
        session = random_session(config, weights, limits, options.kv_cache_dtype)
        session.device.prepare(options.max_batch_size)
        self._scheduler = session.scheduler

    def run(self, given: list[Request]) -> None:
        """Return when all requests are done."""
        from qwen_model.engine.sequences import Sequence

        self._scheduler.forget_prefixes()
        for request in given:
            self._scheduler.add(Sequence(request.prompt, request.new_tokens))
        while self._scheduler.has_work:
            self._scheduler.step(patient=True)


class Vllm:
    """A Vllm gives the requests to vLLM's `LLM.generate`."""

    def __init__(self, options: argparse.Namespace, values: dict[str, Any]):
        import vllm

        from benchmarks.generate_torch import vllm_engine

        self._sampling = vllm.SamplingParams
        self._engine = vllm_engine(values, options.dtype, 2 * LONGEST, options.max_batch_size, 0.9)

    def run(self, given: list[Request]) -> None:
        """Return when all requests are done."""
        options = [
            self._sampling(temperature=0, max_tokens=request.new_tokens, ignore_eos=True, detokenize=False)
            for request in given
        ]
        prompts = [{"prompt_token_ids": request.prompt} for request in given]
        self._engine.generate(prompts, options, use_tqdm=False)


IMPLEMENTATIONS: dict[str, type[QwenModel] | type[Vllm]] = {"qwen_model": QwenModel, "vllm": Vllm}


def measure(name: str, options: argparse.Namespace, values: dict[str, Any]) -> list[Throughput]:
    """Return the throughput of each repetition, after one of a tenth of the requests."""
    given = requests(options.requests, values["vocab_size"])
    implementation = IMPLEMENTATIONS[name](options, values)
    implementation.run(given[: max(1, len(given) // 10)])
    found = []
    prompt_tokens, new_tokens = sum(len(each.prompt) for each in given), sum(each.new_tokens for each in given)
    for _ in range(options.repeats):
        start = time.perf_counter()
        implementation.run(given)
        seconds = time.perf_counter() - start
        kind = options.kv_cache_dtype if name == "qwen_model" else "auto"
        sizes = (options.max_batch_size, len(given), prompt_tokens, new_tokens)
        rates = (round(seconds, 3), round(len(given) / seconds, 3), round(new_tokens / seconds, 1))
        found.append(Throughput(options.shape, name, options.dtype, kind, *sizes, *rates))
        print(
            f"{name:12} {len(given)} requests, {prompt_tokens} + {new_tokens} tokens in {seconds:.2f} s: "
            f"{new_tokens / seconds:,.0f} new tokens/s",
            flush=True,
        )
    return found


def main() -> None:
    from benchmarks.generate import COMMON, SHAPES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen2.5-7b")
    parser.add_argument("--implementations", nargs="+", choices=list(IMPLEMENTATIONS), default=list(IMPLEMENTATIONS))
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--max-batch-size", type=int, default=512, help="of both (default: %(default)s)")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--kv-cache-dtype", choices=["auto", "int8", "fp8"], default="auto", help="ours")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS / "throughput_offline.json")
    options = parser.parse_args()
    require_gpu()
    import torch

    found: list[Throughput] = []
    for name in options.implementations:
        found += measure(name, options, {**COMMON, **SHAPES[options.shape]})
        gc.collect()
        torch.cuda.empty_cache()
    write_results(options.results, [dataclasses.asdict(each) for each in found])
    print(options.results)


if __name__ == "__main__":
    main()
