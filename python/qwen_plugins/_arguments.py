"""Check arguments and find data types, the current device and stream, for all functions on PyTorch tensors.

A check raises TypeError for an argument of the wrong type or dtype, and ValueError for a wrong value, shape, layout or
device. The message says what the argument must be, then what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32)


@cache
def core() -> Any:
    """Import `qwen_plugins.launch` at its first use, and return it: functions on a CPU need no compiled module."""
    from qwen_plugins import launch

    return launch


@cache
def data_type(dtype: torch.dtype) -> Any:
    """Return the `qwen_plugins.launch.DataType` of a PyTorch type; AttributeError where there is none."""
    return getattr(core().DataType, type_name(dtype))


def type_name(dtype: Any) -> str:
    """Return a type's name without its module, such as "float16"."""
    return str(dtype).removeprefix("torch.")


def type_names(dtypes: Sequence[torch.dtype]) -> str:
    """Return the names of alternatives, such as "float16, bfloat16 or float32"."""
    *first, last = dict.fromkeys(type_name(dtype) for dtype in dtypes)
    return f"{', '.join(first)} or {last}" if first else last


class CurrentDevice:
    """Make a tensor's device the current one inside a with block, whose target is PyTorch's current stream, an int."""

    def __init__(self, tensor: Tensor) -> None:
        self._index = tensor.device.index
        self._guard: Any = None

    def __enter__(self) -> int:
        if self._index != torch.cuda.current_device():
            self._guard = torch.cuda.device(self._index)
            self._guard.__enter__()
        return torch.cuda.current_stream().cuda_stream

    def __exit__(self, *exception: Any) -> None:
        if self._guard is not None:
            self._guard.__exit__(*exception)


def address(tensor: Tensor | None) -> int:
    """Return the address of a tensor's data; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def extents_overlap(a: Tensor, b: Tensor) -> bool:
    """Return whether the memory from the first to the last element of one tensor overlaps that of the other."""
    if a.numel() == 0 or b.numel() == 0:
        return False

    def end(tensor: Tensor) -> int:
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return tensor.data_ptr() + (last + 1) * tensor.element_size()

    return a.data_ptr() < end(b) and b.data_ptr() < end(a)


def check(condition: bool, message: str) -> None:
    """Raise ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_is_tensor(name: str, value: Any) -> None:
    """Raise TypeError unless the value is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__}")


def check_tensor(name: str, value: Any) -> None:
    """Check that the value is a tensor, and that no gradient is expected of it."""
    check_is_tensor(name, value)
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires gradients, which qwen_plugins does not compute: call it under torch.no_grad()"
        )


def check_dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype], like: str | None = None) -> None:
    """Raise TypeError unless the tensor has one of these types; `like` names the argument that decides the type."""
    if tensor.dtype not in allowed:
        reason = "" if like is None else f" like {like}"
        raise TypeError(f"{name} must be {type_names(allowed)}{reason}, not {type_name(tensor.dtype)}")


def check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError unless the tensor has this shape."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have the shape {tuple(shape)}, not {tuple(tensor.shape)}")


def check_contiguous(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the tensor is contiguous."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, but its strides are {tuple(tensor.stride())}")


def check_contiguous_rows(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the last dimension is contiguous; the others may be strided."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1 and tensor.numel() > 0:
        raise ValueError(
            f"the last dimension of {name} must be contiguous, but its strides are {tuple(tensor.stride())}; "
            "call contiguous() first"
        )


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    """Raise ValueError unless the tensor is on the device of `like`, the function's first argument."""
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on the device of the first argument, {like.device}, not on {tensor.device}")


def check_gpu(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the tensor is on an NVIDIA GPU."""
    check(tensor.device.type == "cuda", f"{name} must be on an NVIDIA GPU, not on {tensor.device}")


def check_rows(name: str, tensor: Any) -> None:
    """Check for a tensor of two dimensions in a type that the kernels compute in, with contiguous rows."""
    check_is_tensor(name, tensor)
    check_dtype(name, tensor, FLOAT_TYPES)
    check(tensor.dim() == 2, f"{name} must have 2 dimensions, not {tensor.dim()}")
    check_contiguous_rows(name, tensor)


def check_matrix(name: str, tensor: Any) -> None:
    """Check what `check_rows` checks, and that the tensor is on an NVIDIA GPU."""
    check_rows(name, tensor)
    check_gpu(name, tensor)


def check_array(name: str, tensor: Any, dtype: torch.dtype, shape: Sequence[int], like: Tensor) -> None:
    """Check for a contiguous tensor of this type and shape, on the device of `like`."""
    check_is_tensor(name, tensor)
    check_dtype(name, tensor, (dtype,))
    check_shape(name, tensor, shape)
    check_contiguous(name, tensor)
    check_device(name, tensor, like)


def check_int32(name: str, tensor: Any, length: int, like: Tensor) -> None:
    """Check for contiguous int32 [length], on the device of `like`."""
    check_array(name, tensor, torch.int32, (length,), like)


def check_output(out: Any, shape: Sequence[int], like: Tensor) -> None:
    """Check for a contiguous tensor of this shape, with the type and device of `like`."""
    check_tensor("out", out)
    check_array("out", out, like.dtype, shape, like)
