"""Print tables and draw a picture of the results of benchmarks.generate, of several runs together.

    python -m benchmarks.generate_report [RESULTS ...]    # default: generate_*.json in benchmarks/results
    python -m benchmarks.generate_report benchmarks/results/h100/generate_*.json --bandwidth 3.14 --picture FILE.svg

The floor is the time to read the weights once, and the cache of half the generated tokens, at --bandwidth.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.common import IMAGES, READ_BANDWIDTH, RESULTS, add_bandwidth_argument, floor_bytes, pyplot, save_figure
from benchmarks.generate import COMMON, SHAPES
from qwen_model.checkpoints.config import read_config

NAMES = {
    "tensorrt": "**ours**, TensorRT engine",
    "qwen_model": "**ours**, torch back end",
    "native_norms": "engine with RMSNorm in native layers",
    "native_rotary": "engine with the rotary embedding in native layers",
    "native_gemm": "engine with linear layers in native layers",
    "vllm": "vLLM",
    "transformers": "transformers, eager",
    "products": "GEMMs alone (cuBLAS, one CUDA graph)",
    "floor": "floor: reading weights and cache at {:.2f} TB/s",
}
SHOWN = ("tensorrt", "qwen_model", "vllm", "transformers", "products", "floor")
COLORS = {"tensorrt": "#76b900", "qwen_model": "#4a7500", "vllm": "#3b7dd8", "transformers": "#d1495b"}
Record = dict[str, Any]


def read_records(paths: list[Path]) -> tuple[list[Record], str]:
    """Return the records of published shapes in these files, and the GPU they were measured on."""
    records, machines = [], set()
    for path in paths:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = [r for r in content["results"] if r["shape"] in SHAPES]
        records += found
        machines.update([str(content["machine"]["gpu"])] if found else [])
    if len(machines) != 1:
        raise SystemExit(f"results of one machine were expected, these are of {sorted(machines) or 'none'}")
    measured = [(r["shape"], r["implementation"], r["batch_size"], r["prompt_tokens"]) for r in records]
    if twice := [load for load in measured if measured.count(load) > 1]:
        raise SystemExit(f"measured in more than one of the files: {twice[0]}")
    return records, machines.pop()


def floor_rate(record: Record, bandwidth: float) -> float:
    """Return the tokens per second of a step that only reads weights and cache, at `bandwidth` bytes per second."""
    config = read_config({**COMMON, **SHAPES[record["shape"]]})
    context = record["prompt_tokens"] + record["new_tokens"] // 2
    step = sum(floor_bytes(config, record["dtype"], record["batch_size"], context).values()) / bandwidth
    return float(record["batch_size"] / step)


def with_floor(records: list[Record], bandwidth: float) -> list[Record]:
    """Return the records, and one of the floor for each load that ours or vLLM ran."""
    whole = [r for r in records if r["implementation"] in ("tensorrt", "qwen_model", "vllm")]
    loads = {(r["shape"], r["batch_size"], r["prompt_tokens"]): r for r in whole}
    floors = [
        {
            **r,
            "implementation": "floor",
            "first_token_ms": None,
            "decode_tokens_per_second": floor_rate(r, bandwidth),
        }
        for r in loads.values()
    ]
    return records + floors


def table(
    records: list[Record], prompt_tokens: int, bandwidth: float = READ_BANDWIDTH, names: tuple[str, ...] = SHOWN
) -> str:
    """Return a Markdown table, a line for each shape and implementation; `bandwidth` is in bytes per second."""
    records = with_floor(records, bandwidth)
    records = [r for r in records if r["prompt_tokens"] == prompt_tokens]
    batches = sorted({r["batch_size"] for r in records})
    columns = [*(f"tokens/s, batch {n}" for n in batches), *(f"first token, ms, batch {n}" for n in batches)]
    lines = ["| shape | | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for shape in SHAPES:
        for name in names:
            here = {r["batch_size"]: r for r in records if (r["shape"], r["implementation"]) == (shape, name)}
            if not here:
                continue
            rates = [f"{here[n]['decode_tokens_per_second']:.0f}" if n in here else "" for n in batches]
            firsts = [here[n]["first_token_ms"] if n in here else None for n in batches]
            cells = [*rates, *("" if first is None else f"{first:.1f}" for first in firsts)]
            lines.append(f"| {shape} | {NAMES[name].format(bandwidth * 1e-12)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(records: list[Record], machine: str, prompt_tokens: int, bandwidth: float, path: Path) -> None:
    """Draw tokens per second as shares of the floor, and times to the first token, beside each other."""
    plt = pyplot()
    records = [r for r in records if r["prompt_tokens"] == prompt_tokens and r["implementation"] in COLORS]
    shapes = [shape for shape in SHAPES if any(r["shape"] == shape for r in records)]
    figure, panels = plt.subplots(2, len(shapes), figsize=(6 * len(shapes), 7), squeeze=False)
    for column, shape in enumerate(shapes):
        here = [r for r in records if r["shape"] == shape]
        draw_bars(
            panels[0][column],
            here,
            lambda r: 100 * r["decode_tokens_per_second"] / floor_rate(r, bandwidth),
            "{:.0f} %",
        )
        draw_bars(panels[1][column], here, lambda r: r["first_token_ms"], "{:.1f}")
        panels[0][column].set(title=shape, ylabel="decode, % of the floor", ylim=(0, 110))
        panels[1][column].set(ylabel="ms to the first token", yscale="log")
        panels[0][column].legend(fontsize=8, ncols=2)
    save_figure(figure, f"Generation, {records[0]['dtype']}, prompts of {prompt_tokens} tokens, {machine}", path)


def draw_bars(panel: Any, records: list[Record], value: Any, text: str) -> None:
    """Draw a group of bars for each batch size, in a colour for each implementation."""
    batches = sorted({r["batch_size"] for r in records})
    names = [name for name in COLORS if any(r["implementation"] == name for r in records)]
    for i, name in enumerate(names):
        mine = [r for r in records if r["implementation"] == name]
        places = [batches.index(r["batch_size"]) + 0.8 * (i - (len(names) - 1) / 2) / len(names) for r in mine]
        heights = [value(r) for r in mine]
        panel.bar(places, heights, 0.76 / len(names), color=COLORS[name], label=NAMES[name].replace("**", ""))
        for place, height in zip(places, heights, strict=True):
            panel.text(place, height, text.format(height), ha="center", va="bottom", fontsize=7)
    panel.set_xticks(range(len(batches)), [f"batch {n}" for n in batches])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path)
    add_bandwidth_argument(parser)
    parser.add_argument("--picture", type=Path, default=IMAGES / "generate.svg")
    options = parser.parse_args()
    paths = options.results or sorted(RESULTS.glob("generate_*.json"))
    records, machine = read_records(paths)
    bandwidth = options.bandwidth * 1e12
    for prompt_tokens in sorted({r["prompt_tokens"] for r in records}):
        print(f"Prompts of {prompt_tokens} tokens:\n\n{table(records, prompt_tokens, bandwidth)}\n")
    draw(records, machine, min(r["prompt_tokens"] for r in records), bandwidth, options.picture)


if __name__ == "__main__":
    main()
