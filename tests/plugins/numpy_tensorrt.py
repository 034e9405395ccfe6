"""A stand-in for the tensorrt module, of any version: layers compute at once with NumPy, plug-ins are written down.

It has what `qwen_plugins.tensorrt` uses, so that the functions for TensorRT 10 and 11 can be run where only 8.6 can be
had, and the arithmetic of the native layers can be checked without a GPU.
"""

import ctypes
import enum
import types
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np


class DataType(enum.Enum):
    FLOAT, HALF, INT8, INT32, FP8, BF16 = 0, 1, 2, 3, 6, 7

    def __int__(self) -> int:
        return self.value


NUMPY_TYPES = {
    DataType.FLOAT: np.dtype(np.float32),
    DataType.HALF: np.dtype(np.float16),
    DataType.INT8: np.dtype(np.int8),
    DataType.INT32: np.dtype(np.int32),
    DataType.FP8: np.dtype(ml_dtypes.float8_e4m3fn),
    DataType.BF16: np.dtype(ml_dtypes.bfloat16),
}
ELEMENTWISE = {"SUM": np.add, "PROD": np.multiply, "DIV": np.divide, "MAX": np.maximum}
UNARY = {"SQRT": np.sqrt, "ABS": np.abs, "ROUND": np.round}
REDUCE = {"AVG": np.mean, "MAX": np.max}


class ITensor:
    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.dtype = next(dtype for dtype, known in NUMPY_TYPES.items() if known == array.dtype)
        self.dynamic_range: tuple[float, float] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def set_dynamic_range(self, low: float, high: float) -> None:
        self.dynamic_range = (low, high)


class Layer:
    """Computes its outputs when they are first asked for: attributes are set before that."""

    def __init__(self, compute: Callable[["Layer"], list[np.ndarray]], num_outputs: int = 1) -> None:
        self.compute = compute
        self.num_outputs = num_outputs
        self.name = ""
        self.outputs: list[ITensor] | None = None
        self.output_types: dict[int, DataType] = {}

    def get_output(self, index: int) -> ITensor:
        if self.outputs is None:
            self.outputs = [ITensor(array) for array in self.compute(self)]
        return self.outputs[index]

    def set_output_type(self, index: int, dtype: DataType) -> None:
        self.output_types[index] = dtype


class Weights:
    def __init__(self, array_or_type: Any, address: int = 0, count: int = 0) -> None:
        if isinstance(array_or_type, np.ndarray):
            self.array = array_or_type
        else:  # type, address and number of elements
            dtype = NUMPY_TYPES[array_or_type]
            self.array = np.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(address), dtype)

    size = property(lambda self: self.array.size)
    dtype = property(lambda self: ITensor(self.array).dtype)


class INetworkDefinition:
    def __init__(self, strongly_typed: bool) -> None:
        self.strongly_typed = strongly_typed
        self.layers: list[Layer] = []
        self.plugins: list[types.SimpleNamespace] = []

    num_layers = property(lambda self: len(self.layers))

    def get_layer(self, index: int) -> Layer:
        return self.layers[index]

    def get_flag(self, flag: object) -> bool:
        return self.strongly_typed

    def add(self, compute: Callable[[Layer], np.ndarray]) -> Layer:
        self.layers.append(Layer(lambda layer: [compute(layer)]))
        return self.layers[-1]

    def add_constant(self, shape: tuple[int, ...], weights: Weights) -> Layer:
        return self.add(lambda _: weights.array.reshape(shape))

    def add_elementwise(self, a: ITensor, b: ITensor, operation: str) -> Layer:
        assert a.dtype == b.dtype, "elementwise layers take two tensors of one type"
        assert len(a.shape) == len(b.shape), "elementwise layers take two tensors of one rank"
        return self.add(lambda _: ELEMENTWISE[operation](a.array, b.array))

    def add_unary(self, tensor: ITensor, operation: str) -> Layer:
        return self.add(lambda _: UNARY[operation](tensor.array))

    def add_reduce(self, tensor: ITensor, operation: str, axes: int, keep_dims: bool) -> Layer:
        chosen = tuple(axis for axis in range(len(tensor.shape)) if axes >> axis & 1)
        return self.add(lambda _: REDUCE[operation](tensor.array, axis=chosen, keepdims=keep_dims))

    def add_activation(self, tensor: ITensor, kind: str) -> Layer:
        assert kind == "CLIP"
        return self.add(lambda layer: np.clip(tensor.array, np.float32(layer.alpha), np.float32(layer.beta)))

    def add_shuffle(self, tensor: ITensor) -> Layer:
        return self.add(lambda layer: tensor.array.reshape(layer.reshape_dims))

    def add_cast(self, tensor: ITensor, dtype: DataType) -> Layer:
        return self.add(lambda _: tensor.array.astype(NUMPY_TYPES[dtype]))

    def add_quantize(self, tensor: ITensor, scale: ITensor, dtype: DataType = DataType.INT8) -> Layer:
        assert tensor.dtype == scale.dtype == DataType.FLOAT
        low, high = (-448, 448) if dtype == DataType.FP8 else (-128, 127)
        scaled = np.clip(tensor.array / scale.array, low, high)
        return self.add(lambda _: (np.round(scaled) if dtype == DataType.INT8 else scaled).astype(NUMPY_TYPES[dtype]))

    def add_dequantize(self, tensor: ITensor, scale: ITensor) -> Layer:
        return self.add(lambda _: tensor.array * scale.array)

    def add_plugin_v2(self, inputs: list[ITensor], plugin: types.SimpleNamespace) -> Layer:
        return self.add_plugin(inputs, plugin)

    def add_plugin_v3(self, inputs: list[ITensor], shape_inputs: list[ITensor], plugin: types.SimpleNamespace) -> Layer:
        assert shape_inputs == []
        return self.add_plugin(inputs, plugin)

    def add_plugin(self, inputs: list[ITensor], plugin: types.SimpleNamespace) -> Layer:
        plugin.inputs = inputs
        self.plugins.append(plugin)
        if plugin.name == "GptAttention":
            outputs = [inputs[0].array, inputs[1].array]
        else:
            num_outputs = 1 + plugin.fields.get("residual", 0) + plugin.fields.get("dyn_act_scaling", 0)
            outputs = [inputs[0].array] * num_outputs
        layer = Layer(lambda _: outputs, len(outputs))
        self.layers.append(layer)
        return layer


class Creator:
    plugin_version, plugin_namespace = "1", "qwen_plugins"

    def __init__(self, name: str) -> None:
        self.name = name

    def create_plugin(self, layer: str, fields: list[types.SimpleNamespace], phase: str | None = None) -> Any:
        values = {field.name: field.array[0].item() for field in fields}
        kinds = {field.name: field.kind for field in fields}
        return types.SimpleNamespace(name=self.name, layer=layer, fields=values, kinds=kinds, phase=phase)


def make_module(version: str) -> types.ModuleType:
    """The module ``tensorrt`` of that version, its plug-ins registered."""
    module = types.ModuleType("tensorrt")
    module.__spec__ = types.SimpleNamespace(name="tensorrt")
    creators = [Creator(name) for name in ("RmsNorm", "RmsNormQuantization", "Gemm", "GptAttention")]
    major = int(version.split(".")[0])
    names = {name: name for name in (*ELEMENTWISE, *UNARY, *REDUCE, "CLIP", "FLOAT32", "INT32")}
    operations = types.SimpleNamespace(**names)
    module.__dict__.update(
        __version__=version,
        **{"DataType": DataType, "ITensor": ITensor, "INetworkDefinition": INetworkDefinition, "Weights": Weights},
        **{"float32": DataType.FLOAT, "float16": DataType.HALF, "int8": DataType.INT8, "int32": DataType.INT32},
        fp8=DataType.FP8,
        nptype=NUMPY_TYPES.__getitem__,
        **{f"{kind}Operation": operations for kind in ("ElementWise", "Unary", "Reduce")},
        ActivationType=operations,
        PluginFieldType=operations,
        PluginField=lambda name, array, kind: types.SimpleNamespace(name=name, array=array, kind=kind),
        PluginFieldCollection=list,
        get_plugin_registry=lambda: types.SimpleNamespace(
            **{"all_creators" if major >= 10 else "plugin_creator_list": creators}
        ),
    )
    if major >= 10:
        module.__dict__.update(
            bfloat16=DataType.BF16,
            TensorRTPhase=types.SimpleNamespace(BUILD="build", RUNTIME="runtime"),
            NetworkDefinitionCreationFlag=types.SimpleNamespace(STRONGLY_TYPED="strongly typed"),
        )
    return module
