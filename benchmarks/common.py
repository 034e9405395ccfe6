"""Hold what benchmarks share: checks of requirements, calls of providers, files of results, figures."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qwen_model.common.files import write_whole
from qwen_model.quantization.options import QUANTIZATIONS

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parent.parent / "docs" / "images"
OURS = "qwen_plugins"
READ_BANDWIDTH = 4.55e12
"""Bytes per second: the highest rate measured at which a kernel reads an H200's memory."""
PACKAGES = (
    "qwen-plugins",
    "torch",
    "transformers",
    "vllm",
    "tensorrt",
    "flashinfer-python",
    "liger-kernel",
    "humming-kernels",
    "triton",
    "numpy",
)


def add_bandwidth_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option --bandwidth, from which floors are computed."""
    text = "highest rate in TB/s at which the GPU's memory is read (default: %(default)s, an H200's)"
    parser.add_argument("--bandwidth", type=float, default=READ_BANDWIDTH * 1e-12, help=text)


def add_quantization_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options from which `benchmarks.generate_torch.random_formats` makes the formats of weights."""
    parser.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="of our torch back end's random weights, and vLLM's; smoothquant and fp8: of x, too, with static scales",
    )
    parser.add_argument("--per-token", action="store_true", help="with smoothquant and fp8: a scale for each row of x")
    parser.add_argument("--group-size", type=int, default=128, help="with int4; -1: all inputs")
    parser.add_argument("--asymmetric", action="store_true", help="with int4")
    parser.add_argument("--head-quantization", choices=["int8", "int4", "none"], default="int8")


def require_torch() -> None:
    """Exit with one line where PyTorch is missing."""
    if importlib.util.find_spec("torch") is None:
        raise SystemExit('this benchmark needs PyTorch: pip install "qwen-plugins[torch]"')


def require_gpu() -> None:
    """Exit with one line where PyTorch or a GPU is missing."""
    require_torch()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs an NVIDIA GPU: PyTorch finds none")


def require_tensorrt() -> None:
    """Exit with one line where TensorRT, its CUDA bindings or a GPU is missing."""
    try:
        import tensorrt  # noqa: F401
        from cuda.bindings import runtime as cudart
    except ImportError as error:
        raise SystemExit(f'this benchmark needs TensorRT: pip install "qwen-plugins[tensorrt]" ({error})') from None
    status, count = cudart.cudaGetDeviceCount()
    if status != cudart.cudaError_t.cudaSuccess or count == 0:
        raise SystemExit("this benchmark needs an NVIDIA GPU: the driver finds none")


def pyplot() -> Any:
    """Return matplotlib.pyplot, set up to draw files; exit with one line where matplotlib is missing."""
    try:
        import matplotlib
        import matplotlib.pyplot
    except ImportError:
        raise SystemExit('matplotlib is not installed: pip install "qwen-plugins[benchmarks]"') from None
    matplotlib.use("Agg")
    return matplotlib.pyplot


def short(microseconds: float | None) -> str:
    """Return a time with three digits, or a dash for none."""
    if microseconds is None:
        return "–"
    return f"{microseconds:.2f}" if microseconds < 10 else f"{microseconds:.{1 if microseconds < 100 else 0}f}"


def gather_calls(
    operations: Iterable[str], finders: Iterable[Callable[[], dict[str, dict[str, Any]]]]
) -> dict[str, dict[str, Any]]:
    """Return the calls by operation and provider, for every provider that can be imported."""
    calls: dict[str, dict[str, Any]] = {operation: {} for operation in operations}
    for find in finders:
        try:
            found = find()
        except Exception as error:
            # Imports fail in many ways: missing parts, missing compilers, other versions of PyTorch.
            print(f"without {find.__name__.strip('_')}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        for operation, providers in found.items():
            calls[operation].update(providers)
    return calls


def timed(record: dict[str, Any], measure: Callable[[], float]) -> dict[str, Any]:
    """Return the record with the result of `measure` as "microseconds", or with an "error" if it fails."""
    import torch

    try:
        return {**record, "microseconds": round(measure(), 3)}
    except Exception as error:
        torch.cuda.synchronize()
        return {**record, "error": f"{type(error).__name__}: {error}"[:300]}


def environment() -> dict[str, Any]:
    """Return the machine, the versions of what is installed, the commit and the date."""
    return {
        "machine": {"cpu": _cpu_name(), "gpu": _gpu(), "platform": platform.platform()},
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def floor_bytes(config: Any, dtype: str, batch_size: int, context: int, formats: Any = None) -> dict[str, int]:
    """Return the bytes that a decode step must read: every weight but an untied embedding, and the key-value cache.

    formats: of the quantized modules, if any are.
    """
    from qwen_model.checkpoints.module_weights import NOT_QUANTIZED
    from qwen_model.checkpoints.weights import weight_groups
    from qwen_model.interface.memory import ITEM_SIZES, spec_bytes

    specs = [spec for group in weight_groups(config, dtype, formats or NOT_QUANTIZED) for spec in group.specs]
    weights = sum(spec_bytes(spec) for spec in specs if spec.name != "embedding.weight" or config.tied_embedding)
    cache = 2 * config.num_layers * config.num_kv_heads * config.head_size * context * batch_size * ITEM_SIZES[dtype]
    return {"weights": weights, "cache": cache}


def write_results(path: Path, results: Any) -> None:
    """Write results and their environment as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps({**environment(), "results": results}, indent=2) + "\n").encode())


def finish_panel(axis: Any, title: str, xlabel: str, ylabel: str) -> None:
    """Give a matplotlib panel labels, a logarithmic x axis, a grid and a legend."""
    axis.set_xscale("log", base=2)
    axis.set_title(title, fontsize=10)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def save_figure(figure: Any, title: str, path: Path, dpi: int = 90) -> None:
    """Finish a matplotlib figure and write it whole or not at all."""
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    kind = path.suffix.removeprefix(".")
    figure.savefig(picture, format=kind, dpi=dpi, metadata={"Date": None} if kind == "svg" else None)
    write_whole(path, picture.getvalue())
    print(f"written: {path}")


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@cache
def _gpu() -> str | None:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    found = _output(query)
    return found.splitlines()[0] if found else found  # of several, which a machine has of one kind


def commit() -> str | None:
    """Return the tree's commit, with a plus if files have changed since.

    The environment variable QWEN_PLUGINS_COMMIT replaces it, for a tree without its Git history.
    """
    if told := os.environ.get("QWEN_PLUGINS_COMMIT"):
        return told
    folder = str(Path(__file__).parent)
    head = _output(["git", "-C", folder, "rev-parse", "HEAD"])
    changed = _output(["git", "-C", folder, "status", "--porcelain", "--untracked-files=no"])
    return head + "+" if head and changed else head


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None
