"""Compare the plug-in Gemm with TensorRT's own MatrixMultiply, in TensorRT engines.

    python -m benchmarks.tensorrt_gemm [--shapes 4096x12288 4096x4096] [--rows 1 8 64] [--results FILE]

All is float16, and weights are constants of the network. There is an engine for each number of rows, with several GEMMs
that have their own weights and inputs, together larger than the L2 cache. Results are microseconds per GEMM, medians
over replays of a CUDA graph; the largest error compared with float64; and the seconds of the build, which runs in a
separate process. Needs tensorrt, cuda-bindings and NumPy.
"""

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import READ_BANDWIDTH, RESULTS, require_tensorrt, write_results
from benchmarks.timing import time_graph

TOGETHER_BYTES = 200e6  # the weights of an engine: four times the L2 cache of an H200
BUILD_SECONDS = 200


@dataclasses.dataclass(frozen=True)
class Case:
    """A Case is one engine: an implementation of the product, its shape, and the number of rows."""

    implementation: str
    in_features: int
    out_features: int
    rows: int

    @property
    def copies(self) -> int:
        """Return the number of products in the engine."""
        return max(1, round(TOGETHER_BYTES / self.weight_bytes))

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of one product's weight."""
        return 2 * self.in_features * self.out_features

    def arrays(self) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
        """Return inputs and weights, the same in every process."""
        numbers = np.random.default_rng(self.rows)
        inputs = {f"x_{i}": numbers.standard_normal((self.rows, self.in_features), np.float32) for i in self._range}
        scale = np.float32(self.in_features**-0.5)
        shape = (self.out_features, self.in_features)
        weights = [(numbers.standard_normal(shape, np.float32) * scale).astype(np.float16) for _ in self._range]
        return {name: x.astype(np.float16) for name, x in inputs.items()}, weights

    @property
    def _range(self) -> range:
        return range(self.copies)

    def build(self) -> bytes:
        """Build the engine and return its plan."""
        import tensorrt as trt

        from qwen_plugins import tensorrt as plugins
        from support.tensorrt_engines import Input, build_plan

        _, weights = self.arrays()

        def describe(network: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            plugin = self.implementation == "plugin"
            return {
                f"y_{i}": plugins.gemm(network, tensors[f"x_{i}"], weights[i], dtype=trt.float16, plugin=plugin)
                for i in self._range
            }

        inputs = {f"x_{i}": Input(trt.float16, (self.rows, self.in_features)) for i in self._range}
        return build_plan(inputs, describe)


def build_apart(case: Case, path: Path) -> float | str:
    """Build in another process, which may crash or take too long; return its seconds, or an error message."""
    arguments = [str(value) for value in dataclasses.astuple(case)]
    command = [sys.executable, "-m", "benchmarks.tensorrt_gemm", "--build", *arguments, str(path)]
    begin = time.perf_counter()
    try:
        status = subprocess.run(command, timeout=BUILD_SECONDS, check=False).returncode
    except subprocess.TimeoutExpired:
        return f"not built in {BUILD_SECONDS} s"
    return time.perf_counter() - begin if status == 0 else f"the build ended with status {status}"


def measure(case: Case, plan: bytes) -> dict[str, Any]:
    """Run a built case and return its time and its largest error."""
    from support.tensorrt_engines import Engine, Graph

    inputs, weights = case.arrays()
    execution = Engine(plan).bind(inputs)
    results = execution.run()
    errors = [
        np.abs(results[f"y_{i}"] - inputs[f"x_{i}"].astype(np.float64) @ weight.astype(np.float64).T).max()
        for i, weight in enumerate(weights)
    ]
    microseconds = time_graph(Graph(execution.stream, execution.enqueue)) / case.copies
    return {
        **dataclasses.asdict(case),
        "microseconds": round(microseconds, 2),
        "floor_microseconds": round(case.weight_bytes / READ_BANDWIDTH * 1e6, 2),
        "largest_error": float(np.max(errors)),
        "dtype": str(results["y_0"].dtype),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4096x12288", "4096x4096"], help="in_features x out_features")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--results", type=Path, default=RESULTS / "tensorrt_gemm.json")
    parser.add_argument("--build", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    require_tensorrt()
    if options.build:
        implementation, *sizes, path = options.build
        Path(path).write_bytes(Case(implementation, *map(int, sizes)).build())
        return
    cases = [
        Case(name, int(shape.split("x")[0]), int(shape.split("x")[1]), rows)
        for shape in options.shapes
        for rows in options.rows
        for name in ("native", "plugin")
    ]
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            path = Path(folder) / "plan"
            built = build_apart(case, path)
            if isinstance(built, str):
                records.append({**dataclasses.asdict(case), "error": built})
            else:
                records.append({**measure(case, path.read_bytes()), "build_seconds": round(built, 1)})
            print(records[-1], flush=True)
    write_results(options.results, records)
    print(options.results)


if __name__ == "__main__":
    main()
