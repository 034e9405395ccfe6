"""Wrap what the TensorRT back end needs of the CUDA runtime: device memory, streams, events and CUDA graphs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda.bindings import runtime as cudart

from ...common.errors import OutOfMemoryError, QwenModelError
from ...common.extras import oldest_driver


class CudaError(RuntimeError):
    """A call of the CUDA runtime failed."""


class NoDeviceError(QwenModelError):
    """There is no usable GPU; the message says why."""


def check(result: tuple[Any, ...]) -> Any:
    """Return the values of a cuda-bindings call: None, one value, or a tuple.

    Raises:
        OutOfMemoryError: the GPU's memory ran out.
        CudaError: the call failed for another reason.
    """
    status, *values = result
    if status == cudart.cudaError_t.cudaErrorMemoryAllocation:
        cudart.cudaGetLastError()  # clears the error, so that no later call reports it
        raise OutOfMemoryError(
            "the GPU's memory ran out; give a smaller --gpu-memory-utilization, or build with a smaller "
            "--max-num-tokens or --max-batch-size"
        )
    if status != cudart.cudaError_t.cudaSuccess:
        raise CudaError(_described(status))
    return None if not values else values[0] if len(values) == 1 else tuple(values)


def _described(status: Any) -> str:
    name, text = (read(status)[1].decode() for read in (cudart.cudaGetErrorName, cudart.cudaGetErrorString))
    return f"{name}: {text}"


def device_count() -> int:
    """Return the number of GPUs that the driver finds, at least 1.

    Raises:
        NoDeviceError: there is none, or none can be used.
    """
    status, count = cudart.cudaGetDeviceCount()
    if status == cudart.cudaError_t.cudaErrorInsufficientDriver:  # also where there is no driver at all
        raise NoDeviceError(f"there is no NVIDIA driver, or one older than {oldest_driver()} ({_described(status)})")
    if status == cudart.cudaError_t.cudaErrorNoDevice or (status == cudart.cudaError_t.cudaSuccess and not count):
        raise NoDeviceError("the driver finds none")
    if status != cudart.cudaError_t.cudaSuccess:
        raise NoDeviceError(f"the driver gives none ({_described(status)})")
    return int(count)


def current_device() -> int:
    """Return the index of the calling thread's current device."""
    return int(check(cudart.cudaGetDevice()))


@contextmanager
def on_device(device: int) -> Iterator[None]:
    """Make `device` the calling thread's current device inside the `with` block."""
    before = current_device()
    if before == device:
        yield
        return
    check(cudart.cudaSetDevice(device))
    try:
        yield
    finally:
        check(cudart.cudaSetDevice(before))


def device_name_and_capability() -> tuple[str, str]:
    """Return the current device's name and compute capability, such as ("NVIDIA H200", "9.0")."""
    properties = check(cudart.cudaGetDeviceProperties(current_device()))
    return bytes(properties.name).split(b"\0")[0].decode(), f"{properties.major}.{properties.minor}"


def memory_info() -> tuple[int, int]:
    """Return the free and the total bytes of the current device's memory."""
    free, total = check(cudart.cudaMemGetInfo())
    return int(free), int(total)


class Stream:
    """Own a non-blocking CUDA stream, destroyed with the object."""

    def __init__(self) -> None:
        self.handle = int(check(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking)))

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            cudart.cudaStreamDestroy(self.handle)

    def synchronize(self) -> None:
        """Block until all work on the stream is done."""
        check(cudart.cudaStreamSynchronize(self.handle))


class Event:
    """Own a CUDA event, a point in a stream that the host can wait for."""

    def __init__(self) -> None:
        self.handle = check(cudart.cudaEventCreateWithFlags(cudart.cudaEventDisableTiming))

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            cudart.cudaEventDestroy(self.handle)

    def record(self, stream: Stream) -> None:
        """Record the event after the work that is on the stream at this point."""
        check(cudart.cudaEventRecord(self.handle, stream.handle))

    def synchronize(self) -> None:
        """Block until the event has happened."""
        check(cudart.cudaEventSynchronize(self.handle))


class DeviceMemory:
    """Own memory on the current device, freed with the object."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.address = int(check(cudart.cudaMalloc(max(num_bytes, 1))))

    def __del__(self) -> None:
        if hasattr(self, "address"):
            cudart.cudaFree(self.address)

    def fill(self, byte: int, stream: Stream) -> None:
        """Set every byte to this value."""
        check(cudart.cudaMemsetAsync(self.address, byte, self.num_bytes, stream.handle))


class DeviceArray(DeviceMemory):
    """Own device memory with the shape and type of an array."""

    def __init__(self, shape: Sequence[int], dtype: npt.DTypeLike) -> None:
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        super().__init__(int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize)

    def upload(self, array: npt.ArrayLike, stream: Stream) -> None:
        """Copy an array to the beginning of the memory; the array may be changed as soon as this returns.

        Raises:
            ValueError: the array is larger than the memory.
        """
        source = np.ascontiguousarray(array, self.dtype)
        if source.nbytes > self.num_bytes:
            raise ValueError(f"an array of shape {source.shape} is too large for memory of shape {self.shape}")
        kind = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        check(cudart.cudaMemcpyAsync(self.address, source.ctypes.data, source.nbytes, kind, stream.handle))

    def download(self, stream: Stream, rows: int | None = None) -> npt.NDArray[Any]:
        """Wait for the stream and return a copy of the first `rows` rows; None: of all."""
        array = np.empty(self.shape if rows is None else (rows, *self.shape[1:]), self.dtype)
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        check(cudart.cudaMemcpyAsync(array.ctypes.data, self.address, array.nbytes, kind, stream.handle))
        stream.synchronize()
        return array


class PinnedArray:
    """Own page-locked host memory, to which the device copies asynchronously."""

    def __init__(self, shape: Sequence[int], dtype: npt.DTypeLike) -> None:
        count = int(np.prod(tuple(shape), dtype=np.int64))
        num_bytes = count * np.dtype(dtype).itemsize
        self.address = int(check(cudart.cudaHostAlloc(max(num_bytes, 1), cudart.cudaHostAllocDefault)))
        memory = memoryview((ctypes.c_byte * num_bytes).from_address(self.address))
        self.array = np.frombuffer(memory, dtype, count).reshape(tuple(shape))

    def __del__(self) -> None:
        if hasattr(self, "address"):
            cudart.cudaFreeHost(self.address)

    def copy_from(self, address: int, num_bytes: int, stream: Stream) -> None:
        """Enqueue a copy from device memory."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        check(cudart.cudaMemcpyAsync(self.address, address, num_bytes, kind, stream.handle))

    def copy_to(self, address: int, num_bytes: int, stream: Stream) -> None:
        """Enqueue a copy to device memory; the array must not be changed before it is done."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        check(cudart.cudaMemcpyAsync(address, self.address, num_bytes, kind, stream.handle))


def copy_within(target: int, source: int, num_bytes: int, stream: Stream) -> None:
    """Enqueue a copy from device memory to device memory."""
    kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
    check(cudart.cudaMemcpyAsync(target, source, num_bytes, kind, stream.handle))


class Graph:
    """Capture what `enqueue` launches on the stream as a CUDA graph."""

    def __init__(self, stream: Stream, enqueue: Callable[[], None]) -> None:
        self.stream = stream
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        check(cudart.cudaStreamBeginCapture(stream.handle, mode))
        try:
            enqueue()
        except BaseException:
            status, graph = cudart.cudaStreamEndCapture(stream.handle)
            if status == cudart.cudaError_t.cudaSuccess:
                cudart.cudaGraphDestroy(graph)
            raise
        self.graph = check(cudart.cudaStreamEndCapture(stream.handle))
        self._executable = check(cudart.cudaGraphInstantiate(self.graph, 0))

    def __del__(self) -> None:
        if hasattr(self, "_executable"):
            cudart.cudaGraphExecDestroy(self._executable)
        if hasattr(self, "graph"):
            cudart.cudaGraphDestroy(self.graph)

    def launch(self) -> None:
        """Launch the graph on its stream."""
        check(cudart.cudaGraphLaunch(self._executable, self.stream.handle))

    def node_types(self) -> list[str]:
        """Return the type of each node: Kernel, Memcpy, Memset, ..."""
        _, count = check(cudart.cudaGraphGetNodes(self.graph))
        nodes, _ = check(cudart.cudaGraphGetNodes(self.graph, count))
        return [check(cudart.cudaGraphNodeGetType(node)).name.removeprefix("cudaGraphNodeType") for node in nodes]
