"""Check the operands of the operator scaled_gemm of torch_ops.py, whose x and weight are codes, and compute it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_plugins._arguments import (
    FLOAT_TYPES,
    address,
    check,
    check_contiguous,
    check_device,
    check_dtype,
    check_tensor,
    type_name,
    type_names,
)
from qwen_plugins._gemm import check_bias, check_weight, check_x, columns_of, launch_layer, linear_layer, swiglu

CODE_TYPES = (torch.int8, torch.float8_e4m3fn)
BLOCK = 128  # rows and columns of a weight that share a scale
MAX_INT8_INPUTS = 2**17 - 1  # sums of more could overflow int32
_KINDS = {torch.int8: "int8_rows", torch.float8_e4m3fn: "fp8_rows"}


def scaled_gemm(
    x: Tensor,
    weight: Tensor,
    x_scales: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    y_scale: Tensor | None,
    activation: str | None,
    dtype: torch.dtype,
    constant_weight: bool,
) -> Tensor:
    """Check the operands and compute y; the arguments are those of `qwen_plugins.scaled_gemm`."""
    check_x(x, CODE_TYPES)
    check_weight(weight, x)
    if x.dtype == torch.int8 and x.shape[-1] > MAX_INT8_INPUTS:
        raise ValueError(f"x must have at most {MAX_INT8_INPUTS} columns of int8, not {x.shape[-1]}")
    _check_scales(x, weight, x_scales, weight_scales, y_scale)
    if dtype not in FLOAT_TYPES:
        raise TypeError(f"dtype must be {type_names(FLOAT_TYPES)}, not {type_name(dtype)}")
    check_bias(bias, x, weight.shape[0], dtype)
    columns = columns_of(weight.shape[0], activation)
    y = x.new_empty((*x.shape[:-1], columns), dtype=dtype if y_scale is None else x.dtype)
    operands = (x, weight, x_scales, weight_scales, bias, y_scale, activation)
    if x.is_cuda:
        _on_gpu(*operands, dtype, constant_weight, y)
    elif x.device.type == "cpu":
        _on_cpu(*operands, y)
    return y


def _check_scales(x: Tensor, weight: Tensor, x_scales: Tensor, weight_scales: Tensor, y_scale: Tensor | None) -> None:
    given = {"x_scales": x_scales, "weight_scales": weight_scales}
    for name, scales in (given if y_scale is None else {**given, "y_scale": y_scale}).items():
        check_tensor(name, scales)
        check_dtype(name, scales, (torch.float32,))
        check_contiguous(name, scales)
        check_device(name, scales, x)
    rows = tuple(x.shape[:-1])
    if x_scales.numel() != 1 and tuple(x_scales.shape) not in (rows, (*rows, 1)):
        raise ValueError(
            f"x_scales must have one element, or the shape {(*rows, 1)} for x of {tuple(x.shape)}, "
            f"not {tuple(x_scales.shape)}"
        )
    out_features = weight.shape[0]
    if tuple(weight_scales.shape) not in ((out_features,), (out_features, 1)) and not _in_blocks(weight, weight_scales):
        blocks = f" or {_blocks_of(weight)}, in blocks," if x.dtype == torch.float8_e4m3fn else ""
        raise ValueError(
            f"weight_scales must have the shape {(out_features, 1)}{blocks} for a weight of {tuple(weight.shape)}, "
            f"not {tuple(weight_scales.shape)}"
        )
    if y_scale is not None:
        check(y_scale.numel() == 1, f"y_scale must have one element, but its shape is {tuple(y_scale.shape)}")


def _blocks_of(weight: Tensor) -> tuple[int, int]:
    rows, columns = weight.shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def _in_blocks(weight: Tensor, weight_scales: Tensor) -> bool:
    """Return whether the scales are those of blocks; where both are possible they mean the same."""
    return weight.dtype == torch.float8_e4m3fn and tuple(weight_scales.shape) == _blocks_of(weight)


def _on_cpu(
    x: Tensor,
    weight: Tensor,
    x_scales: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    y_scale: Tensor | None,
    activation: str | None,
    y: Tensor,
) -> None:
    """Compute y in float64, which holds sums of products of int8 exactly."""
    w = weight.float().double()
    if _in_blocks(weight, weight_scales):
        w *= weight_scales.repeat_interleave(BLOCK, 0)[: len(w)].repeat_interleave(BLOCK, 1)[:, : w.shape[1]]
    else:
        w *= weight_scales.reshape(-1, 1)
    z = F.linear(x.float().double(), w) * x_scales.reshape(-1 if x_scales.numel() == 1 else (*x.shape[:-1], 1))
    if bias is not None:
        z += bias
    if activation == "swiglu":
        z = swiglu(z)
    if y_scale is not None:
        z = z.float() * (1 / y_scale.reshape(())).clamp(max=torch.finfo(torch.float32).max)
        z = z.round_().clamp_(-128, 127).nan_to_num_(nan=0.0) if y.dtype == torch.int8 else z.clamp_(-448, 448)
    y.copy_(z)


def _on_gpu(
    x: Tensor,
    weight: Tensor,
    x_scales: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    y_scale: Tensor | None,
    activation: str | None,
    dtype: torch.dtype,
    constant_weight: bool,
    y: Tensor,
) -> None:
    rows = x.shape[:-1].numel()
    one_scale = x_scales.numel() == 1 and rows != 1
    layer = linear_layer(
        weight.data_ptr(),
        address(bias),
        x.shape[-1],
        weight.shape[0],
        activation,
        dtype,
        constant_weight,
        _KINDS[x.dtype],
        BLOCK if _in_blocks(weight, weight_scales) and weight_scales.numel() != weight.shape[0] else 0,
        "float32",
        weight_scales.data_ptr(),
        0,
        x_scales.data_ptr() if one_scale else 0,
        address(y_scale),
    )
    launch_layer(layer, x, y, None if one_scale else x_scales)
