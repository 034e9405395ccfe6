"""Add a linear layer whose x and weight are codes of 8 bits: version 3 of the Gemm plug-in."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorrt as trt

from .._numbers import ACTIVATIONS, CODE_TYPES
from .layers import (
    CODES_OF_INT32,
    add_plugin,
    as_array,
    check_network,
    check_type,
    checked_dtype,
    free_name,
    may_be_equal,
    one_scale,
    parameter,
    tensor_shape,
)
from .linear import kernel_numbers
from .native import NativeLayers

_BLOCK = 128  # rows and columns of a weight that share a scale


def scaled_gemm(
    network: Any,
    x: Any,
    weight: np.ndarray,
    x_scales: Any,
    weight_scales: np.ndarray,
    bias: Any = None,
    *,
    dtype: Any,
    activation: str | None = None,
    y_scale: Any = None,
    constant_weight: bool = True,
    kernels: Sequence[tuple[int, str]] = (),
    name: str | None = None,
) -> Any:
    """Add z[m, n] = (Σ_k x[m, k] · weight[n, k]) · weight_scales[n] · x_scales[m] + bias[n], of codes of 8 bits.

    Args:
        network: ``INetworkDefinition`` to add to.
        x: ``ITensor`` int32 [..., in_features / 4], four codes in each number, as `rms_norm_quant`, `quantize`,
            `gpt_attention` and this function give it; in_features are known, the other dimensions may be dynamic. Its
            codes are of the type of the weight's.
        weight: [out_features, in_features], an array of int8, or of uint8 or ml_dtypes' float8_e4m3fn for the bytes of
            e4m3. It is not copied, and must not change until the engine is built.
        x_scales: ``ITensor`` float32 [..., 1], a scale for each row; or one for all, above 0: an ``ITensor`` of shape
            [] or [1], or a number.
        weight_scales: float32 [out_features] or [out_features, 1], an array; with e4m3 also of blocks of 128 rows and
            columns, [out_features / 128, in_features / 128], rounded up.
        bias: [out_features] of ``dtype``, an ``ITensor`` or an array, or None.
        dtype: ``tensorrt.DataType`` of bias and y: float32, float16 or (TensorRT 10 and later) bfloat16.
        activation: None, y = z; or "swiglu", y = silu(z_gate) · z_up of the halves of z.
        y_scale: to quantize y where it is written, saturate(round(y / y_scale)): one float32 above 0, an ``ITensor`` of
            shape [] or [1], or a number. y is then int32, four codes in each number. None: y has ``dtype``.
        constant_weight: False with TensorRT's weight streaming (10 and later), which copies weights to the GPU while
            the engine runs: see `gemm`.
        kernels: as `gemm` takes them.
        name: of the layer, and prefix of its constants' names, unique in the network; None: scaled_gemm with a number.

    Returns:
        y, an ``ITensor`` of shape [..., columns], where columns are out_features, with swiglu half of them; with
        y_scale [..., columns / 4].

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value.
        RuntimeError: TensorRT refused the layer; its log has the reason.
    """
    check_network(network)
    shape = tensor_shape(x, "x")
    dtype = checked_dtype(dtype, x, "y")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; expected None or 'swiglu'")
    kind = _kind_of(weight)
    out_features, in_features = weight.shape
    if not shape or shape[-1] * CODES_OF_INT32 != in_features:
        raise ValueError(f"x has shape {shape}; expected [..., in_features / 4], here in_features is {in_features}")
    unit = (CODES_OF_INT32 if y_scale is not None else 1) * (2 if activation else 1)
    if out_features % unit:
        raise ValueError(f"weight has {out_features} rows; expected a multiple of {unit}")
    weight_scales, group_size = _weight_scales(weight_scales, out_features, in_features, kind)
    layers = NativeLayers(network, name or free_name(network, "scaled_gemm"))
    if layers.typed:  # TensorRT 8.6 reports float32 for the tensors inside a network
        check_type(x, trt.int32, "x")
    per_token = isinstance(x_scales, trt.ITensor) and len(x_scales.shape) > 1
    if per_token:
        _check_row_scales(layers, x_scales, shape)
    inputs = [
        x,
        layers.constant(np.ascontiguousarray(weight).view(np.int32), trt.int32, "weight", keeps_type=True),
        layers.constant(weight_scales, trt.float32, "weight_scales", keeps_type=True),
        x_scales if per_token else one_scale(layers, x_scales, "x_scales"),
    ]
    if y_scale is not None:
        inputs.append(one_scale(layers, y_scale, "y_scale"))
    if bias is not None:
        inputs.append(parameter(layers, bias, (out_features,), "bias", "[out_features]", dtype))
    fields: dict[str, int | float | list[int]] = {
        "type_id": int(dtype),
        "x_type_id": CODE_TYPES[kind],
        "in_features": in_features,
        "out_features": out_features,
        "group_size": group_size,
        "has_per_token_scaling": int(per_token),
        "quantize_output": int(y_scale is not None),
        "bias": int(bias is not None),
        "activation": ACTIVATIONS[activation],
        "constant_weight": int(constant_weight),
    }
    if kernels:
        fields["kernels"] = kernel_numbers(kernels)
    types = [dtype if y_scale is None else trt.int32]
    return add_plugin(network, "Gemm", inputs, fields, layers.name, types, version="3")[0]


def _kind_of(weight: Any) -> str:
    """Check the codes of a weight, and return their type."""
    kinds = {"int8": "int8", "uint8": "fp8", "float8_e4m3fn": "fp8"}
    if not isinstance(weight, np.ndarray) or weight.dtype.name not in kinds:
        found = getattr(weight, "dtype", type(weight).__name__)
        raise TypeError(f"weight is of {found}; expected an array of int8, or of e4m3 as uint8 or float8_e4m3fn")
    if weight.ndim != 2 or 0 in weight.shape or weight.shape[1] % CODES_OF_INT32:
        raise ValueError(
            f"weight has shape {weight.shape}; expected [out_features, in_features], in_features a multiple of 4"
        )
    return kinds[weight.dtype.name]


def _weight_scales(value: Any, out_features: int, in_features: int, kind: str) -> tuple[np.ndarray, int]:
    """Return the scales as the plug-in takes them, and its group_size."""
    scales = as_array(value, "weight_scales")
    blocks = (-(-out_features // _BLOCK), -(-in_features // _BLOCK))
    if scales.shape in ((out_features,), (out_features, 1)):
        return scales.reshape(out_features), 0
    if kind == "fp8" and scales.shape == blocks:
        return scales, _BLOCK
    expected = f"({out_features},)" + (f" or {blocks}" if kind == "fp8" else "")
    raise ValueError(f"weight_scales has shape {scales.shape}; expected {expected}")


def _check_row_scales(layers: NativeLayers, x_scales: Any, x_shape: tuple[int, ...]) -> None:
    found, expected = tuple(x_scales.shape), (*x_shape[:-1], 1)
    if len(found) != len(expected) or not all(map(may_be_equal, found, expected)):
        raise ValueError(f"x_scales has shape {found}; expected a scale for each row of x, {expected}, or one for all")
    if layers.typed:
        check_type(x_scales, trt.float32, "x_scales")
