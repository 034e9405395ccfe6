"""Check the operands of the operator scaled_gemm of torch_ops.py, whose x and weight are codes, and compute it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

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
    check_shape,
    check_tensor,
    core,
    data_type,
    type_name,
    type_names,
)
from qwen_plugins._gemm import columns_of, launch_layer

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
    _check_codes(x, weight)
    _check_scales(x, weight, x_scales, weight_scales, y_scale)
    if dtype not in FLOAT_TYPES:
        raise TypeError(f"dtype must be {type_names(FLOAT_TYPES)}, not {type_name(dtype)}")
    if bias is not None:
        check_tensor("bias", bias)
        check_dtype("bias", bias, (dtype,), like="dtype")
        check_shape("bias", bias, weight.shape[:1])
        check_contiguous("bias", bias)
        check_device("bias", bias, x)
    columns = columns_of(weight.shape[0], activation)
    y = x.new_empty((*x.shape[:-1], columns), dtype=dtype if y_scale is None else x.dtype)
    operands = (x, weight, x_scales, weight_scales, bias, y_scale, activation)
    if x.is_cuda:
        _on_gpu(*operands, dtype, constant_weight, y)
    elif x.device.type == "cpu":
        _on_cpu(*operands, y)
    elif x.device.type != "meta":
        raise ValueError(f"x must be on a CPU or an NVIDIA GPU, not on {x.device}")
    return y


def _check_codes(x: Tensor, weight: Tensor) -> None:
    check_tensor("x", x)
    check_dtype("x", x, CODE_TYPES)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have a last dimension of at least 1, but its shape is {tuple(x.shape)}")
    check_tensor("weight", weight)
    check_dtype("weight", weight, (x.dtype,), like="x")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"weight must have the shape (out_features, {x.shape[-1]}) for x of {tuple(x.shape)}, "
            f"not {tuple(weight.shape)}"
        )
    if x.dtype == torch.int8 and x.shape[-1] > MAX_INT8_INPUTS:
        raise ValueError(f"x must have at most {MAX_INT8_INPUTS} columns of int8, not {x.shape[-1]}")
    check_contiguous("weight", weight)
    check_device("weight", weight, x)


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
        gate, up = z.chunk(2, dim=-1)
        z = F.silu(gate) * up
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
    layer = _layer(
        weight.data_ptr(),
        weight_scales.data_ptr(),
        address(bias),
        x_scales.data_ptr() if one_scale else 0,
        address(y_scale),
        x.shape[-1],
        weight.shape[0],
        activation,
        x.dtype,
        dtype,
        constant_weight,
        BLOCK if _in_blocks(weight, weight_scales) and weight_scales.numel() != weight.shape[0] else 0,
    )
    launch_layer(layer, x, y, None if one_scale else x_scales)


@lru_cache(maxsize=4096)
def _layer(
    weight: int,
    weight_scales: int,
    bias: int,
    input_scale: int,
    output_scale: int,
    in_features: int,
    out_features: int,
    activation: str | None,
    code_type: torch.dtype,
    dtype: torch.dtype,
    constant_weight: bool,
    group_size: int,
) -> Any:
    """Return the launcher's parameters, which are made once for each layer: they hold these numbers and no tensor."""
    launch = core()
    return launch.LinearLayer(
        weight=weight,
        scales=weight_scales,
        bias=bias,
        input_scale=input_scale,
        output_scale=output_scale,
        in_features=in_features,
        out_features=out_features,
        activation=launch.Activation.__members__[activation or "none"],
        dtype=data_type(dtype),
        constant_weight=constant_weight,
        weight_format=launch.WeightFormat(
            kind=launch.WeightKind.__members__[_KINDS[code_type]],
            group_size=group_size,
            scale_dtype=launch.DataType.float32,
        ),
    )
