"""Add a linear layer: the Gemm plug-in, or TensorRT's own layers."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import tensorrt as trt

from .._numbers import ACTIVATIONS, MAX_KERNELS, SCALE_TYPES
from .layers import add_plugin, check_network, check_type, checked_dtype, free_name, parameter, tensor_shape
from .native import NativeLayers


def gemm(
    network: Any,
    x: Any,
    weight: Any,
    bias: Any = None,
    *,
    activation: str | None = None,
    constant_weight: bool | None = None,
    dtype: Any = None,
    plugin: bool = True,
    kernels: Sequence[tuple[int, str]] = (),
    permutation: Any = None,
    name: str | None = None,
) -> Any:
    """Add y = x · weightᵀ + bias, or with ``activation="swiglu"`` y = silu(z_gate) · z_up of the halves of that z.

    Args:
        network: ``INetworkDefinition`` to add to.
        x: ``ITensor`` of shape [..., in_features], float32, float16 or (TensorRT 10 and later) bfloat16; in_features
            is known, the other dimensions may be dynamic.
        weight: [out_features, in_features], an ``ITensor``, an array or ``tensorrt.Weights``. An array of another
            floating-point type is converted to ``dtype``. An array that has ``dtype`` and is contiguous, such as that
            of a memory-mapped file, is not copied; the network keeps it alive. ``Weights`` must have ``dtype``, and
            the caller keeps their memory until the engine is built. Or a `qwen_plugins.quantized.PackedWeight`, whose
            arrays are not copied either and become int32 constants, which TensorRT leaves as they are.
        bias: [out_features], likewise, or None.
        activation: None or "swiglu" (Shazeer, "GLU Variants Improve Transformer", 2020): the first half of
            out_features is z_gate, the second half z_up.
        constant_weight: True where no layer of the network computes weight or bias: the kernel may then read them
            before the previous kernel has finished. None: True unless one of them is an ``ITensor``. Pass True for
            an ``ITensor`` that is the output of a constant layer, such as an embedding that is also the weight of the
            last linear layer. Pass False with TensorRT's weight streaming (10 and later), which copies weights to the
            GPU while the engine runs.
        dtype: ``tensorrt.DataType`` of x, weight, bias and y; None: ``x.dtype``. Pass it in TensorRT 8.6 where x
            reports float32 but will be computed in float16.
        plugin: True: one Gemm plug-in layer; False: TensorRT's own layers, with SwiGLU computed in float32, and the
            weights that a PackedWeight stands for.
        kernels: of the plug-in: pairs (max_rows, name), a kernel for up to so many rows of x, in increasing order, as
            `qwen_plugins.tuning` measures and names them; at most 32. For more rows, and where a kernel cannot compute
            the GEMM on the GPU that runs the engine, the plug-in chooses by its rules.
        permutation: of a PackedWeight: int32 [in_features], the column of x that each column of the weight multiplies
            (GPTQ's act-order); None: its own.
        name: of the layer, and prefix of its constants' names, unique in the network; None: gemm with a number.

    Returns:
        y, an ``ITensor`` of shape [..., out_features], with swiglu [..., out_features / 2].

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value.
        RuntimeError: TensorRT refused the layer; its log has the reason.
    """
    check_network(network)
    shape = tensor_shape(x, "x")
    if not shape or shape[-1] < 1:
        raise ValueError(f"x has shape {shape}; expected [..., in_features] with a known in_features")
    dtype = checked_dtype(dtype, x, "x")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; expected None or 'swiglu'")
    if constant_weight is None:
        constant_weight = not any(isinstance(tensor, trt.ITensor) for tensor in (weight, bias))

    name = name or free_name(network, "gemm")
    layers = NativeLayers(network, name)
    if is_packed(weight):
        _check_packed(weight, permutation, shape[-1], activation)
        x = x if permutation is None else layers.gather(x, permutation, dtype)
        if plugin:
            return _packed_gemm(layers, x, weight, bias, activation, constant_weight, dtype, kernels)
        from .. import quantized

        weight = quantized.dequantize(weight)
    elif permutation is not None:
        raise ValueError("permutation is given; expected None unless weight is a PackedWeight")
    weight = _parameter(layers, weight, (-1, shape[-1]), dtype, "weight")
    out_features = int(weight.shape[0])
    if out_features < 1 or (activation == "swiglu" and out_features % 2 != 0):
        raise ValueError(f"weight has {out_features} rows; expected {'an even' if activation else 'a known'} number")
    if bias is not None:
        bias = _parameter(layers, bias, (out_features,), dtype, "bias")
    if not plugin:
        return layers.gemm(x, weight, bias, dtype, swiglu=activation == "swiglu")
    inputs = [x, weight] if bias is None else [x, weight, bias]
    fields: dict[str, int | float | list[int]] = {
        "type_id": int(dtype),
        "bias": int(bias is not None),
        "activation": ACTIVATIONS[activation],
        "constant_weight": int(constant_weight),
    }
    if kernels:
        fields["kernels"] = kernel_numbers(kernels)
    return add_plugin(network, "Gemm", inputs, fields, name, [dtype], version="1")[0]


def is_packed(weight: Any) -> bool:
    """Return whether it is a `qwen_plugins.quantized.PackedWeight`, whose module needs the compiled one."""
    return type(weight).__name__ == "PackedWeight" and type(weight).__module__ == "qwen_plugins.quantized"


def _check_packed(weight: Any, permutation: Any, in_features: int, activation: str | None) -> None:
    if weight.in_features != in_features:
        raise ValueError(f"weight has {weight.in_features} columns; expected those of x, {in_features}")
    if activation == "swiglu" and weight.out_features % 2 != 0:
        raise ValueError(f"weight has {weight.out_features} rows; expected an even number")
    if permutation is None:
        return
    order = np.asarray(permutation)
    if order.dtype.kind not in "iu" or not np.array_equal(np.sort(order.ravel()), np.arange(in_features)):
        raise ValueError(f"permutation has shape {order.shape}; expected each of {in_features} columns once")


def _packed_gemm(
    layers: NativeLayers,
    x: Any,
    weight: Any,
    bias: Any,
    activation: str | None,
    constant_weight: bool,
    dtype: Any,
    kernels: Sequence[tuple[int, str]],
) -> Any:
    """Add the plug-in's version 2."""
    arrays = {"weight": weight.codes, "scales": weight.scales, "zeros": weight.zeros}
    inputs = [x]
    for what, array in arrays.items():
        if array is not None:
            words = np.ascontiguousarray(array).view(np.int32)
            inputs.append(layers.constant(words, trt.int32, what, keeps_type=True))
    if bias is not None:
        inputs.append(_parameter(layers, bias, (weight.out_features,), dtype, "bias"))
    fields: dict[str, int | float | list[int]] = {
        "type_id": int(dtype),
        "in_features": weight.in_features,
        "out_features": weight.out_features,
        "weight_bits": weight.format.bits,
        "group_size": weight.format.group_size,
        "zeros": int(weight.zeros is not None),
        "scale_type_id": SCALE_TYPES[weight.format.scale_dtype],
        "bias": int(bias is not None),
        "activation": ACTIVATIONS[activation],
        "constant_weight": int(constant_weight),
    }
    if kernels:
        fields["kernels"] = kernel_numbers(kernels)
    return add_plugin(layers.network, "Gemm", inputs, fields, layers.name, [dtype], version="2")[0]


def kernel_numbers(kernels: Sequence[tuple[int, str]]) -> list[int]:
    """Check the pairs and return them as the plug-in's field takes them."""
    from .. import launch  # compiled for one version of Python, which a network without choices does not need

    if len(kernels) > MAX_KERNELS:
        raise ValueError(f"kernels has {len(kernels)} pairs; expected at most {MAX_KERNELS}")
    rows = [max_rows for max_rows, _ in kernels]
    if rows[0] < 1 or rows[-1] >= 2**31 or any(a >= b for a, b in pairwise(rows)):
        raise ValueError(f"kernels has the rows {rows}; expected numbers that increase from 1 on")
    return [number for max_rows, kernel in kernels for number in (max_rows, launch.gemm_choice_number(kernel))]


def _parameter(layers: NativeLayers, value: Any, expected: tuple[int, ...], dtype: Any, what: str) -> Any:
    """Return a tensor of the expected shape, where -1 fits anything, for an ``ITensor``, an array or ``Weights``."""
    meaning = "[out_features, in_features]" if what == "weight" else "[out_features]"
    if not isinstance(value, trt.Weights):
        return parameter(layers, value, expected, what, meaning, dtype)
    check_type(value, dtype, what)
    known = math.prod(extent for extent in expected if extent > 0)
    shape = tuple(value.size // known if extent < 0 else extent for extent in expected)
    if math.prod(shape) != value.size:
        raise ValueError(f"{what} has {value.size} elements; expected {meaning}, here {expected}")
    return layers.weights(value, shape, dtype, what, keeps_type=True)
