"""What the RMSNorm operators of torch_ops.py check and compute, for tensors on a CPU and on a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
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

QUANT_LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Norm:
    """The operands that all RMSNorm operators share, checked."""

    x: Tensor
    weight: Tensor
    eps: float
    residual: Tensor | None
    unit_offset: bool

    def __post_init__(self) -> None:
        """Check everything that can be checked without looking at values."""
        check_tensor("x", self.x)
        if self.x.dtype not in FLOAT_TYPES:
            raise TypeError(f"x must be {_names(FLOAT_TYPES)}, not {type_name(self.x.dtype)}")
        if self.x.dim() == 0 or self.x.shape[-1] == 0:
            raise ValueError(f"x must have a last dimension of at least 1, but its shape is {tuple(self.x.shape)}")
        check_last_dimension("x", self.x)
        check_per_channel("weight", self.weight, self.x)
        if self.residual is not None:
            check_like("residual", self.residual, self.x)
        smallest, largest = SMALLEST_SCALE, torch.finfo(torch.float32).max
        if not (isinstance(self.eps, float | int) and smallest <= self.eps <= largest):
            raise ValueError(f"eps must be a finite number above 0 that float32 can hold, not {self.eps!r}")


@dataclass(frozen=True)
class Quantization:
    """How a normalised row is quantized, checked against the operands of its Norm."""

    dtype: torch.dtype
    scale: Tensor | None
    smoothing: Tensor | None

    def check(self, norm: Norm) -> None:
        """Raise TypeError or ValueError where this does not fit `norm`."""
        if self.dtype not in QUANT_LIMITS:
            raise TypeError(f"quant_dtype must be {_names(tuple(QUANT_LIMITS))}, not {type_name(self.dtype)}")
        if self.smoothing is not None:
            check_per_channel("smoothing", self.smoothing, norm.x)
        if self.scale is None:
            return
        check_tensor("scale", self.scale)
        check_device("scale", self.scale, norm.x)
        if self.scale.dtype != torch.float32:
            raise TypeError(f"scale must be float32, not {type_name(self.scale.dtype)}")
        if self.scale.numel() != 1:
            raise ValueError(f"scale must have one element, but its shape is {tuple(self.scale.shape)}")


def check_last_dimension(name: str, tensor: Tensor) -> None:
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1 and tensor.numel() > 0:
        raise ValueError(
            f"the last dimension of {name} must be contiguous, but the strides of {name} are {tuple(tensor.stride())}; "
            "call contiguous() first"
        )


def check_like(name: str, tensor: Any, x: Tensor) -> None:
    """Check a tensor that must have the shape, type and device of x."""
    check_tensor(name, tensor)
    check_device(name, tensor, x)
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name} must have the type of x, {type_name(x.dtype)}, not {type_name(tensor.dtype)}")
    if tensor.shape != x.shape:
        raise ValueError(f"{name} must have the shape of x, {tuple(x.shape)}, not {tuple(tensor.shape)}")
    check_last_dimension(name, tensor)


def check_per_channel(name: str, tensor: Any, x: Tensor) -> None:
    """Check a vector with one element for each channel of x, in the type of x or float32."""
    check_tensor(name, tensor)
    check_device(name, tensor, x)
    if tensor.dtype not in (x.dtype, torch.float32):
        raise TypeError(
            f"{name} must be {_names((x.dtype, torch.float32))} for x in {type_name(x.dtype)}, "
            f"not {type_name(tensor.dtype)}"
        )
    if tuple(tensor.shape) != (x.shape[-1],):
        raise ValueError(f"{name} must have the shape ({x.shape[-1]},), not {tuple(tensor.shape)}")
    check_last_dimension(name, tensor)


def check_output_memory(name: str, output: Tensor, norm: Norm, *, other_output: Tensor | None = None) -> None:
    """Check that an output shares memory with nothing but, exactly, x or the residual: their rows are read first."""
    if _overlaps_itself(output):
        raise ValueError(f"elements of {name} overlap each other: its strides are {tuple(output.stride())}")
    operands = {"x": norm.x, "residual": norm.residual, "weight": norm.weight}
    for other_name, other in operands.items():
        if other is None or not _share_memory(output, other):
            continue
        same = output.data_ptr() == other.data_ptr() and output.stride() == other.stride()
        if same and other_name != "weight":
            continue
        allowed = " or ".join(n for n in ("x", "residual") if operands[n] is not None)
        raise ValueError(f"{name} overlaps {other_name}: it may be {allowed} itself, or share no memory with it")
    if other_output is not None and _share_memory(output, other_output):
        raise ValueError(f"{name} overlaps the other output")


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether some dimension steps by less than the dimensions inside it reach; views that interleave count too."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach = stride * (size - 1) + reach
    return False


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether the memory of two tensors overlaps; of interleaved columns of one matrix, exactly."""
    if not extents_overlap(a, b):
        return False
    if a.stride() != b.stride() or a.shape != b.shape or a.dim() < 2:
        return True
    # Equal strides: apart if within one step of the leading dimensions their last ones lie side by side.
    step = min((s for s, n in zip(a.stride()[:-1], a.shape[:-1], strict=True) if n > 1), default=0) * a.element_size()
    row = a.shape[-1] * a.element_size()
    distance = abs(a.data_ptr() - b.data_ptr())
    return step == 0 or distance % step < row or distance % step > step - row


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(dict.fromkeys(type_name(dtype) for dtype in dtypes))


# The CPU: float64 throughout for float32, float32 for the 16-bit types, as on the GPU.


def _wide(tensor: Tensor, x: Tensor) -> Tensor:
    return tensor.to(torch.float64 if x.dtype == torch.float32 else torch.float32)


def _normalized_on_cpu(norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """(h, 1 / sqrt(mean(h²) + eps), weight): h in the type of x, the others wide."""
    h = norm.x if norm.residual is None else (_wide(norm.x, norm.x) + _wide(norm.residual, norm.x)).to(norm.x.dtype)
    wide = _wide(h, norm.x)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    weight = _wide(norm.weight, norm.x)
    return h, rstd, weight + 1 if norm.unit_offset else weight


def norm_on_cpu(norm: Norm, round_before_weight: bool, out: Tensor, residual_out: Tensor | None) -> None:
    """Write y into `out` and, with a residual, h into `residual_out`."""
    h, rstd, weight = _normalized_on_cpu(norm)
    normalized = _wide(h, h) * rstd
    if round_before_weight:
        normalized = _wide(normalized.to(h.dtype), h)
    out.copy_(normalized.mul_(weight))
    if residual_out is not None:
        residual_out.copy_(h)


def quant_on_cpu(
    norm: Norm, quantization: Quantization, q: Tensor, scales: Tensor | None, residual_out: Tensor | None
) -> None:
    """Write q and, where they are there, the dynamic scales and h."""
    h, rstd, weight = _normalized_on_cpu(norm)
    if quantization.smoothing is not None:
        weight = weight / _wide(quantization.smoothing, norm.x)
    limit = QUANT_LIMITS[quantization.dtype]
    y = _wide(h, h) * weight * rstd
    if scales is None:
        scale = quantization.scale
        assert scale is not None
    else:
        scale = (y.abs().amax(-1, keepdim=True) / limit).to(torch.float32).clamp_(min=SMALLEST_SCALE)
        scales.copy_(scale)
    scaled = y / scale
    if quantization.dtype == torch.int8:
        scaled = scaled.round_().clamp_(-128, 127).nan_to_num_(nan=0.0)
    else:
        scaled = scaled.clamp_(-limit, limit)
    q.copy_(scaled)
    if residual_out is not None:
        residual_out.copy_(h)


# The GPU: rows of all operands as two levels with one stride each, then the launcher.

_Strides = tuple[int, int]


def _merged_levels(shape: list[int], strides: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """Leading dimensions with those merged that all operands step through evenly. `strides` is by operand."""
    sizes: list[int] = []
    merged: list[list[int]] = [[] for _ in strides]
    for i, size in enumerate(shape):
        if size == 1:
            continue
        if sizes and all(kept[-1] == given[i] * size for kept, given in zip(merged, strides, strict=True)):
            sizes[-1] *= size
            for kept, given in zip(merged, strides, strict=True):
                kept[-1] = given[i]
        else:
            sizes.append(size)
            for kept, given in zip(merged, strides, strict=True):
                kept.append(given[i])
    return sizes, merged


def _launches(x: Tensor, operands: list[Tensor]) -> list[tuple[tuple[int, int], list[_Strides], list[int]]]:
    """(rows, strides by operand, byte offsets by operand) of each launch: one covers all rows but of odd views."""
    sizes, strides = _merged_levels(list(x.shape[:-1]), [list(t.stride()[:-1]) for t in operands])
    while len(sizes) < 2:
        sizes.insert(0, 1)
        for kept in strides:
            kept.insert(0, 0)
    launches = []
    outer_sizes = sizes[:-2]
    for position in range(math.prod(outer_sizes)):
        offsets = [0] * len(operands)
        rest = position
        for level in reversed(range(len(outer_sizes))):
            rest, index = divmod(rest, outer_sizes[level])
            for i, kept in enumerate(strides):
                offsets[i] += index * kept[level] * operands[i].element_size()
        # Rows of one level are all "inner" rows.
        rows = (sizes[-2] * sizes[-1], sizes[-1])
        launches.append((rows, [(kept[-2], kept[-1]) for kept in strides], offsets))
    return launches


def _operands(
    norm: Norm, residual_out: Tensor | None, rows: tuple[int, int], strides: list[_Strides], offsets: list[int]
) -> Any:
    """The launcher's operands; strides and offsets are those of x and, where they are there, residual, residual_out."""
    has_residual = norm.residual is not None and residual_out is not None
    return core().RmsNormOperands(
        norm.x.data_ptr() + offsets[0],
        strides[0],
        norm.residual.data_ptr() + offsets[1] if norm.residual is not None else 0,
        strides[1] if has_residual else (0, 0),
        residual_out.data_ptr() + offsets[2] if residual_out is not None else 0,
        strides[2] if has_residual else (0, 0),
        norm.weight.data_ptr(),
        rows,
        norm.x.shape[-1],
        type_number(norm.x.dtype),
        type_number(norm.weight.dtype),
        norm.eps,
        norm.unit_offset,
    )


def _row_operands(norm: Norm, residual_out: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in (norm.x, norm.residual, residual_out) if tensor is not None]


def norm_on_gpu(norm: Norm, round_before_weight: bool, out: Tensor, residual_out: Tensor | None) -> None:
    """As norm_on_cpu, with the kernel, on the current stream."""
    if norm.x.numel() == 0:
        return
    with CurrentDevice(norm.x) as stream:
        for rows, strides, offsets in _launches(norm.x, [*_row_operands(norm, residual_out), out]):
            operands = _operands(norm, residual_out, rows, strides, offsets)
            core().rms_norm(operands, out.data_ptr() + offsets[-1], strides[-1], round_before_weight, stream)


def quant_on_gpu(
    norm: Norm, quantization: Quantization, q: Tensor, scales: Tensor | None, residual_out: Tensor | None
) -> None:
    """As quant_on_cpu, with the kernel, on the current stream."""
    if norm.x.numel() == 0:
        return
    smoothing, scale = quantization.smoothing, quantization.scale
    with CurrentDevice(norm.x) as stream:
        # q is contiguous: part of the operands, so that its offsets come out where there are several launches.
        first_row = 0
        for rows, strides, offsets in _launches(norm.x, [*_row_operands(norm, residual_out), q]):
            core().rms_norm_quant(
                _operands(norm, residual_out, rows, strides, offsets),
                q.data_ptr() + offsets[-1],
                type_number(quantization.dtype),
                address(smoothing),
                type_number(smoothing.dtype if smoothing is not None else norm.x.dtype),
                address(scale),
                scales.data_ptr() + 4 * first_row if scales is not None else 0,
                stream,
            )
            first_row += rows[0]
