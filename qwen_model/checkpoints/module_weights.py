"""Describe the weights of a module of the network: its tensors, and the format of its weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class WeightFormat:
    """Say how the numbers of a weight are stored, and what a linear layer computes with.

    kind: of a number of the weight: "float16", "bfloat16" or "float32".
    group_size: the number of inputs that share a scale of each output; 0: there are no groups.
    symmetric: whether scaled numbers have no zero points.
    activation: the kind that x is quantized to before the product; None: x stays as it is.
    layout: version of the order of the numbers in memory, the same for all GPUs. 1: [out, in], row-major.
    """

    kind: str
    group_size: int = 0
    symmetric: bool = True
    activation: str | None = None
    layout: int = 1


@dataclass(frozen=True)
class ModuleWeights(Generic[T]):
    """Hold the tensors of one module: a linear layer, or a norm or the embedding, which have a weight alone.

    T: what stands for a tensor: a `WeightSpec`, or a back end's tensor or array.
    """

    weight: T
    format: WeightFormat
    bias: T | None = None
    scales: T | None = None
    zeros: T | None = None

    @property
    def tensors(self) -> tuple[T, ...]:
        """Return the tensors that the module has."""
        return tuple(t for t in (self.weight, self.bias, self.scales, self.zeros) if t is not None)

    def map(self, function: Callable[[T], U]) -> ModuleWeights[U]:
        """Return the same record with `function(tensor)` in place of each tensor, in the order of `tensors`."""

        def mapped(tensor: T | None) -> U | None:
            return None if tensor is None else function(tensor)

        return ModuleWeights(
            function(self.weight), self.format, mapped(self.bias), mapped(self.scales), mapped(self.zeros)
        )
