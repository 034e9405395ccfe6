"""Add RMSNorm, alone and with quantization: the plug-ins, or TensorRT's own layers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorrt as trt

from .._numbers import CODE_TYPES
from .layers import (
    add_plugin,
    as_array,
    check_code_type,
    check_network,
    check_positive,
    check_words,
    checked_dtype,
    free_name,
    may_be_equal,
    one_scale,
    tensor_shape,
)
from .native import MAJOR, NativeLayers, is_strongly_typed


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
    """Add y = h / sqrt(mean(h²) + eps) · weight over the last dimension, with h = x + residual, or h = x without one.

    Args:
        network: ``INetworkDefinition`` to add to.
        x: ``ITensor`` of shape [..., hidden_size], float32, float16 or (TensorRT 10 and later) bfloat16.
        weight: [hidden_size], an ``ITensor`` or an array; of ``dtype``, or float32. An array of another
            floating-point type is converted to ``dtype``.
        eps: added to the mean square, above 0.
        residual: ``ITensor`` of the shape and type of x, or None.
        unit_offset: multiply by weight + 1 (Gemma, Qwen3-Next).
        round_before_weight: round to ``dtype`` before multiplying by the weight, as Hugging Face's modules do.
        dtype: ``tensorrt.DataType`` of x, residual and y; None: ``x.dtype``. Pass it in TensorRT 8.6 where x reports
            float32 but will be computed in float16.
        plugin: True: one RmsNorm plug-in layer; False: TensorRT's own layers.
        name: of the layer, and prefix of the names of native layers, unique in the network; None: rms_norm with a
            number.

    Returns:
        y, an ``ITensor`` with the shape of x; with a residual, (y, x + residual).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value.
        RuntimeError: TensorRT refused the layer; its log has the reason.
    """
    check_network(network)
    arguments = _Arguments(network, x, weight, eps, residual, dtype, name or free_name(network, "rms_norm"), plugin)
    if plugin:
        fields = arguments.fields() | {
            "unit_offset": int(unit_offset),
            "round_before_weight": int(round_before_weight),
        }
        inputs = [x, arguments.weight, *([] if residual is None else [residual])]
        types = [arguments.dtype] * (1 if residual is None else 2)
        outputs = add_plugin(network, "RmsNorm", inputs, fields, arguments.name, types)
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
    """Add `rms_norm` followed by quantization: q = saturate(round(y / smoothing / scale)).

    Args:
        network, x, weight, eps, residual, unit_offset, dtype, plugin, name: as in `rms_norm`.
        quant_dtype: ``tensorrt.int8``, or ``tensorrt.fp8`` (float8_e4m3fn) from TensorRT 10 on. Or "int8" or "fp8", by
            name, for a q that is int32 to TensorRT, four codes in each number: every version leaves that alone, and
            `scaled_gemm` takes it. There are no native layers for it.
        scale: for static quantization of the whole tensor, one float32: an ``ITensor`` of shape [] or [1], or a
            number. None: dynamic quantization, with a scale of each row as an output.
        smoothing: [hidden_size], an ``ITensor`` or an array, of ``dtype`` or float32: the divisor of each channel
            (SmoothQuant, Xiao et al. 2022).

    Returns:
        q with the shape of x, or int32 [..., hidden_size / 4]; in dynamic quantization followed by the scales, float32
        of shape [..., 1]; with a residual followed by x + residual. A tuple unless q is the only output.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value.
        RuntimeError: TensorRT refused the layer; its log has the reason.
    """
    check_network(network)
    arguments = _Arguments(
        network, x, weight, eps, residual, dtype, name or free_name(network, "rms_norm_quant"), plugin
    )
    as_int32 = isinstance(quant_dtype, str)
    if as_int32:
        check_code_type(quant_dtype, "quant_dtype")
        check_words(arguments.shape, "x")
        if not plugin:
            raise ValueError(f"plugin is False; expected True with the quant_dtype {quant_dtype!r}")
    else:
        _check_quant_dtype(quant_dtype)
    smoothing = None if smoothing is None else arguments.channels(smoothing, "smoothing", trt.float32)
    scale = None if scale is None else one_scale(NativeLayers(network, arguments.name), scale, "scale")
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


class _Arguments:
    """Hold the arguments that both functions take, checked, with the weight as a tensor."""

    def __init__(
        self, network: Any, x: Any, weight: Any, eps: float, residual: Any, dtype: Any, name: str, plugin: bool
    ) -> None:
        check_positive(eps, "eps")
        self.network, self.x, self.residual, self.eps, self.name = network, x, residual, float(eps), name
        self.shape = tensor_shape(x, "x")
        if not self.shape:
            raise ValueError("x has no dimensions; expected [..., hidden_size]")
        self.dtype = checked_dtype(dtype, x, "x")
        if residual is not None:
            self._check_residual()
        self.plugin = plugin
        self.types: dict[str, Any] = {}  # of weight and smoothing: TensorRT 8.6 reports float32 for constants
        self.weight = self.channels(weight, "weight", self.dtype)

    def _check_residual(self) -> None:
        shape = tensor_shape(self.residual, "residual")
        fits = len(shape) == len(self.shape) and all(may_be_equal(a, b) for a, b in zip(shape, self.shape, strict=True))
        if not fits:
            raise ValueError(f"residual has shape {shape}; expected that of x, {self.shape}")

    def channels(self, value: Any, what: str, default_type: Any) -> Any:
        """Return a tensor of shape [hidden_size] for a tensor or an array."""
        hidden_size = self.shape[-1]
        expected = f"expected [{'hidden_size' if hidden_size < 0 else hidden_size}], the last dimension of x"
        if isinstance(value, trt.ITensor):
            shape = tuple(value.shape)
        else:
            value = as_array(value, what)
            shape = value.shape
        if len(shape) != 1 or not may_be_equal(shape[0], hidden_size):
            raise ValueError(f"{what} has shape {shape}; {expected}")
        if not isinstance(value, trt.ITensor):
            self.types[what] = trt.float32 if value.dtype == np.float32 else default_type
            # A plug-in reads this type; for native layers TensorRT may fold a conversion into the constant.
            native = NativeLayers(self.network, self.name)
            return native.constant(value, self.types[what], what, keeps_type=self.plugin)
        if value.dtype not in (self.dtype, trt.float32):
            raise TypeError(f"{what} has type {value.dtype}; expected {self.dtype} or {trt.float32}")
        self.types[what] = value.dtype
        return value

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
    as_int32 = isinstance(quant_dtype, str)
    fields = arguments.fields() | {
        "dyn_act_scaling": int(scale is None),
        "out_type_id": CODE_TYPES[quant_dtype] if as_int32 else int(quant_dtype),
        "smoothing": int(smoothing is not None),
        "unit_offset": int(unit_offset),
    }
    if as_int32:
        fields["int32_output"] = 1
    if smoothing is not None:
        fields["smoothing_type_id"] = int(arguments.types["smoothing"])
    optional = (arguments.residual, scale, smoothing)
    inputs = [arguments.x, arguments.weight, *(tensor for tensor in optional if tensor is not None)]
    types = [trt.int32 if as_int32 else quant_dtype, *([trt.float32] if scale is None else [])]
    types += [arguments.dtype] if arguments.residual is not None else []
    return add_plugin(arguments.network, "RmsNormQuantization", inputs, fields, arguments.name, types)


def _set_ranges(outputs: Sequence[Any]) -> None:
    """Set the dynamic range of a layer's outputs where the network is not strongly typed.

    The int8 tensor gets 127, for a step of 1. The other outputs are never int8, but TensorRT 8.6 refuses the layer
    while one of them has no range: they get that of float16.
    """
    outputs[0].set_dynamic_range(-127.0, 127.0)
    for tensor in outputs[1:]:
        tensor.set_dynamic_range(-65504.0, 65504.0)


def _declare_types_explicit(network: Any) -> None:
    """Add one quantization and dequantization of a constant that nothing uses, unless the network has it already.

    In a network without any, TensorRT 8.6 decides which tensors are int8, and refuses a layer with an int8 output whose
    other output feeds a floating-point layer, as the residual of every decoder layer does. In a network with one it
    takes the types as set.
    """
    name = "explicit_types"
    if any(network.get_layer(i).name.startswith(name) for i in range(network.num_layers)):
        return
    native = NativeLayers(network, name)
    one = native.constant(np.ones((), np.float32), trt.float32, "one")
    value = native.constant(np.ones(1, np.float32), trt.float32, "value")
    network.add_dequantize(network.add_quantize(value, one).get_output(0), one)


def _check_quant_dtype(quant_dtype: Any) -> None:
    allowed = [trt.int8, *([trt.fp8] if MAJOR >= 10 else [])]
    if quant_dtype not in allowed:
        raise TypeError(f"quant_dtype is {quant_dtype}; expected {' or '.join(map(str, allowed))}")
