"""What the functions of every plug-in share: the layer itself, the types of its outputs, checks of arguments."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorrt as trt

from ..registration import PLUGIN_NAMESPACE, find_creator, register_tensorrt_plugins
from .native import MAJOR, NativeLayers, is_strongly_typed


def add_plugin(
    network: Any,
    plugin_name: str,
    inputs: Sequence[Any],
    fields: Mapping[str, int | float],
    layer_name: str,
    output_types: Sequence[Any],
) -> list[Any]:
    """One plug-in layer; its outputs, of ``output_types``. RuntimeError where TensorRT refuses it."""
    creator = find_creator(trt, plugin_name) if register_tensorrt_plugins() else None
    if creator is None:
        raise RuntimeError(
            f"the plug-in {PLUGIN_NAMESPACE}::{plugin_name} is not registered in TensorRT {trt.__version__}"
        )
    # The arrays must outlive create_plugin: a PluginField refers to their memory.
    arrays = {
        key: np.array([value], np.float32 if isinstance(value, float) else np.int32) for key, value in fields.items()
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
    """Say the types of a layer's outputs twice.

    Where the builder chooses types, TensorRT 8.6 calls all of them float32, and converts a network's outputs to that,
    unless both the layer and the tensor say otherwise.
    """
    for i, (tensor, dtype) in enumerate(zip(outputs, types, strict=True)):
        layer.set_output_type(i, dtype)
        tensor.dtype = dtype


def parameter(layers: NativeLayers, value: Any, expected: Sequence[int], what: str, meaning: str, dtype: Any) -> Any:
    """A tensor, or an array as a constant, of that shape and type."""
    if isinstance(value, trt.ITensor):
        check_shape(value.shape, expected, what, meaning)
        if layers.typed:  # TensorRT 8.6 calls the tensors inside a network float32
            check_type(value, dtype, what)
        return value
    array = as_array(value, what)
    check_shape(array.shape, expected, what, meaning)
    return layers.constant(array, dtype, what, keeps_type=True)


def check_network(network: Any) -> None:
    """TypeError unless it is an ``INetworkDefinition``."""
    if not isinstance(network, trt.INetworkDefinition):
        raise TypeError(f"network is a {type(network).__name__}; expected a tensorrt.INetworkDefinition")


def checked_dtype(dtype: Any, tensor: Any, what: str) -> Any:
    """``dtype``, by default that of the tensor; TypeError if it is not a floating-point type that plug-ins take."""
    dtype = tensor.dtype if dtype is None else dtype
    if dtype not in floating_types():
        raise TypeError(f"{what} has type {dtype}; expected one of {', '.join(map(str, floating_types()))}")
    return dtype


def check_type(tensor: Any, dtype: Any, what: str) -> None:
    """TypeError where a tensor's known type is another."""
    if tensor.dtype != dtype:
        raise TypeError(f"{what} has type {tensor.dtype}; expected {dtype}")


def check_positive(value: float, what: str) -> None:
    """ValueError unless it is a finite number above 0."""
    if not np.isfinite(value) or value <= 0:
        raise ValueError(f"{what} is {value}; expected a finite number above 0")


def check_shape(shape: Sequence[int], expected: Sequence[int], what: str, meaning: str) -> None:
    """ValueError where a shape can't be that; -1 on either side fits anything."""
    shape = tuple(shape)
    if len(shape) != len(expected) or not all(map(may_be_equal, shape, expected)):
        raise ValueError(f"{what} has shape {shape}; expected {meaning}, here {tuple(expected)}")


def floating_types() -> tuple[Any, ...]:
    """What the plug-ins compute in, with this TensorRT."""
    return (trt.float32, trt.float16, *([trt.bfloat16] if hasattr(trt, "bfloat16") else []))


def free_name(network: Any, prefix: str) -> str:
    """A name for a layer that no other layer has."""
    return f"{prefix}_{getattr(network, 'num_layers', 0)}"  # not yet known to be a network


def tensor_shape(tensor: Any, what: str) -> tuple[int, ...]:
    """Its shape, -1 where it is not known; TypeError if it is no ``ITensor``."""
    if not isinstance(tensor, trt.ITensor):
        raise TypeError(f"{what} is a {type(tensor).__name__}; expected a tensorrt.ITensor")
    return tuple(tensor.shape)


def as_array(value: Any, what: str) -> np.ndarray:
    """As an array of numbers, not copied if it is one; TypeError otherwise."""
    array = np.asarray(value)
    # ml_dtypes' bfloat16 is no subtype of np.floating, but converts to one.
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        raise TypeError(f"{what} has type {array.dtype}; expected a floating-point array or a tensorrt.ITensor")
    return array


def may_be_equal(a: int, b: int) -> bool:
    """Of two dimensions; -1 is not known yet."""
    return a == b or a < 0 or b < 0
