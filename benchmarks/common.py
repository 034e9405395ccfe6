"""What every benchmark writes beside its numbers: the machine, the versions, the commit."""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qwen_model.common.files import write_whole

READ_BANDWIDTH = 4.55e12
"""Bytes per second: the best that was measured on an H200."""
PACKAGES = (
    "qwen-plugins",
    "torch",
    "transformers",
    "vllm",
    "tensorrt",
    "flashinfer-python",
    "liger-kernel",
    "triton",
    "numpy",
)


def add_bandwidth_argument(parser: argparse.ArgumentParser) -> None:
    """--bandwidth, which floors are computed at."""
    text = "TB/s that the GPU's memory is read at, at most (default: %(default)s, an H200's)"
    parser.add_argument("--bandwidth", type=float, default=READ_BANDWIDTH * 1e-12, help=text)


def require_gpu() -> None:
    """Exit with one line where PyTorch or a GPU is missing."""
    try:
        import torch
    except ImportError:
        raise SystemExit('this benchmark needs PyTorch: pip install "qwen-plugins[torch]"') from None
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs an NVIDIA GPU: PyTorch finds none")


def environment() -> dict[str, Any]:
    """The machine, the versions of what is installed, the commit and the date."""
    return {
        "machine": {"cpu": _cpu_name(), "gpu": _gpu(), "platform": platform.platform()},
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def floor_bytes(config: Any, itemsize: int, batch_size: int, context: int) -> dict[str, int]:
    """What a step must read: every weight but the rows of the embedding that are not asked for, and the cache."""
    from qwen_model.checkpoints.weights import weight_groups

    sizes = {spec.name: spec.shape for group in weight_groups(config) for spec in group.specs}
    weights = sum(
        itemsize * (shape[0] * shape[1] if len(shape) == 2 else shape[0])
        for name, shape in sizes.items()
        if name != "embedding.weight" or config.tied_embedding
    )
    cache = 2 * config.num_layers * config.num_kv_heads * config.head_size * context * batch_size * itemsize
    return {"weights": weights, "cache": cache}


def write_results(path: Path, results: Any) -> None:
    """Write results and their environment as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps({**environment(), "results": results}, indent=2) + "\n").encode())


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


def _gpu() -> str | None:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return _output(query)


def _commit() -> str | None:
    """With a plus where files of the tree have changed since. A tree without its history is told by the environment."""
    if told := os.environ.get("QWEN_PLUGINS_COMMIT"):
        return told
    folder = str(Path(__file__).parent)
    commit = _output(["git", "-C", folder, "rev-parse", "HEAD"])
    changed = _output(["git", "-C", folder, "status", "--porcelain", "--untracked-files=no"])
    return commit + "+" if commit and changed else commit


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None
