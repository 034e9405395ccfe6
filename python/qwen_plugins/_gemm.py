"""What the operator gemm of torch_ops.py checks and computes, for tensors on a CPU and on a GPU."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_plugins._arguments import (
    FLOAT_TYPES,
    CurrentDevice,
    address,
    check_device,
    check_tensor,
    core,
    extents_overlap,
    type_name,
    type_number,
)
from qwen_plugins._numbers import ACTIVATIONS


def gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    constant_weight: bool,
    out: Tensor | None = None,
) -> Tensor:
    """Check the operands and compute y."""
    columns = _check(x, weight, bias, activation)
    shape = (*x.shape[:-1], columns)
    if out is None:
        out = x.new_empty(shape)
    else:
        _check_out(out, shape, x, weight, bias)
    if x.is_cuda:
        _on_gpu(x, weight, bias, activation, constant_weight, out)
    elif x.device.type == "cpu":
        _on_cpu(x, weight, bias, activation, out)
    elif x.device.type != "meta":
        raise ValueError(f"gemm runs on a CPU or an NVIDIA GPU, and x is on {x.device}")
    return out


def cublas_lt_status() -> str:
    return core().cublas_lt_status()


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> int:
    """The columns of y, for operands that fit."""
    check_tensor("x", x)
    check_tensor("weight", weight)
    dtype = x.dtype
    if dtype not in FLOAT_TYPES:
        raise TypeError(f"x must be float16 or bfloat16 or float32, not {type_name(dtype)}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have a last dimension of at least 1, but its shape is {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"weight must have the shape (out_features, {x.shape[-1]}) for x of {tuple(x.shape)}, "
            f"not {tuple(weight.shape)}"
        )
    if not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous, but its strides are {tuple(weight.stride())}")
    out_features = weight.shape[0]
    _check_operand("weight", weight, x)
    if bias is not None:
        check_tensor("bias", bias)
        if bias.shape != (out_features,):
            raise ValueError(f"bias must have the shape ({out_features},), not {tuple(bias.shape)}")
        _check_operand("bias", bias, x)
        if not bias.is_contiguous():
            raise ValueError(f"bias must be contiguous, but its stride is {bias.stride(0)}")
    if activation is None:
        return out_features
    if activation != "swiglu":
        raise ValueError(f'activation must be None or "swiglu", not {activation!r}')
    if out_features % 2 != 0:
        raise ValueError(f"weight must have an even number of rows with swiglu, not {out_features}")
    return out_features // 2


def _check_operand(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name} must have the type of x, {type_name(x.dtype)}, not {type_name(tensor.dtype)}")
    check_device(name, tensor, x)


def _check_out(out: Tensor, shape: tuple[int, ...], x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tensor("out", out)
    if tuple(out.shape) != shape:
        raise ValueError(f"out must have the shape {shape}, not {tuple(out.shape)}")
    _check_operand("out", out, x)
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, but its strides are {tuple(out.stride())}")
    if out.is_meta:  # no memory
        return
    for name, other in (("x", x), ("weight", weight), ("bias", bias)):
        if other is not None and extents_overlap(out, other):
            raise ValueError(f"out shares memory with {name}, which is still read while out is written")


def _on_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, out: Tensor) -> None:
    z = F.linear(x, weight, bias)
    if activation == "swiglu":
        gate, up = z.float().chunk(2, dim=-1)
        z = F.silu(gate) * up
    out.copy_(z)


def _on_gpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, constant_weight: bool, out: Tensor
) -> None:
    out_features, in_features = weight.shape
    if x.dim() != 2 or x.stride(1) != 1 or x.stride(0) < in_features:
        x = x.reshape(-1, in_features)
        if x.stride(1) != 1 or x.stride(0) < in_features:  # of one element or overlapping
            x = x.contiguous()
    rows = x.shape[0]
    number, dtype = ACTIVATIONS[activation], type_number(x.dtype)
    with CurrentDevice(x) as stream:
        workspace_bytes = _workspace_bytes(rows, in_features, out_features, number, dtype)
        # From PyTorch's pool each time: it knows about streams and captures.
        workspace = x.new_empty(workspace_bytes, dtype=torch.uint8) if workspace_bytes else None
        core().gemm(
            x.data_ptr(),
            x.stride(0),
            weight.data_ptr(),
            address(bias),
            out.data_ptr(),
            rows,
            in_features,
            out_features,
            number,
            dtype,
            constant_weight,
            address(workspace),
            workspace_bytes,
            stream,
        )


@lru_cache(maxsize=4096)
def _workspace_bytes(*shape: int) -> int:
    return core().gemm_workspace_bytes(*shape)
