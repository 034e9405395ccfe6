"""Check the operands of the operator gemm of torch_ops.py and compute it, on a CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_plugins._arguments import (
    FLOAT_TYPES,
    CurrentDevice,
    address,
    check_contiguous,
    check_device,
    check_dtype,
    check_shape,
    check_tensor,
    core,
    data_type,
    extents_overlap,
)


def gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    constant_weight: bool,
    out: Tensor | None = None,
) -> Tensor:
    """Check the operands and compute y; the arguments are those of `qwen_plugins.gemm`."""
    check_x(x)
    check_weight(weight, x)
    check_bias(bias, x, weight.shape[0])
    shape = (*x.shape[:-1], columns_of(weight.shape[0], activation))
    if out is None:
        out = x.new_empty(shape)
    else:
        check_out(out, shape, x, weight=weight, bias=bias)
    if x.is_cuda:
        _on_gpu(x, weight, bias, activation, constant_weight, out)
    elif x.device.type == "cpu":
        _on_cpu(x, weight, bias, activation, out)
    return out


def cublas_lt_status() -> str:
    """Return the file of cuBLASLt in use, or why none is in use."""
    return core().cublas_lt_status()


def check_x(x: Tensor, dtypes: Sequence[torch.dtype] = FLOAT_TYPES) -> None:
    """Check the rows that are multiplied."""
    check_tensor("x", x)
    check_dtype("x", x, dtypes)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have a last dimension of at least 1, but its shape is {tuple(x.shape)}")
    if not x.is_cuda and x.device.type not in ("cpu", "meta"):
        raise ValueError(f"x must be on a CPU or an NVIDIA GPU, not on {x.device}")


def check_weight(weight: Tensor, x: Tensor) -> None:
    """Check a weight [out_features, in_features] of the type of x."""
    check_tensor("weight", weight)
    check_dtype("weight", weight, (x.dtype,), like="x")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"weight must have the shape (out_features, {x.shape[-1]}) for x of {tuple(x.shape)}, "
            f"not {tuple(weight.shape)}"
        )
    check_contiguous("weight", weight)
    check_device("weight", weight, x)


def check_bias(bias: Tensor | None, x: Tensor, out_features: int, dtype: torch.dtype | None = None) -> None:
    """Check the bias, if there is one; dtype: what the argument `dtype` says; None: the type of x."""
    if bias is None:
        return
    check_tensor("bias", bias)
    if dtype is None:
        check_dtype("bias", bias, (x.dtype,), like="x")
    else:
        check_dtype("bias", bias, (dtype,), like="dtype")
    check_shape("bias", bias, (out_features,))
    check_contiguous("bias", bias)
    check_device("bias", bias, x)


def columns_of(out_features: int, activation: str | None) -> int:
    """Check the activation, and return the columns of y."""
    if activation is None:
        return out_features
    if activation != "swiglu":
        raise ValueError(f'activation must be None or "swiglu", not {activation!r}')
    if out_features % 2 != 0:
        raise ValueError(f"weight must have an even number of rows with swiglu, not {out_features}")
    return out_features // 2


def check_out(out: Tensor, shape: tuple[int, ...], x: Tensor, **others: Tensor | None) -> None:
    """Check where y is written: no memory of x or of the other operands, which the messages name."""
    check_tensor("out", out)
    check_dtype("out", out, (x.dtype,), like="x")
    check_shape("out", out, shape)
    check_contiguous("out", out)
    check_device("out", out, x)
    if out.is_meta:  # no memory
        return
    for name, other in {"x": x, **others}.items():
        if other is not None and extents_overlap(out, other):
            raise ValueError(f"out must not share memory with {name}, which is still read while out is written")


def launch_layer(layer: Any, x: Tensor, out: Tensor, x_scales: Tensor | None = None) -> None:
    """Launch the GEMM of a `qwen_plugins.launch.LinearLayer` for all rows of x, in any layout.

    x_scales: one for each row of x, contiguous, where x is codes and the layer has no scale of x.
    """
    in_features = x.shape[-1]
    if x.dim() != 2 or x.stride(1) != 1 or x.stride(0) < in_features:
        x = x.reshape(-1, in_features)
        if x.stride(1) != 1 or x.stride(0) < in_features:  # rows of one element, or rows that overlap
            x = x.contiguous()
    rows = x.shape[0]
    workspace_bytes = layer.workspace_bytes(rows)
    with CurrentDevice(x) as stream:
        # Allocated at each call: PyTorch's caching allocator knows about streams and captures.
        workspace = x.new_empty(workspace_bytes, dtype=torch.uint8) if workspace_bytes else None
        core().gemm(
            layer,
            x=x.data_ptr(),
            x_row_stride=x.stride(0),
            y=out.data_ptr(),
            rows=rows,
            workspace=address(workspace),
            stream=stream,
            x_scales=address(x_scales),
        )


def swiglu(z: Tensor) -> Tensor:
    """Return silu(gate) · up, the gate being the first half of the columns of z, in the type of z."""
    gate, up = z.chunk(2, dim=-1)
    return F.silu(gate) * up


@lru_cache(maxsize=8192)
def linear_layer(
    weight: int,
    bias: int,
    in_features: int,
    out_features: int,
    activation: str | None,
    dtype: torch.dtype,
    constant_weight: bool,
    kind: str = "same",
    group_size: int = 0,
    scale_dtype: str = "float16",
    scales: int = 0,
    zeros: int = 0,
    input_scale: int = 0,
    output_scale: int = 0,
) -> Any:
    """Return a `qwen_plugins.launch.LinearLayer`, made once for each layer: it holds these numbers and no tensor.

    Tensors are given by their addresses, 0 for none. kind: a `qwen_plugins.launch.WeightKind`'s name, "same" for a
    weight in the type of x, whose group_size, scale_dtype and scales do not count.
    """
    launch = core()
    return launch.LinearLayer(
        weight=weight,
        scales=scales,
        zeros=zeros,
        bias=bias,
        input_scale=input_scale,
        output_scale=output_scale,
        in_features=in_features,
        out_features=out_features,
        activation=launch.Activation.__members__[activation or "none"],
        dtype=data_type(dtype),
        constant_weight=constant_weight,
        weight_format=launch.WeightFormat(
            kind=launch.WeightKind.__members__[kind],
            group_size=group_size,
            has_zeros=zeros != 0,
            scale_dtype=launch.DataType.__members__[scale_dtype],
        ),
    )


def _on_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, out: Tensor) -> None:
    z = F.linear(x, weight, bias)
    if activation == "swiglu":
        z = swiglu(z.float())
    out.copy_(z)


def _on_gpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, constant_weight: bool, out: Tensor
) -> None:
    out_features, in_features = weight.shape
    layer = linear_layer(
        weight.data_ptr(), address(bias), in_features, out_features, activation, x.dtype, constant_weight
    )
    launch_layer(layer, x, out)
