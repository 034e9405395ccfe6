"""Build and run small TensorRT engines from NumPy arrays, for benchmarks and tests of the plug-ins.

PyTorch is not needed: device memory, streams and graphs come from cuda-bindings.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorrt as trt
from cuda.bindings import runtime as cudart

import qwen_plugins.tensorrt
from qwen_model.backends.tensorrt.compat import LOG, create_network
from qwen_model.backends.tensorrt.cuda_runtime import DeviceMemory, Graph, Stream, check

__all__ = ["LOG", "DeviceArray", "Engine", "Execution", "Graph", "Input", "build_plan", "check", "cudart"]


@dataclass(frozen=True)
class Input:
    """An Input has a type, a shape with -1 for dynamic dimensions, and the profile's values of these dimensions."""

    dtype: Any
    shape: tuple[int, ...]
    dynamic_min: Sequence[int] = ()
    dynamic_opt: Sequence[int] = ()
    dynamic_max: Sequence[int] = ()

    def with_values(self, values: Sequence[int]) -> tuple[int, ...]:
        """Return the shape with its dynamic dimensions replaced in turn."""
        remaining = iter(values)
        return tuple(next(remaining) if extent == -1 else extent for extent in self.shape)


def build_plan(
    inputs: Mapping[str, Input],
    describe: Callable[[Any, dict[str, Any]], Mapping[str, Any]],
    *,
    profiling: bool = False,
) -> bytes:
    """Build a network and return the serialised plan.

    ``describe`` takes the network and its input tensors by name, adds layers, and returns the outputs by name.
    ``profiling`` keeps the layers' names and details in the engine.

    Raises:
        RuntimeError: TensorRT builds no engine.
    """
    builder = trt.Builder(LOG)
    network = create_network(builder)
    config = builder.create_builder_config()
    # Without cuBLAS and cuDNN: no network here needs them, and TensorRT 8.6 fails where they are not installed.
    config.set_tactic_sources(0)
    if hasattr(trt, "PreviewFeature") and hasattr(trt.PreviewFeature, "PROFILE_SHARING_0806"):
        # Lets several contexts use one engine, which later versions always allow.
        config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)
    if profiling:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    tensors = {}
    for name, given in inputs.items():
        tensors[name] = network.add_input(name, given.dtype, given.shape)
        if -1 in given.shape:
            ranges = (given.dynamic_min, given.dynamic_opt, given.dynamic_max)
            profile.set_shape(name, *(given.with_values(values) for values in ranges))
    config.add_optimization_profile(profile)
    for name, tensor in describe(network, tensors).items():
        tensor.name = name
        network.mark_output(tensor)
        tensor.allowed_formats = 1 << int(trt.TensorFormat.LINEAR)
    qwen_plugins.tensorrt.configure_builder(config, network)
    LOG.messages.clear()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("TensorRT built no engine:\n" + "\n".join(LOG.messages))
    return bytes(plan)


class DeviceArray(DeviceMemory):
    """A DeviceArray is device memory with the shape and type of an array; its methods block until they are done."""

    def __init__(self, shape: Sequence[int], dtype: Any) -> None:
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        super().__init__(int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize)

    def upload(self, array: np.ndarray) -> "DeviceArray":
        """Copy from the host."""
        array = np.ascontiguousarray(array, self.dtype)
        if array.shape != self.shape:
            raise ValueError(f"got an array of shape {array.shape}; expected {self.shape}")
        kind = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        check(cudart.cudaMemcpy(self.address, array.ctypes.data, self.num_bytes, kind))
        check(cudart.cudaDeviceSynchronize())
        return self

    def poison(self) -> "DeviceArray":
        """Set all bytes to 0xFF: NaN in every floating-point type, -1 in integers."""
        check(cudart.cudaMemset(self.address, 0xFF, self.num_bytes))
        check(cudart.cudaDeviceSynchronize())
        return self

    def download(self) -> np.ndarray:
        """Copy to the host."""
        array = np.empty(self.shape, self.dtype)
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        check(cudart.cudaMemcpy(array.ctypes.data, self.address, self.num_bytes, kind))
        return array


@dataclass
class Execution:
    """An Execution is an execution context bound to inputs and outputs of fixed shapes."""

    context: Any
    stream: Stream
    inputs: dict[str, DeviceArray] = field(default_factory=dict)
    outputs: dict[str, DeviceArray] = field(default_factory=dict)

    def enqueue(self) -> None:
        """Enqueue the engine's work on the stream."""
        if not self.context.execute_async_v3(self.stream.handle):
            raise RuntimeError("TensorRT refused to run:\n" + "\n".join(LOG.messages))

    def run(self) -> dict[str, np.ndarray]:
        """Run once, with poisoned outputs, and return them."""
        for output in self.outputs.values():
            output.poison()
        check(cudart.cudaDeviceSynchronize())
        self.enqueue()
        return self.results()

    def results(self) -> dict[str, np.ndarray]:
        """Wait for the enqueued work and return its outputs."""
        self.stream.synchronize()
        return {name: output.download() for name, output in self.outputs.items()}


class Engine:
    """An Engine is a deserialised plan."""

    def __init__(self, plan: bytes) -> None:
        self.runtime = trt.Runtime(LOG)
        LOG.messages.clear()
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise RuntimeError("TensorRT could not read the plan:\n" + "\n".join(LOG.messages))

    def bind(self, arrays: Mapping[str, np.ndarray], stream: Stream | None = None) -> Execution:
        """Return a new context with these inputs on the device and memory for the outputs.

        Raises:
            ValueError: a shape is outside of the engine's profile.
        """
        context = self.engine.create_execution_context()
        execution = Execution(context, stream or Stream())
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        outputs = [name for name in names if self.engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
        for name in set(names) - set(outputs):
            dtype = trt.nptype(self.engine.get_tensor_dtype(name))
            array = np.asarray(arrays[name], dtype)
            if not context.set_input_shape(name, array.shape):
                raise ValueError(f"shape {array.shape} of '{name}' is outside of the engine's profile")
            execution.inputs[name] = DeviceArray(array.shape, dtype).upload(array)
        for name in outputs:
            dtype = trt.nptype(self.engine.get_tensor_dtype(name))
            execution.outputs[name] = DeviceArray(context.get_tensor_shape(name), dtype)
        for name, memory in (execution.inputs | execution.outputs).items():
            context.set_tensor_address(name, memory.address)
        return execution

    def run(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once in a context of its own and return the outputs."""
        return self.bind(arrays).run()
