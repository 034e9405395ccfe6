"""Compare RMSNorm, with residual and quantization, with PyTorch, Liger, flashinfer and vLLM on one GPU.

    python -m benchmarks.rms_norm [--dtype float16] [--hidden-sizes 4096 ...] [--tokens 1 64 ...]
    python -m benchmarks.rms_norm --report benchmarks/results/rms_norm_float16.json

The first measures, prints a table and writes benchmarks/results/rms_norm_DTYPE.json; the second prints the tables of
such a file as Markdown and draws the plots into docs/images. Providers that cannot be imported are left out.

Each figure is the time of one call among many inside a CUDA graph, the median over replays. Calls rotate over sets of
buffers. Small buffers stay in the L2 cache, as the output of the previous layer does when a model decodes; the sets of
larger ones are together three times the L2 cache.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import (
    IMAGES,
    OURS,
    RESULTS,
    finish_panel,
    gather_calls,
    pyplot,
    require_gpu,
    save_figure,
    short,
    timed,
    write_results,
)
from benchmarks.timing import time_calls

HIDDEN_SIZES = [2048, 3584, 4096, 5120, 8192]
TOKENS = [1, 8, 64, 512, 1024, 4096, 8192]
EPS = 1e-6

# What a call reads and writes, in rows of 2 bytes per element.
OPERATIONS = {
    "rms_norm": 2.0,
    "rms_norm + residual": 4.0,
    "dynamic int8": 1.5,
    "dynamic fp8": 1.5,
    "dynamic int8 + residual": 3.5,
    "dynamic fp8 + residual": 3.5,
}


@dataclass
class Buffers:
    """Buffers hold one set of operands; every call writes into memory of its own set."""

    x: Any
    residual: Any
    weight: Any
    y: Any
    h: Any


Call = Callable[[Buffers], Any]


def _ours() -> dict[str, dict[str, Call]]:
    import torch

    import qwen_plugins

    def quant(dtype: torch.dtype, residual: bool) -> Call:
        return lambda b: qwen_plugins.rms_norm_quant(
            b.x, b.weight, EPS, quant_dtype=dtype, residual=b.residual if residual else None
        )

    return {
        "rms_norm": {OURS: lambda b: qwen_plugins.rms_norm(b.x, b.weight, EPS, out=b.y)},
        "rms_norm + residual": {
            OURS: lambda b: qwen_plugins.rms_norm(b.x, b.weight, EPS, residual=b.residual, out=(b.y, b.h)),
            f"{OURS}, in place": lambda b: qwen_plugins.rms_norm(
                b.x, b.weight, EPS, residual=b.residual, out=(b.x, b.residual)
            ),
        },
        "dynamic int8": {OURS: quant(torch.int8, residual=False)},
        "dynamic fp8": {OURS: quant(torch.float8_e4m3fn, residual=False)},
        "dynamic int8 + residual": {OURS: quant(torch.int8, residual=True)},
        "dynamic fp8 + residual": {OURS: quant(torch.float8_e4m3fn, residual=True)},
    }


def _pytorch() -> dict[str, dict[str, Call]]:
    import torch.nn.functional as F
    from torch import Tensor

    def eager(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * (wide.pow(2).mean(-1, keepdim=True) + EPS).rsqrt()
        return weight * wide.to(x.dtype)

    return {
        "rms_norm": {
            "copy_": lambda b: b.y.copy_(b.x),
            "transformers' module, eager": lambda b: eager(b.x, b.weight),
            "F.rms_norm": lambda b: F.rms_norm(b.x, b.x.shape[-1:], b.weight, EPS),
        },
        "rms_norm + residual": {"F.rms_norm": lambda b: F.rms_norm(b.x + b.residual, b.x.shape[-1:], b.weight, EPS)},
    }


def _liger() -> dict[str, dict[str, Call]]:
    from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_forward
    from liger_kernel.ops.rms_norm import rms_norm_forward

    return {
        "rms_norm": {"Liger": lambda b: rms_norm_forward(b.x, b.weight, EPS, 0.0, "llama", None)},
        "rms_norm + residual": {
            "Liger": lambda b: fused_add_rms_norm_forward(b.x, b.residual, b.weight, EPS, 0.0, "llama")
        },
    }


def _flashinfer() -> dict[str, dict[str, Call]]:
    from flashinfer import norm

    return {
        "rms_norm": {"flashinfer": lambda b: norm.rmsnorm(b.x, b.weight, EPS, out=b.y, enable_pdl=True)},
        "rms_norm + residual": {
            "flashinfer": lambda b: norm.fused_add_rmsnorm(b.x, b.residual, b.weight, EPS, enable_pdl=True)
        },
    }


def _vllm() -> dict[str, dict[str, Call]]:
    import torch
    from vllm import _custom_ops as ops

    def quant(dtype: torch.dtype, residual: bool) -> dict[str, Call]:
        def call(b: Buffers) -> Any:
            return ops.rms_norm_dynamic_per_token_quant(
                b.x, b.weight, EPS, dtype, residual=b.residual if residual else None
            )

        return {"vLLM": call}

    return {
        "rms_norm": {"vLLM": lambda b: ops.rms_norm(b.y, b.x, b.weight, EPS)},
        "rms_norm + residual": {"vLLM": lambda b: ops.fused_add_rms_norm(b.x, b.residual, b.weight, EPS)},
        "dynamic int8": quant(torch.int8, residual=False),
        "dynamic fp8": quant(torch.float8_e4m3fn, residual=False),
        "dynamic int8 + residual": quant(torch.int8, residual=True),
        "dynamic fp8 + residual": quant(torch.float8_e4m3fn, residual=True),
    }


def make_buffers(tokens: int, hidden_size: int, dtype: Any) -> list[Buffers]:
    """Return several sets of operands; the module's docstring says how many."""
    import torch

    def rows() -> torch.Tensor:
        return torch.randn(tokens, hidden_size, dtype=dtype, device="cuda")

    bytes_of_set = 4 * tokens * hidden_size * dtype.itemsize
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    sets = 8 if bytes_of_set <= 4 << 20 else max(2, -(-3 * l2_bytes // bytes_of_set))
    weight = 1 + 0.1 * torch.randn(hidden_size, dtype=dtype, device="cuda")
    return [Buffers(rows(), rows(), weight, rows(), rows()) for _ in range(sets)]


def time_call(call: Call, sets: list[Buffers]) -> float:
    """Return the microseconds of one call inside a CUDA graph."""
    # Enough calls that the launch of the graph does not matter.
    rounds = max(1, (64 if sets[0].x.numel() < 1 << 20 else 16) // len(sets))
    # Outputs that a call allocates are kept until the next call with the same set: otherwise all calls would write to
    # the same memory, which never leaves the cache.
    outputs: list[Any] = [None] * len(sets)

    def record() -> None:
        for _ in range(rounds):
            for i, buffers in enumerate(sets):
                outputs[i] = call(buffers)

    return time_calls({"": record})[""] / (rounds * len(sets))


def measure(dtype_name: str, hidden_sizes: list[int], tokens: list[int]) -> list[dict[str, Any]]:
    """Return one record for each operation, provider and size."""
    import torch

    calls = gather_calls(OPERATIONS, (_ours, _pytorch, _liger, _flashinfer, _vllm))
    records = []
    for hidden_size in hidden_sizes:
        for count in tokens:
            sets = make_buffers(count, hidden_size, getattr(torch, dtype_name))
            for operation, providers in calls.items():
                for provider, call in providers.items():
                    record = {"operation": operation, "hidden_size": hidden_size, "tokens": count, "provider": provider}
                    records.append(timed(record, partial(time_call, call, sets)))
            line = ", ".join(
                f"{r['provider']} {r.get('microseconds', 'failed')}"
                for r in records
                if matches(r, "rms_norm", hidden_size, count)
            )
            print(f"hidden_size {hidden_size}, {count} tokens: {line}", file=sys.stderr, flush=True)
            del sets
    return records


def matches(record: dict[str, Any], operation: str, hidden_size: int, tokens: int) -> bool:
    return (record["operation"], record["hidden_size"], record["tokens"]) == (operation, hidden_size, tokens)


def tables(records: list[dict[str, Any]], hidden_size: int) -> str:
    """Return Markdown tables of one hidden size, one for each operation, in microseconds."""
    sizes = sorted({r["tokens"] for r in records if r["hidden_size"] == hidden_size})
    times = {
        (r["operation"], r["provider"], r["tokens"]): r.get("microseconds")
        for r in records
        if r["hidden_size"] == hidden_size
    }
    lines = []
    for operation in OPERATIONS:
        providers = list(dict.fromkeys(p for o, p, _ in times if o == operation))
        lines += [
            f"**{operation}**",
            "",
            "| tokens | " + " | ".join(map(str, sizes)) + " |",
            "|---" * (len(sizes) + 1) + "|",
        ]
        for provider in providers:
            cells = [times.get((operation, provider, size)) for size in sizes]
            lines.append(f"| {provider} | " + " | ".join(map(short, cells)) + " |")
        lines.append("")
    return "\n".join(lines)


def summary(records: list[dict[str, Any]]) -> str:
    """Say at how many sizes ours is the fastest of all providers, and list where it is not."""
    lines = []
    for operation in OPERATIONS:
        behind, total = [], 0
        for hidden_size in sorted({r["hidden_size"] for r in records}):
            for tokens in sorted({r["tokens"] for r in records}):
                here = {
                    r["provider"]: r["microseconds"]
                    for r in records
                    if matches(r, operation, hidden_size, tokens) and "microseconds" in r
                }
                ours = here.get(OURS)
                peers = {p: t for p, t in here.items() if not p.startswith(OURS) and p != "copy_"}
                if ours is None or not peers:
                    continue
                total += 1
                best = min(peers, key=lambda p: peers[p])
                if peers[best] < ours:
                    behind.append(f"{hidden_size} x {tokens}: {best} {peers[best]:.2f}, ours {ours:.2f}")
        lines.append(
            f"* {operation}: fastest at {total - len(behind)} of {total} sizes" + "".join(f"\n  * {b}" for b in behind)
        )
    return "\n".join(lines)


def plot(records: list[dict[str, Any]], hidden_size: int, path: Path, title: str) -> None:
    """Draw achieved bandwidth over tokens, one panel for each operation."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), sharex=True)
    for axis, (operation, row_count) in zip(axes.flat, OPERATIONS.items(), strict=True):
        here = [
            r
            for r in records
            if r["operation"] == operation and r["hidden_size"] == hidden_size and "microseconds" in r
        ]
        for provider in dict.fromkeys(r["provider"] for r in here):
            points = [
                (r["tokens"], row_count * 2e-6 * r["tokens"] * hidden_size / r["microseconds"])
                for r in here
                if r["provider"] == provider
            ]
            ours = provider.startswith(OURS)
            axis.plot(
                *zip(*points, strict=True),
                marker="o",
                label=provider,
                linewidth=3 if ours else 1.5,
                zorder=3 if ours else 2,
            )
        finish_panel(axis, operation, "tokens", "TB/s read and written")
    save_figure(figure, title, path)


def report(path: Path) -> None:
    """Print the tables of a results file and draw its plot."""
    content = json.loads(path.read_text(encoding="utf-8"))
    records = content["results"]["records"]
    dtype = content["results"]["dtype"]
    for hidden_size in sorted({r["hidden_size"] for r in records}):
        print(f"### hidden size {hidden_size}, {dtype}, microseconds\n\n{tables(records, hidden_size)}")
    print(summary(records))
    hidden_size = 4096 if any(r["hidden_size"] == 4096 for r in records) else records[0]["hidden_size"]
    gpu = content["machine"]["gpu"]
    plot(
        records,
        hidden_size,
        IMAGES / f"{path.stem}.png",
        f"{gpu}, {dtype}, hidden size {hidden_size}, inside a CUDA graph",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=HIDDEN_SIZES)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/rms_norm_DTYPE.json")
    parser.add_argument("--report", type=Path, metavar="RESULTS", help="print and draw results instead of measuring")
    arguments = parser.parse_args()
    if arguments.report:
        report(arguments.report)
        return
    require_gpu()
    records = measure(arguments.dtype, arguments.hidden_sizes, arguments.tokens)
    output = arguments.output or RESULTS / f"rms_norm_{arguments.dtype}.json"
    write_results(output, {"dtype": arguments.dtype, "records": records})
    for hidden_size in arguments.hidden_sizes:
        print(f"### hidden size {hidden_size}\n\n{tables(records, hidden_size)}")
    print(summary(records))


if __name__ == "__main__":
    main()
