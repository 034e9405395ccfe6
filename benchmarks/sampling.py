"""Compare sampling from 151,936 logits with PyTorch and, where it is installed, flashinfer on one GPU.

    python -m benchmarks.sampling [--batch-sizes 1 8 64] [--dtype float16]

Each figure is the time of one call among many inside a replayed CUDA graph, in microseconds: the median over replays.
The logits, normally distributed, are in the L2 cache, where the output projection leaves them when a model decodes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import RESULTS, require_gpu, write_results
from benchmarks.timing import time_calls

if TYPE_CHECKING:
    from torch import Tensor

CALLS = 40  # in a graph
OPTIONS: dict[str, dict[str, Any]] = {
    "argmax": {},
    "temperature": {"temperature": 0.8},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.9},
    "top_k + top_p": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "top_k + top_p + penalty": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1},
}


def microseconds(call: Callable[[], Any]) -> float:
    """Return the microseconds of one call inside a CUDA graph."""

    def record() -> None:
        for _ in range(CALLS):
            call()

    return time_calls({"": record})[""] / CALLS


def ours(logits: Tensor, name: str) -> Callable[[], Any]:
    """Return the call of our kernel for one of OPTIONS."""
    import torch

    from qwen_plugins.sampling import sample, sampling_state

    options = OPTIONS[name]
    state = sampling_state(len(logits), logits.shape[1], logits.device)
    state.set(**options)
    tokens = torch.empty(len(logits), dtype=torch.int32, device=logits.device)
    greedy, penalty = not options, "repetition_penalty" in options
    return lambda: sample(logits, state, greedy=greedy, penalty=penalty, out=tokens)


def scaled(logits: Tensor, options: dict[str, Any]) -> Tensor:
    """Return the logits in float32, divided by the temperature where there is one: which other providers start from."""
    return logits.float() / options["temperature"] if "temperature" in options else logits.float()


def pytorch(logits: Tensor, name: str) -> Callable[[], Any] | None:
    """Return PyTorch's call: topk or sort, softmax, and exponential noise instead of multinomial, as in gpt-fast."""
    import torch

    options = OPTIONS[name]
    if not options:
        return lambda: logits.argmax(-1)
    if "repetition_penalty" in options:
        return None

    def call() -> Tensor:
        values, tokens = scaled(logits, options), None
        if "top_k" in options:
            values, tokens = values.topk(options["top_k"])
        elif "top_p" in options:
            values, tokens = values.sort(descending=True)
        probabilities = values.softmax(-1)
        if "top_p" in options:
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(before >= options["top_p"], 0.0)
        drawn = (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1, keepdim=True)
        return drawn if tokens is None else tokens.gather(-1, drawn)

    return call


def flashinfer(logits: Tensor, name: str) -> Callable[[], Any] | None:
    """Return the call of flashinfer's sampler, which does not sort; top_k comes before top_p."""
    from flashinfer import sampling

    options = OPTIONS[name]
    if not options or "repetition_penalty" in options:
        return None

    def call() -> Tensor:
        values = scaled(logits, options)
        if "top_k" in options and "top_p" in options:
            return sampling.top_k_top_p_sampling_from_logits(values, options["top_k"], options["top_p"])
        probabilities = values.softmax(-1)
        if "top_k" in options:
            return sampling.top_k_sampling_from_probs(probabilities, options["top_k"])
        if "top_p" in options:
            return sampling.top_p_sampling_from_probs(probabilities, options["top_p"])
        return sampling.sampling_from_probs(probabilities)

    return call


def measure(batch_sizes: list[int], vocab_size: int, dtype: str) -> list[dict[str, Any]]:
    """Return one record for each batch size, operation and implementation that takes part."""
    import torch

    results = []
    for batch_size in batch_sizes:
        logits = (torch.randn(batch_size, vocab_size, device="cuda") * 3).to(getattr(torch, dtype))
        for name in OPTIONS:
            for implementation, make in (("qwen_plugins", ours), ("PyTorch", pytorch), ("flashinfer", flashinfer)):
                try:
                    call = make(logits, name)
                    time = None if call is None else microseconds(call)
                except Exception as error:  # a provider that is not installed, or cannot be captured
                    if implementation == "qwen_plugins":
                        raise
                    print(f"{implementation}, {name}: {type(error).__name__}: {str(error).splitlines()[:1]}")
                    continue
                if time is not None:
                    print(f"batch {batch_size:3} {name:24} {implementation:13} {time:8.2f} us", flush=True)
                    results.append(
                        {
                            "batch_size": batch_size,
                            "operation": name,
                            "implementation": implementation,
                            "vocab_size": vocab_size,
                            "dtype": dtype,
                            "microseconds": time,
                        }
                    )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--vocab-size", type=int, default=151936)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--results", type=Path, default=RESULTS / "sampling.json")
    options = parser.parse_args()
    require_gpu()
    write_results(options.results, measure(options.batch_sizes, options.vocab_size, options.dtype))
    print(options.results)


if __name__ == "__main__":
    main()
