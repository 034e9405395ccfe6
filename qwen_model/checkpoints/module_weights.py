"""Describe the weights of a module of the network: its tensors, and the format of its weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")
BLOCK_SIZE = 128
"""The outputs, and the inputs, that share a scale where scales are those of blocks (fp8)."""


@dataclass(frozen=True)
class WeightFormat:
    """Say how the numbers of a weight are stored, and what a linear layer computes with.

    kind: of a number of the weight: "float16", "bfloat16" or "float32"; or "int4" or "int8", unsigned codes that stand
        for scale · (code - zero point). Where x is quantized, too: "int8", signed, or "fp8" (e4m3), codes that stand
        for scale · code.
    group_size: the number of inputs that share a scale of each output; 0: all of them do. With an activation: 128
        (fp8): so many outputs share it as well, a block of 128 x 128; x has one scale for each token all the same.
    symmetric: whether scaled numbers have no zero points of their own: it is 8 for int4, 128 for int8.
    activation: the kind that x is quantized to before the product, that of the weight; None: x stays as it is.
    layout: version of the order of the numbers in memory, the same for all GPUs. 1: [out, in], row-major. 2: the
        fragments of tensor cores, of int4 and int8 (see `qwen_plugins.quantized`), where x is not quantized.
    permuted: whether the columns of x are gathered in another order first, that of the weight's groups (GPTQ's
        act-order).
    scale_dtype: "float16" or "bfloat16", of the scales, whatever the type of x; "float32" with an activation; "": there
        are none.
    activation_scale: with an activation: "token": x has a scale for each token, made at run time; "tensor": one for
        all, which is a tensor of the module. "" without one.
    """

    kind: str
    group_size: int = 0
    symmetric: bool = True
    activation: str | None = None
    layout: int = 1
    permuted: bool = False
    scale_dtype: str = ""
    activation_scale: str = ""

    @property
    def bits(self) -> int:
        """Return the bits of a code; 0: the weight is not quantized."""
        return {"int4": 4, "int8": 8, "fp8": 8}.get(self.kind, 0)

    @property
    def text(self) -> str:
        """Return the format as summaries have it: "int4, groups of 128", "fp8, a scale per output, x per token"."""
        if not self.bits:
            return self.kind
        groups = f"groups of {self.group_size}" if self.activation is None else "blocks of 128 x 128"
        parts = [self.kind, groups if self.group_size else "a scale per output"]
        parts += [] if self.symmetric else ["zero points"]
        parts += ["act-order"] if self.permuted else []
        parts += [f"x per {self.activation_scale}"] if self.activation else []
        return ", ".join(parts)


Formats = Mapping[str, WeightFormat]
"""The formats of quantized modules, by name; the other modules have the engine's type."""
NOT_QUANTIZED: Formats = MappingProxyType({})


@dataclass(frozen=True)
class ModuleWeights(Generic[T]):
    """Hold the tensors of one module: a linear layer, or a norm or the embedding, which have a weight alone.

    T: what stands for a tensor: a `WeightSpec`, or a back end's tensor or array.
    shape: of the numbers that the weight stands for: [out, in], or [size] of a norm.
    scales: [out, groups]; of blocks (fp8) [⌈out / 128⌉, ⌈in / 128⌉].
    zeros: uint8 [out, groups]; None: the format is symmetric.
    permutation: int32 [in], the column of x that each column of the weight belongs to; None: its own.
    input_scale: float32 [1], the scale of x where it is quantized with one for all tokens; else None.
    """

    weight: T
    format: WeightFormat
    bias: T | None = None
    scales: T | None = None
    zeros: T | None = None
    permutation: T | None = None
    shape: tuple[int, ...] = ()
    input_scale: T | None = None

    @property
    def tensors(self) -> tuple[T, ...]:
        """Return the tensors that the module has."""
        all_of_them = (self.weight, self.bias, self.scales, self.zeros, self.permutation, self.input_scale)
        return tuple(tensor for tensor in all_of_them if tensor is not None)

    def map(self, function: Callable[[T], U]) -> ModuleWeights[U]:
        """Return the same record with `function(tensor)` in place of each tensor, in the order of `tensors`."""

        def mapped(tensor: T | None) -> U | None:
            return None if tensor is None else function(tensor)

        return ModuleWeights(
            function(self.weight),
            self.format,
            mapped(self.bias),
            mapped(self.scales),
            mapped(self.zeros),
            mapped(self.permutation),
            self.shape,
            mapped(self.input_scale),
        )
