"""Add a plug-in's layer, set the types of its outputs and check arguments, for the functions of every plug-in.

A check raises TypeError for a wrong type of argument or tensor, and ValueError for a wrong value or shape. Messages are
worded like those that the plug-ins log: what the argument is, then what was expected.
"""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorrt as trt

from .._numbers import CODE_TYPES
from ..registration import PLUGIN_NAMESPACE, find_creator, register_tensorrt_plugins
from .native import MAJOR, NativeLayers, is_strongly_typed

CODES_OF_INT32 = 4
"""Codes of 8 bits in each number of a tensor that is int32 to TensorRT."""


def add_plugin(
    network: Any,
    plugin_name: str,
    inputs: Sequence[Any],
    fields: Mapping[str, int | float | list[int]],
    layer_name: str,
    output_types: Sequence[Any],
    version: str | None = None,
) -> list[Any]:
    """Add a layer of a plug-in and return its outputs; RuntimeError where TensorRT refuses it.

    version: of the plug-in; None: the newest.
    """
    creator = find_creator(trt, plugin_name, version) if register_tensorrt_plugins() else None
    if creator is None:
        raise RuntimeError(
            f"the plug-in {PLUGIN_NAMESPACE}::{plugin_name} is not registered in TensorRT {trt.__version__}"
        )
    # The arrays must outlive create_plugin: a PluginField refers to their memory.
    arrays = {
        key: np.array(value, np.float32 if isinstance(value, float) else np.int32, ndmin=1)
        for key, value in fields.items()
    }
    collection = trt.PluginFieldCollection(
        [
            trt.PluginField(key, array, getattr(trt.PluginFieldType, str(array.dtype).upper()))
            for key, array in arrays.items()
        ]
    )
    if MAJOR >= 10:
        plugin = creator.create_plugin(layer_name, collection, trt.TensorRTPhase.BUILD)
    else:
        plugin = creator.create_plugin(layer_name, collection)
    if plugin is None:
        raise RuntimeError(f"TensorRT could not create the plug-in {plugin_name} from {fields}; its log has the reason")
    if MAJOR >= 10:
        layer = network.add_plugin_v3(list(inputs), [], plugin)
    else:
        layer = network.add_plugin_v2(list(inputs), plugin)
    if layer is None:
        raise RuntimeError(f"TensorRT could not add the plug-in {plugin_name}; its log has the reason")
    layer.name = layer_name
    outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
    if not is_strongly_typed(network):
        _set_output_types(layer, outputs, output_types)
    return outputs


def _set_output_types(layer: Any, outputs: Sequence[Any], types: Sequence[Any]) -> None:
    """Set the types of a layer's outputs, in the layer and in the tensors.

    Where the builder chooses types, TensorRT 8.6 treats all outputs as float32, and converts a network's outputs to
    float32, unless both the layer and the tensor say otherwise.
    """
    for i, (tensor, dtype) in enumerate(zip(outputs, types, strict=True)):
        layer.set_output_type(i, dtype)
        tensor.dtype = dtype


def parameter(layers: NativeLayers, value: Any, expected: Sequence[int], what: str, meaning: str, dtype: Any) -> Any:
    """Return a tensor of that shape and type: the one given, or a constant for an array."""
    if isinstance(value, trt.ITensor):
        check_shape(value.shape, expected, what, meaning)
        if layers.typed:  # TensorRT 8.6 reports float32 for the tensors inside a network
            check_type(value, dtype, what)
        return value
    array = as_array(value, what)
    check_shape(array.shape, expected, what, meaning)
    return layers.constant(array, dtype, what, keeps_type=True)


def one_scale(layers: NativeLayers, value: Any, what: str) -> Any:
    """Return a float32 tensor of one element for a tensor or a number above 0."""
    if isinstance(value, trt.ITensor):
        check_type(value, trt.float32, what)
        if tuple(value.shape) not in ((), (1,)):
            raise ValueError(f"{what} has shape {tuple(value.shape)}; expected [] or [1]")
        return value
    array = as_array(value, what)
    if array.size != 1 or not np.isfinite(array).all() or float(array.reshape(())) <= 0:
        raise ValueError(f"{what} is {value!r}; expected one finite number above 0")
    return layers.constant(array.reshape(1), trt.float32, what)


def check_code_type(name: Any, what: str) -> None:
    """Raise ValueError unless it is the name of a type of codes that are int32 to TensorRT."""
    if name not in CODE_TYPES:
        raise ValueError(f"{what} is {name!r}; expected one of {', '.join(map(repr, CODE_TYPES))}")


def check_words(shape: Sequence[int], what: str) -> None:
    """Raise ValueError unless the last dimension is known and divides into int32 numbers of four codes."""
    if not shape or shape[-1] < 1 or shape[-1] % CODES_OF_INT32:
        raise ValueError(f"{what} has shape {tuple(shape)}; expected a last dimension that is a known multiple of 4")


def check_network(network: Any) -> None:
    """Raise TypeError unless it is an ``INetworkDefinition``."""
    if not isinstance(network, trt.INetworkDefinition):
        raise TypeError(f"network is a {type(network).__name__}; expected a tensorrt.INetworkDefinition")


def checked_dtype(dtype: Any, tensor: Any, what: str) -> Any:
    """Return ``dtype``, or the tensor's for None; TypeError for a type that the plug-ins do not compute in."""
    dtype = tensor.dtype if dtype is None else dtype
    if dtype not in floating_types():
        raise TypeError(f"{what} has type {dtype}; expected one of {', '.join(map(str, floating_types()))}")
    return dtype


def check_type(tensor: Any, dtype: Any, what: str) -> None:
    """Raise TypeError where a tensor has another type."""
    if tensor.dtype != dtype:
        raise TypeError(f"{what} has type {tensor.dtype}; expected {dtype}")


def check_positive(value: float, what: str) -> None:
    """Check for a finite number above 0."""
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{what} is a {type(value).__name__}; expected a number")
    if not np.isfinite(value) or value <= 0:
        raise ValueError(f"{what} is {value}; expected a finite number above 0")


def check_shape(shape: Sequence[int], expected: Sequence[int], what: str, meaning: str) -> None:
    """Raise ValueError for another shape; -1 on either side fits anything."""
    shape = tuple(shape)
    if len(shape) != len(expected) or not all(map(may_be_equal, shape, expected)):
        raise ValueError(f"{what} has shape {shape}; expected {meaning}, here {tuple(expected)}")


def floating_types() -> tuple[Any, ...]:
    """Return the types that the plug-ins compute in, with this TensorRT."""
    return (trt.float32, trt.float16, *([trt.bfloat16] if hasattr(trt, "bfloat16") else []))


def free_name(network: Any, prefix: str) -> str:
    """Return a name that no layer of the network has."""
    return f"{prefix}_{network.num_layers}"


def tensor_shape(tensor: Any, what: str) -> tuple[int, ...]:
    """Return a tensor's shape, -1 where it is not known; TypeError for what is not an ``ITensor``."""
    if not isinstance(tensor, trt.ITensor):
        raise TypeError(f"{what} is a {type(tensor).__name__}; expected a tensorrt.ITensor")
    return tuple(tensor.shape)


def as_array(value: Any, what: str) -> np.ndarray:
    """Return an array of numbers, not copied if it is one already; TypeError for what holds no numbers."""
    array = np.asarray(value)
    # ml_dtypes' bfloat16 is no subtype of np.floating, but converts to one.
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        raise TypeError(f"{what} has type {array.dtype}; expected a floating-point array or a tensorrt.ITensor")
    return array


def may_be_equal(a: int, b: int) -> bool:
    """Return whether two dimensions may be equal; -1 is not known yet."""
    return a == b or a < 0 or b < 0
