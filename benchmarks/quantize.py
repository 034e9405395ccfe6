"""Compare quantization of rows to 8 bits with vLLM's kernels and a copy on one GPU.

    python -m benchmarks.quantize [--dtype float16] [--columns 3584 18944 ...] [--rows 1 64 ...]

Each figure is the time of one call among many inside a CUDA graph, in microseconds: the median over replays. Each row
has a scale of its own, or, "static", all have one. Calls rotate over sets of buffers, as in `benchmarks.rms_norm`;
"copy_" reads and writes x. Providers that cannot be imported are left out.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import OURS, RESULTS, gather_calls, require_gpu, short, timed, write_results
from benchmarks.rms_norm import Call, make_buffers, time_call

COLUMNS = [3584, 4096, 18944, 29568]  # hidden_size of Qwen2.5-7B and Qwen3-8B, intermediate_size of 7B and 72B
ROWS = [1, 8, 64, 512, 2048, 8192]
OPERATIONS = ("int8", "fp8", "fp8, static")


def _ours() -> dict[str, dict[str, Call]]:
    import torch

    from qwen_plugins import quantize

    scale = torch.full((1,), 0.02, device="cuda")
    return {
        "int8": {OURS: lambda b: quantize(b.x, torch.int8)},
        "fp8": {OURS: lambda b: quantize(b.x, torch.float8_e4m3fn)},
        "fp8, static": {OURS: lambda b: quantize(b.x, torch.float8_e4m3fn, scale)},
    }


def _pytorch() -> dict[str, dict[str, Call]]:
    return {operation: {"copy_": lambda b: b.y.copy_(b.x)} for operation in OPERATIONS}


def _vllm() -> dict[str, dict[str, Call]]:
    import torch
    from vllm import _custom_ops as ops

    scale = torch.full((1,), 0.02, device="cuda")
    return {
        "int8": {"vLLM": lambda b: ops.scaled_int8_quant(b.x)},
        "fp8": {"vLLM": lambda b: ops.scaled_fp8_quant(b.x, use_per_token_if_dynamic=True)},
        "fp8, static": {"vLLM": lambda b: ops.scaled_fp8_quant(b.x, scale)},
    }


def measure(dtype_name: str, columns: list[int], rows: list[int]) -> list[dict[str, Any]]:
    """Return one record for each operation, provider and size."""
    import torch

    calls = gather_calls(OPERATIONS, (_ours, _pytorch, _vllm))
    records = []
    for width in columns:
        for count in rows:
            sets = make_buffers(count, width, getattr(torch, dtype_name))
            for operation, providers in calls.items():
                for provider, call in providers.items():
                    record = {"operation": operation, "columns": width, "rows": count, "provider": provider}
                    records.append(timed(record, partial(time_call, call, sets)))
            print(f"{count} rows of {width}", file=sys.stderr, flush=True)
            del sets
    return records


def table(records: list[dict[str, Any]], columns: int) -> str:
    """Return a Markdown table of the microseconds of rows of one length."""
    here = [record for record in records if record["columns"] == columns]
    sizes = sorted({record["rows"] for record in here})
    lines = [f"| rows of {columns} | {' | '.join(map(str, sizes))} |", "|---" * (len(sizes) + 1) + "|"]
    for name in dict.fromkeys((record["operation"], record["provider"]) for record in here):
        times = {r["rows"]: r.get("microseconds") for r in here if (r["operation"], r["provider"]) == name}
        lines.append(f"| {', '.join(name)} | {' | '.join(short(times.get(size)) for size in sizes)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--columns", type=int, nargs="+", default=COLUMNS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--output", type=Path, default=RESULTS / "quantize.json", help="default: %(default)s")
    arguments = parser.parse_args()
    require_gpu()
    records = measure(arguments.dtype, arguments.columns, arguments.rows)
    write_results(arguments.output, {"dtype": arguments.dtype, "records": records})
    for columns in arguments.columns:
        print(table(records, columns), end="\n\n")


if __name__ == "__main__":
    main()
