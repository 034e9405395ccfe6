"""cuda.bindings.runtime with the host's memory as the device's: work is done at once, or when its graph is launched."""

import ctypes
import enum
import itertools
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

cudaError_t = enum.Enum(  # noqa: N816
    "cudaError_t",
    {
        "cudaSuccess": 0,
        "cudaErrorInvalidValue": 1,
        "cudaErrorMemoryAllocation": 2,
        "cudaErrorInsufficientDriver": 35,
        "cudaErrorDevicesUnavailable": 46,
        "cudaErrorNoDevice": 100,
        "cudaErrorInvalidDevice": 101,
    },
)


@dataclass
class Device:
    """The devices, which are all alike, and their memory."""

    name: str = "NumPy"
    capability: tuple[int, int] = (9, 0)
    count: int = 1
    count_error: cudaError_t | None = None  # of cudaGetDeviceCount
    total_bytes: int = 8 << 30
    allocations: dict[int, np.ndarray] = field(default_factory=dict)
    places: dict[int, int] = field(default_factory=dict)  # of memory and of streams: which device they are on
    capture: list[Callable[[], None]] | None = None
    graphs: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    handles: Iterator[int] = field(default_factory=lambda: itertools.count(1))


class Thread(threading.local):
    """The current device of a thread, at first device 0."""

    device = 0


device = Device()
thread = Thread()
OK = cudaError_t.cudaSuccess


def used_bytes() -> int:
    return sum(memory.nbytes for memory in device.allocations.values())


def enqueue(work: Callable[[], None], stream: int) -> None:
    """Run work, or add it to the graph that is being captured. The stream must be of the current device."""
    assert device.places[stream] == thread.device, "work for a stream of another device"
    if device.capture is None:
        work()
    else:
        device.capture.append(work)


def view(address: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return the array at an address, which must lie within allocated memory of the current device."""
    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    inside = any(
        start <= address and address + num_bytes <= start + memory.nbytes and device.places[start] == thread.device
        for start, memory in device.allocations.items()
    )
    assert inside, f"{num_bytes} bytes at {address:#x} are not allocated on this device"
    return np.frombuffer((ctypes.c_byte * num_bytes).from_address(address), dtype).reshape(shape)


def allocate(num_bytes: int) -> tuple[cudaError_t, int]:
    if used_bytes() + num_bytes > device.total_bytes:
        return cudaError_t.cudaErrorMemoryAllocation, 0
    memory = np.full(num_bytes, 0xFF, np.uint8)  # NaN in every type
    device.allocations[memory.ctypes.data] = memory
    device.places[memory.ctypes.data] = thread.device
    return OK, memory.ctypes.data


def free(address: int) -> tuple[cudaError_t]:
    del device.allocations[address]
    del device.places[address]
    return (OK,)


def copy(target: int, source: int, num_bytes: int, kind: str, stream: int) -> tuple[cudaError_t]:
    enqueue(lambda: ctypes.memmove(target, source, num_bytes) and None, stream)
    return (OK,)


def copy_2d(
    target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int, kind: str, stream: int
) -> tuple[cudaError_t]:
    for row in range(height):
        copy(target + row * target_pitch, source + row * source_pitch, width, kind, stream)
    return (OK,)


def fill(address: int, byte: int, num_bytes: int, stream: int) -> tuple[cudaError_t]:
    enqueue(lambda: ctypes.memset(address, byte, num_bytes) and None, stream)
    return (OK,)


def begin_capture(stream: int, mode: str) -> tuple[cudaError_t]:
    assert device.capture is None
    device.capture = []
    return (OK,)


def end_capture(stream: int) -> tuple[cudaError_t, int]:
    graph = next(device.handles)
    assert device.capture is not None
    device.graphs[graph], device.capture = device.capture, None
    return OK, graph


def launch(graph: int, stream: int) -> tuple[cudaError_t]:
    for work in device.graphs[graph]:
        enqueue(work, stream)
    return (OK,)


def destroy_graph(graph: int) -> tuple[cudaError_t]:
    device.graphs.pop(graph, None)
    return (OK,)


def device_count() -> tuple[cudaError_t, int]:
    if device.count_error is not None:
        return device.count_error, 0
    return (OK, device.count) if device.count else (cudaError_t.cudaErrorNoDevice, 0)


def set_device(index: int) -> tuple[cudaError_t]:
    if not 0 <= index < device.count:
        return (cudaError_t.cudaErrorInvalidDevice,)
    thread.device = index
    return (OK,)


def create_stream(flags: int) -> tuple[cudaError_t, int]:
    stream = next(device.handles)
    device.places[stream] = thread.device
    return OK, stream


def properties(index: int) -> tuple[cudaError_t, types.SimpleNamespace]:
    name = device.name.encode().ljust(256, b"\0")
    major, minor = device.capability
    return OK, types.SimpleNamespace(name=name, major=major, minor=minor)


def succeed(*arguments: object) -> tuple[cudaError_t]:
    return (OK,)


def new_handle(*arguments: object) -> tuple[cudaError_t, int]:
    return OK, next(device.handles)


runtime = types.ModuleType("cuda.bindings.runtime")
runtime.__dict__.update(
    cudaError_t=cudaError_t,
    cudaMemcpyKind=types.SimpleNamespace(
        cudaMemcpyHostToDevice="up", cudaMemcpyDeviceToHost="down", cudaMemcpyDeviceToDevice="within"
    ),
    cudaStreamCaptureMode=types.SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread"),
    cudaStreamNonBlocking=1,
    cudaEventDisableTiming=2,
    cudaEventDefault=0,
    cudaHostAllocDefault=0,
    cudaMalloc=allocate,
    cudaFree=free,
    cudaHostAlloc=lambda num_bytes, flags: allocate(num_bytes),
    cudaFreeHost=free,
    cudaMemcpyAsync=copy,
    cudaMemcpy2DAsync=copy_2d,
    cudaMemsetAsync=fill,
    cudaStreamCreateWithFlags=create_stream,
    cudaStreamDestroy=succeed,
    cudaStreamSynchronize=succeed,
    cudaEventCreateWithFlags=new_handle,
    cudaEventDestroy=succeed,
    cudaEventRecord=succeed,
    cudaEventSynchronize=succeed,
    cudaEventElapsedTime=lambda start, end: (OK, 1.0),
    cudaStreamBeginCapture=begin_capture,
    cudaStreamEndCapture=end_capture,
    cudaGraphInstantiate=lambda graph, flags: (OK, graph),
    cudaGraphLaunch=launch,
    cudaGraphExecDestroy=succeed,
    cudaGraphDestroy=destroy_graph,
    cudaGetDeviceCount=device_count,
    cudaGetDevice=lambda: (OK, thread.device),
    cudaSetDevice=set_device,
    cudaGetDeviceProperties=properties,
    cudaMemGetInfo=lambda: (OK, device.total_bytes - used_bytes(), device.total_bytes),
    cudaGetLastError=succeed,
    cudaDeviceSynchronize=succeed,
    cudaGetErrorName=lambda status: (OK, status.name.encode()),
    cudaGetErrorString=lambda status: (OK, b"as the stand-in says"),
)
