"""Record with CUPTI when each kernel of RMSNorm runs inside a TensorRT engine: native layers and the plug-in.

    python -m benchmarks.tensorrt_timeline [--results FILE]

A chain of 32 operations in float16 at hidden size 4096, replayed as a CUDA graph. Needs tensorrt, cuda-bindings and
cupti-python (``pip install cupti-python``); ``benchmarks.plot_tensorrt`` draws the results.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, require_tensorrt
from benchmarks.tensorrt_rms_norm import CHAIN, HIDDEN_SIZE, bind_rotating, build, machine, write_json

TOKENS = (1, 1024)
BUFFER_BYTES = 8 << 20


class KernelRecorder:
    """A KernelRecorder collects the kernels that run while it is open: name, start and end in nanoseconds.

    cupti: the module of that name in cupti-python.
    """

    def __init__(self, cupti: Any) -> None:
        self.kernels: list[dict[str, Any]] = []
        self._cupti = cupti
        cupti.activity_register_callbacks(lambda: (BUFFER_BYTES, 0), self._completed)

    def __enter__(self) -> "KernelRecorder":
        self.kernels.clear()
        self._cupti.activity_enable(self._cupti.ActivityKind.CONCURRENT_KERNEL)
        return self

    def __exit__(self, *error: object) -> None:
        from support.tensorrt_engines import check, cudart

        check(cudart.cudaDeviceSynchronize())
        self._cupti.activity_flush_all(1)
        self._cupti.activity_disable(self._cupti.ActivityKind.CONCURRENT_KERNEL)

    def _completed(self, activities: list[Any]) -> None:
        for activity in activities:
            if activity.kind == self._cupti.ActivityKind.CONCURRENT_KERNEL:
                self.kernels.append({"name": activity.name, "start": activity.start, "end": activity.end})


def record(recorder: KernelRecorder, implementation: str, num_tokens: int) -> dict[str, Any]:
    """Replay a chain several times and return the kernels of the last replay."""
    from support.tensorrt_engines import Graph, check, cudart

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
    parser.add_argument("--results", type=Path, default=RESULTS / "tensorrt_timeline.json")
    arguments = parser.parse_args()
    require_tensorrt()
    try:
        from cupti import cupti
    except ImportError:
        raise SystemExit("this benchmark needs CUPTI: pip install cupti-python") from None
    recorder = KernelRecorder(cupti)
    recordings = [
        record(recorder, implementation, tokens) for tokens in TOKENS for implementation in ("native", "plugin")
    ]
    content = {"machine": machine(), "hidden_size": HIDDEN_SIZE, "layers": CHAIN, "recordings": recordings}
    write_json(arguments.results, content)
    print(f"written: {arguments.results}")


if __name__ == "__main__":
    main()
