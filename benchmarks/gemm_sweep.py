"""Compare the GEMM kernels with cuBLASLt at every linear layer of ten published models, whole and divided among GPUs.

    python -m benchmarks.gemm_sweep [--models llama-3.2-1b ...] [--rows 1 2 ...] [--dtype float16]
    python -m benchmarks.gemm_sweep --report benchmarks/results/gemm_sweep.json

The first measures and writes benchmarks/results/gemm_sweep.json; the second prints the tables of such a file as
Markdown and draws the plot into docs/images.

Layers are whole, halved and quartered as tensor parallelism divides them: qkv, gate-up and the output projection by
their outputs, o and down by their inputs. `qwen_plugins.tuning` measures every candidate among the kernels, the
algorithms that cuBLASLt proposes first included, as a decode step runs them: one GEMM after the other, on weights
that the L2 cache does not hold. What comes out within 3 % of cuBLASLt is measured again. The floor is the time to
read the weight at --bandwidth, or to multiply at the rate in MULTIPLY_RATE, whichever is longer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import (
    IMAGES,
    OURS,
    RESULTS,
    add_bandwidth_argument,
    finish_panel,
    pyplot,
    require_gpu,
    save_figure,
    short,
    write_results,
)

ROWS = [1, 2, 4, 8, 12, 16, 17, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 8192]
CUBLAS = "cuBLASLt"
MULTIPLY_RATE = 790e12
"""Floating-point operations per second: the highest measured on an H200 with random 16-bit numbers."""
MAX_OPERATIONS = 1.2e12
"""Larger GEMMs are left out: they take long to measure, and their kernels are those of somewhat smaller ones."""
CLOSE = 0.03


@dataclass(frozen=True)
class Architecture:
    """An Architecture has the sizes in a published config.json from which those of the linear layers follow."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int

    def layers(self, parts: int) -> Iterator[tuple[str, int, int, str | None]]:
        """Yield name, in_features, out_features and activation of the layers that one of `parts` GPUs holds."""
        heads, kv_heads = self.num_heads // parts, max(1, self.num_kv_heads // parts)
        intermediate = self.intermediate_size // parts
        yield "qkv", self.hidden_size, (heads + 2 * kv_heads) * self.head_size, None
        yield "o", heads * self.head_size, self.hidden_size, None
        yield "gate-up", self.hidden_size, 2 * intermediate, "swiglu"
        yield "down", intermediate, self.hidden_size, None
        yield "head", self.hidden_size, self.vocab_size // parts, None


MODELS = {
    "qwen2.5-0.5b": Architecture(896, 4864, 14, 2, 64, 151936),
    "qwen3-0.6b": Architecture(1024, 3072, 16, 8, 128, 151936),
    "llama-3.2-1b": Architecture(2048, 8192, 32, 8, 64, 128256),
    "qwen2.5-1.5b": Architecture(1536, 8960, 12, 2, 128, 151936),
    "qwen2.5-3b": Architecture(2048, 11008, 16, 2, 128, 151936),
    "qwen3-4b": Architecture(2560, 9728, 32, 8, 128, 151936),
    "qwen2.5-7b": Architecture(3584, 18944, 28, 4, 128, 152064),
    "qwen2.5-14b": Architecture(5120, 13824, 40, 8, 128, 152064),
    "qwen2.5-32b": Architecture(5120, 27648, 40, 8, 128, 152064),
    "qwen2.5-72b": Architecture(8192, 29568, 64, 8, 128, 152064),
}

Shape = tuple[int, int, str | None]


def shapes(models: list[str]) -> dict[Shape, list[str]]:
    """Return who has a layer of each shape (in_features, out_features, activation)."""
    found: dict[Shape, list[str]] = {}
    for model in models:
        for parts in (1, 2, 4):
            if MODELS[model].num_heads % parts != 0:
                continue
            for name, in_features, out_features, activation in MODELS[model].layers(parts):
                user = f"{model} {name}" + (f" / {parts}" if parts > 1 else "")
                found.setdefault((in_features, out_features, activation), []).append(user)
    return found


def measure_gemm(shape: Shape, rows: int, dtype: str) -> dict[str, Any]:
    """Return the microseconds of our fastest kernel, cuBLASLt's fastest algorithm and the rules, and the names."""
    from qwen_plugins import tuning

    in_features, out_features, activation = shape
    size: dict[str, Any] = {
        "rows": rows,
        "in_features": in_features,
        "out_features": out_features,
        "activation": activation,
    }
    candidates = tuning.candidates(**size, dtype=dtype)
    times = tuning.measure(**size, dtype=dtype, kernels=["rules", *candidates])
    rules = times.pop("rules")
    ours = min((name for name in times if not name.startswith("cublas_lt")), key=times.__getitem__, default=None)
    cublas = min((name for name in times if name.startswith("cublas_lt")), key=times.__getitem__)
    if ours and abs(times[ours] / times[cublas] - 1) < CLOSE:
        again = tuning.measure(**size, dtype=dtype, kernels=[ours, cublas])
        times |= {name: (times[name] + again[name]) / 2 for name in (ours, cublas)}
    return {
        "rows": rows,
        OURS: round(times[ours], 3) if ours else None,
        CUBLAS: round(times[cublas], 3),
        "rules": round(rules, 3),
        "kernel": ours,
        "by_rules": tuning.choice_by_rules(**size, dtype=dtype),
    }


def measure(models: list[str], counts: list[int], dtype: str, seconds: float) -> dict[str, Any]:
    """Measure every shape at every number of rows, few rows first; those that remain after `seconds` are left out."""
    start, left_out = time.monotonic(), 0
    layers: dict[Shape, dict[str, Any]] = {
        shape: {"in_features": shape[0], "out_features": shape[1], "activation": shape[2], "used_by": users}
        for shape, users in shapes(models).items()
    }
    for rows in counts:
        for shape, layer in layers.items():
            if 2 * rows * shape[0] * shape[1] > MAX_OPERATIONS:
                continue
            if time.monotonic() - start > seconds:
                left_out += 1
                continue
            for name, value in measure_gemm(shape, rows, dtype).items():
                layer.setdefault(name, []).append(value)
        print(f"{rows} rows: {time.monotonic() - start:.0f} s", file=sys.stderr)
    return {"dtype": dtype, "layers": list(layers.values()), "left_out": left_out}


MEASURED = ("rows", OURS, CUBLAS, "rules", "kernel", "by_rules")


def gemms(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a record for each layer and number of rows."""
    return [
        {**layer, **dict(zip(MEASURED, values, strict=True))}
        for layer in results["layers"]
        for values in zip(*(layer.get(name, []) for name in MEASURED), strict=True)
    ]


def floor(record: dict[str, Any], bandwidth: float) -> float:
    """Return the microseconds below which no kernel can be."""
    elements = record["in_features"] * record["out_features"]
    return 1e6 * max(2 * elements / bandwidth, 2 * record["rows"] * elements / MULTIPLY_RATE)


def fastest(record: dict[str, Any]) -> float:
    """Return the microseconds of the kernel that measurement chooses: ours, or cuBLASLt's."""
    return min(record[OURS] or record[CUBLAS], record[CUBLAS])


def shares_table(results: dict[str, Any], bandwidth: float) -> str:
    """Return, by rows, how often ours is the fastest, how the rules do, and the share of the floor."""
    lines = [
        f"| rows | GEMMs | {OURS} is the fastest | {OURS} / {CUBLAS}: median, worst "
        "| by the rules / chosen: median, worst | of the floor, at weights of 16 MB and more: median |",
        "|---|---|---|---|---|---|",
    ]
    for rows in sorted({r["rows"] for r in gemms(results)}):
        records = [r for r in gemms(results) if r["rows"] == rows]
        ratios = [r[OURS] / r[CUBLAS] for r in records if r[OURS]]
        rules = [r["rules"] / fastest(r) for r in records]
        large = [floor(r, bandwidth) / fastest(r) for r in records if 2 * r["in_features"] * r["out_features"] >= 16e6]
        ahead = sum(ratio < 1 for ratio in ratios)
        ours = f"{statistics.median(ratios):.2f}, {max(ratios):.2f}" if ratios else "–"
        lines.append(
            f"| {rows} | {len(records)} | {ahead / len(records):.0%} | {ours} | {statistics.median(rules):.2f}, "
            f"{max(rules):.2f} | {statistics.median(large):.0%} |"
        )
    return "\n".join(lines)


def worst_table(results: dict[str, Any], bandwidth: float, most_rows: int = 64, count: int = 12) -> str:
    """Return the GEMMs of up to `most_rows` rows at which ours is the furthest behind cuBLASLt."""
    records = [r for r in gemms(results) if r[OURS] and r["rows"] <= most_rows]
    records.sort(key=lambda r: r[CUBLAS] / r[OURS])
    lines = [
        f"| layer | rows | {OURS}, µs | {CUBLAS}, µs | ratio | floor, µs | kernel of ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in records[:count]:
        size = f"{r['in_features']}→{r['out_features']}"
        lines.append(
            f"| {r['used_by'][0]}, {size} | {r['rows']} | {short(r[OURS])} | {short(r[CUBLAS])} | "
            f"{r[OURS] / r[CUBLAS]:.2f} | {short(floor(r, bandwidth))} | `{r['kernel']}` |"
        )
    return "\n".join(lines)


def summary(results: dict[str, Any]) -> str:
    """Say in two lines how the kernels do at 1 to 64 rows and beyond."""
    lines = []
    for text, least, most in (("1 to 64 rows", 1, 64), ("65 to 256 rows", 65, 256), ("more rows", 257, 1 << 30)):
        records = [r for r in gemms(results) if least <= r["rows"] <= most]
        if records:
            ahead = sum(r[OURS] is not None and r[OURS] < r[CUBLAS] for r in records)
            lines.append(
                f"* {text}: ours is the fastest at {ahead} of {len(records)} GEMMs ({ahead / len(records):.0%})"
            )
    return "\n".join(lines)


def plot(results: dict[str, Any], bandwidth: float, path: Path, title: str) -> None:
    """Draw each GEMM's time over that of cuBLASLt, and its share of the floor, over the rows."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5))
    records = [r for r in gemms(results) if r[OURS]]
    megabytes = [2e-6 * r["in_features"] * r["out_features"] for r in records]
    rows = [r["rows"] for r in records]
    ratios = [min(2.0, r[OURS] / r[CUBLAS]) for r in records]
    points = left.scatter(rows, ratios, c=megabytes, s=9, norm="log", cmap="viridis", label="a GEMM")
    left.axhline(1, color="black", linewidth=0.8)
    figure.colorbar(points, ax=left, label="MB of weights")
    finish_panel(left, "the fastest of our kernels", "rows", f"time / {CUBLAS}'s (2: 2 and more)")
    for key, pick in ((CUBLAS, lambda r: r[CUBLAS]), ("chosen by measurement", fastest)):
        counts = sorted(dict.fromkeys(rows))
        shares = [
            statistics.median(100 * floor(r, bandwidth) / pick(r) for r in records if r["rows"] == count)
            for count in counts
        ]
        right.plot(counts, shares, marker="o", label=key)
    finish_panel(right, "median of all layers", "rows", "% of the floor's speed")
    save_figure(figure, title, path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=list(MODELS), nargs="+", default=list(MODELS))
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument(
        "--seconds", type=float, default=600, help="what remains then is left out (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "gemm_sweep.json")
    parser.add_argument("--report", type=Path, metavar="RESULTS", help="print and draw results instead of measuring")
    parser.add_argument("--picture", type=Path, default=IMAGES / "gemm_sweep.png", help="of --report")
    add_bandwidth_argument(parser)
    arguments = parser.parse_args()
    bandwidth = 1e12 * arguments.bandwidth
    if arguments.report:
        content = json.loads(arguments.report.read_text(encoding="utf-8"))
        results = content["results"]
    else:
        require_gpu()
        results = measure(arguments.models, arguments.rows, arguments.dtype, arguments.seconds)
        write_results(arguments.output, results)
    print(shares_table(results, bandwidth), worst_table(results, bandwidth), summary(results), sep="\n\n")
    if arguments.report:
        plot(results, bandwidth, arguments.picture, f"{content['machine']['gpu']}, {results['dtype']}")


if __name__ == "__main__":
    main()
