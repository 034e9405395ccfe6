"""Add quantization to 8 bits: the QuantizePerToken and QuantizeTensor plug-ins."""

from typing import Any

import tensorrt as trt

from .._numbers import CODE_TYPES
from .layers import (
    add_plugin,
    check_code_type,
    check_network,
    check_words,
    checked_dtype,
    free_name,
    one_scale,
    tensor_shape,
)
from .native import NativeLayers


def quantize(
    network: Any,
    x: Any,
    quant_dtype: str,
    scale: Any = None,
    *,
    dtype: Any = None,
    name: str | None = None,
) -> Any:
    """Add q = saturate(round(x / scale)), rounded to nearest even, as a tensor that is int32 to TensorRT.

    Each number of it has four codes: every version leaves that alone, and `scaled_gemm` takes it.

    Args:
        network: ``INetworkDefinition`` to add to.
        x: ``ITensor`` of shape [..., columns], float32, float16 or (TensorRT 10 and later) bfloat16; columns are a
            known multiple of 4, the other dimensions may be dynamic.
        quant_dtype: "int8" or "fp8" (e4m3).
        scale: one float32 above 0 for the whole tensor: an ``ITensor`` of shape [] or [1], or a number. None: each row
            has its own, max|x| / 127 for int8, / 448 for fp8.
        dtype: ``tensorrt.DataType`` of x; None: ``x.dtype``. Pass it in TensorRT 8.6 where x reports float32 but will
            be computed in float16.
        name: of the layer, unique in the network; None: quantize with a number.

    Returns:
        q, int32 [..., columns / 4], and, without a scale, (q, scales), float32 [..., 1].

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value.
        RuntimeError: TensorRT refused the layer; its log has the reason.
    """
    check_network(network)
    check_words(tensor_shape(x, "x"), "x")
    dtype = checked_dtype(dtype, x, "x")
    check_code_type(quant_dtype, "quant_dtype")
    name = name or free_name(network, "quantize")
    fields = {"type_id": int(dtype), "out_type_id": CODE_TYPES[quant_dtype], "int32_output": 1}
    if scale is None:
        types = [trt.int32, trt.float32]
        return tuple(add_plugin(network, "QuantizePerToken", [x], fields, name, types))
    inputs = [x, one_scale(NativeLayers(network, name), scale, "scale")]
    return add_plugin(network, "QuantizeTensor", inputs, fields, name, [trt.int32])[0]
