"""Compare sampling from 151,936 logits with PyTorch and, where it is installed, flashinfer on one GPU.

    python -m benchmarks.sampling [--batch-sizes 1 8 64 256] [--dtype float16]

Each figure is the time of one call among many inside a replayed CUDA graph, in microseconds: the median over replays.
The logits, normally distributed, are in the L2 cache, where the output projection leaves them when a model decodes.
"mixture" has rows of all the other operations; "logprobs" is the second kernel, of the chosen and the 20 best tokens.
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
    "min_p": {"min_p": 0.05},
    "top_k + top_p + penalty": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1},
    "greedy + penalty": {"greedy": True, "repetition_penalty": 1.1},
}
MIXTURE, LOGPROBS = "mixture", "logprobs"
PROMPT = range(0, 150000, 150)  # 1000 tokens that the penalty holds for


def microseconds(call: Callable[[], Any]) -> float:
    """Return the microseconds of one call inside a CUDA graph."""

    def record() -> None:
        for _ in range(CALLS):
            call()

    return time_calls({"": record})[""] / CALLS


def ours(logits: Tensor, name: str) -> Callable[[], Any]:
    """Return the call of our kernel for one of OPTIONS."""
    import torch

    from qwen_plugins.sampling import SamplingState, SequenceStart, logprobs, sample

    tokens = torch.zeros(len(logits), dtype=torch.int32, device=logits.device)
    if name == LOGPROBS:
        return lambda: logprobs(logits, tokens, 20)
    state = SamplingState(len(logits), logits.shape[1], logits.device)
    of_rows = list(OPTIONS.values()) if name == MIXTURE else [OPTIONS[name]]
    if name == "argmax":
        return lambda: sample(logits, state, largest=True, out=tokens)
    state.start(
        [
            SequenceStart(slot=i, draw_stream=i, prompt=PROMPT, **(of_rows[i % len(of_rows)] or {"greedy": True}))
            for i in range(len(logits))
        ]
    )
    return lambda: sample(logits, state, out=tokens)


def scaled(logits: Tensor, options: dict[str, Any]) -> Tensor:
    """Return the logits in float32, divided by the temperature where there is one: which other providers start from."""
    return logits.float() / options["temperature"] if "temperature" in options else logits.float()


def pytorch(logits: Tensor, name: str) -> Callable[[], Any] | None:
    """Return PyTorch's call: topk or sort, softmax, and exponential noise instead of multinomial, as in gpt-fast."""
    import torch

    options = OPTIONS.get(name)
    if name == "argmax":
        return lambda: logits.argmax(-1)
    if not options or "repetition_penalty" in options or "min_p" in options:
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

    options = OPTIONS.get(name)
    if not options or "repetition_penalty" in options or "min_p" in options:
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
        for name in (*OPTIONS, MIXTURE, LOGPROBS):
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
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--vocab-size", type=int, default=151936)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--results", type=Path, default=RESULTS / "sampling.json")
    options = parser.parse_args()
    require_gpu()
    write_results(options.results, measure(options.batch_sizes, options.vocab_size, options.dtype))
    print(options.results)


if __name__ == "__main__":
    main()
