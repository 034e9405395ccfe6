"""When each kernel of RMSNorm runs inside a TensorRT engine, recorded by CUPTI: native layers and the plug-in.

    python -m benchmarks.tensorrt_timeline [--results FILE]

A chain of 32 operations in float16 at hidden size 4096, replayed as a CUDA graph. Needs tensorrt, cuda-bindings and
cupti-python (``pip install cupti-python``); ``benchmarks.plot_tensorrt`` draws the results.
"""

import argparse
from pathlib import Path
from typing import Any

from cuda.bindings import runtime as cudart
from cupti import cupti

from .tensorrt_engines import Graph, check
from .tensorrt_rms_norm import CHAIN, HIDDEN_SIZE, bind_rotating, build, machine, write_json

TOKENS = (1, 1024)
BUFFER_BYTES = 8 << 20


class KernelRecorder:
    """Collects the kernels that run while it is open: name, start and end in nanoseconds."""

    def __init__(self) -> None:
        self.kernels: list[dict[str, Any]] = []
        cupti.activity_register_callbacks(lambda: (BUFFER_BYTES, 0), self._completed)

    def __enter__(self) -> "KernelRecorder":
        self.kernels.clear()
        cupti.activity_enable(cupti.ActivityKind.CONCURRENT_KERNEL)
        return self

    def __exit__(self, *error: object) -> None:
        check(cudart.cudaDeviceSynchronize())
        cupti.activity_flush_all(1)
        cupti.activity_disable(cupti.ActivityKind.CONCURRENT_KERNEL)

    def _completed(self, activities: list[Any]) -> None:
        for activity in activities:
            if activity.kind == cupti.ActivityKind.CONCURRENT_KERNEL:
                self.kernels.append({"name": activity.name, "start": activity.start, "end": activity.end})


def record(recorder: KernelRecorder, implementation: str, num_tokens: int) -> dict[str, Any]:
    """The kernels of the last of several replays."""
    execution = bind_rotating(build("rms_norm", CHAIN, implementation == "plugin", num_tokens), num_tokens)[0]
    execution.run()
    graph = Graph(execution.stream, execution.enqueue)
    for _ in range(3):
        graph.launch()
    check(cudart.cudaDeviceSynchronize())
    with recorder:
        graph.launch()
    kernels = sorted(recorder.kernels, key=lambda kernel: kernel["start"])
    begin = kernels[0]["start"]
    for kernel in kernels:
        kernel["start"] -= begin
        kernel["end"] -= begin
    print(f"{implementation:7} {num_tokens:5} tokens: {len(kernels)} kernels in {kernels[-1]['end'] / 1000:.1f} us")
    return {"implementation": implementation, "tokens": num_tokens, "kernels": kernels}


def main() -> None:
    parser = argparse.ArgumentParser(description="When each kernel runs inside a TensorRT engine.")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/tensorrt_timeline.json"))
    arguments = parser.parse_args()
    recorder = KernelRecorder()
    recordings = [
        record(recorder, implementation, tokens) for tokens in TOKENS for implementation in ("native", "plugin")
    ]
    content = {"machine": machine(), "hidden_size": HIDDEN_SIZE, "layers": CHAIN, "recordings": recordings}
    write_json(arguments.results, content)
    print(f"written: {arguments.results}")


if __name__ == "__main__":
    main()
