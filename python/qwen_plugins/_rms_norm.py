"""Check the operands of the RMSNorm operators of torch_ops.py and compute them, on a CPU and on a GPU."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qwen_plugins._arguments import (
    FLOAT_TYPES,
    CurrentDevice,
    address,
    check_contiguous_rows,
    check_device,
    check_dtype,
    check_shape,
    check_tensor,
    core,
    data_type,
    extents_overlap,
)
from qwen_plugins._quantize import QUANT_LIMITS, SMALLEST_SCALE, check_quant_dtype, check_static_scale, static_divisor

LARGEST_FLOAT32 = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Norm:
    """Hold the operands that all RMSNorm operators share, checked."""

    x: Tensor
    weight: Tensor
    eps: float
    residual: Tensor | None
    unit_offset: bool

    def __post_init__(self) -> None:
        """Check everything that can be checked without looking at values."""
        check_tensor("x", self.x)
        check_dtype("x", self.x, FLOAT_TYPES)
        if self.x.dim() == 0 or self.x.shape[-1] == 0:
            raise ValueError(f"x must have a last dimension of at least 1, but its shape is {tuple(self.x.shape)}")
        check_contiguous_rows("x", self.x)
        check_per_channel("weight", self.weight, self.x)
        if self.residual is not None:
            check_like("residual", self.residual, self.x)
        if not isinstance(self.eps, float | int):
            raise TypeError(f"eps must be a number, not {type(self.eps).__name__}")
        if not SMALLEST_SCALE <= self.eps <= LARGEST_FLOAT32:
            raise ValueError(f"eps must be a finite number above 0 that float32 can hold, not {self.eps!r}")


@dataclass(frozen=True)
class Quantization:
    """Hold how normalised rows are quantized."""

    dtype: torch.dtype
    scale: Tensor | None
    smoothing: Tensor | None

    def check(self, norm: Norm) -> None:
        """Raise TypeError or ValueError where this does not fit `norm`."""
        check_quant_dtype("quant_dtype", self.dtype)
        if self.smoothing is not None:
            check_per_channel("smoothing", self.smoothing, norm.x)
        if self.scale is not None:
            check_static_scale("scale", self.scale, norm.x)


def check_like(name: str, tensor: Any, x: Tensor) -> None:
    """Check for the shape, type and device of x, rows contiguous."""
    check_tensor(name, tensor)
    check_dtype(name, tensor, (x.dtype,), like="x")
    check_shape(name, tensor, x.shape)
    check_contiguous_rows(name, tensor)
    check_device(name, tensor, x)


def check_per_channel(name: str, tensor: Any, x: Tensor) -> None:
    """Check for a contiguous vector [hidden_size], in the type of x or float32, on the device of x."""
    check_tensor(name, tensor)
    check_dtype(name, tensor, (x.dtype, torch.float32))
    check_shape(name, tensor, x.shape[-1:])
    check_contiguous_rows(name, tensor)
    check_device(name, tensor, x)


def check_output_memory(name: str, output: Tensor, norm: Norm, *, other_output: Tensor | None = None) -> None:
    """Check that an output shares no memory with another operand, unless it is exactly x or the residual.

    A kernel reads a row of x and the residual before it writes that row of an output.
    """
    if _overlaps_itself(output):
        raise ValueError(f"{name} must not overlap itself, but its strides are {tuple(output.stride())}")
    operands = {"x": norm.x, "residual": norm.residual, "weight": norm.weight}
    for other_name, other in operands.items():
        if other is None or not _share_memory(output, other):
            continue
        same = output.data_ptr() == other.data_ptr() and output.stride() == other.stride()
        if same and other_name != "weight":
            continue
        allowed = " or ".join(n for n in ("x", "residual") if operands[n] is not None)
        raise ValueError(f"{name} must be {allowed} itself or share no memory with it, but overlaps {other_name}")
    if other_output is not None and _share_memory(output, other_output):
        raise ValueError(f"{name} must not share memory with the other output")


def _overlaps_itself(tensor: Tensor) -> bool:
    """Return whether a dimension's stride is less than the extent of those inside it, as in interleaved views too."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach = stride * (size - 1) + reach
    return False


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether the memory of two tensors overlaps; exact for the columns of one matrix, else by extents."""
    if not extents_overlap(a, b):
        return False
    if a.stride() != b.stride() or a.shape != b.shape or a.dim() < 2:
        return True
    # With equal strides they are apart if, within one step of the leading dimensions, the rows lie side by side.
    step = min((s for s, n in zip(a.stride()[:-1], a.shape[:-1], strict=True) if n > 1), default=0) * a.element_size()
    row = a.shape[-1] * a.element_size()
    distance = abs(a.data_ptr() - b.data_ptr())
    return step == 0 or distance % step < row or distance % step > step - row


# On a CPU: computed in float64 for float32, and in float32 for the 16-bit types, as on a GPU.


def _wide(tensor: Tensor, x: Tensor) -> Tensor:
    return tensor.to(torch.float64 if x.dtype == torch.float32 else torch.float32)


def _normalized_on_cpu(norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """Return h in the type of x, and 1 / sqrt(mean(h²) + eps) and the weight in the wide type."""
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
    """Write q, the scales where they are dynamic, and h where there is a residual."""
    h, rstd, weight = _normalized_on_cpu(norm)
    if quantization.smoothing is not None:
        weight = weight / _wide(quantization.smoothing, norm.x)
    limit = QUANT_LIMITS[quantization.dtype]
    y = _wide(h, h) * weight * rstd
    if scales is None:
        assert quantization.scale is not None
        scale = static_divisor(quantization.scale)
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


# On a GPU: the leading dimensions of all operands become rows in two levels, each with one stride.


def _merged_levels(shape: list[int], strides: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """Merge the leading dimensions that all operands step through evenly. `strides` is by operand, then dimension."""
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


class _Launch(NamedTuple):
    """Describe the rows of one launch: their number, the addresses of the first ones, and the strides between them."""

    rows: int
    x: int
    residual: int
    residual_out: int
    y: int
    layout: Any  # qwen_plugins.launch.RowLayout


def _launches(norm: Norm, residual_out: Tensor | None, y: Tensor) -> list[_Launch]:
    """Divide the rows among launches: one, but for views whose leading dimensions merge into more than two levels."""
    x, residual = norm.x, norm.residual
    given = (x, residual, residual_out, y)
    if all(tensor is None or tensor.is_contiguous() for tensor in given):
        rows = x.numel() // x.shape[-1]
        return [_Launch(rows, x.data_ptr(), address(residual), address(residual_out), y.data_ptr(), _contiguous())]
    named = dict(zip(("x", "residual", "residual_out", "y"), given, strict=True))
    operands = {name: tensor for name, tensor in named.items() if tensor is not None}
    leading = [list(tensor.stride()[:-1]) for tensor in operands.values()]
    sizes, strides = _merged_levels(list(x.shape[:-1]), leading)
    while len(sizes) < 2:
        sizes.insert(0, 1)
        for kept in strides:
            kept.insert(0, 0)
    inner = {"residual": (0, 0), "residual_out": (0, 0)}
    inner |= {name: (kept[-2], kept[-1]) for name, kept in zip(operands, strides, strict=True)}
    layout = core().RowLayout(inner_rows=sizes[-1], **inner)
    launches = []
    for indices in itertools.product(*map(range, sizes[:-2])):
        at = dict.fromkeys(named, 0)  # addresses of the first rows
        for (name, tensor), kept in zip(operands.items(), strides, strict=True):
            steps = sum(index * stride for index, stride in zip(indices, kept[:-2], strict=True))
            at[name] = tensor.data_ptr() + steps * tensor.element_size()
        launches.append(_Launch(rows=sizes[-2] * sizes[-1], layout=layout, **at))
    return launches


@cache
def _contiguous() -> Any:
    return core().RowLayout()


@lru_cache(maxsize=4096)
def _layer(
    weight: int, hidden_size: int, dtype: torch.dtype, weight_dtype: torch.dtype, eps: float, unit_offset: bool
) -> Any:
    """Return the launcher's parameters, which are made once for each layer: they hold these numbers and no tensor."""
    return core().RmsNormLayer(
        weight=weight,
        hidden_size=hidden_size,
        dtype=data_type(dtype),
        weight_dtype=data_type(weight_dtype),
        eps=eps,
        unit_offset=unit_offset,
    )


def _layer_of(norm: Norm) -> Any:
    x, weight = norm.x, norm.weight
    return _layer(weight.data_ptr(), x.shape[-1], x.dtype, weight.dtype, norm.eps, norm.unit_offset)


def norm_on_gpu(norm: Norm, round_before_weight: bool, out: Tensor, residual_out: Tensor | None) -> None:
    """Do what `norm_on_cpu` does, with the kernel, on the current stream."""
    if norm.x.numel() == 0:
        return
    layer = _layer_of(norm)
    with CurrentDevice(norm.x) as stream:
        for part in _launches(norm, residual_out, out):
            core().rms_norm(
                layer,
                x=part.x,
                residual=part.residual,
                residual_out=part.residual_out,
                y=part.y,
                rows=part.rows,
                stream=stream,
                round_before_weight=round_before_weight,
                layout=part.layout,
            )


def quant_on_gpu(
    norm: Norm, quantization: Quantization, q: Tensor, scales: Tensor | None, residual_out: Tensor | None
) -> None:
    """Do what `quant_on_cpu` does, with the kernel, on the current stream."""
    if norm.x.numel() == 0:
        return
    layer, smoothing = _layer_of(norm), quantization.smoothing
    first_row = 0
    with CurrentDevice(norm.x) as stream:
        for part in _launches(norm, residual_out, q):
            core().rms_norm_quant(
                layer,
                x=part.x,
                residual=part.residual,
                residual_out=part.residual_out,
                q=part.y,
                quant_dtype=data_type(quantization.dtype),
                smoothing=address(smoothing),
                smoothing_dtype=data_type(norm.x.dtype if smoothing is None else smoothing.dtype),
                static_scale=address(quantization.scale),
                scales=0 if scales is None else scales.data_ptr() + 4 * first_row,
                rows=part.rows,
                stream=stream,
                layout=part.layout,
            )
            first_row += part.rows
