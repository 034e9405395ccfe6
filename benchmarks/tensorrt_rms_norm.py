"""Compare the RMSNorm plug-ins with native layers, in TensorRT engines of one operation and of chains of 32.

    python -m benchmarks.tensorrt_rms_norm [--results FILE]

Microseconds per operation in float16 at hidden size 4096, medians over replays of a CUDA graph that was captured from
``execute_async_v3``. Needs tensorrt, cuda-bindings and NumPy; ``benchmarks.plot_tensorrt`` draws the results.

* One operation: an engine of one layer, enqueued 32 times into the graph, rotating over contexts with their own buffers
  where one set of buffers would stay in the L2 cache.
* A chain: an engine of 32 operations, each on the output of the one before, enqueued once.

``nodes`` is what TensorRT put into the graph for one operation, and ``overlapped`` how many of the 32 launches may
start while the one before them still runs (programmatic dependent launch): together, what TensorRT adds to the bare
kernels.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.common import RESULTS, commit, require_tensorrt
from benchmarks.timing import time_graph
from qwen_model.common.files import write_whole

if TYPE_CHECKING:
    from support.tensorrt_engines import Engine, Execution, Graph

HIDDEN_SIZE = 4096
TOKENS = (1, 64, 1024, 8192)
CHAIN = 32
IMPLEMENTATIONS = ("native", "plugin")
L2_BYTES = 60e6  # a little more than an H200's
Network = Callable[[Any, dict[str, Any]], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A Measurement is one line of the results."""

    operation: str
    implementation: str
    layers: int
    tokens: int
    microseconds: float
    nodes: dict[str, float]
    overlapped: int


def add(operation: str, network: Any, x: Any, plugin: bool, index: int, **options: Any) -> Any:
    """Add one operation in float16, as the plug-in or in native layers, and return its outputs."""
    import tensorrt as trt

    from qwen_plugins import tensorrt as plugins

    settings = {"dtype": trt.float16, "plugin": plugin, "name": f"{operation}_{index}", **options}
    return getattr(plugins, operation)(network, x, weight(), **settings)


def rms_norm(num_layers: int, plugin: bool) -> Network:
    """Describe y = rms_norm(x), again and again."""

    def describe(network: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        y = tensors["x"]
        for i in range(num_layers):
            y = add("rms_norm", network, y, plugin, i)
        return {"y": y}

    return describe


def rms_norm_residual(num_layers: int, plugin: bool) -> Network:
    """Describe y, h = rms_norm(y, residual=h): a decoder whose attention and MLP return their inputs."""

    def describe(network: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        y, h = tensors["x"], tensors["residual"]
        for i in range(num_layers):
            y, h = add("rms_norm", network, y, plugin, i, residual=h)
        return {"y": y, "h": h}

    return describe


def rms_norm_quant_residual(num_layers: int, plugin: bool) -> Network:
    """Describe q, scales, h = rms_norm_quant(x, residual=h), int8 with a scale per token; each q is an output."""

    def describe(network: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        outputs, h = {}, tensors["residual"]
        for i in range(num_layers):
            added = add("rms_norm_quant", network, tensors["x"], plugin, i, residual=h)
            outputs[f"q_{i}"], outputs[f"scales_{i}"], h = added
        return outputs | {"h": h}

    return describe


def rms_norm_quant(num_layers: int, plugin: bool) -> Network:
    """Describe q, scales = rms_norm_quant(x), each of an input of its own, so that native layers cannot be shared."""

    def describe(network: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        outputs = {}
        for i in range(num_layers):
            added = add("rms_norm_quant", network, tensors[f"x_{i}"], plugin, i)
            outputs[f"q_{i}"], outputs[f"scales_{i}"] = added
        return outputs

    return describe


OPERATIONS = {
    "rms_norm": rms_norm,
    "rms_norm_residual": rms_norm_residual,
    "rms_norm_quant": rms_norm_quant,
    "rms_norm_quant_residual": rms_norm_quant_residual,
}


def weight() -> np.ndarray:
    """Return a new weight: each operation has one of its own, so that none can be shared."""
    return np.random.default_rng().normal(1, 0.1, HIDDEN_SIZE).astype(np.float16)


def input_names(operation: str, num_layers: int) -> list[str]:
    if operation == "rms_norm_quant":
        return [f"x_{i}" for i in range(num_layers)]
    return ["x", "residual"] if operation.endswith("residual") else ["x"]


def build(operation: str, num_layers: int, plugin: bool, num_tokens: int) -> Engine:
    """Build an engine with this number of tokens as its profile's optimum: TensorRT tunes its own layers for it."""
    import tensorrt as trt

    from support.tensorrt_engines import Engine, Input, build_plan

    rows = Input(trt.float16, (-1, HIDDEN_SIZE), (1,), (num_tokens,), (max(num_tokens, 64),))
    inputs = dict.fromkeys(input_names(operation, num_layers), rows)
    return Engine(build_plan(inputs, OPERATIONS[operation](num_layers, plugin)))


def bind_rotating(engine: Engine, num_tokens: int) -> list[Execution]:
    """Return contexts on one stream, with buffers of their own: more than the L2 cache holds, unless they are small."""
    import tensorrt as trt

    arrays = {}
    for i in range(engine.engine.num_io_tensors):
        name = engine.engine.get_tensor_name(i)
        if engine.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            arrays[name] = np.random.default_rng().standard_normal((num_tokens, HIDDEN_SIZE), np.float32)
    first = engine.bind(arrays)
    num_bytes = sum(memory.num_bytes for memory in [*first.inputs.values(), *first.outputs.values()])
    num_contexts = 1 if num_bytes < 2e6 else max(1, int(np.ceil(L2_BYTES / num_bytes)))
    return [first, *(engine.bind(arrays, first.stream) for _ in range(num_contexts - 1))]


def programmatic_edges(graph: Graph) -> int:
    """Count the dependencies of the graph that let a kernel start before the one it follows has ended."""
    from support.tensorrt_engines import check, cudart

    *_, count = check(cudart.cudaGraphGetEdges(graph.graph))
    _, _, edges, _ = check(cudart.cudaGraphGetEdges(graph.graph, count))
    programmatic = cudart.cudaGraphDependencyType.cudaGraphDependencyTypeProgrammatic
    return sum(edge.type == programmatic for edge in edges)


def measure(engine: Engine, operation: str, implementation: str, num_layers: int, num_tokens: int) -> Measurement:
    """Time one engine inside a CUDA graph."""
    from support.tensorrt_engines import Graph

    executions = bind_rotating(engine, num_tokens) if num_layers == 1 else [bind_rotating(engine, num_tokens)[0]]
    for execution in executions:
        execution.run()  # TensorRT prepares a context in its first run
    rounds = CHAIN // num_layers

    def enqueue() -> None:
        for i in range(rounds):
            executions[i % len(executions)].enqueue()

    graph = Graph(executions[0].stream, enqueue)
    nodes = {kind: count / CHAIN for kind, count in Counter(graph.node_types()).items()}
    microseconds = time_graph(graph) / CHAIN
    return Measurement(
        operation, implementation, num_layers, num_tokens, microseconds, nodes, programmatic_edges(graph)
    )


def measure_all(operations: list[str], implementations: list[str]) -> list[Measurement]:
    results = []
    for operation in operations:
        for num_layers in (1, CHAIN):
            for implementation in implementations:
                for num_tokens in TOKENS:
                    try:
                        engine = build(operation, num_layers, implementation == "plugin", num_tokens)
                    except RuntimeError as error:  # TensorRT's own layers fail in more ways than one
                        print(f"{operation} x{num_layers} {implementation}: {str(error)[-300:]}", flush=True)
                        continue
                    results.append(measure(engine, operation, implementation, num_layers, num_tokens))
                    print(describe_line(results[-1]), flush=True)
    return results


def describe_line(result: Measurement) -> str:
    nodes = ", ".join(f"{count:g} {kind}" for kind, count in result.nodes.items())
    case = f"{result.operation:24} x{result.layers:<3} {result.tokens:5} tokens  {result.implementation:7}"
    return f"{case} {result.microseconds:9.2f} us   {nodes}, {result.overlapped} of {CHAIN} overlapped"


def table(results: list[Measurement]) -> str:
    """Return native layers, plug-in and their ratio as a Markdown table."""
    by_case: dict[tuple[str, int, int], dict[str, float]] = {}
    for result in results:
        case = by_case.setdefault((result.operation, result.layers, result.tokens), {})
        case[result.implementation] = result.microseconds
    lines = ["| operation | layers | tokens | native | plug-in | times faster |", "|---|---|---|---|---|---|"]
    for (operation, layers, tokens), case in by_case.items():
        if len(case) == 2:
            times = f"{case['native']:.2f} | {case['plugin']:.2f} | {case['native'] / case['plugin']:.1f}"
            lines.append(f"| {operation} | {layers} | {tokens} | {times} |")
    return "\n".join(lines)


def machine() -> dict[str, str]:
    """Return the GPU, the driver, TensorRT's version and the commit."""
    import tensorrt as trt

    from support.tensorrt_engines import check, cudart

    properties = check(cudart.cudaGetDeviceProperties(0))
    return {
        "gpu": properties.name.decode(),
        "driver": str(check(cudart.cudaDriverGetVersion())),
        "tensorrt": trt.__version__,
        "commit": commit() or "unknown",
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description="RMSNorm in TensorRT engines: native layers beside the plug-ins.")
    parser.add_argument("--results", type=Path, default=RESULTS / "tensorrt_rms_norm.json")
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    arguments = parser.parse_args()
    require_tensorrt()
    results = measure_all(arguments.operations, arguments.implementations)
    print("\n" + table(results))
    write_json(
        arguments.results,
        {
            "machine": machine(),
            "hidden_size": HIDDEN_SIZE,
            "results": [dataclasses.asdict(result) for result in results],
        },
    )
    print(f"written: {arguments.results}")


if __name__ == "__main__":
    main()
