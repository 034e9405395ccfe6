"""Compare prefill and decode attention with PyTorch, FlashAttention and flashinfer on one GPU.

    python -m benchmarks.attention [--dtype float16] [--phases decode prefill] [--models Qwen-7B ...] [--ours]
    python -m benchmarks.attention --report benchmarks/results/attention.json

The first measures, prints tables and writes benchmarks/results/attention.json; the second prints the tables of such a
file as Markdown and draws docs/images/attention.png. Providers that cannot be imported are left out.

Each figure is the time of one call among many inside a CUDA graph, the median over replays. Calls rotate over sets of
buffers that are together several times the L2 cache, as the layers of a model do. Ours includes the rotary
embedding and writing the new keys and values to the cache; for the others both are done before. Besides a contiguous
cache in 16 bits ("ours") there are pages in random order, of 16 bits and of both types of 8 bits; --ours measures these
alone. PyTorch's decode
attention gets the query heads that share keys as rows of one head, the fastest way to call it; FlashAttention and
flashinfer have pages of 256 positions.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from benchmarks.common import (
    IMAGES,
    OURS,
    READ_BANDWIDTH,
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

HEAD_SIZE = 128
PAGE = 256  # of other providers
PAGED, INT8, FP8 = (f"{OURS}, {cache}" for cache in ("pages", "int8 pages", "fp8 pages"))
READ_SPEED = READ_BANDWIDTH * 1e-6  # bytes per microsecond
MODELS = {"Qwen-7B": (32, 32), "Qwen2.5-7B": (28, 4), "64/8 heads": (64, 8)}  # heads, key-value heads
DECODE = [  # sequences, tokens of each
    *[(1, n) for n in (160, 256, 512, 1024, 4096, 16384, 65536)],
    *[(8, n) for n in (256, 2048, 8192)],
    *[(64, n) for n in (256, 1024)],
    (4, 32768),
]
PREFILL = [(1, 256), (1, 1024), (1, 2048), (1, 4096), (1, 8192), (8, 1024), (32, 256)]


@dataclass(frozen=True)
class Problem:
    """A Problem is one size to measure; `tokens` is the length of each sequence, the new token included."""

    phase: str
    model: str
    sequences: int
    tokens: int
    dtype: str

    @property
    def new_tokens(self) -> int:
        """Return the number of new tokens of all sequences."""
        return self.sequences * (self.tokens if self.phase == "prefill" else 1)

    @property
    def cache_bytes(self) -> int:
        """Return the bytes of all tokens' keys and values."""
        return 4 * self.sequences * self.tokens * MODELS[self.model][1] * HEAD_SIZE

    @property
    def operations(self) -> float:
        """Return the floating-point operations of prefill: q · k and p · v for each query and key that it sees."""
        return 2.0 * MODELS[self.model][0] * HEAD_SIZE * self.sequences * self.tokens * (self.tokens + 1)


class Buffers:
    """Buffers hold one set of operands; the layouts of other providers are made when they are first used."""

    def __init__(self, problem: Problem):
        import torch

        self.problem = problem
        self.heads, self.kv_heads = MODELS[problem.model]
        self._options: dict[str, Any] = {"dtype": getattr(torch, problem.dtype), "device": "cuda"}
        self.qkv = torch.randn(problem.new_tokens, (self.heads + 2 * self.kv_heads) * HEAD_SIZE, **self._options)
        self.cache = torch.randn(problem.sequences, 2, self.kv_heads, problem.tokens, HEAD_SIZE, **self._options)
        self.out = self.qkv.new_empty(problem.new_tokens, self.heads * HEAD_SIZE)

    def _int32(self, values: Any) -> Any:
        import torch

        return torch.tensor(list(values), dtype=torch.int32, device="cuda")

    @cached_property
    def cu_seqlens(self) -> Any:
        """Return where each sequence begins in `qkv`, and the end: int32 [sequences + 1]."""
        step = self.problem.new_tokens // self.problem.sequences
        return self._int32(step * i for i in range(self.problem.sequences + 1))

    @cached_property
    def lengths(self) -> Any:
        """Return the length of each sequence, the new token included."""
        return self._int32([self.problem.tokens] * self.problem.sequences)

    @cached_property
    def past_lengths(self) -> Any:
        """Return the length of each sequence without the new token."""
        return self.lengths - 1

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """Return the AttentionInputs of our functions, by provider."""
        import torch

        from qwen_plugins.attention import PAGE_SIZE, AttentionInputs

        angles = torch.rand(self.problem.tokens, HEAD_SIZE // 2, device="cuda") * 6.28
        contiguous = AttentionInputs(self.heads, self.cache, torch.cat([angles.cos(), angles.sin()], -1))
        each = -(-self.problem.tokens // PAGE_SIZE)
        count = each * self.problem.sequences
        table = torch.randperm(count, device="cuda").int().view(-1, each)
        shape = (count, 2, self.kv_heads, PAGE_SIZE)
        paged = replace(contiguous, pages=table, kv_cache=torch.randn(*shape, HEAD_SIZE, **self._options))
        return {OURS: contiguous, PAGED: paged} | {
            provider: replace(contiguous, pages=table, kv_cache=_random_codes(*shape), cache_dtype=dtype)
            for provider, dtype in ((INT8, torch.int8), (FP8, torch.float8_e4m3fn))
        }

    @cached_property
    def workspace(self) -> Any:
        """Return the workspace of our decode attention."""
        from qwen_plugins.attention import decode_attention_workspace

        return decode_attention_workspace(self.inputs[OURS])

    @cached_property
    def packed(self) -> tuple[Any, Any, Any]:
        """Return q, k and v of prompts, [tokens, heads, head_size] each."""
        q, k, v = self.qkv.unflatten(-1, (-1, HEAD_SIZE)).split([self.heads, self.kv_heads, self.kv_heads], 1)
        return q.contiguous(), k.contiguous(), v.contiguous()

    @cached_property
    def by_sequence(self) -> tuple[Any, ...]:
        """Return q, k and v of prompts as [sequences, heads, tokens, head_size]."""
        shape = (self.problem.sequences, self.problem.tokens)
        return tuple(x.unflatten(0, shape).transpose(1, 2) for x in self.packed)

    @cached_property
    def new_queries(self) -> Any:
        """Return q of the new tokens, [sequences, kv_heads, heads of each, head_size]."""
        return self.qkv[:, : self.heads * HEAD_SIZE].contiguous().unflatten(-1, (self.kv_heads, -1, HEAD_SIZE))

    @cached_property
    def pages(self) -> tuple[Any, Any]:
        """Return pages [pages, 2, PAGE, kv_heads, head_size] and the page table, int32 [sequences, pages of each]."""
        import torch

        each = -(-self.problem.tokens // PAGE)
        count = each * self.problem.sequences
        pages = torch.randn(count, 2, PAGE, self.kv_heads, HEAD_SIZE, **self._options)
        return pages, torch.arange(count, dtype=torch.int32, device="cuda").view(-1, each)


Call = Callable[[Buffers], Any]


def _random_codes(*shape: int) -> Any:
    """Return a cache of 8 bits, [..., head_size + 4]; the codes are numbers in both types."""
    import torch

    from qwen_plugins.attention import split_quantized_cache

    cache = torch.randint(0, 120, (*shape, HEAD_SIZE + 4), dtype=torch.uint8, device="cuda")
    split_quantized_cache(cache)[1].fill_(0.02)
    return cache


def _ours() -> dict[str, dict[str, Call]]:
    from qwen_plugins.attention import decode_attention, prefill_attention

    def decode(provider: str, b: Buffers) -> Any:
        return decode_attention(b.qkv, b.inputs[provider], b.past_lengths, b.workspace, out=b.out)

    def prefill(provider: str, b: Buffers) -> Any:
        return prefill_attention(b.qkv, b.inputs[provider], b.cu_seqlens, out=b.out)

    providers = (OURS, PAGED, INT8, FP8)
    return {
        "decode": {provider: partial(decode, provider) for provider in providers},
        "prefill": {provider: partial(prefill, provider) for provider in providers},
    }


def _pytorch() -> dict[str, dict[str, Call]]:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    def prefill(b: Buffers) -> Any:
        q, k, v = b.by_sequence
        return sdpa(q, k, v, is_causal=True, enable_gqa=b.heads != b.kv_heads)

    def decode(b: Buffers) -> Any:
        return sdpa(b.new_queries, b.cache[:, 0], b.cache[:, 1])

    def with_backend(call: Call, backend: Any) -> Call:
        def run(b: Buffers) -> Any:
            with sdpa_kernel(backend):
                return call(b)

        return run

    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
    calls: dict[str, dict[str, Call]] = {"decode": {"PyTorch": decode}, "prefill": {"PyTorch": prefill}}
    for name, backend in backends.items():
        calls["decode"][f"PyTorch, {name}"] = with_backend(decode, backend)
        calls["prefill"][f"PyTorch, {name}"] = with_backend(prefill, backend)
    return calls


def _flash_attention() -> dict[str, dict[str, Call]]:
    """Return the calls of FlashAttention 3, from the copy inside vLLM."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    def prefill(b: Buffers) -> Any:
        tokens = b.problem.tokens
        return flash_attn_varlen_func(
            *b.packed, tokens, b.cu_seqlens, tokens, cu_seqlens_k=b.cu_seqlens, causal=True, fa_version=3
        )

    def decode(b: Buffers) -> Any:
        pages, table = b.pages
        return flash_attn_varlen_func(
            b.new_queries.flatten(1, 2),
            pages[:, 0],
            pages[:, 1],
            1,
            b.cu_seqlens,
            b.problem.tokens,
            seqused_k=b.lengths,
            block_table=table,
            causal=True,
            fa_version=3,
        )

    return {"decode": {"FlashAttention 3": decode}, "prefill": {"FlashAttention 3": prefill}}


def _flashinfer() -> dict[str, dict[str, Call]]:
    import torch
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    planned: WeakKeyDictionary[Buffers, Any] = WeakKeyDictionary()

    def plan(b: Buffers) -> Any:
        pages, table = b.pages
        group = b.heads // b.kv_heads
        memory = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
        wrapper = BatchDecodeWithPagedKVCacheWrapper(memory, "NHD", use_tensor_cores=group > 1)
        indptr = torch.arange(len(table) + 1, dtype=torch.int32, device="cuda") * table.shape[1]
        last = torch.full((len(table),), (b.problem.tokens - 1) % PAGE + 1, dtype=torch.int32, device="cuda")
        kinds = {"q_data_type": b.qkv.dtype, "kv_data_type": b.qkv.dtype}
        wrapper.plan(indptr, table.flatten(), last, b.heads, b.kv_heads, HEAD_SIZE, PAGE, **kinds)
        return wrapper, pages

    def decode(b: Buffers) -> Any:
        if b not in planned:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError("planned for all sets before the graph is captured")
            planned[b] = plan(b)
        wrapper, pages = planned[b]
        return wrapper.run(b.new_queries.flatten(1, 2), pages)

    return {"decode": {"flashinfer": decode}, "prefill": {}}


def make_sets(problem: Problem) -> list[Buffers]:
    """Return sets of buffers whose caches exceed the L2 cache six times, and in 8 bits three times, together."""
    import torch

    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    return [Buffers(problem) for _ in range(min(max(2, -(-6 * l2_bytes // problem.cache_bytes)), 500))]


def time_call(call: Call, sets: list[Buffers]) -> float:
    """Return the microseconds of one call inside a CUDA graph."""
    rounds = max(1, 40 // len(sets)) if sets[0].problem.phase == "decode" else 1

    def record() -> None:
        for _ in range(rounds):
            for buffers in sets:
                call(buffers)

    return time_calls({"": record})[""] / (rounds * len(sets))


def measure(problems: list[Problem], ours: bool) -> list[dict[str, Any]]:
    """Return one record for each problem and provider; with `ours`, for our own providers."""
    finders = (_ours,) if ours else (_ours, _pytorch, _flash_attention, _flashinfer)
    calls = gather_calls(("decode", "prefill"), finders)
    records = []
    for problem in problems:
        sets = make_sets(problem)
        here = [
            timed({**vars(problem), "provider": provider}, partial(time_call, call, sets))
            for provider, call in calls[problem.phase].items()
        ]
        line = ", ".join(f"{r['provider']} {r.get('microseconds', 'failed')}" for r in here)
        print(
            f"{problem.phase} {problem.model} {problem.sequences} x {problem.tokens}: {line}",
            file=sys.stderr,
            flush=True,
        )
        records += here
        del sets
    return records


def _problem(record: dict[str, Any]) -> Problem:
    return Problem(*(record[name] for name in ("phase", "model", "sequences", "tokens", "dtype")))


def table(records: list[dict[str, Any]], phase: str, model: str) -> str:
    """Return a Markdown table in microseconds; its last column is time over the limit (decode) or TFLOP/s (prefill)."""
    mine = [r for r in records if (r["phase"], r["model"]) == (phase, model)]
    providers = list(dict.fromkeys(r["provider"] for r in mine))
    last = "ours / limit" if phase == "decode" else "ours, TFLOP/s"
    lines = [f"| sequences x tokens | {' | '.join(providers)} | {last} |", "|---" * (len(providers) + 2) + "|"]
    for problem in dict.fromkeys(map(_problem, mine)):
        times = {r["provider"]: r["microseconds"] for r in mine if _problem(r) == problem and "microseconds" in r}
        cells = [short(times.get(p)) for p in providers]
        if OURS not in times:
            cells.append("–")
        elif phase == "decode":
            cells.append(f"{times[OURS] / (problem.cache_bytes / READ_SPEED):.2f}")
        else:
            cells.append(f"{problem.operations / times[OURS] * 1e-6:.0f}")
        lines.append(f"| {problem.sequences} x {problem.tokens} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cache_table(records: list[dict[str, Any]], phase: str) -> str:
    """Return a Markdown table of what pages cost and what 8 bits save."""
    lines = ["| heads, sequences x tokens | pages / rows | 16 bits / int8 | 16 bits / fp8 |", "|---" * 4 + "|"]
    for problem in dict.fromkeys(_problem(r) for r in records if r["phase"] == phase):
        times = {r["provider"]: r["microseconds"] for r in records if _problem(r) == problem and "microseconds" in r}
        ratios = [(PAGED, OURS), (PAGED, INT8), (PAGED, FP8)]
        if not times.keys() >= {OURS, PAGED, INT8, FP8}:
            continue
        cells = [f"{times[a] / times[b]:.2f}" for a, b in ratios]
        heads = "/".join(map(str, MODELS[problem.model]))
        lines.append(f"| {heads}, {problem.sequences} x {problem.tokens} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tables(records: list[dict[str, Any]]) -> str:
    """Return a table for each phase and model, and one of the kinds of caches for each phase."""
    found = dict.fromkeys((r["phase"], r["model"]) for r in records)
    parts = []
    for phase, model in found:
        heads = "/".join(map(str, MODELS[model]))
        parts.append(f"**{phase}, {model}** ({heads} heads), microseconds\n\n{table(records, phase, model)}")
    for phase in dict.fromkeys(r["phase"] for r in records):
        parts.append(f"**{phase}, kinds of caches**, ratios of times\n\n{cache_table(records, phase)}")
    return "\n\n".join(parts)


def plot(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw bandwidth of decode and TFLOP/s of prefill, one panel for each model."""
    plt = pyplot()
    models = list(dict.fromkeys(r["model"] for r in records))
    figure, axes = plt.subplots(2, len(models), figsize=(5 * len(models), 9), squeeze=False)
    for row, phase in enumerate(("decode", "prefill")):
        for axis, model in zip(axes[row], models, strict=True):
            here = [r for r in records if (r["phase"], r["model"]) == (phase, model) and "microseconds" in r]
            for provider in dict.fromkeys(r["provider"] for r in here):
                points = sorted(
                    (r["tokens"], _problem(r).cache_bytes / r["microseconds"] * 1e-6)
                    if phase == "decode"
                    else (r["tokens"], _problem(r).operations / r["microseconds"] * 1e-6)
                    for r in here
                    if r["provider"] == provider and r["sequences"] == 1
                )
                if not points:
                    continue
                ours = provider == OURS
                axis.plot(*zip(*points, strict=True), marker="o", label=provider, linewidth=3 if ours else 1.5)
            unit = "TB/s of the cache" if phase == "decode" else "TFLOP/s"
            finish_panel(axis, f"{phase}, {model}, one sequence", "tokens", unit)
    save_figure(figure, title, path)


def report(path: Path) -> None:
    """Print the tables of a results file and draw its plot."""
    content = json.loads(path.read_text(encoding="utf-8"))
    records = content["results"]["records"]
    print(tables(records))
    title = f"{content['machine']['gpu']}, {records[0]['dtype']}, inside a CUDA graph"
    plot(records, IMAGES / f"{path.stem}.png", title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--phases", choices=["decode", "prefill"], nargs="+", default=["decode", "prefill"])
    parser.add_argument("--models", choices=list(MODELS), nargs="+", default=list(MODELS))
    parser.add_argument("--tokens", type=int, nargs="+", metavar="N", help="only sequences of these lengths")
    parser.add_argument("--ours", action="store_true", help="measure no other providers")
    parser.add_argument("--output", type=Path, default=RESULTS / "attention.json")
    parser.add_argument("--report", type=Path, metavar="RESULTS", help="print and draw results instead of measuring")
    arguments = parser.parse_args()
    if arguments.report:
        report(arguments.report)
        return
    require_gpu()
    sizes = {"decode": DECODE, "prefill": PREFILL}
    problems = [
        Problem(phase, model, sequences, tokens, arguments.dtype)
        for phase in arguments.phases
        for model in arguments.models
        for sequences, tokens in sizes[phase]
        if arguments.tokens is None or tokens in arguments.tokens
    ]
    records = measure(problems, arguments.ours)
    write_results(arguments.output, {"records": records})
    print(tables(records))


if __name__ == "__main__":
    main()
