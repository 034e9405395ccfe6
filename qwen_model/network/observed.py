"""Let a caller see, and replace, the result of each operation of the decoder, whatever the back end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from .decoder import Operations

T = TypeVar("T")


class ObservedOperations(Generic[T]):
    """Implement `Operations` by another implementation, and pass each result through a function.

    A result is called as the module that computes it: "embedding", "layers.0.attention.qkv", "layers.0.attention",
    "lm_head", ... A norm with a residual has two results; the name of the sum ends in ".residual".
    """

    def __init__(self, operations: Operations[T], observe: Callable[[str, T], T]):
        """Take the operations, and what is called with each result's name and value; it returns what goes on."""
        self._operations = operations
        self._observe = observe

    def embedding(self, input_ids: T, module: str) -> T:
        """See `Operations`."""
        return self._observe(module, self._operations.embedding(input_ids, module))

    def norm(self, x: T, module: str, residual: T | None = None, into: tuple[str, ...] = ()) -> tuple[T, T]:
        """See `Operations`."""
        y, h = self._operations.norm(x, module, residual, into)
        y = self._observe(module, y)
        return y, h if residual is None else self._observe(f"{module}.residual", h)

    def linear(
        self, x: T, module: str, activation: str | None = None, into: tuple[str, ...] = (), reduce: bool = False
    ) -> T:
        """See `Operations`."""
        return self._observe(module, self._operations.linear(x, module, activation, into, reduce))

    def attention(self, qkv: T, layer: int, into: tuple[str, ...] = ()) -> T:
        """See `Operations`."""
        return self._observe(f"layers.{layer}.attention", self._operations.attention(qkv, layer, into))

    def last_token(self, x: T, residual: T) -> tuple[T, T]:
        """See `Operations`; it is not observed."""
        return self._operations.last_token(x, residual)
