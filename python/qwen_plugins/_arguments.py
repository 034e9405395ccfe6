"""What functions on PyTorch tensors share: checks of arguments, numbers of types, the current device and stream."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32)


@cache
def core() -> Any:
    """The launchers of our kernels, loaded with the first use of one."""
    from qwen_plugins import _core

    return _core


@cache
def type_number(dtype: torch.dtype) -> int:
    """The number of the type in csrc/kernels/data_type.h; AttributeError for one that is not there."""
    return int(getattr(core().DataType, type_name(dtype)))


@cache
def float_type_number(dtype: torch.dtype) -> int:
    """As `type_number`; ValueError for what is not a type that kernels compute in."""
    check(dtype in FLOAT_TYPES, f"the type must be float32, float16 or bfloat16, not {dtype}")
    return type_number(dtype)


def type_name(dtype: Any) -> str:
    """As in "float16"; of what is no type, its text."""
    return str(dtype).removeprefix("torch.")


class CurrentDevice:
    """Makes a tensor's device the current one where it is not, and gives the current stream there."""

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
    """Where a tensor's data begins; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def extents_overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the memory from the first to the last element of one overlaps that of the other."""
    if a.numel() == 0 or b.numel() == 0:
        return False

    def end(tensor: Tensor) -> int:
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return tensor.data_ptr() + (last + 1) * tensor.element_size()

    return a.data_ptr() < end(b) and b.data_ptr() < end(a)


def check(condition: bool, message: str) -> None:
    """ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_tensor(name: str, value: Any) -> None:
    """Check that it is a tensor, and one that needs no gradients."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__}")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires gradients, which qwen_plugins does not compute: call it under torch.no_grad()"
        )


def check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    """Check that it is on the device of x."""
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, but is on {tensor.device}")


def check_matrix(name: str, tensor: Tensor) -> None:
    """Check for two dimensions on an NVIDIA GPU, rows contiguous in themselves."""
    check(tensor.device.type == "cuda", f"{name} must be on an NVIDIA GPU, not on {tensor.device}")
    check(tensor.dim() == 2, f"{name} must have 2 dimensions, not {tensor.dim()}")
    check(tensor.shape[1] <= 1 or tensor.stride(1) == 1, f"the rows of {name} must be contiguous")


def check_output(out: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Check for this shape, contiguous, of the type and device of `like`."""
    same = tuple(out.shape) == shape and out.dtype == like.dtype and out.device == like.device and out.is_contiguous()
    check(
        same,
        f"out must be contiguous {list(shape)} of {like.dtype} on {like.device}, not {list(out.shape)} of {out.dtype} "
        f"on {out.device} with strides {out.stride()}",
    )


def check_int32(name: str, tensor: Tensor, length: int, like: Tensor) -> None:
    """Check for int32 [length], contiguous, on the device of `like`."""
    right = tensor.dtype == torch.int32 and tuple(tensor.shape) == (length,) and tensor.is_contiguous()
    check(
        right and tensor.device == like.device,
        f"{name} must be contiguous int32 [{length}] on {like.device}, not {tensor.dtype} {list(tensor.shape)} on "
        f"{tensor.device}",
    )
