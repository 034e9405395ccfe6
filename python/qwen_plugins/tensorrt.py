"""RMSNorm, alone and with quantization, as layers of a TensorRT network.

Each function adds one operation to an ``INetworkDefinition`` and returns its output tensors: with ``plugin=True`` one
plug-in layer, with ``plugin=False`` the same operation in TensorRT's own layers, to compare with or to run where the
plug-in library is not wanted. Needs the ``tensorrt`` package: 8.6, 10 or 11.

In TensorRT 8.6 (and 10, unless the network is strongly typed) the builder chooses each layer's precision. There,

* a plug-in in float16 needs the builder flag ``FP16``, an int8 output the flag ``INT8``;
* the native layers are marked to compute in float32, which the builder obeys if the flag
  ``OBEY_PRECISION_CONSTRAINTS`` is set: without it the squares of float16 values may overflow.

`configure_builder` sets the flags that a network with these layers needs.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

try:
    import tensorrt as trt
except ImportError as error:
    raise ImportError(
        f'qwen_plugins.tensorrt needs the tensorrt package: pip install "qwen-plugins[tensorrt]" ({error})'
    ) from error

from ._tensorrt_native import NativeLayers, is_strongly_typed
from ._tensorrt_registration import PLUGIN_NAMESPACE, find_creator, register_tensorrt_plugins

__all__ = ["configure_builder", "rms_norm", "rms_norm_quant"]

_MAJOR = int(trt.__version__.split(".")[0])


def rms_norm(
    network: Any,
    x: Any,
    weight: Any,
    eps: float = 1e-6,
    residual: Any = None,
    *,
    unit_offset: bool = False,
    round_before_weight: bool = False,
    dtype: Any = None,
    plugin: bool = True,
    name: str | None = None,
) -> Any:
    """Adds y = h / sqrt(mean(h²) + eps) · weight over the last dimension, where h = x + residual, or x without one.

    Args:
        network: ``INetworkDefinition`` to add to.
        x: ``ITensor`` of shape [..., hidden_size], float32, float16 or (TensorRT 10 and later) bfloat16.
        weight: [hidden_size], an ``ITensor`` or an array; of ``dtype``, or float32. An array of another
            floating-point type is converted to ``dtype``.
        eps: added to the mean square, above 0.
        residual: ``ITensor`` of the shape and type of x, or None.
        unit_offset: multiply with weight + 1 (Gemma, Qwen3-Next).
        round_before_weight: round to ``dtype`` before the product with the weight, as Hugging Face's modules do.
        dtype: ``tensorrt.DataType`` of x, residual and y; ``x.dtype`` by default. To be named in TensorRT 8.6 where it
            reports float32 for a tensor that it will compute in float16.
        plugin: one RmsNorm plug-in layer, or TensorRT's own layers.
        name: of the layer, and prefix of the names of native layers; no two layers of a network may share one. By
            default rms_norm with a number.

    Returns:
        y, an ``ITensor`` with the shape of x; with a residual, (y, x + residual).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value.
        RuntimeError: TensorRT refused the layer; its log has the reason.
    """
    arguments = _Arguments(network, x, weight, eps, residual, dtype, name or _free_name(network, "rms_norm"), plugin)
    if plugin:
        fields = arguments.fields() | {
            "unit_offset": int(unit_offset),
            "round_before_weight": int(round_before_weight),
        }
        inputs = [x, arguments.weight, *([] if residual is None else [residual])]
        outputs = _add_plugin(network, "RmsNorm", inputs, fields, arguments.name)
        _set_output_types(network, outputs, [arguments.dtype] * len(outputs))
        return outputs[0] if residual is None else tuple(outputs)

    native = NativeLayers(network, arguments.name)
    h, y = native.rms_norm(
        x,
        arguments.weight,
        eps,
        residual,
        arguments.dtype,
        unit_offset=unit_offset,
        round_before_weight=round_before_weight,
    )
    y = native.cast(y, arguments.dtype)
    return y if residual is None else (y, h)


def rms_norm_quant(
    network: Any,
    x: Any,
    weight: Any,
    eps: float = 1e-6,
    *,
    quant_dtype: Any = trt.int8,
    scale: Any = None,
    smoothing: Any = None,
    residual: Any = None,
    unit_offset: bool = False,
    dtype: Any = None,
    plugin: bool = True,
    name: str | None = None,
) -> Any:
    """Adds `rms_norm` followed by quantization: q = saturate(round(y / smoothing / scale)).

    Args:
        network, x, weight, eps, residual, unit_offset, dtype, plugin, name: as in `rms_norm`.
        quant_dtype: ``tensorrt.int8``, or ``tensorrt.fp8`` (float8_e4m3fn) from TensorRT 10 on.
        scale: one float32, an ``ITensor`` of shape [] or [1] or a number: static quantization, per tensor. None:
            dynamic, per row, the scales being an output.
        smoothing: [hidden_size], an ``ITensor`` or an array, of ``dtype`` or float32: the divisor of each channel
            (SmoothQuant, Xiao et al. 2022).

    Returns:
        q with the shape of x; then, in dynamic quantization, the scales, float32 of shape [..., 1]; then, with a
        residual, x + residual. A tuple where there is more than q.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value.
        RuntimeError: TensorRT refused the layer; its log has the reason.
    """
    arguments = _Arguments(
        network, x, weight, eps, residual, dtype, name or _free_name(network, "rms_norm_quant"), plugin
    )
    _check_quant_dtype(quant_dtype)
    smoothing = None if smoothing is None else arguments.channels(smoothing, "smoothing", trt.float32)
    scale = None if scale is None else arguments.per_tensor(scale, "scale")
    if plugin:
        outputs = _add_quantization_plugin(arguments, quant_dtype, scale, smoothing, unit_offset)
    else:
        native = NativeLayers(network, arguments.name)
        h, y = native.rms_norm(x, arguments.weight, eps, residual, arguments.dtype, unit_offset=unit_offset)
        outputs = native.quantize(y, quant_dtype, scale, smoothing)
        outputs += [] if residual is None else [h]
    if quant_dtype == trt.int8 and not is_strongly_typed(network):
        _set_ranges(outputs)
        if plugin and residual is not None:
            _declare_types_explicit(network)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def configure_builder(config: Any, network: Any) -> None:
    """Sets the flags of an ``IBuilderConfig`` that the layers of a finished network need, and no other.

    In a network that is not strongly typed: ``FP16``, ``OBEY_PRECISION_CONSTRAINTS``, ``BF16`` where there is one, and
    ``INT8`` if there is an int8 tensor: TensorRT wants scales for the others otherwise. In a strongly typed network the
    tensors' own types say everything, and nothing is set.
    """
    if is_strongly_typed(network):
        return
    flags = ["FP16", "BF16", "OBEY_PRECISION_CONSTRAINTS", *(["INT8"] if _has_int8(network) else [])]
    for flag in flags:
        if hasattr(trt.BuilderFlag, flag):
            config.set_flag(getattr(trt.BuilderFlag, flag))


class _Arguments:
    """Checks what both functions take; `weight` becomes a tensor."""

    def __init__(
        self, network: Any, x: Any, weight: Any, eps: float, residual: Any, dtype: Any, name: str, plugin: bool
    ) -> None:
        if not isinstance(network, trt.INetworkDefinition):
            raise TypeError(f"network is a {type(network).__name__}; expected a tensorrt.INetworkDefinition")
        self.network, self.x, self.residual, self.eps, self.name = network, x, residual, float(eps), name
        if not np.isfinite(self.eps) or self.eps <= 0:
            raise ValueError(f"eps is {eps}; expected a finite number above 0")
        self.shape = _tensor_shape(x, "x")
        if not self.shape:
            raise ValueError("x has no dimensions; expected [..., hidden_size]")
        self.dtype = x.dtype if dtype is None else dtype
        if self.dtype not in _floating_types():
            raise TypeError(f"x has type {self.dtype}; expected one of {', '.join(map(str, _floating_types()))}")
        if residual is not None:
            self._check_residual()
        self.plugin = plugin
        self.types: dict[str, Any] = {}  # of the weight and the smoothing; TensorRT 8.6 forgets those of constants
        self.weight = self.channels(weight, "weight", self.dtype)

    def _check_residual(self) -> None:
        shape = _tensor_shape(self.residual, "residual")
        fits = len(shape) == len(self.shape) and all(
            _may_be_equal(a, b) for a, b in zip(shape, self.shape, strict=True)
        )
        if not fits:
            raise ValueError(f"residual has shape {shape}; expected that of x, {self.shape}")

    def channels(self, value: Any, what: str, default_type: Any) -> Any:
        """A tensor of shape [hidden_size] from a tensor or an array."""
        hidden_size = self.shape[-1]
        expected = f"expected [{'hidden_size' if hidden_size < 0 else hidden_size}], the last dimension of x"
        if isinstance(value, trt.ITensor):
            shape = tuple(value.shape)
        else:
            value = _as_array(value, what)
            shape = value.shape
        if len(shape) != 1 or not _may_be_equal(shape[0], hidden_size):
            raise ValueError(f"{what} has shape {shape}; {expected}")
        if not isinstance(value, trt.ITensor):
            self.types[what] = trt.float32 if value.dtype == np.float32 else default_type
            # A plug-in reads it as it is; for native layers TensorRT may fold a conversion into the constant.
            native = NativeLayers(self.network, self.name)
            return native.constant(value, self.types[what], what, keeps_type=self.plugin)
        if value.dtype not in (self.dtype, trt.float32):
            raise TypeError(f"{what} has type {value.dtype}; expected {self.dtype} or {trt.float32}")
        self.types[what] = value.dtype
        return value

    def per_tensor(self, value: Any, what: str) -> Any:
        """A float32 tensor of one element from a tensor or a number."""
        if isinstance(value, trt.ITensor):
            if tuple(value.shape) not in ((), (1,)) or value.dtype != trt.float32:
                raise ValueError(
                    f"{what} is {value.dtype} of shape {tuple(value.shape)}; expected float32 of shape [] or [1]"
                )
            return value
        array = _as_array(value, what)
        if array.size != 1 or not np.isfinite(array).all() or float(array.reshape(())) <= 0:
            raise ValueError(f"{what} is {value!r}; expected one finite number above 0")
        return NativeLayers(self.network, self.name).constant(array.reshape(1), trt.float32, what)

    def fields(self) -> dict[str, int | float]:
        return {
            "eps": self.eps,
            "type_id": int(self.dtype),
            "weight_type_id": int(self.types["weight"]),
            "residual": int(self.residual is not None),
        }


def _add_quantization_plugin(
    arguments: _Arguments, quant_dtype: Any, scale: Any, smoothing: Any, unit_offset: bool
) -> list[Any]:
    fields = arguments.fields() | {
        "dyn_act_scaling": int(scale is None),
        "out_type_id": int(quant_dtype),
        "smoothing": int(smoothing is not None),
        "unit_offset": int(unit_offset),
    }
    if smoothing is not None:
        fields["smoothing_type_id"] = int(arguments.types["smoothing"])
    optional = (arguments.residual, scale, smoothing)
    inputs = [arguments.x, arguments.weight, *(tensor for tensor in optional if tensor is not None)]
    outputs = _add_plugin(arguments.network, "RmsNormQuantization", inputs, fields, arguments.name)
    types = [quant_dtype, *([trt.float32] if scale is None else [])]
    types += [arguments.dtype] if arguments.residual is not None else []
    _set_output_types(arguments.network, outputs, types)
    return outputs


def _add_plugin(
    network: Any, plugin_name: str, inputs: Sequence[Any], fields: dict[str, int | float], layer_name: str
) -> list[Any]:
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
    if _MAJOR >= 10:
        plugin = creator.create_plugin(layer_name, collection, trt.TensorRTPhase.BUILD)
    else:
        plugin = creator.create_plugin(layer_name, collection)
    if plugin is None:
        raise RuntimeError(f"TensorRT could not create the plug-in {plugin_name} from {fields}; its log has the reason")
    if _MAJOR >= 10:
        layer = network.add_plugin_v3(list(inputs), [], plugin)
    else:
        layer = network.add_plugin_v2(list(inputs), plugin)
    if layer is None:
        raise RuntimeError(f"TensorRT could not add the plug-in {plugin_name}; its log has the reason")
    layer.name = layer_name
    return [layer.get_output(i) for i in range(layer.num_outputs)]


def _set_output_types(network: Any, outputs: Sequence[Any], types: Sequence[Any]) -> None:
    """Set the types of the outputs of the network's last layer, a plug-in.

    Where the builder chooses types, TensorRT 8.6 calls all of them float32, and converts a network's outputs to that,
    unless both the layer and the tensor say otherwise.
    """
    if is_strongly_typed(network):
        return
    layer = network.get_layer(network.num_layers - 1)
    for i, (tensor, dtype) in enumerate(zip(outputs, types, strict=True)):
        layer.set_output_type(i, dtype)
        tensor.dtype = dtype


def _set_ranges(outputs: Sequence[Any]) -> None:
    """Tell a network that is not strongly typed that one step of the int8 tensor is 1: the range is 127 steps.

    The other outputs of the layer have no int8 form, but TensorRT 8.6 refuses the layer while one of them has no range:
    they get that of float16.
    """
    outputs[0].set_dynamic_range(-127.0, 127.0)
    for tensor in outputs[1:]:
        tensor.set_dynamic_range(-65504.0, 65504.0)


def _declare_types_explicit(network: Any) -> None:
    """Add, once, a quantization and dequantization of a constant, which nothing uses.

    Without any, TensorRT 8.6 decides which tensors are int8, and refuses a layer with an int8 output whose other output
    feeds a layer in floating point: every layer of a decoder with the residual. With one, it takes the types as set.
    """
    name = "explicit_types"
    if any(network.get_layer(i).name.startswith(name) for i in range(network.num_layers)):
        return
    native = NativeLayers(network, name)
    one = native.constant(np.ones((), np.float32), trt.float32, "one")
    value = native.constant(np.ones(1, np.float32), trt.float32, "value")
    network.add_dequantize(network.add_quantize(value, one).get_output(0), one)


def _has_int8(network: Any) -> bool:
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    tensors = [layer.get_output(i) for layer in layers for i in range(layer.num_outputs)]
    return any(tensor.dtype == trt.int8 or tensor.dynamic_range is not None for tensor in tensors)


def _floating_types() -> tuple[Any, ...]:
    return (trt.float32, trt.float16, *([trt.bfloat16] if hasattr(trt, "bfloat16") else []))


def _check_quant_dtype(quant_dtype: Any) -> None:
    allowed = [trt.int8, *([trt.fp8] if _MAJOR >= 10 else [])]
    if quant_dtype not in allowed:
        raise ValueError(f"quant_dtype is {quant_dtype}; a plug-in gives {' or '.join(map(str, allowed))}")


def _free_name(network: Any, prefix: str) -> str:
    return f"{prefix}_{getattr(network, 'num_layers', 0)}"  # not yet known to be a network


def _tensor_shape(tensor: Any, what: str) -> tuple[int, ...]:
    if not isinstance(tensor, trt.ITensor):
        raise TypeError(f"{what} is a {type(tensor).__name__}; expected a tensorrt.ITensor")
    return tuple(tensor.shape)


def _as_array(value: Any, what: str) -> np.ndarray:
    array = np.asarray(value)
    # ml_dtypes' bfloat16 is no subtype of np.floating, but converts to one.
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        raise TypeError(f"{what} has type {array.dtype}; expected a floating-point array or a tensorrt.ITensor")
    return array


def _may_be_equal(a: int, b: int) -> bool:
    return a == b or a < 0 or b < 0
