"""Time CUDA graphs: medians over replays, between CUDA events."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_model.backends.tensorrt.cuda_runtime import Graph


@cache
def _side_stream() -> Any:
    """Return the stream of first calls: one for all, because PyTorch caches memory for each stream separately."""
    import torch

    return torch.cuda.Stream()


def capture(call: Callable[[], object]) -> Any:
    """Run a call once, so that it compiles and allocates what it needs, and return a CUDA graph of it."""
    import torch

    side = _side_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def time_calls(calls: Mapping[str, Callable[[], object]], replays: int = 10, warm_up: int = 3) -> dict[str, float]:
    """Capture each call in a CUDA graph with PyTorch and return the median microseconds of its replays, by name.

    The graphs are replayed in turn, so that changes of the GPU's clock affect all alike.
    """
    import torch

    graphs = {name: capture(call) for name, call in calls.items()}

    def microseconds(replay: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    return _medians({name: graph.replay for name, graph in graphs.items()}, microseconds, replays, warm_up)


def time_graph(graph: Graph, replays: int = 50, warm_up: int = 5) -> float:
    """Return the median microseconds of replays of a graph that was captured without PyTorch."""
    from cuda.bindings import runtime as cudart

    from qwen_model.backends.tensorrt.cuda_runtime import check

    start, end = check(cudart.cudaEventCreate()), check(cudart.cudaEventCreate())

    def microseconds(replay: Callable[[], object]) -> float:
        check(cudart.cudaEventRecord(start, graph.stream.handle))
        replay()
        check(cudart.cudaEventRecord(end, graph.stream.handle))
        check(cudart.cudaEventSynchronize(end))
        elapsed: float = check(cudart.cudaEventElapsedTime(start, end))
        return elapsed * 1e3

    return _medians({"graph": graph.launch}, microseconds, replays, warm_up)["graph"]


def _medians(
    launches: Mapping[str, Callable[[], object]],
    microseconds: Callable[[Callable[[], object]], float],
    replays: int,
    warm_up: int,
) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in launches}
    for _ in range(warm_up + replays):
        for name, launch in launches.items():
            times[name].append(microseconds(launch))
    return {name: statistics.median(values[warm_up:]) for name, values in times.items()}
