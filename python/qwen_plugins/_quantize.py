"""Check the operands of the quantization operators of torch_ops.py and compute them, on a CPU and on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_plugins._arguments import (
    FLOAT_TYPES,
    CurrentDevice,
    address,
    check_contiguous_rows,
    check_device,
    check_dtype,
    check_tensor,
    core,
    data_type,
    type_name,
    type_names,
)

QUANT_LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
_LEAST_FLOAT32 = torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps  # subnormal


def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return q with a static scale."""
    return _quantize(x, scale, dtype)[0]


def dynamic_quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return q and the scale of each row."""
    return _quantize(x, None, dtype)


def check_quant_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise TypeError unless this is a type of 8 bits that the kernels write."""
    if dtype not in QUANT_LIMITS:
        raise TypeError(f"{name} must be {type_names(tuple(QUANT_LIMITS))}, not {type_name(dtype)}")


def check_static_scale(name: str, scale: Tensor, x: Tensor) -> None:
    """Check for one float32 on the device of x."""
    check_tensor(name, scale)
    check_dtype(name, scale, (torch.float32,))
    if scale.numel() != 1:
        raise ValueError(f"{name} must have one element, but its shape is {tuple(scale.shape)}")
    check_device(name, scale, x)


def static_divisor(scale: Tensor) -> Tensor:
    """Return a static scale as a scalar; 0 counts as the smallest number above it, by which zeros stay zeros."""
    return scale.reshape(()).clamp(min=_LEAST_FLOAT32)


def _quantize(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return q and its scales, which are `scale` where it is given."""
    check_tensor("x", x)
    check_dtype("x", x, FLOAT_TYPES)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have a last dimension of at least 1, but its shape is {tuple(x.shape)}")
    check_contiguous_rows("x", x)
    check_quant_dtype("dtype", dtype)
    if scale is not None:
        check_static_scale("scale", scale, x)
    q = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device) if scale is None else scale
    if x.device.type == "cpu":
        _on_cpu(x, scale, q, scales)
    elif x.device.type == "cuda" and x.numel() > 0:
        _on_gpu(x, scale, q, scales)
    return q, scales


def _on_cpu(x: Tensor, scale: Tensor | None, q: Tensor, scales: Tensor) -> None:
    wide = x.to(torch.float32)
    limit = QUANT_LIMITS[q.dtype]
    if scale is None:
        largest = wide.abs().amax(-1, keepdim=True)
        scales.copy_((largest / limit).clamp_(min=SMALLEST_SCALE).masked_fill_(~largest.isfinite(), torch.nan))
        divisor = scales
    else:
        divisor = static_divisor(scale)
    scaled = torch.where(divisor.isnan(), wide * 0, wide / divisor)
    if q.dtype == torch.int8:
        scaled = scaled.round_().clamp_(-128, 127).nan_to_num_(nan=0.0)
    else:
        scaled = scaled.clamp_(-limit, limit)
    q.copy_(scaled)


def _on_gpu(x: Tensor, scale: Tensor | None, q: Tensor, scales: Tensor) -> None:
    rows = x.reshape(-1, x.shape[-1])
    with CurrentDevice(x) as stream:
        core().quantize(
            x=rows.data_ptr(),
            x_row_stride=rows.stride(0),
            q=q.data_ptr(),
            rows=rows.shape[0],
            columns=rows.shape[1],
            dtype=data_type(x.dtype),
            quant_dtype=data_type(q.dtype),
            static_scale=address(scale),
            scales=0 if scale is not None else scales.data_ptr(),
            stream=stream,
        )
