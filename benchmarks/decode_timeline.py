"""Record where the time of a torch decode step goes: each kernel of a layer, and the whole step by kind of kernel.

    python -m benchmarks.decode_timeline [--shape qwen-7b] [--batch-sizes 1 8 64]   # records; needs an NVIDIA GPU
    python -m benchmarks.decode_timeline --quantization int4                        # of quantized weights
    python -m benchmarks.decode_timeline --draw                                   # draws; needs matplotlib alone

Replays of the step's CUDA graph are traced with CUPTI through torch.profiler. With programmatic dependent launch
kernels overlap: time is attributed to the oldest running kernel, so that kinds and gaps add up to the step. Tracing
takes time itself; the time of a step without it is recorded, too. The floor is the bytes of weights and cache divided
by 4.55 TB/s. Results are a file, decode_timeline.json, with --quantization decode_timeline_int4.json and so on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.common import (
    IMAGES,
    READ_BANDWIDTH,
    RESULTS,
    add_quantization_arguments,
    floor_bytes,
    pyplot,
    require_gpu,
    save_figure,
    write_results,
)

STEPS = 9
KINDS = {  # the first pattern that matches a kernel's name decides
    "attention": "attention|attend|prepare_tokens",
    "norms": "rms_norm",
    "quantization": "quantize_in_",
    "sampling": "argmax|sample",
    "embedding": "gather_rows",
    "products": "gemm|gemv|cutlass|nvjet|splitK|cublas",
    "SwiGLU": "swiglu",
    "copies": "Memcpy|Memset",
}
COLORS = {
    "products": "#76b900",
    "attention": "#3b7dd8",
    "norms": "#f2a541",
    "quantization": "#e9c46a",
    "SwiGLU": "#b07cc6",
    "sampling": "#d1495b",
    "embedding": "#66a182",
    "copies": "#8d99ae",
    "other": "#555555",
    "gaps": "#e3e6ea",
}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Kernel is one run of a kernel, from `start` to `end` in nanoseconds."""

    name: str
    start: int
    end: int

    @property
    def kind(self) -> str:
        """Return one of KINDS, or "other"."""
        return next((kind for kind, pattern in KINDS.items() if re.search(pattern, self.name)), "other")


def kernel_times(step: Callable[[], object], steps: int) -> list[Kernel]:
    """Return the kernels of `steps` decode steps, in the order of their starts."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    events = [e for e in profiler.profiler.kineto_results.events() if e.device_type() == torch.autograd.DeviceType.CUDA]
    kernels = [Kernel(e.name(), e.start_ns(), e.start_ns() + e.duration_ns()) for e in events]
    return sorted(kernels, key=lambda kernel: kernel.start)


def microseconds_untraced(step: Callable[[], object], steps: int) -> float:
    """Return the microseconds of one step, measured with CUDA events around `steps` of them."""
    import torch

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    step()
    begin.record()
    for _ in range(steps):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / steps


def split_steps(kernels: list[Kernel]) -> list[list[Kernel]]:
    """Split at the embedding's kernel; leave out the first and the last step, which may be incomplete.

    The kernel that gathers rows of the embedding table gathers those of the last tokens, too, behind the last layer.
    """
    starts = [i for i, kernel in enumerate(kernels) if kernel.kind == "embedding"]
    parts = [kernels[begin:end] for begin, end in pairwise([*starts, len(kernels)])]
    steps: list[list[Kernel]] = []
    for part in parts:
        if steps and not any(kernel.kind == "attention" for kernel in part):
            steps[-1].extend(part)
        else:
            steps.append(part)
    return steps[1:-1]


def attribute(step: list[Kernel], end: int) -> dict[str, float]:
    """Return microseconds by kind up to `end`, the next step's start; time is that of the oldest running kernel."""
    spent = dict.fromkeys([*COLORS], 0.0)
    covered = step[0].start
    for kernel in step:
        spent["gaps"] += max(0, kernel.start - covered) / 1e3
        covered = max(covered, kernel.start)
        spent[kernel.kind] += max(0, kernel.end - covered) / 1e3
        covered = max(covered, kernel.end)
    spent["gaps"] += max(0, end - covered) / 1e3
    return {kind: time for kind, time in spent.items() if time > 0}


def layer_of(step: list[Kernel]) -> list[Kernel]:
    """Return the kernels of a middle layer, from its first norm up to and including that of the next layer."""
    attentions = [i for i, kernel in enumerate(step) if kernel.kind == "attention"]
    per_layer = attentions[-1] - attentions[-2]
    first = attentions[len(attentions) // 2]
    while step[first].kind != "norms":
        first -= 1
    return step[first : first + per_layer + 1]


def record(options: argparse.Namespace) -> list[dict[str, Any]]:
    import torch

    from benchmarks.generate import COMMON, SHAPES, Load, weights_text
    from benchmarks.generate_torch import random_formats, random_session, random_weights
    from qwen_model.checkpoints.config import read_config
    from qwen_model.engine.sequences import Sequence
    from qwen_model.interface.engine_config import Limits

    prompt_tokens, dtype = options.prompt_tokens, options.dtype
    config = read_config({**COMMON, **SHAPES[options.shape]})
    formats = random_formats(options, config)
    weights = random_weights(config, getattr(torch, dtype), "cuda", formats)
    limits = Limits(max(options.batch_sizes), prompt_tokens, 4 * STEPS)
    session = random_session(config, weights, limits, formats=formats)
    recordings = []
    for batch_size in options.batch_sizes:
        prompts = Load(batch_size, prompt_tokens, 1).prompts(config.vocab_size, seed=0)
        sequences = [Sequence(prompt, 4 * STEPS) for prompt in prompts]
        for sequence in sequences:
            session.scheduler.add(sequence)
        while len(session.scheduler.step()) < batch_size:  # until all decode
            pass
        untraced = microseconds_untraced(session.scheduler.step, STEPS)
        kernels = kernel_times(session.scheduler.step, STEPS + 3)
        for sequence in sequences:
            session.scheduler.cancel(sequence)
        steps = split_steps(kernels)
        ends = [step[0].start for step in steps[1:]]
        summaries = [attribute(step, end) for step, end in zip(steps, ends, strict=False)]
        kinds = [kind for kind in COLORS if any(kind in summary for summary in summaries)]
        spent = {kind: statistics.median(summary.get(kind, 0.0) for summary in summaries) for kind in kinds}
        middle = steps[len(steps) // 2]
        layer = layer_of(middle)
        bytes_read = floor_bytes(config, dtype, batch_size, prompt_tokens + 2 * STEPS, formats)
        recordings.append(
            {
                "shape": options.shape,
                "dtype": weights_text(options, "qwen_model"),
                "batch_size": batch_size,
                "prompt_tokens": prompt_tokens,
                "kernels_per_step": len(middle),
                "microseconds_per_step": untraced,
                "microseconds_by_kind_traced": spent,
                "floor_bytes": bytes_read,
                "floor_microseconds": sum(bytes_read.values()) / READ_BANDWIDTH * 1e6,
                "layer": [
                    {"name": k.name, "kind": k.kind, "start": k.start - layer[0].start, "end": k.end - layer[0].start}
                    for k in layer
                ],
                "outside_layers": sorted({k.name for k in middle if k.kind in ("sampling", "embedding", "other")}),
            }
        )
        print(describe(recordings[-1]), flush=True)
    return recordings


def describe(recording: dict[str, Any]) -> str:
    kinds = ", ".join(f"{kind} {time:.1f}" for kind, time in recording["microseconds_by_kind_traced"].items())
    return (
        f"{recording['shape']} batch {recording['batch_size']}: {recording['microseconds_per_step']:.0f} us a step, "
        f"floor {recording['floor_microseconds']:.0f}; traced {recording['kernels_per_step']} kernels: {kinds}"
    )


def draw(content: dict[str, Any], path: Path) -> None:
    """Draw a layer's kernels and the whole step by kind beside the floor, for each batch size."""
    plt = pyplot()
    recordings = content["results"]
    figure, panels = plt.subplots(
        2 * len(recordings), 1, figsize=(12, 4.2 * len(recordings)), height_ratios=[3, 1.6] * len(recordings)
    )
    for recording, layer, step in zip(recordings, panels[::2], panels[1::2], strict=True):
        draw_layer(recording, layer)
        draw_step(recording, step)
    machine = content["machine"]["gpu"]
    shape, dtype = recordings[0]["shape"], recordings[0]["dtype"]
    save_figure(figure, f"A decode step of the torch back end, shape of {shape}, {dtype}, {machine}", path)
    plt.close(figure)


def draw_layer(recording: dict[str, Any], panel: Any) -> None:
    kernels = recording["layer"]
    for row, kernel in enumerate(kernels):
        start, duration = kernel["start"] / 1e3, (kernel["end"] - kernel["start"]) / 1e3
        panel.barh(-row, duration, left=start, height=0.75, color=COLORS[kernel["kind"]])
        panel.text(start + duration, -row, f" {duration:.1f} µs", va="center", fontsize=7)
    panel.set_yticks([-row for row in range(len(kernels))], [short_name(k["name"]) for k in kernels], fontsize=7)
    panel.margins(x=0.07)
    panel.set(title=f"batch {recording['batch_size']}: a layer and the next one's first kernel, traced", xlabel="µs")
    panel.title.set_fontsize(9)
    panel.grid(axis="x", alpha=0.3)


def draw_step(recording: dict[str, Any], panel: Any) -> None:
    left = 0.0
    for kind, time in recording["microseconds_by_kind_traced"].items():
        panel.barh(1, time, left=left, color=COLORS[kind], label=f"{kind} {time:.0f} µs")
        left += time
    panel.barh(0, recording["floor_microseconds"], color="#222222")
    step = recording["microseconds_per_step"]
    panel.axvline(step, color="#222222", linestyle=":", linewidth=1)
    panel.set_yticks(
        [0, 1], [f"floor {recording['floor_microseconds']:.0f} µs", f"traced step {left:.0f} µs"], fontsize=8
    )
    panel.set(ylim=(-0.6, 1.6), xlabel=f"µs; dotted: the step without tracing, {step:.0f}")
    panel.legend(frameon=False, fontsize=7, ncols=9, loc="lower center", bbox_to_anchor=(0.5, 0.95))


def short_name(name: str) -> str:
    """Return a kernel's name without namespaces, template arguments and parameters."""
    plain = re.sub(r"\(anonymous namespace\)::|<unnamed>::|^void ", "", name)
    return re.split(r"[<(]", plain)[0].split("::")[-1][:40]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen-7b", help="one of the shapes of benchmarks.generate")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="float16")
    add_quantization_arguments(parser)
    parser.add_argument("--results", type=Path, help="default: decode_timeline[_QUANTIZATION].json, in results/")
    parser.add_argument("--picture", type=Path, help="default: decode_timeline[_QUANTIZATION].svg, in docs/images/")
    parser.add_argument("--draw", action="store_true", help="draw recorded results instead of measuring")
    parser.set_defaults(kv_cache_dtype="auto")
    options = parser.parse_args()
    name = "_".join(filter(None, ["decode_timeline", options.quantization]))
    options.results = options.results or RESULTS / f"{name}.json"
    options.picture = options.picture or IMAGES / f"{name}.svg"
    if options.draw:
        draw(json.loads(options.results.read_text(encoding="utf-8")), options.picture)
        return
    require_gpu()
    write_results(options.results, record(options))
    print(options.results)


if __name__ == "__main__":
    main()
