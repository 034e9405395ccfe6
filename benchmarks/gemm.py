"""Compare a decoder's GEMMs with cuBLAS on one GPU, one by one and as a whole decode step.

    python -m benchmarks.gemm [--models qwen-7b ...] [--rows 1 2 ...] [--dtype float16]
    python -m benchmarks.gemm --report benchmarks/results/gemm.json

The first measures, prints tables and writes benchmarks/results/gemm.json; the second prints the tables of such a file
as Markdown and draws the plot into docs/images.

Each figure is a median over replays of a CUDA graph. "One by one" is the time of one GEMM among many of the same shape,
which rotate over more than 1 GB of weights, so that none is still in the L2 cache. Ours overlap (programmatic dependent
launch with constant weights), as they do when a model decodes. "Decode step" is the four GEMMs of every layer and the
output projection, each with its own weight (14 GB together), and our RMSNorm with residual between them: all of a step
but attention and sampling. The floor is the time to read the weights at --bandwidth, by default the highest rate
measured on an H200.
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
    add_bandwidth_argument,
    finish_panel,
    pyplot,
    require_gpu,
    save_figure,
    write_results,
)
from benchmarks.timing import time_calls

ROWS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 2048, 8192]
STEP_ROWS = [1, 2, 4, 8, 16, 32, 64]
CUBLAS = "cuBLAS"
ROTATED_BYTES = 1.1e9


@dataclass(frozen=True)
class Product:
    """A Product is one GEMM of a layer; gate and up are one GEMM with SwiGLU."""

    name: str
    in_features: int
    out_features: int
    swiglu: bool = False

    @property
    def elements(self) -> int:
        """Return the number of the weight's elements."""
        return self.in_features * self.out_features

    def floor(self, bandwidth: float) -> float:
        """Return the microseconds that reading the weight takes, at `bandwidth` bytes per second."""
        return 2e6 * self.elements / bandwidth


@dataclass(frozen=True)
class Model:
    """A Model lists the GEMMs of a layer in their order, and the output projection."""

    layers: int
    products: tuple[Product, ...]
    head: Product

    @property
    def elements(self) -> int:
        """Return the number of all weights' elements."""
        return self.layers * sum(product.elements for product in self.products) + self.head.elements

    def floor(self, bandwidth: float) -> float:
        """Return the microseconds that reading all weights takes, at `bandwidth` bytes per second."""
        return 2e6 * self.elements / bandwidth


MODELS = {
    "qwen-7b": Model(
        32,
        (
            Product("qkv", 4096, 12288),
            Product("o", 4096, 4096),
            Product("gate-up", 4096, 22016, swiglu=True),
            Product("down", 11008, 4096),
        ),
        Product("head", 4096, 151936),
    ),
    "qwen2.5-7b": Model(
        28,
        (
            Product("qkv", 3584, 4608),
            Product("o", 3584, 3584),
            Product("gate-up", 3584, 37888, swiglu=True),
            Product("down", 18944, 3584),
        ),
        Product("head", 3584, 152064),
    ),
}

Call = Callable[[Product, Any, Any], Any]


def providers() -> dict[str, Call]:
    """Return each provider's function that multiplies x with a weight and applies the activation."""
    import torch.nn.functional as F

    import qwen_plugins
    from qwen_plugins.activation import swiglu

    def ours(product: Product, x: Any, weight: Any) -> Any:
        return qwen_plugins.gemm(x, weight, activation="swiglu" if product.swiglu else None, constant_weight=True)

    def cublas(product: Product, x: Any, weight: Any) -> Any:
        z = F.linear(x, weight)
        return swiglu(z) if product.swiglu else z

    return {OURS: ours, CUBLAS: cublas}


def time_product(product: Product, rows: int, calls: dict[str, Call], memory: Any) -> dict[str, float]:
    """Return the microseconds of one GEMM among many that rotate over the weights in `memory`, by provider."""
    import torch

    copies = max(2, int(ROTATED_BYTES / (2 * product.elements)))
    weights = [
        memory[i * product.elements :][: product.elements].view(product.out_features, product.in_features)
        for i in range(copies)
    ]
    count = max(16, copies)
    x = torch.randn(rows, product.in_features, dtype=memory.dtype, device="cuda")

    def recording(call: Call) -> Callable[[], None]:
        def record() -> None:
            for i in range(count):
                call(product, x, weights[i % copies])

        return record

    times = time_calls({provider: recording(call) for provider, call in calls.items()})
    return {provider: round(time / count, 3) for provider, time in times.items()}


def time_step(model: Model, rows: int, calls: dict[str, Call], memory: Any) -> dict[str, float]:
    """Return the microseconds of a decode step's GEMMs and RMSNorms, by provider of the GEMMs."""
    import torch

    import qwen_plugins

    hidden_size = model.head.in_features
    x = torch.randn(rows, hidden_size, dtype=memory.dtype, device="cuda")
    norm_weight = torch.ones(hidden_size, dtype=memory.dtype, device="cuda")

    def record(call: Call) -> None:
        position = 0

        def multiply(product: Product, operand: Any) -> Any:
            nonlocal position
            weight = memory[position:][: product.elements].view(product.out_features, product.in_features)
            position += product.elements
            return call(product, operand, weight)

        h, residual = x, x.clone()
        qkv, o, gate_up, down = model.products
        for _ in range(model.layers):
            h, residual = qwen_plugins.rms_norm(h, norm_weight, residual=residual)
            h = multiply(o, multiply(qkv, h)[:, : o.in_features])
            h, residual = qwen_plugins.rms_norm(h, norm_weight, residual=residual)
            h = multiply(down, multiply(gate_up, h))
        h, residual = qwen_plugins.rms_norm(h, norm_weight, residual=residual)
        multiply(model.head, h)

    times = time_calls({provider: partial(record, call) for provider, call in calls.items()})
    return {provider: round(time, 1) for provider, time in times.items()}


def measure(models: list[str], rows: list[int], step_rows: list[int], dtype_name: str) -> dict[str, Any]:
    """Return one record for each product or step and number of rows, with the time of each provider."""
    import torch

    import qwen_plugins

    dtype = getattr(torch, dtype_name)
    products, steps = [], []
    calls = providers()
    for name in models:
        model = MODELS[name]
        memory = torch.empty(max(model.elements, 2 * model.head.elements), dtype=dtype, device="cuda")
        for part in memory.split(1 << 28):
            part.normal_(std=0.02)
        for count in step_rows:
            steps.append({"model": name, "rows": count, **time_step(model, count, calls, memory)})
            print(f"{name}, step of {count} rows: {steps[-1]}", file=sys.stderr, flush=True)
        for count in rows:
            for product in (*model.products, model.head):
                times = time_product(product, count, calls, memory)
                products.append({"model": name, "product": product.name, "rows": count, **times})
            print(f"{name}, {count} rows: done", file=sys.stderr, flush=True)
        del memory
    return {"dtype": dtype_name, "cublas_lt": qwen_plugins.cublas_lt_status(), "products": products, "steps": steps}


def tables(results: dict[str, Any], bandwidth: float) -> str:
    """Return Markdown tables: microseconds, and the floor's share of them where memory decides."""
    lines = []
    for name in dict.fromkeys(record["model"] for record in results["steps"] + results["products"]):
        model = MODELS[name]
        floor = model.floor(bandwidth)
        lines += [
            f"### {name}, {results['dtype']}: decode step, microseconds",
            "",
            f"The floor is {floor:.0f}.",
            "",
            f"| rows | {OURS} | of the floor | {CUBLAS} | of the floor | tokens/s at most |",
            "|---|---|---|---|---|---|",
        ]
        for record in results["steps"]:
            if record["model"] == name:
                ours, cublas = record[OURS], record[CUBLAS]
                tokens = 1e6 * record["rows"] / ours
                lines.append(
                    f"| {record['rows']} | {ours:.0f} | {floor / ours:.1%} | {cublas:.0f} | "
                    f"{floor / cublas:.1%} | {tokens:.0f} |"
                )
        lines += ["", f"### {name}, {results['dtype']}: one by one, microseconds, ours / cuBLAS", ""]
        products = (*model.products, model.head)
        lines += [
            "| rows | " + " | ".join(f"{p.name} {p.in_features}→{p.out_features}" for p in products) + " |",
            "|---" * (len(products) + 1) + "|",
            "| floor | " + " | ".join(f"{p.floor(bandwidth):.1f}" for p in products) + " |",
        ]
        for count in dict.fromkeys(r["rows"] for r in results["products"] if r["model"] == name):
            cells = []
            for product in products:
                record = find(results["products"], name, product.name, count)
                share = f" ({product.floor(bandwidth) / record[OURS]:.0%})" if count <= 16 else ""
                cells.append(f"{record[OURS]:.1f}{share} / {record[CUBLAS]:.1f}")
            lines.append(f"| {count} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def find(records: list[dict[str, Any]], model: str, product: str, rows: int) -> dict[str, Any]:
    return next(r for r in records if (r["model"], r["product"], r["rows"]) == (model, product, rows))


def summary(results: dict[str, Any], noise: float = 0.02) -> str:
    """List the sizes at which cuBLAS is faster by more than repeated measurements differ."""
    behind = [r for r in results["products"] if r[OURS] > r[CUBLAS] * (1 + noise)]
    lines = [f"* slower than cuBLAS by more than {noise:.0%} at {len(behind)} of {len(results['products'])} sizes"]
    lines += [f"  * {r['model']} {r['product']}, {r['rows']} rows: {r[OURS]:.2f}, {r[CUBLAS]:.2f}" for r in behind]
    return "\n".join(lines)


def plot(results: dict[str, Any], bandwidth: float, path: Path, title: str) -> None:
    """Draw the share of the floor over rows, a panel for each product."""
    plt = pyplot()
    names = list(dict.fromkeys(r["model"] for r in results["products"]))
    figure, axes = plt.subplots(len(names), 5, figsize=(20, 4 * len(names)), squeeze=False, sharey=True)
    for line, name in zip(axes, names, strict=True):
        model = MODELS[name]
        for axis, product in zip(line, (*model.products, model.head), strict=True):
            records = [r for r in results["products"] if r["model"] == name and r["product"] == product.name]
            for provider, width in ((CUBLAS, 1.5), (OURS, 3)):
                points = [
                    (r["rows"], 100 * product.floor(bandwidth) / r[provider]) for r in records if r["rows"] <= 256
                ]
                axis.plot(*zip(*points, strict=True), marker="o", linewidth=width, label=provider)
            title = f"{name} {product.name}, {product.in_features}→{product.out_features}"
            finish_panel(axis, title, "rows", f"% of {bandwidth * 1e-12:.2f} TB/s")
            axis.set_ylim(0, 105)
    save_figure(figure, title, path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=list(MODELS), nargs="+", default=list(MODELS))
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--step-rows", type=int, nargs="+", default=STEP_ROWS)
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--output", type=Path, default=RESULTS / "gemm.json")
    parser.add_argument("--report", type=Path, metavar="RESULTS", help="print and draw results instead of measuring")
    parser.add_argument("--picture", type=Path, default=IMAGES / "gemm.png", help="of --report")
    add_bandwidth_argument(parser)
    arguments = parser.parse_args()
    if arguments.report:
        content = json.loads(arguments.report.read_text(encoding="utf-8"))
        results = content["results"]
    else:
        require_gpu()
        results = measure(arguments.models, arguments.rows, arguments.step_rows, arguments.dtype)
        write_results(arguments.output, results)
    bandwidth = 1e12 * arguments.bandwidth
    print(tables(results, bandwidth))
    print(summary(results))
    if arguments.report:
        plot(results, bandwidth, arguments.picture, f"{content['machine']['gpu']}, {results['dtype']}")


if __name__ == "__main__":
    main()
