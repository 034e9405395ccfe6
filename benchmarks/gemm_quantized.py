"""Compare GEMMs of int4 and int8 weights with 16-bit ones, and with Marlin, Machete and humming, on one GPU.

    python -m benchmarks.gemm_quantized [--models qwen2.5-7b ...] [--rows 1 8 ...] [--formats int4 ...] [--peers ...]
    python -m benchmarks.gemm_quantized --report benchmarks/results/gemm_quantized.json

The first measures, prints tables and writes benchmarks/results/gemm_quantized.json, after each layer and format, for
which it prints the seconds of each phase. The second prints the tables of such a file as Markdown and draws the plot
into docs/images. Marlin and Machete are those of an installed vLLM (0.22), humming that of `humming-kernels` (0.1.19,
with `cuda-bindings`); those that cannot be imported, or called, are left out. `--peers` without a name leaves out all.

Activations are float16, but bfloat16 for Marlin: vLLM's wheel has machine code of its float16 kernels for compute
capability 8.0 alone, so that an H100's driver would compile those of a format at the first call; of its bfloat16
kernels it has machine code for 9.0 too.

Each figure is the median over replays of a CUDA graph, of one GEMM among many of the same shape, which rotate over so
many weights that none is still in the L2 cache. Ours, with quantized weights and with 16-bit ones, are the fastest
kernels by `qwen_plugins.tuning`. Gate and up are one GEMM with SwiGLU, which others run as a kernel of its own. The
output projection is measured up to 64 rows: one for each sequence. The floor is the time to read codes and scales at
the rate of --bandwidth.

Up to 64 rows come first, without humming, then humming for up to 64 rows, then more rows without it. It compiles a
kernel for each layer, format and tile of rows, which takes seconds for each: with NVRTC or, if the environment says
HUMMING_COMPILER=nvcc, with the nvcc of /usr/local/cuda or CUDA_HOME. A process of low priority
(`--compile-humming-kernels`) does that meanwhile, and leaves them in humming's cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
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

STEP_ROWS = [1, 4, 8, 16, 32, 64]
PROMPT_ROWS = [128, 512, 1024, 2048, 4096, 8192]
MAX_STEP_ROWS = 64
FORMATS = {"int4": (4, 128), "int8": (8, 128), "int8, by channel": (8, 0)}
"""Bits and group size by the name of a format."""
OURS_16_BIT = "16 bit, ours"
HUMMING_SECONDS = 120.0
"""How long humming's kernels are waited for, once all else up to 64 rows is measured."""
SPARE_CORES = 4
"""Cores on which humming's kernels are not compiled."""
ROTATED_BYTES = 1.6e8
"""Weights that are rotated have these bytes together, at least: three times the L2 cache of an H100."""
Calls = list[Callable[[Any], Any]]
"""A call for each of the weights that are rotated: from x to y."""


def packed_bytes(product: Product, weight_format: str) -> float:
    """Return the bytes of codes and scales."""
    bits, group_size = FORMATS[weight_format]
    scales = product.elements / (group_size or product.in_features)
    return product.elements * bits / 8 + 2 * scales


def floor(product: Product, weight_format: str, bandwidth: float) -> float:
    """Return the microseconds that reading codes and scales takes, at `bandwidth` bytes per second."""
    return 1e6 * packed_bytes(product, weight_format) / bandwidth


def copies_of(product: Product, bits: int) -> int:
    """Return how many weights are rotated."""
    return max(2, int(ROTATED_BYTES / (product.elements * bits / 8)) + 1)


@cache
def fastest_kernel(product: Product, weight_format: str | None, rows: int) -> str:
    """Return the name of the fastest of our kernels; without a format, of 16-bit weights."""
    from qwen_plugins import quantized, tuning

    times = tuning.measure(
        rows=rows,
        in_features=product.in_features,
        out_features=product.out_features,
        activation="swiglu" if product.swiglu else None,
        weight_format=quantized.WeightFormat(*FORMATS[weight_format]) if weight_format else None,
    )
    return min(times, key=lambda name: times[name])


def ours(product: Product, weight_format: str | None, rows: tuple[int, ...]) -> Calls:
    """Return calls of the fastest of our kernels for each number of rows; without a format, of 16-bit weights."""
    import torch

    from qwen_plugins import launch, quantized

    bits, group_size = FORMATS[weight_format] if weight_format else (16, 0)
    stored = quantized.WeightFormat(bits, group_size)
    activation = "swiglu" if product.swiglu else "none"
    kernels = [(count, fastest_kernel(product, weight_format, count)) for count in sorted(rows)]
    workspaces: list[Any] = []

    def make() -> Callable[[Any], Any]:
        if weight_format:
            weight = random_words(product.elements * bits // 32)
            scales = random_scales(product, group_size)
        else:
            weight, scales = random_weight(product), None
        layer = launch.LinearLayer(
            weight=weight.data_ptr(),
            scales=scales.data_ptr() if scales is not None else 0,
            bias=0,
            weight_format=stored.for_launch(),
            in_features=product.in_features,
            out_features=product.out_features,
            activation=launch.Activation.__members__[activation],
            dtype=launch.DataType.float16,
            constant_weight=True,
            kernels=kernels,
        )
        if not workspaces:
            size = max(layer.workspace_bytes(max(rows)), 1)
            workspaces.append(torch.empty(size, dtype=torch.uint8, device="cuda"))

        def call(x: Any, kept: tuple[Any, ...] = (weight, scales)) -> Any:
            y = torch.empty(x.shape[0], layer.columns, dtype=torch.float16, device="cuda")
            launch.gemm(
                layer,
                x=x.data_ptr(),
                x_row_stride=x.stride(0),
                y=y.data_ptr(),
                rows=x.shape[0],
                workspace=workspaces[0].data_ptr(),
                stream=torch.cuda.current_stream().cuda_stream,
            )
            return y

        return call

    return [make() for _ in range(copies_of(product, bits))]


def random_weight(product: Product) -> Any:
    """Return a 16-bit weight."""
    import torch

    weight = torch.empty(product.out_features, product.in_features, dtype=torch.float16, device="cuda")
    return weight.normal_(std=0.02)


def random_words(*shape: int) -> Any:
    """Return codes, whatever they are: int32 words of random bits."""
    import torch

    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device="cuda")


def random_scales(product: Product, group_size: int) -> Any:
    """Return a scale for each group and weight row, [groups, out_features]."""
    import torch

    groups = product.in_features // group_size if group_size else 1
    return torch.rand(groups, product.out_features, dtype=torch.float16, device="cuda") / 500


def with_swiglu(product: Product, call: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return the call with our SwiGLU kernel behind it, where the product has one."""
    from qwen_plugins.activation import swiglu

    return (lambda x: swiglu(call(x))) if product.swiglu else call


def ours_16_bit(product: Product, weight_format: str, rows: tuple[int, ...]) -> Calls:
    """Return calls of the fastest of our kernels of 16-bit weights."""
    return ours(product, None, rows)


def cublas(product: Product, weight_format: str, rows: tuple[int, ...]) -> Calls:
    """Return calls of cuBLAS on 16-bit weights."""
    import torch.nn.functional as F

    def make() -> Callable[[Any], Any]:
        weight = random_weight(product)
        return with_swiglu(product, lambda x: F.linear(x, weight))

    return [make() for _ in range(copies_of(product, 16))]


def marlin(product: Product, weight_format: str, rows: tuple[int, ...]) -> Calls:
    """Return calls of vLLM's Marlin for bfloat16 x, as its `MarlinLinearKernel` makes them."""
    import torch
    from vllm import _custom_ops as ops
    from vllm.scalar_type import scalar_types

    bits, group_size = FORMATS[weight_format]
    n, k = product.out_features, product.in_features
    kind = scalar_types.uint4b8 if bits == 4 else scalar_types.uint8b128
    multiprocessors = torch.cuda.get_device_properties("cuda").multi_processor_count
    workspace = torch.zeros(multiprocessors, dtype=torch.int32, device="cuda")  # a word for each thread block
    empty = torch.empty(0, dtype=torch.int32, device="cuda")

    def make() -> Callable[[Any], Any]:
        # Tiles of 16 x 16, as `gptq_marlin_repack` writes them; the order of scales does not change the time.
        weight = random_words(k // 16, n * bits // 2)
        scales = random_scales(product, group_size).bfloat16()

        def call(x: Any) -> Any:
            return ops.marlin_gemm(
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
                use_fp32_reduce=True,
            )

        return with_swiglu(product, call)

    return [make() for _ in range(copies_of(product, bits))]


def machete(product: Product, weight_format: str, rows: tuple[int, ...]) -> Calls:
    """Return calls of vLLM's Machete, as its `MacheteLinearKernel` makes them."""
    import torch
    from vllm import _custom_ops as ops
    from vllm.scalar_type import scalar_types

    bits, group_size = FORMATS[weight_format]
    n, k = product.out_features, product.in_features
    kind = scalar_types.uint4b8 if bits == 4 else scalar_types.uint8b128

    def make() -> Callable[[Any], Any]:
        weight = random_words(n, k * bits // 32).t()  # [k / codes in a word, n], in columns
        packed = ops.machete_prepack_B(weight, a_type=torch.float16, b_type=kind, group_scales_type=torch.float16)
        scales = random_scales(product, group_size)

        def call(x: Any) -> Any:
            return ops.machete_mm(a=x, b_q=packed, b_type=kind, b_group_scales=scales, b_group_size=group_size or -1)

        return with_swiglu(product, call)

    return [make() for _ in range(copies_of(product, bits))]


HUMMING_TILE = 256
"""humming pads out_features to a multiple of the weight rows of a tile."""
HUMMING_LOCKS = 2048
"""Words of memory, zero, with which the blocks of a kernel of humming wait for each other."""


def humming(product: Product, weight_format: str, rows: tuple[int, ...]) -> Calls:
    """Return calls of humming, with the kernel that its heuristics choose for each number of rows.

    The kernels should be in humming's cache; it compiles those that are not.
    """
    import torch
    from humming.kernel.humming import HummingKernel
    from humming.ops import launch_kernel

    bits, group_size = FORMATS[weight_format]
    padded = replace(product, out_features=-(-product.out_features // HUMMING_TILE) * HUMMING_TILE)
    ranges, above = [], 0  # each kernel is for more rows than `above`, up to `count`
    for count, arguments, multiprocessors in humming_kernels(product, weight_format, rows):
        ranges += [above, count, HummingKernel(**arguments).kernel_id, multiprocessors]
        above = count
    configs = torch.tensor(ranges, dtype=torch.int64)

    def make() -> Callable[[Any], Any]:
        # As its `repack_weight` and `transform_humming_weight_scale` write them, but for the order of codes and scales.
        weight = random_words(padded.in_features // 16, padded.out_features * bits // 2)
        scales = random_scales(padded, group_size)
        locks = torch.zeros(HUMMING_LOCKS, dtype=torch.int32, device="cuda")

        def call(x: Any) -> Any:
            return launch_kernel(configs=configs, inputs=x, weight=weight, weight_scale=scales, locks=locks)

        return with_swiglu(product, call)

    return [make() for _ in range(copies_of(product, bits))]


def humming_kernels(
    product: Product, weight_format: str, rows: tuple[int, ...]
) -> list[tuple[int, dict[str, Any], int]]:
    """Return humming's choice of a kernel for each number of rows, in ascending order.

    Each is the number of rows, the arguments of HummingKernel, and on how many multiprocessors it runs (0: on all).
    """
    import torch
    from humming.schema import HummingWeightSchema
    from humming.transform import prepare_layer_config
    from humming.tune import get_heuristics_config

    bits, group_size = FORMATS[weight_format]
    layer = prepare_layer_config(
        shape_n=product.out_features,
        shape_k=product.in_features,
        weight_schema=HummingWeightSchema(b_dtype=f"int{bits}", weight_scale_group_size=group_size),
        pad_n_to_multiple=HUMMING_TILE,
        torch_dtype=torch.float16,
    )
    kernels = []
    for count in sorted(rows):
        tile = dict(get_heuristics_config(layer, count))
        multiprocessors = tile.pop("num_sms", 0)
        kernels.append((count, {**layer.to_dict(), **tile}, multiprocessors))
    return kernels


def compile_humming_kernels(models: list[str], formats: list[str], rows: tuple[int, ...]) -> None:
    """Compile humming's kernels into its cache, at low priority; in a process of its own, which never loads them."""
    os.nice(19)
    from humming.kernel.humming import HummingKernel

    HummingKernel.register_kernel = lambda self: None
    kernels = {
        str(arguments): arguments
        for _, product in layers_of(models)
        for weight_format in formats
        for _, arguments, _ in humming_kernels(product, weight_format, rows)
    }
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) - SPARE_CORES)) as threads:
        for _ in threads.map(lambda arguments: HummingKernel(**arguments), kernels.values()):
            pass


class Compilation:
    """A Compilation is the process that compiles humming's kernels."""

    def __init__(self, options: list[str]) -> None:
        command = [sys.executable, "-m", "benchmarks.gemm_quantized", "--compile-humming-kernels", *options]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def wait(self, seconds: float) -> None:
        """Wait until all kernels are compiled; raise RuntimeError if they are not, or not in so many seconds."""
        try:
            _, errors = self._process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"its kernels were not compiled in {seconds:g} s more") from None
        if status := self._process.returncode:
            raise RuntimeError((errors.strip() or f"exit status {status}").splitlines()[-1])

    def stop(self) -> None:
        """End the process if it still runs; compilers that it has started end by themselves."""
        self._process.terminate()
        self._process.communicate()


Provider = Callable[[Product, str, tuple[int, ...]], Calls]
PEERS: dict[str, Provider] = {
    "Marlin": marlin,
    "Machete": machete,
    "humming": humming,
}
PROVIDERS: dict[str, Provider] = {OURS: ours, OURS_16_BIT: ours_16_bit, CUBLAS: cublas, **PEERS}
OTHERS = tuple(name for name in PROVIDERS if name != OURS)
"""What makes calls for a layer, a format and all numbers of rows, by the name of the provider."""
BFLOAT16 = ("Marlin",)
"""Providers whose x is bfloat16."""


class Stopwatch:
    """A Stopwatch adds up the seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds of what is done inside to those of a phase."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def __str__(self) -> str:
        phases = "; ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items() if seconds >= 0.05)
        return f"{time.perf_counter() - self._started:.1f} s ({phases})"


def measure_layer(
    product: Product, weight_format: str, rows: tuple[int, ...], providers: list[str], watch: Stopwatch
) -> dict[int, dict[str, Any]]:
    """Return the microseconds of each provider that works, and the kernel of ours, by number of rows."""
    import torch

    kernels: dict[int, str] = {}
    if OURS in providers:
        with watch.phase("choosing kernels"):
            kernels = {count: fastest_kernel(product, weight_format, count) for count in rows}
        with watch.phase("choosing 16-bit kernels"):
            for count in rows:
                fastest_kernel(product, None, count)
    found: dict[str, Calls] = {}
    for name in list(providers):
        with watch.phase(f"weights of {name}"), leaving_out(name, providers):
            found[name] = PROVIDERS[name](product, weight_format, rows)
    records = {}
    for count in rows:
        x = random_x(count, product)
        inputs = {name: x.bfloat16() if name in BFLOAT16 else x for name in found}
        for name in list(found):
            calls = found.pop(name)
            with watch.phase(f"first calls of {name}"), leaving_out(name, providers):
                calls[0](inputs[name])
                torch.cuda.synchronize()
                found[name] = calls
        with watch.phase(f"timing {count}"):
            times = time_rotated(found, inputs, count)
        records[count] = {**({"kernel": kernels[count]} if kernels else {}), **times}
    return records


def random_x(rows: int, product: Product) -> Any:
    """Return x, [rows, in_features]."""
    import torch

    return torch.randn(rows, product.in_features, dtype=torch.float16, device="cuda")


def time_rotated(found: dict[str, Calls], inputs: dict[str, Any], rows: int) -> dict[str, float]:
    """Return the microseconds of one call among many in a graph, by provider."""
    # The start of a graph is a small part of its time; where calls are short, each weight has its turn.
    lengths = {
        name: 4 if rows > 512 else max(16, len(calls) * (rows <= MAX_STEP_ROWS)) for name, calls in found.items()
    }

    def recording(name: str) -> Callable[[], None]:
        def record() -> None:
            for i in range(lengths[name]):
                found[name][i % len(found[name])](inputs[name])

        return record

    times = time_calls({name: recording(name) for name in found})
    return {name: round(microseconds / lengths[name], 3) for name, microseconds in times.items()}


@contextmanager
def leaving_out(name: str, providers: list[str]) -> Iterator[None]:
    """Print in one line why a peer is left out: for good if it cannot be imported. Ours and cuBLAS must work."""
    try:
        yield
    except Exception as error:  # imports and calls of other versions fail in many ways
        if name not in PEERS:
            raise
        text = f"without {name}: {type(error).__name__}: {error}".splitlines()[0]
        print(text[:500], file=sys.stderr, flush=True)
        if isinstance(error, ImportError) and name in providers:
            providers.remove(name)


Records = dict[tuple[str, str, str, int], dict[str, Any]]
"""Records by model, product, format and number of rows."""


def layers_of(models: list[str]) -> list[tuple[str, Product]]:
    """Return the products of models, each with the name of its model."""
    return [(name, product) for name in models for product in (*MODELS[name].products, MODELS[name].head)]


def measure(
    models: list[str], formats: list[str], rows: list[int], peers: list[str], output: Path
) -> list[dict[str, Any]]:
    """Return one record for each layer, format and number of rows; `output` has them after each layer and format."""
    steps = tuple(count for count in rows if count <= MAX_STEP_ROWS)
    prompts = tuple(count for count in rows if count > MAX_STEP_ROWS)
    layers = layers_of(models)
    providers = [OURS, OURS_16_BIT, CUBLAS, *(name for name in peers if name != "humming")]
    records: Records = {}
    compilation = None
    if steps and "humming" in peers:
        options = ["--models", *models, "--formats", *formats, "--rows", *map(str, steps)]
        compilation = Compilation(options)
    try:
        measure_layers(layers, formats, steps, providers, records, output)
        humming_alone: list[str] = []
        if compilation:
            started = time.perf_counter()
            with leaving_out("humming", humming_alone):
                compilation.wait(HUMMING_SECONDS)
                humming_alone.append("humming")
            spent = time.perf_counter() - started
            print(f"humming's kernels were waited for: {spent:.1f} s", file=sys.stderr, flush=True)
        measure_layers(layers, formats, steps, humming_alone, records, output)
    finally:
        if compilation:
            compilation.stop()
    without_heads = [(name, product) for name, product in layers if product is not MODELS[name].head]
    measure_layers(without_heads, formats, prompts, providers, records, output)
    return in_order(records)


def measure_layers(
    layers: list[tuple[str, Product]],
    formats: list[str],
    rows: tuple[int, ...],
    providers: list[str],
    records: Records,
    output: Path,
) -> None:
    """Add what providers take to the records, and write them after each layer and format."""
    import torch

    for model, product in layers:
        for weight_format in formats:
            if not rows or not providers:
                return
            watch = Stopwatch()
            for count, found in measure_layer(product, weight_format, rows, providers, watch).items():
                what = {"model": model, "product": product.name, "format": weight_format, "rows": count}
                records.setdefault((model, product.name, weight_format, count), what).update(found)
            write_results(output, in_order(records))
            torch.cuda.empty_cache()
            text = f"{model} {product.name}, {weight_format}, {rows[0]} to {rows[-1]} rows: {watch}"
            print(text, file=sys.stderr, flush=True)


def in_order(records: Records) -> list[dict[str, Any]]:
    """Return records by format, layer and rows."""
    layers = [(name, product.name) for name, product in layers_of(list(MODELS))]
    formats = list(FORMATS)
    return sorted(
        records.values(),
        key=lambda r: (formats.index(r["format"]), layers.index((r["model"], r["product"])), r["rows"]),
    )


def product_of(record: dict[str, Any]) -> Product:
    """Return the product of a record."""
    model = MODELS[record["model"]]
    return next(product for product in (*model.products, model.head) if product.name == record["product"])


def tables(records: list[dict[str, Any]], bandwidth: float) -> str:
    """Return a Markdown table for each format: microseconds, and the floor's share where memory decides."""
    lines = []
    for weight_format in dict.fromkeys(record["format"] for record in records):
        chosen = [record for record in records if record["format"] == weight_format]
        names = [name for name in PROVIDERS if any(name in record for record in chosen)]
        lines += [
            f"### {weight_format}, microseconds",
            "",
            "| layer | rows | floor | " + " | ".join(names) + " | of the floor | kernel of ours |",
            "|---" * (len(names) + 5) + "|",
        ]
        for record in chosen:
            product = product_of(record)
            least = floor(product, weight_format, bandwidth)
            size = label(record)
            times = " | ".join(short(record.get(name)) for name in names)
            share = f"{least / record[OURS]:.0%}" if record["rows"] <= MAX_STEP_ROWS else "–"
            lines.append(f"| {size} | {record['rows']} | {short(least)} | {times} | {share} | `{record['kernel']}` |")
        lines.append("")
    return "\n".join(lines)


def label(record: dict[str, Any]) -> str:
    """Return the name and the sizes of a record's layer."""
    product = product_of(record)
    return f"{record['model']} {product.name}, {product.in_features}→{product.out_features}"


def by_layer(records: list[dict[str, Any]]) -> dict[tuple[str, str], dict[int, dict[str, Any]]]:
    """Return the records of each layer and format by their rows."""
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for record in records:
        found.setdefault((label(record), record["format"]), {})[record["rows"]] = record
    return found


def steps_table(records: list[dict[str, Any]], bandwidth: float) -> str:
    """Return a Markdown table of decoding: the floor's share, 64 rows over 16, and the least lead over each peer."""
    peers = [name for name in PEERS if any(name in record for record in records)]
    counts = [count for count in (1, 4, 8, 16) if any(record["rows"] == count for record in records)]
    heads = ["layer", "weights", "MB", *(f"of the floor: {count}" for count in counts)]
    heads += ["64 rows / 16 rows", *(f"{name} / ours, least (rows)" for name in peers)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for (layer, weight_format), here in by_layer(records).items():
        product = product_of(next(iter(here.values())))
        least = floor(product, weight_format, bandwidth)
        cells = [layer, weight_format, f"{packed_bytes(product, weight_format) / 1e6:.0f}"]
        cells += [f"{least / here[count][OURS]:.0%}" if count in here else "–" for count in counts]
        cells.append(f"{here[64][OURS] / here[16][OURS]:.2f}" if {16, 64} <= here.keys() else "–")
        for name in peers:
            leads = [(r[name] / r[OURS], rows) for rows, r in here.items() if name in r and rows <= MAX_STEP_ROWS]
            cells.append("{:.2f} ({})".format(*min(leads)) if leads else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def prompts_table(records: list[dict[str, Any]]) -> str:
    """Return a Markdown table of prompts: the time over that of our own fastest kernel of 16-bit weights."""
    prompts = [record for record in records if record["rows"] > MAX_STEP_ROWS]
    counts = sorted({record["rows"] for record in prompts})
    heads = ["quantized / 16 bit, both ours", "weights", *(f"{count} rows" for count in counts)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name in (label, lambda record: f"**all layers of {record['model']}**"):
        for record in prompts:
            groups.setdefault((name(record), record["format"]), []).append(record)
    for (layer, weight_format), here in groups.items():
        cells = []
        for count in counts:
            times = [(record[OURS], record[OURS_16_BIT]) for record in here if record["rows"] == count]
            quantized, plain = (sum(column) for column in zip(*times, strict=True)) if times else (0, 0)
            cells.append(f"{quantized / plain:.2f}" if times else "–")
        lines.append(f"| {layer} | {weight_format} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(records: list[dict[str, Any]], others: Iterable[str] = OTHERS, noise: float = 0.02) -> str:
    """List the GEMMs at which one of `others` is faster by more than repeated measurements differ."""
    compared = [(record, name) for record in records for name in others if name in record]
    behind = [(record, name) for record, name in compared if record[OURS] > record[name] * (1 + noise)]
    lines = [f"* slower than another by more than {noise:.0%} in {len(behind)} of {len(compared)} comparisons"]
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
                points = [point for point in points if point[0] <= MAX_STEP_ROWS]
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o", label=f"{model} {layer}")
            finish_panel(axis, f"{name}, {weight_format}", "rows", f"% of {bandwidth * 1e-12:.2f} TB/s")
            axis.set_ylim(0, 105)
            axis.get_legend().remove()
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="upper left", ncols=5, fontsize=8)
    save_figure(figure, f"{title}\n", path, dpi=80)  # the second line leaves room for the legend's second row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=list(MODELS), nargs="+", default=list(MODELS))
    parser.add_argument("--rows", type=int, nargs="+", default=[*STEP_ROWS, *PROMPT_ROWS])
    parser.add_argument("--formats", choices=list(FORMATS), nargs="+", default=list(FORMATS))
    parser.add_argument("--peers", choices=list(PEERS), nargs="*", default=list(PEERS))
    parser.add_argument("--output", type=Path, default=RESULTS / "gemm_quantized.json")
    parser.add_argument("--report", type=Path, metavar="RESULTS", help="print and draw results instead of measuring")
    parser.add_argument(
        "--compile-humming-kernels", action="store_true", help="for these layers, formats and rows, and end"
    )
    parser.add_argument("--picture", type=Path, default=IMAGES / "gemm_quantized.png", help="of --report")
    add_bandwidth_argument(parser)
    arguments = parser.parse_args()
    bandwidth = 1e12 * arguments.bandwidth
    if arguments.compile_humming_kernels:
        compile_humming_kernels(arguments.models, arguments.formats, tuple(arguments.rows))
        return
    if arguments.report:
        if not arguments.report.is_file():
            parser.error(f"--report: there is no file {arguments.report}")
        content = json.loads(arguments.report.read_text(encoding="utf-8"))
        records = content["results"]
    else:
        require_gpu()
        records = measure(
            arguments.models, arguments.formats, sorted(arguments.rows), arguments.peers, arguments.output
        )
    print(tables(records, bandwidth), steps_table(records, bandwidth), "", prompts_table(records), "", sep="\n")
    print(summary(records))
    if arguments.report:
        plot(records, bandwidth, arguments.picture, content["machine"]["gpu"])


if __name__ == "__main__":
    main()
