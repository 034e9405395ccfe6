"""Compare GEMMs of int4 and int8 weights with cuBLAS in 16 bits and with Marlin, Machete and humming, on one GPU.

    python -m benchmarks.gemm_quantized [--models qwen2.5-7b ...] [--rows 1 8 ...] [--formats int4 ...]
    python -m benchmarks.gemm_quantized --report benchmarks/results/gemm_quantized.json

The first measures, prints tables and writes benchmarks/results/gemm_quantized.json. The second prints the tables of
such a file as Markdown and draws the plot into docs/images. Marlin and Machete are those of an installed vLLM, humming
that of `humming-kernels`; those that cannot be imported, or called, are left out.

Each figure is the median over replays of a CUDA graph, of one GEMM among many of the same shape, which rotate over so
many weights that none is still in the L2 cache. Ours is the fastest kernel by `qwen_plugins.tuning`. Gate and up are
one GEMM with SwiGLU, which others run as a kernel of its own. The floor is the time to read codes and scales at the
rate of --bandwidth.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Callable
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
from benchmarks.gemm import CUBLAS, MODELS, Product
from benchmarks.timing import time_calls

ROWS = [1, 4, 8, 16, 32, 64, 128, 256, 1024, 2048, 4096]
FORMATS = {"int4": (4, 128), "int8": (8, 128), "int8, by channel": (8, 0)}
"""Bits and group size by the name of a format."""
PEERS = ("Marlin", "Machete", "humming")
ROTATED_BYTES = 3e8
Calls = list[Callable[[Any], Any]]
"""A call for each of the weights that are rotated: from x to y."""


def floor(product: Product, weight_format: str, bandwidth: float) -> float:
    """Return the microseconds that reading codes and scales takes, at `bandwidth` bytes per second."""
    bits, group_size = FORMATS[weight_format]
    scales = product.elements / (group_size or product.in_features)
    return 1e6 * (product.elements * bits / 8 + 2 * scales) / bandwidth


def ours(product: Product, bits: int, group_size: int, rows: int, copies: int) -> tuple[Calls, str]:
    """Return calls of the fastest of our kernels, and its name."""
    import torch

    from qwen_plugins import launch, quantized, tuning

    weight_format = quantized.WeightFormat(bits, group_size)
    activation = "swiglu" if product.swiglu else None
    times = tuning.measure(
        rows=rows,
        in_features=product.in_features,
        out_features=product.out_features,
        activation=activation,
        weight_format=weight_format,
    )
    fastest = min(times, key=lambda name: times[name])

    def make() -> Callable[[Any], Any]:
        words = product.elements * bits // 32
        codes = torch.randint(-(2**31), 2**31 - 1, (words,), dtype=torch.int32, device="cuda")
        groups = product.in_features // group_size if group_size else 1
        scales = torch.rand(groups, product.out_features, dtype=torch.float16, device="cuda") / 500
        layer = launch.LinearLayer(
            weight=codes.data_ptr(),
            scales=scales.data_ptr(),
            bias=0,
            weight_format=weight_format.for_launch(),
            in_features=product.in_features,
            out_features=product.out_features,
            activation=launch.Activation.__members__[activation or "none"],
            dtype=launch.DataType.float16,
            constant_weight=True,
            kernels=[(2**29, fastest)],
        )
        workspace = torch.empty(max(layer.workspace_bytes(rows), 1), dtype=torch.uint8, device="cuda")
        y = torch.empty(rows, layer.columns, dtype=torch.float16, device="cuda")

        def call(x: Any, kept: tuple[Any, ...] = (codes, scales)) -> Any:
            launch.gemm(
                layer,
                x=x.data_ptr(),
                x_row_stride=x.stride(0),
                y=y.data_ptr(),
                rows=rows,
                workspace=workspace.data_ptr(),
                stream=torch.cuda.current_stream().cuda_stream,
            )
            return y

        return call

    return [make() for _ in range(copies)], fastest


def with_swiglu(product: Product, call: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return the call with our SwiGLU kernel behind it, where the product has one."""
    from qwen_plugins.activation import swiglu

    return (lambda x: swiglu(call(x))) if product.swiglu else call


def cublas(product: Product, bits: int, group_size: int, rows: int, copies: int) -> Calls:
    """Return calls of cuBLAS on 16-bit weights."""
    import torch
    import torch.nn.functional as F

    def make() -> Callable[[Any], Any]:
        weight = torch.randn(product.out_features, product.in_features, dtype=torch.float16, device="cuda") / 50
        return with_swiglu(product, lambda x: F.linear(x, weight))

    return [make() for _ in range(copies)]


def by_names(function: Callable[..., Any], **known: Any) -> Any:
    """Call a function with those arguments that it has: vLLM's differ from version to version."""
    return function(**{name: known[name] for name in inspect.signature(function).parameters if name in known})


def marlin(product: Product, bits: int, group_size: int, rows: int, copies: int) -> Calls:
    """Return calls of vLLM's Marlin."""
    import torch
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_make_workspace_new
    from vllm.scalar_type import scalar_types

    function = getattr(ops, "gptq_marlin_gemm", None) or ops.marlin_gemm
    n, k = product.out_features, product.in_features
    kind = scalar_types.uint4b8 if bits == 4 else scalar_types.uint8b128
    workspace = marlin_make_workspace_new(torch.device("cuda"))
    empty = torch.empty(0, dtype=torch.int32, device="cuda")

    def make() -> Callable[[Any], Any]:
        weight = torch.randint(-(2**31), 2**31 - 1, (k // 16, n * bits // 2), dtype=torch.int32, device="cuda")
        scales = torch.rand(k // group_size if group_size else 1, n, dtype=torch.float16, device="cuda") / 500

        def call(x: Any) -> Any:
            return by_names(
                function,
                a=x,
                c=None,
                b_q_weight=weight,
                b_bias=None,
                b_scales=scales,
                a_scales=None,
                global_scale=None,
                b_zeros=empty,
                g_idx=empty,
                perm=empty,
                workspace=workspace,
                b_q_type=kind,
                size_m=x.shape[0],
                size_n=n,
                size_k=k,
                is_k_full=True,
                use_atomic_add=False,
                use_fp32_reduce=True,
                is_zp_float=False,
            )

        return with_swiglu(product, call)

    return [make() for _ in range(copies)]


def machete(product: Product, bits: int, group_size: int, rows: int, copies: int) -> Calls:
    """Return calls of vLLM's Machete."""
    import torch
    from vllm import _custom_ops as ops
    from vllm.scalar_type import scalar_types

    n, k = product.out_features, product.in_features
    kind = scalar_types.uint4b8 if bits == 4 else scalar_types.uint8b128

    def make() -> Callable[[Any], Any]:
        weight = torch.randint(-(2**31), 2**31 - 1, (k * bits // 32, n), dtype=torch.int32, device="cuda")
        packed = by_names(
            ops.machete_prepack_B,
            b_q_weight=weight.t().contiguous().t(),
            a_type=torch.float16,
            b_type=kind,
            group_scales_type=torch.float16,
        )
        scales = torch.rand(k // group_size if group_size else 1, n, dtype=torch.float16, device="cuda") / 500

        def call(x: Any) -> Any:
            return by_names(
                ops.machete_mm,
                a=x,
                b_q=packed,
                b_type=kind,
                out_type=torch.float16,
                b_group_scales=scales,
                b_group_size=group_size or k,
            )

        return with_swiglu(product, call)

    return [make() for _ in range(copies)]


def humming(product: Product, bits: int, group_size: int, rows: int, copies: int) -> Calls:
    """Return calls of humming."""
    import torch
    from humming.layer import HummingLayer

    def make() -> Callable[[Any], Any]:
        layer = HummingLayer(
            shape_n=product.out_features,
            shape_k=product.in_features,
            weight_config={"dtype": f"int{bits}", "group_size": group_size},
            torch_dtype=torch.float16,
        ).cuda()
        weight = torch.randn(product.out_features, product.in_features, dtype=torch.float16, device="cuda") / 50
        layer.load_from_unquantized(weight)
        layer.transform()
        return with_swiglu(product, layer)

    return [make() for _ in range(copies)]


def measure_product(product: Product, weight_format: str, rows: int, failed: set[str]) -> dict[str, Any]:
    """Return the microseconds of each provider that works, and our kernel; those that do not are added to `failed`."""
    import torch

    bits, group_size = FORMATS[weight_format]
    copies = max(2, int(ROTATED_BYTES / (product.elements * bits / 8)) + 1)
    calls, kernel = ours(product, bits, group_size, rows, copies)
    found = {OURS: calls}
    for name, make in {CUBLAS: cublas, "Marlin": marlin, "Machete": machete, "humming": humming}.items():
        if name in failed:
            continue
        try:
            # The same weights a few times are enough where one does not fit into the L2 cache.
            found[name] = make(product, bits, group_size, rows, 2 if name == CUBLAS else copies)
            found[name][0](torch.zeros(rows, product.in_features, dtype=torch.float16, device="cuda"))
            torch.cuda.synchronize()
        except Exception as error:  # imports and calls of other versions fail in many ways
            found.pop(name, None)
            failed.add(name)
            print(f"without {name}: {type(error).__name__}: {error}", file=sys.stderr)
    x = torch.randn(rows, product.in_features, dtype=torch.float16, device="cuda")
    count = max(16, copies)

    def recording(rotated: Calls) -> Callable[[], None]:
        def record() -> None:
            for i in range(count):
                rotated[i % len(rotated)](x)

        return record

    times = time_calls({name: recording(rotated) for name, rotated in found.items()})
    return {"kernel": kernel, **{name: round(time / count, 3) for name, time in times.items()}}


def measure(models: list[str], formats: list[str], rows: list[int], output: Path) -> list[dict[str, Any]]:
    """Return one record for each product, format and number of rows; `output` has them after each product."""
    import torch

    records = []
    failed: dict[str, set[str]] = {weight_format: set() for weight_format in formats}
    for name in models:
        for product in (*MODELS[name].products, MODELS[name].head):
            for weight_format in formats:
                for count in rows:
                    what = {"model": name, "product": product.name, "format": weight_format, "rows": count}
                    records.append({**what, **measure_product(product, weight_format, count, failed[weight_format])})
                    torch.cuda.empty_cache()
            write_results(output, records)
            print(f"{name} {product.name}: done", file=sys.stderr, flush=True)
    return records


def product_of(record: dict[str, Any]) -> Product:
    """Return the product of a record."""
    model = MODELS[record["model"]]
    return next(product for product in (*model.products, model.head) if product.name == record["product"])


def tables(records: list[dict[str, Any]], bandwidth: float) -> str:
    """Return a Markdown table for each format: microseconds, and the floor's share where memory decides."""
    lines = []
    for weight_format in dict.fromkeys(record["format"] for record in records):
        chosen = [record for record in records if record["format"] == weight_format]
        names = [name for name in (OURS, CUBLAS, *PEERS) if any(name in record for record in chosen)]
        lines += [
            f"### {weight_format}, microseconds",
            "",
            "| layer | rows | floor | " + " | ".join(names) + " | of the floor | kernel of ours |",
            "|---" * (len(names) + 5) + "|",
        ]
        for record in chosen:
            product = product_of(record)
            least = floor(product, weight_format, bandwidth)
            size = f"{record['model']} {product.name}, {product.in_features}→{product.out_features}"
            times = " | ".join(short(record.get(name)) for name in names)
            share = f"{least / record[OURS]:.0%}" if record["rows"] <= 64 else "–"
            lines.append(f"| {size} | {record['rows']} | {short(least)} | {times} | {share} | `{record['kernel']}` |")
        lines.append("")
    return "\n".join(lines)


def summary(records: list[dict[str, Any]], noise: float = 0.02) -> str:
    """List the GEMMs at which another is faster by more than repeated measurements differ."""
    others = (CUBLAS, *PEERS)
    behind = [
        (record, name)
        for record in records
        for name in others
        if name in record and record[OURS] > record[name] * (1 + noise)
    ]
    lines = [f"* slower than another by more than {noise:.0%} in {len(behind)} comparisons"]
    lines += [
        f"  * {r['model']} {r['product']}, {r['format']}, {r['rows']} rows: {r[OURS]:.2f}, {name} {r[name]:.2f}"
        for r, name in behind
    ]
    return "\n".join(lines)


def plot(records: list[dict[str, Any]], bandwidth: float, path: Path, title: str) -> None:
    """Draw the share of the floor's speed over rows, a panel for each format and provider."""
    plt = pyplot()
    formats = list(dict.fromkeys(record["format"] for record in records))
    names = [name for name in (OURS, *PEERS) if any(name in record for record in records)]
    figure, axes = plt.subplots(
        len(formats), len(names), figsize=(5 * len(names), 4 * len(formats)), squeeze=False, sharey=True
    )
    for line, weight_format in zip(axes, formats, strict=True):
        for axis, name in zip(line, names, strict=True):
            layers = dict.fromkeys((r["model"], r["product"]) for r in records)
            for model, layer in layers:
                points = [
                    (r["rows"], 100 * floor(product_of(r), weight_format, bandwidth) / r[name])
                    for r in records
                    if (r["model"], r["product"], r["format"]) == (model, layer, weight_format) and name in r
                ]
                points = [point for point in points if point[0] <= 64]
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o", label=f"{model} {layer}")
            finish_panel(axis, f"{name}, {weight_format}", "rows", f"% of {bandwidth * 1e-12:.2f} TB/s")
            axis.set_ylim(0, 105)
    save_figure(figure, title, path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=list(MODELS), nargs="+", default=list(MODELS))
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--formats", choices=list(FORMATS), nargs="+", default=list(FORMATS))
    parser.add_argument("--output", type=Path, default=RESULTS / "gemm_quantized.json")
    parser.add_argument("--report", type=Path, metavar="RESULTS", help="print and draw results instead of measuring")
    parser.add_argument("--picture", type=Path, default=IMAGES / "gemm_quantized.png", help="of --report")
    add_bandwidth_argument(parser)
    arguments = parser.parse_args()
    bandwidth = 1e12 * arguments.bandwidth
    if arguments.report:
        content = json.loads(arguments.report.read_text(encoding="utf-8"))
        records = content["results"]
    else:
        require_gpu()
        records = measure(arguments.models, arguments.formats, arguments.rows, arguments.output)
    print(tables(records, bandwidth), summary(records), sep="\n")
    if arguments.report:
        plot(records, bandwidth, arguments.picture, content["machine"]["gpu"])


if __name__ == "__main__":
    main()
