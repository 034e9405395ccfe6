"""Time `qwen-model build` of a quantized checkpoint in the shape of a published model, and its peak of memory.

    python -m benchmarks.build_times [--backends torch tensorrt] [--formats gptq compressed-tensors]

For each format a random checkpoint is written first (see benchmarks.random_checkpoint), into --checkpoints if that is
given, where a later call finds it: the TensorRT back end can be in another environment. Each build is a process of its
own: seconds are from its start to its end, `resident` is the most memory that it had, files that are mapped included,
and `anonymous` the most without files. Results are added to those in the file, build_times.json. Needs Linux.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, write_results
from benchmarks.generate import COMMON, SHAPES
from benchmarks.random_checkpoint import write_checkpoint
from qwen_model.command_line import positive_integer
from qwen_model.quantization.published import FORMATS

POLL_SECONDS = 0.02
MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Build:
    """A Build is one line of the results; sizes are MiB."""

    shape: str
    layers: int
    checkpoint: str
    backend: str
    weights: int
    seconds: float
    resident: int
    anonymous: int


def run(command: list[str]) -> tuple[float, int, int]:
    """Run a command, and return its seconds and the most resident and anonymous memory that it had, in bytes."""
    start = time.perf_counter()
    resident = anonymous = 0
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            found = memory(process.pid)
            resident, anonymous = max(resident, found.get("VmHWM", 0)), max(anonymous, found.get("RssAnon", 0))
            time.sleep(POLL_SECONDS)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - start, resident, anonymous


def memory(pid: int) -> dict[str, int]:
    """Return the sizes in a process's status, in bytes; none if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.removesuffix(":"): 1024 * int(value) for name, value, _ in fields}


def measure(options: argparse.Namespace, stored_as: str, folder: Path) -> list[Build]:
    """Return the builds of a checkpoint with each back end."""
    values = {**COMMON, **SHAPES[options.shape]}
    values["num_hidden_layers"] = options.layers or values["num_hidden_layers"]
    checkpoint = (options.checkpoints or folder) / f"{options.shape}-{values['num_hidden_layers']}-{stored_as}"
    if not checkpoint.exists():
        start = time.perf_counter()
        write_checkpoint(checkpoint, values, stored_as)
        print(f"{checkpoint}: written in {time.perf_counter() - start:.1f} s", flush=True)
    weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    found = []
    for backend in options.backends:
        engine = folder / f"engine-{stored_as}-{backend}"
        command = [
            sys.executable,
            "-m",
            "qwen_model.build",
            "--model-dir",
            str(checkpoint),
            "--output-dir",
            str(engine),
        ]
        seconds, resident, anonymous = run([*command, "--backend", backend, "--dtype", "float16"])
        sizes = [round(size / MIB) for size in (weights, resident, anonymous)]
        build = Build(
            options.shape,
            values["num_hidden_layers"],
            stored_as,
            backend,
            sizes[0],
            round(seconds, 1),
            *sizes[1:],
        )
        print(
            f"{stored_as} to {backend}: {build.seconds} s; {build.resident} MiB resident, {build.anonymous} of it "
            f"without files; the checkpoint has {build.weights}",
            flush=True,
        )
        found.append(build)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen2.5-7b")
    parser.add_argument("--layers", type=positive_integer, help="default: all")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["gptq"])
    parser.add_argument("--backends", nargs="+", choices=("torch", "tensorrt"), default=["torch"])
    parser.add_argument("--checkpoints", type=Path, help="folder that keeps them (default: none does)")
    parser.add_argument("--results", type=Path, default=RESULTS / "build_times.json")
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    if options.results.exists():
        found = json.loads(options.results.read_text(encoding="utf-8"))["results"]
    for stored_as in options.formats:
        with tempfile.TemporaryDirectory() as temporary:
            found += [dataclasses.asdict(build) for build in measure(options, stored_as, Path(temporary))]
        write_results(options.results, found)
    print(options.results)


if __name__ == "__main__":
    main()
