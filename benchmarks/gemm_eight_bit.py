"""Compare GEMMs of 8-bit x and 8-bit weights with cuBLASLt and CUTLASS on one GPU, and with cuBLAS in 16 bits.

    python -m benchmarks.gemm_eight_bit [--models qwen2.5-7b ...] [--rows 1 64 ...] [--formats fp8 ...]
    python -m benchmarks.gemm_eight_bit --report benchmarks/results/gemm_eight_bit.json

The first measures, prints tables and writes benchmarks/results/gemm_eight_bit.json. The second prints the tables of
such a file as Markdown.

x has a scale for each row, and the weight one for each row, or for blocks of 128 x 128 (`fp8, blocks`). The others are
PyTorch's `_scaled_mm` with a scale for each row, with and without its fast accumulation, `_int_mm`, whose int32 sums
nothing scales, and vLLM's `cutlass_scaled_mm`; those that cannot be imported, or called, are left out. Each figure is
the median over replays of a CUDA graph, of one GEMM among many of the same shape, which rotate over so many weights
that none is still in the L2 cache. Ours is the fastest kernel by `qwen_plugins.tuning`. Gate and up are one GEMM with
SwiGLU, which others run as a kernel of its own, and `_int_mm` without it. The floor is the time to read the codes at
the rate of --bandwidth.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import OURS, RESULTS, add_bandwidth_argument, require_gpu, short, write_results
from benchmarks.gemm import CUBLAS, MODELS, Product
from benchmarks.timing import time_calls

ROWS = [1, 8, 16, 32, 64, 96, 128, 256, 512, 1024, 2048, 4096, 8192]
FORMATS = {"int8": ("int8", 0), "fp8": ("fp8", 0), "fp8, blocks": ("fp8", 128)}
"""Activation and group size by the name of a format."""
ROTATED_BYTES = 3e8
Call = Callable[[], Any]
Calls = list[Call]
"""A call for each of the weights that are rotated."""


def floor(product: Product, bandwidth: float) -> float:
    """Return the microseconds that reading the codes takes, at `bandwidth` bytes per second."""
    return 1e6 * product.elements / bandwidth


def codes(rows: int, columns: int, activation: str) -> Any:
    """Return random codes: float8 is normally distributed, with the largest at about 448."""
    import torch

    if activation == "int8":
        return torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device="cuda")
    return (torch.randn(rows, columns, device="cuda") * 100).clamp(-448, 448).to(torch.float8_e4m3fn)


def ours(product: Product, weight_format: str, rows: int, copies: int) -> tuple[Calls, str]:
    """Return calls of the fastest of our kernels, and its name."""
    import torch

    from qwen_plugins import launch, quantized, tuning

    activation, group_size = FORMATS[weight_format]
    stored = quantized.WeightFormat(8, group_size, scale_dtype="float32", activation=activation)
    swiglu = "swiglu" if product.swiglu else None
    n, k = product.out_features, product.in_features
    times = tuning.measure(rows=rows, in_features=k, out_features=n, activation=swiglu, weight_format=stored)
    fastest = min(times, key=lambda name: times[name])
    x, x_scales = codes(rows, k, activation), torch.rand(rows, 1, device="cuda") / 100

    def make() -> Call:
        weight = codes(n, k, activation)
        scales = torch.rand((-(-n // 128), -(-k // 128)) if group_size else (n, 1), device="cuda") / 100
        layer = launch.LinearLayer(
            weight=weight.data_ptr(),
            scales=scales.data_ptr(),
            bias=0,
            weight_format=stored.for_launch(),
            in_features=k,
            out_features=n,
            activation=launch.Activation.__members__[swiglu or "none"],
            dtype=launch.DataType.float16,
            constant_weight=True,
            kernels=[(2**29, fastest)],
        )
        workspace = torch.empty(max(layer.workspace_bytes(rows), 1), dtype=torch.uint8, device="cuda")
        y = torch.empty(rows, layer.columns, dtype=torch.float16, device="cuda")

        def call(kept: tuple[Any, ...] = (weight, scales)) -> Any:
            launch.gemm(
                layer,
                x=x.data_ptr(),
                x_row_stride=k,
                y=y.data_ptr(),
                rows=rows,
                workspace=workspace.data_ptr(),
                stream=torch.cuda.current_stream().cuda_stream,
                x_scales=x_scales.data_ptr(),
            )
            return y

        return call

    return [make() for _ in range(copies)], fastest


def with_swiglu(product: Product, call: Call) -> Call:
    """Return the call with our SwiGLU kernel behind it, where the product has one."""
    from qwen_plugins.activation import swiglu

    return (lambda: swiglu(call())) if product.swiglu else call


def cublas(product: Product, weight_format: str, rows: int, copies: int) -> Calls:
    """Return calls of cuBLAS on 16-bit x and weights; two copies, since a weight has twice the bytes."""
    import torch
    import torch.nn.functional as F

    x = torch.randn(rows, product.in_features, dtype=torch.float16, device="cuda")

    def make() -> Call:
        weight = torch.randn(product.out_features, product.in_features, dtype=torch.float16, device="cuda") / 50
        return with_swiglu(product, lambda: F.linear(x, weight))

    return [make() for _ in range(max(2, copies // 2))]


def scaled_operands(product: Product, weight_format: str, rows: int) -> Callable[[], tuple[Any, Any, Any, Any]]:
    """Return what makes x, a weight [in_features, out_features] in columns, and the scales of both."""
    import torch

    activation, group_size = FORMATS[weight_format]
    if group_size:
        raise NotImplementedError("weights in blocks")
    n, k = product.out_features, product.in_features
    x, x_scales = codes(rows, k, activation), torch.rand(rows, 1, device="cuda") / 100
    return lambda: (x, codes(n, k, activation).t(), x_scales, torch.rand(1, n, device="cuda") / 100)


def scaled_mm(fast: bool) -> Callable[[Product, str, int, int], Calls]:
    """Return the provider of PyTorch's `_scaled_mm`; scales for each row give bfloat16."""
    import torch

    def provider(product: Product, weight_format: str, rows: int, copies: int) -> Calls:
        operands = scaled_operands(product, weight_format, rows)

        def make() -> Call:
            x, weight, x_scales, scales = operands()

            def call() -> Any:
                return torch._scaled_mm(
                    x, weight, scale_a=x_scales, scale_b=scales, out_dtype=torch.bfloat16, use_fast_accum=fast
                )

            return with_swiglu(product, call)

        return [make() for _ in range(copies)]

    return provider


def int_mm(product: Product, weight_format: str, rows: int, copies: int) -> Calls:
    """Return calls of PyTorch's `_int_mm`, to int32: cuBLASLt's."""
    import torch

    operands = scaled_operands(product, weight_format, rows)

    def make() -> Call:
        x, weight, _, _ = operands()
        return lambda: torch._int_mm(x, weight)

    return [make() for _ in range(copies)]


def cutlass(product: Product, weight_format: str, rows: int, copies: int) -> Calls:
    """Return calls of vLLM's CUTLASS kernels."""
    import torch
    from vllm import _custom_ops as ops

    operands = scaled_operands(product, weight_format, rows)

    def make() -> Call:
        x, weight, x_scales, scales = operands()
        scales = scales.t().contiguous()
        return with_swiglu(
            product,
            lambda: ops.cutlass_scaled_mm(x, weight, scale_a=x_scales, scale_b=scales, out_dtype=torch.float16),
        )

    return [make() for _ in range(copies)]


def peers(weight_format: str) -> dict[str, Callable[[Product, str, int, int], Calls]]:
    """Return the other providers of a format by their names."""
    found: dict[str, Callable[[Product, str, int, int], Calls]] = {CUBLAS: cublas}
    activation, group_size = FORMATS[weight_format]
    if not group_size:
        if activation == "fp8":
            found |= {"_scaled_mm": scaled_mm(fast=False), "_scaled_mm, fast": scaled_mm(fast=True)}
        else:
            found["_int_mm"] = int_mm
        found["vLLM CUTLASS"] = cutlass
    return found


def measure_product(product: Product, weight_format: str, rows: int, failed: set[str]) -> dict[str, Any]:
    """Return the microseconds of each provider that works, and our kernel; imports that fail are added to `failed`."""
    import torch

    copies = max(2, int(ROTATED_BYTES / product.elements) + 1)
    calls, kernel = ours(product, weight_format, rows, copies)
    found = {OURS: calls}
    for name, make in peers(weight_format).items():
        if name in failed:
            continue
        try:
            found[name] = make(product, weight_format, rows, copies)
            found[name][0]()
            torch.cuda.synchronize()
        except Exception as error:  # imports and calls of other versions fail in many ways
            found.pop(name, None)
            if isinstance(error, ImportError):
                failed.add(name)
            print(f"without {name}, {rows} rows: {type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
    count = max(8, copies)

    def recording(rotated: Calls) -> Call:
        def record() -> None:
            for i in range(count):
                rotated[i % len(rotated)]()

        return record

    times = time_calls({name: recording(rotated) for name, rotated in found.items()})
    return {"kernel": kernel, **{name: round(time / count, 3) for name, time in times.items()}}


def measure(models: list[str], formats: list[str], rows: list[int], output: Path) -> list[dict[str, Any]]:
    """Return one record for each product, format and number of rows; `output` has them after each product."""
    import torch

    records = []
    failed: set[str] = set()
    for name in models:
        for product in MODELS[name].products:
            for weight_format in formats:
                for count in rows:
                    what = {"model": name, "product": product.name, "format": weight_format, "rows": count}
                    records.append({**what, **measure_product(product, weight_format, count, failed)})
                    torch.cuda.empty_cache()
            write_results(output, records)
            print(f"{name} {product.name}: done", file=sys.stderr, flush=True)
    return records


def product_of(record: dict[str, Any]) -> Product:
    """Return the product of a record."""
    products = MODELS[record["model"]].products
    return next(product for product in products if product.name == record["product"])


def tables(records: list[dict[str, Any]], bandwidth: float) -> str:
    """Return a Markdown table for each format: microseconds; ours in TFLOP/s, over the floor's speed, over cuBLAS's."""
    lines = []
    for weight_format in dict.fromkeys(record["format"] for record in records):
        chosen = [record for record in records if record["format"] == weight_format]
        names = [OURS, *(name for name in peers_of(chosen) if name != OURS)]
        columns = ["layer", "rows", "floor", *names, "TFLOP/s", "of the floor", f"{CUBLAS} / ours", "kernel of ours"]
        lines += [f"### {weight_format}, microseconds", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for record in chosen:
            product = product_of(record)
            own = record[OURS]
            size = f"{record['model']} {product.name}, {product.in_features}→{product.out_features}"
            times = " | ".join(short(record.get(name)) for name in names)
            share = f"{floor(product, bandwidth) / own:.0%}" if record["rows"] <= 64 else "–"
            speed = f"{2e-6 * record['rows'] * product.elements / own:.0f}" if record["rows"] > 64 else "–"
            gain = f"{record[CUBLAS] / own:.2f}" if CUBLAS in record else "–"
            least = short(floor(product, bandwidth))
            lines.append(
                f"| {size} | {record['rows']} | {least} | {times} | {speed} | {share} | {gain} | `{record['kernel']}` |"
            )
        lines.append("")
    return "\n".join(lines)


def peers_of(records: list[dict[str, Any]]) -> list[str]:
    """Return the names of all providers in records."""
    keys = dict.fromkeys(key for record in records for key in record)
    return [key for key in keys if key not in ("model", "product", "format", "rows", "kernel")]


def summary(records: list[dict[str, Any]], noise: float = 0.02) -> str:
    """List the GEMMs at which another is faster by more than repeated measurements differ."""
    behind = [
        (record, name)
        for record in records
        for name in peers_of([record])
        if name != OURS and record[OURS] > record[name] * (1 + noise)
    ]
    lines = [f"* slower than another by more than {noise:.0%} in {len(behind)} comparisons"]
    lines += [
        f"  * {r['model']} {r['product']}, {r['format']}, {r['rows']} rows: {r[OURS]:.2f}, {name} {r[name]:.2f}"
        for r, name in behind
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=list(MODELS), nargs="+", default=list(MODELS))
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--formats", choices=list(FORMATS), nargs="+", default=list(FORMATS))
    parser.add_argument("--output", type=Path, default=RESULTS / "gemm_eight_bit.json")
    parser.add_argument("--report", type=Path, metavar="RESULTS", help="print results instead of measuring")
    add_bandwidth_argument(parser)
    arguments = parser.parse_args()
    if arguments.report:
        records = json.loads(arguments.report.read_text(encoding="utf-8"))["results"]
    else:
        require_gpu()
        records = measure(arguments.models, arguments.formats, arguments.rows, arguments.output)
    print(tables(records, 1e12 * arguments.bandwidth), summary(records), sep="\n")


if __name__ == "__main__":
    main()
