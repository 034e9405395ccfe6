"""The module tensorrt in NumPy, of any version: a network is a graph of layers that runs when its engine does.

It has dynamic shapes, profiles, plans, contexts and addresses. A plan is a number: it can be read in the process that
wrote it. Without an engine, a tensor that depends on none but those of `tensor_of` has its value in `array`.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
import json
import types
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.machinery import ModuleSpec
from typing import Any

import ml_dtypes
import numpy as np

from qwen_plugins.registration import PLUGIN_VERSIONS
from tests.stand_ins.numpy_cuda import device, enqueue, thread, used_bytes, view
from tests.stand_ins.numpy_plugins import PLUGIN_OUTPUTS, PLUGINS


class DataType(enum.Enum):
    FLOAT, HALF, INT8, INT32, BOOL, FP8, BF16, INT64 = 0, 1, 2, 3, 4, 6, 7, 8

    def __int__(self) -> int:
        return self.value


NUMPY_TYPES = {
    DataType.FLOAT: np.dtype(np.float32),
    DataType.HALF: np.dtype(np.float16),
    DataType.INT8: np.dtype(np.int8),
    DataType.INT32: np.dtype(np.int32),
    DataType.BOOL: np.dtype(np.bool_),
    DataType.FP8: np.dtype(ml_dtypes.float8_e4m3fn),
    DataType.INT64: np.dtype(np.int64),
    DataType.BF16: np.dtype(ml_dtypes.bfloat16),
}
ELEMENTWISE = {
    "SUM": np.add,
    "SUB": np.subtract,
    "PROD": np.multiply,
    "DIV": np.divide,
    "MAX": np.maximum,
    "LESS": np.less,
}
UNARY = {"SQRT": np.sqrt, "ABS": np.abs, "ROUND": np.round}
REDUCE = {"AVG": np.mean, "MAX": np.max, "SUM": np.sum}
HEADER = b"a plan of the stand-in, number "

Shape = tuple[int, ...]
Arrays = list[np.ndarray]


class ITensor:
    def __init__(
        self, network: INetworkDefinition | None, shape: Shape, dtype: DataType, layer: Layer | None = None
    ) -> None:
        self.network, self.shape, self.known_type, self.layer = network, shape, dtype, layer
        self.name = ""
        self.allowed_formats = 0
        self.dynamic_range: tuple[float, float] | None = None
        self.given: np.ndarray | None = None

    is_input = property(lambda self: self.layer is None)

    @property
    def dtype(self) -> DataType:
        """TensorRT 8.6 reports float32 for every tensor inside a network."""
        return self.known_type if self.is_input or self.network.strongly_typed else DataType.FLOAT

    @dtype.setter
    def dtype(self, dtype: DataType) -> None:
        assert not self.network.strongly_typed, "types are not set in a strongly typed network"
        self.known_type = dtype

    def set_dynamic_range(self, low: float, high: float) -> None:
        self.dynamic_range = low, high

    @property
    def array(self) -> np.ndarray:
        """Return the value, computed from those that the inputs were made with."""
        if self.layer is None:
            return self.given
        arrays = {tensor: tensor.array for tensor in self.layer.inputs}
        self.layer.run(arrays)
        return arrays[self]


def tensor_of(array: np.ndarray) -> ITensor:
    """Return an input with a value."""
    made = ITensor(None, array.shape, type_of(array))
    made.given = array
    return made


def type_of(array: np.ndarray) -> DataType:
    return next(dtype for dtype, known in NUMPY_TYPES.items() if known == array.dtype)


class Layer:
    def __init__(
        self,
        network: INetworkDefinition,
        inputs: list[ITensor],
        outputs: list[tuple[Shape, DataType]],
        compute: Callable[..., Arrays],
    ) -> None:
        self.network, self.inputs, self.compute = network, inputs, compute
        self.outputs = [ITensor(network, shape, dtype, self) for shape, dtype in outputs]
        self.num_outputs = len(outputs)
        self.name = f"(Unnamed Layer* {network.num_layers})"
        self.precision: DataType | None = None

    def get_output(self, index: int) -> ITensor:
        return self.outputs[index]

    def set_output_type(self, index: int, dtype: DataType) -> None:
        assert not self.network.strongly_typed, "types are not set in a strongly typed network"
        self.outputs[index].known_type = dtype

    def run(self, arrays: dict[ITensor, np.ndarray]) -> None:
        results = self.compute(*(arrays[tensor] for tensor in self.inputs))
        for tensor, result in zip(self.outputs, results, strict=True):
            arrays[tensor] = result.astype(NUMPY_TYPES[tensor.known_type], copy=False)


class Shuffle(Layer):
    @property
    def reshape_dims(self) -> Shape:
        return self.outputs[0].shape

    @reshape_dims.setter
    def reshape_dims(self, shape: Shape) -> None:
        given = self.inputs[0].shape
        self.outputs[0].shape = tuple(size or given[axis] for axis, size in enumerate(shape))  # 0: as it is


class Slice(Layer):
    def set_input(self, index: int, tensor: ITensor) -> None:
        assert index == 2, "only the size"
        self.inputs.append(tensor)


class Weights:
    def __init__(self, array_or_type: Any, address: int = 0, count: int = 0) -> None:
        if isinstance(array_or_type, np.ndarray):
            self.array = array_or_type
        else:
            dtype = NUMPY_TYPES[array_or_type]
            self.array = np.frombuffer((ctypes.c_byte * (count * dtype.itemsize)).from_address(address), dtype)

    size = property(lambda self: self.array.size)
    dtype = property(lambda self: type_of(self.array))


class INetworkDefinition:
    def __init__(self, strongly_typed: bool) -> None:
        self.strongly_typed = strongly_typed
        self.layers: list[Layer] = []
        self.plugins: list[types.SimpleNamespace] = []
        self.inputs: list[ITensor] = []
        self.outputs: list[ITensor] = []

    num_layers = property(lambda self: len(self.layers))
    num_inputs = property(lambda self: len(self.inputs))

    def get_layer(self, index: int) -> Layer:
        return self.layers[index]

    def get_input(self, index: int) -> ITensor:
        return self.inputs[index]

    def get_flag(self, flag: object) -> bool:
        return self.strongly_typed

    def add_input(self, name: str, dtype: DataType, shape: Shape) -> ITensor:
        tensor = ITensor(self, tuple(shape), dtype)
        tensor.name = name
        self.inputs.append(tensor)
        return tensor

    def mark_output(self, tensor: ITensor) -> None:
        self.outputs.append(tensor)

    def add(
        self,
        inputs: list[ITensor],
        shape: Shape,
        dtype: DataType,
        compute: Callable[..., np.ndarray],
        kind: type[Layer] = Layer,
    ) -> Any:
        """Add a layer with one output."""
        self.layers.append(kind(self, inputs, [(shape, dtype)], lambda *arrays: [compute(*arrays)]))
        return self.layers[-1]

    def add_constant(self, shape: Shape, weights: Weights) -> Layer:
        return self.add([], tuple(shape), weights.dtype, lambda: weights.array.reshape(shape))

    def add_gather(self, table: ITensor, rows: ITensor, axis: int) -> Layer:
        if axis == 0:
            return self.add([table, rows], (*rows.shape, *table.shape[1:]), table.known_type, gather)
        assert axis == len(table.shape) - 1
        shape = (*table.shape[:-1], *rows.shape)
        return self.add([table, rows], shape, table.known_type, lambda x, numbers: gather(x.T, numbers).T)

    def add_elementwise(self, a: ITensor, b: ITensor, operation: str) -> Layer:
        assert len(a.shape) == len(b.shape), "elementwise layers take two tensors of one rank"
        assert a.dtype == b.dtype, "elementwise layers take two tensors of one type"
        shape = tuple(max(x, y) if min(x, y) > 0 else -1 for x, y in zip(a.shape, b.shape, strict=True))
        compute, dtype = ELEMENTWISE[operation], DataType.BOOL if operation == "LESS" else a.known_type
        return self.add([a, b], shape, dtype, lambda x, y: compute(wide(x), wide(y)))

    def add_unary(self, tensor: ITensor, operation: str) -> Layer:
        return self.add([tensor], tensor.shape, tensor.known_type, lambda x: UNARY[operation](wide(x)))

    def add_reduce(self, tensor: ITensor, operation: str, axes: int, keep_dims: bool) -> Layer:
        assert axes == 1 << (len(tensor.shape) - 1)
        shape = (*tensor.shape[:-1], *([1] if keep_dims else []))
        compute = partial(REDUCE[operation], axis=-1, keepdims=keep_dims)
        return self.add([tensor], shape, tensor.known_type, lambda x: compute(wide(x)))

    def add_activation(self, tensor: ITensor, kind: str) -> Layer:
        if kind == "SIGMOID":
            return self.add([tensor], tensor.shape, tensor.known_type, lambda x: 1 / (1 + np.exp(-wide(x))))
        assert kind == "CLIP"
        layer = self.add([tensor], tensor.shape, tensor.known_type, lambda x: np.clip(wide(x), layer.alpha, layer.beta))
        return layer

    def add_matrix_multiply(self, a: ITensor, op_a: str, b: ITensor, op_b: str) -> Layer:
        assert (op_a, op_b) == ("NONE", "TRANSPOSE")
        assert len(a.shape) == len(b.shape), "a matrix multiplication takes two tensors of one rank"
        assert a.dtype == b.dtype, "a matrix multiplication takes two tensors of one type"
        shape = (*a.shape[:-1], b.shape[-2])
        return self.add([a, b], shape, a.known_type, lambda x, w: wide(x) @ wide(w).swapaxes(-1, -2))

    def add_shuffle(self, tensor: ITensor) -> Layer:
        shape = (1, *tensor.shape)
        layer = self.add([tensor], shape, tensor.known_type, lambda x: x.reshape(layer.reshape_dims), Shuffle)
        return layer

    def add_shape(self, tensor: ITensor) -> Layer:
        dtype = DataType.INT64 if MAJOR >= 10 else DataType.INT32
        return self.add([tensor], (len(tensor.shape),), dtype, lambda x: np.array(x.shape))

    def add_slice(self, tensor: ITensor, start: Shape, shape: Shape, stride: Shape) -> Layer:
        assert set(stride) == {1}

        def compute(x: np.ndarray, sizes: Sequence[int] = shape) -> np.ndarray:
            result = x[tuple(slice(first, first + size) for first, size in zip(start, sizes, strict=True))]
            assert result.shape == tuple(sizes), "a slice ends outside of its tensor"
            return result

        return self.add([tensor], tuple(size or -1 for size in shape), tensor.known_type, compute, Slice)

    def add_concatenation(self, tensors: list[ITensor]) -> Layer:
        (dtype,) = {tensor.known_type for tensor in tensors}
        layer = self.add(tensors, tensors[0].shape, dtype, lambda *arrays: np.concatenate(arrays, layer.axis))
        layer.axis = 0
        return layer

    def add_cast(self, tensor: ITensor, dtype: DataType) -> Layer:
        return self.add([tensor], tensor.shape, dtype, lambda x: x)

    def add_quantize(self, tensor: ITensor, scale: ITensor, dtype: DataType = DataType.INT8) -> Layer:
        assert tensor.known_type == scale.known_type == DataType.FLOAT
        low, high, rounded = (-448, 448, np.asarray) if dtype == DataType.FP8 else (-128, 127, np.round)
        return self.add([tensor, scale], tensor.shape, dtype, lambda x, step: rounded(np.clip(x / step, low, high)))

    def add_dequantize(self, tensor: ITensor, scale: ITensor) -> Layer:
        return self.add([tensor, scale], tensor.shape, DataType.FLOAT, np.multiply)

    def add_plugin_v2(self, inputs: list[ITensor], plugin: types.SimpleNamespace) -> Layer:
        dtype = NUMPY_TYPES[DataType(plugin.fields["type_id"])]
        outputs = PLUGIN_OUTPUTS[plugin.name](plugin.fields, [tensor.shape for tensor in inputs])

        def compute(*arrays: np.ndarray) -> Arrays:
            typed = arrays[:1] if plugin.name.startswith("Quantize") else arrays[:2]  # and then scales
            floating = {array.dtype for array in typed if array.dtype.kind != "i"}
            assert floating <= {dtype}, f"{plugin.name} of {dtype} was given {floating}"
            assert floating or "x_type_id" in plugin.fields
            return PLUGINS[plugin.name](plugin.fields, list(arrays))

        plugin.inputs = inputs
        self.plugins.append(plugin)
        self.layers.append(Layer(self, inputs, [(shape, DataType(number)) for shape, number in outputs], compute))
        return self.layers[-1]

    def add_plugin_v3(self, inputs: list[ITensor], shape_inputs: list[ITensor], plugin: Any) -> Layer:
        assert shape_inputs == []
        assert plugin.phase == "build"
        return self.add_plugin_v2(inputs, plugin)


def wide(array: np.ndarray) -> np.ndarray:
    """Convert to float32, in which native layers of networks without types compute; keep integers."""
    return array if array.dtype.kind in "iu" else array.astype(np.float32)


def gather(table: np.ndarray, rows: np.ndarray) -> np.ndarray:
    assert ((rows >= 0) & (rows < len(table))).all(), "a gather of rows that are not there"
    return table[rows]


class Creator:
    plugin_namespace = "qwen_plugins"

    def __init__(self, name: str, version: str) -> None:
        self.name, self.plugin_version = name, version

    def create_plugin(self, layer: str, fields: list[types.SimpleNamespace], phase: str | None = None) -> Any:
        values = {
            field.name: field.array.tolist() if field.array.size > 1 else field.array[0].item() for field in fields
        }
        kinds = {field.name: field.kind for field in fields}
        made = types.SimpleNamespace(name=self.name, layer=layer, fields=values, kinds=kinds, phase=phase)
        made.version = self.plugin_version
        return made


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Shape, Shape, Shape]] = {}

    def set_shape(self, name: str, low: Shape, opt: Shape, high: Shape) -> None:
        self.shapes[name] = low, opt, high


class BuilderConfig:
    def __init__(self) -> None:
        self.profiles: list[Profile] = []
        self.flags: set[str] = set()
        self.cache = b""
        self.profiling_verbosity = ""
        self.hardware_compatibility_level = "none"

    def add_optimization_profile(self, profile: Profile) -> None:
        self.profiles.append(profile)

    def set_flag(self, flag: str) -> None:
        self.flags.add(flag)

    def set_tactic_sources(self, sources: int) -> None:
        assert sources == 0

    def set_preview_feature(self, feature: str, on: bool) -> None:
        self.flags.add(feature)

    def create_timing_cache(self, content: bytes) -> bytes | None:
        return None if content.startswith(b"damaged") else content

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return cache in (b"", b"measured")

    def get_timing_cache(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(serialize=lambda: b"measured")


class Builder:
    def __init__(self, log: Any) -> None:
        self.log = log

    def create_network(self, flags: int) -> INetworkDefinition:
        return INetworkDefinition(MAJOR >= 11 or bool(MAJOR >= 10 and flags & 2))

    def create_builder_config(self) -> BuilderConfig:
        return BuilderConfig()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: INetworkDefinition, config: BuilderConfig) -> Any:
        names = [layer.name for layer in network.layers]
        if len(set(names)) < len(names):
            self.log.log(1, "two layers have one name")
            return None
        for profile in config.profiles:
            dynamic = {tensor.name for tensor in network.inputs if -1 in tensor.shape}
            assert dynamic == set(profile.shapes)
        number = next(NUMBERS)
        PLANS[number] = network, config
        return HEADER + str(number).encode()


class Runtime:
    def __init__(self, log: Any) -> None:
        self.log = log

    def deserialize_cuda_engine(self, plan: Any) -> Engine | None:
        text = bytes(memoryview(plan))
        if not text.startswith(HEADER):
            self.log.log(1, "Serialization assertion failed")
            return None
        if used_bytes() > device.total_bytes // 2:  # the weights, which the stand-in leaves where they are
            self.log.log(1, "Error Code 2: OutOfMemory (no further information)")
            return None
        return Engine(*PLANS[int(text.removeprefix(HEADER))])


class Engine:
    def __init__(self, network: INetworkDefinition, config: BuilderConfig) -> None:
        self.network, self.config = network, config
        self.device = thread.device
        self.tensors = {tensor.name: tensor for tensor in (*network.inputs, *network.outputs)}
        self.names = list(self.tensors)
        self.num_io_tensors = len(self.names)
        self.num_optimization_profiles = len(config.profiles)
        self.num_layers = len(network.layers)
        setattr(self, "device_memory_size_v2" if MAJOR >= 10 else "device_memory_size", 1 << 10)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if self.tensors[name].is_input else "OUTPUT"

    def get_tensor_dtype(self, name: str) -> DataType:
        return self.tensors[name].known_type

    def get_tensor_shape(self, name: str) -> Shape:
        """In TensorRT 8.6 a dimension that has one size in all profiles is static."""
        shape = self.tensors[name].shape
        profiles = [profile.shapes[name] for profile in self.config.profiles if name in profile.shapes]
        if MAJOR >= 10 or not profiles or len({size for sizes in profiles for size in sizes}) > 1:
            return shape
        return tuple(profiles[0][0])

    def get_tensor_profile_shape(self, name: str, profile: int) -> tuple[Shape, ...]:
        return self.config.profiles[profile].shapes.get(name, (self.tensors[name].shape,) * 3)

    def create_execution_context(self, strategy: str) -> Context:
        assert MAJOR >= 10
        return Context(self)

    def create_execution_context_without_device_memory(self) -> Context:
        assert MAJOR < 10
        return Context(self)

    def create_engine_inspector(self) -> types.SimpleNamespace:
        layers = [{"Name": layer.name, "LayerType": type(layer).__name__} for layer in self.network.layers]
        return types.SimpleNamespace(get_engine_information=lambda kind: json.dumps({"Layers": layers}))


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.profile = engine, -1
        self.shapes: dict[str, Shape] = {}
        self.addresses: dict[str, int] = {}
        self.profiler: Any = None
        if MAJOR >= 10:
            self.set_device_memory = lambda address, size: view(address, (size,), np.dtype(np.uint8)) is not None
        self.device_memory = 0

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in self.engine.tensors
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        fits = len(shape) == len(low) and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
        if fits:
            self.shapes[name] = tuple(shape)
        return fits

    def execute_async_v3(self, stream: int) -> bool:
        assert self.engine.device == thread.device, "the engine is on another device"
        network = self.engine.network
        inputs = [
            (tensor, self.addresses[tensor.name], self.shapes[tensor.name] if -1 in tensor.shape else tensor.shape)
            for tensor in network.inputs
        ]
        outputs = [(tensor, self.addresses[tensor.name]) for tensor in network.outputs]
        enqueue(lambda: self._run(inputs, outputs), stream)
        return True

    def _run(self, inputs: list[tuple[ITensor, int, Shape]], outputs: list[tuple[ITensor, int]]) -> None:
        network = self.engine.network
        arrays = {tensor: view(address, shape, NUMPY_TYPES[tensor.known_type]) for tensor, address, shape in inputs}
        for layer in network.layers:
            layer.run(arrays)
            if self.profiler is not None:
                self.profiler.report_layer_time(layer.name, 0.001)
        for tensor, address in outputs:
            result = arrays[tensor]
            target = view(address, result.shape, NUMPY_TYPES[tensor.known_type])
            if result.ctypes.data != address:
                assert not tensor.name.startswith("present"), "the cache was not changed in place"
                target[:] = result


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class IProfiler:
    pass


PLANS: dict[int, tuple[INetworkDefinition, BuilderConfig]] = {}
NUMBERS: Iterator[int] = itertools.count()
MAJOR = 0


def make_module(version: str) -> types.ModuleType:
    """Make the module ``tensorrt`` of a version, with the plug-ins registered. Only one version at a time works."""
    global MAJOR
    MAJOR = int(version.split(".")[0])
    module = types.ModuleType("tensorrt")
    module.__spec__ = ModuleSpec("tensorrt", None)
    creators = [Creator(name, version) for name, versions in PLUGIN_VERSIONS.items() for version in versions]
    others = ("CLIP", "SIGMOID", "NONE", "TRANSPOSE", "FLOAT32", "INT32")
    operations = types.SimpleNamespace(**{name: name for name in (*ELEMENTWISE, *UNARY, *REDUCE, *others)})
    flags = types.SimpleNamespace(FP16="FP16", OBEY_PRECISION_CONSTRAINTS="OBEY_PRECISION_CONSTRAINTS")
    classes = (DataType, ITensor, INetworkDefinition, Weights, Builder, Runtime, ILogger, IProfiler)
    module.__dict__.update(
        __version__=version,
        **{kind.__name__: kind for kind in classes},
        **{
            "float32": DataType.FLOAT,
            "float16": DataType.HALF,
            "int8": DataType.INT8,
            "int32": DataType.INT32,
            "int64": DataType.INT64,
        },
        nptype=NUMPY_TYPES.__getitem__,
        **{f"{kind}Operation": operations for kind in ("ElementWise", "Unary", "Reduce")},
        ActivationType=operations,
        MatrixOperation=operations,
        PluginFieldType=operations,
        PluginField=lambda name, array, kind: types.SimpleNamespace(name=name, array=array, kind=kind),
        PluginFieldCollection=list,
        BuilderFlag=flags,
        HardwareCompatibilityLevel=types.SimpleNamespace(NONE="none", AMPERE_PLUS="ampere plus"),
        TensorFormat=types.SimpleNamespace(LINEAR=0),
        TensorIOMode=types.SimpleNamespace(INPUT="INPUT", OUTPUT="OUTPUT"),
        ProfilingVerbosity=types.SimpleNamespace(DETAILED="detailed"),
        LayerInformationFormat=types.SimpleNamespace(JSON="json"),
        NetworkDefinitionCreationFlag=types.SimpleNamespace(
            **({"EXPLICIT_BATCH": 0} if MAJOR < 10 else {"STRONGLY_TYPED": 1} if MAJOR < 11 else {})
        ),
        get_plugin_registry=lambda: types.SimpleNamespace(
            **{"all_creators" if MAJOR >= 10 else "plugin_creator_list": creators}
        ),
    )
    if MAJOR >= 10:
        module.__dict__.update(
            bfloat16=DataType.BF16,
            fp8=DataType.FP8,
            TensorRTPhase=types.SimpleNamespace(BUILD="build", RUNTIME="runtime"),
            ExecutionContextAllocationStrategy=types.SimpleNamespace(USER_MANAGED="user managed"),
        )
    else:
        flags.DIRECT_IO = "DIRECT_IO"
        module.PreviewFeature = types.SimpleNamespace(PROFILE_SHARING_0806="PROFILE_SHARING_0806")
    return module
