"""Define how a network is run operation by operation, to be compared with another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy.typing as npt

Array = npt.NDArray[Any]


class Probe(Protocol):
    """Run one sequence through a network, and return the result of each operation.

    Results have the names of `qwen_model.network.observed`, and "layers.0.attention.q", ".k" and ".v" for the heads
    that attention works with, after the rotary embedding; one that a back end never stores is left out. Each is
    [tokens, size].
    """

    def run(self, tokens: Sequence[int], past: int, given: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Run the tokens that follow `past` others: a prompt after 0, then one token after the other.

        given: results that go on in place of the network's own, so that no operation sees an earlier one's error;
            None: the network's own go on. It must be the same kind in all steps of a sequence.
        """

    def module(self, name: str) -> tuple[Array, Array | None]:
        """Return weight and bias of a module as the operations use them, float32 or float64.

        Raises:
            KeyError: there is none of that name, or its weight cannot be read back.
        """
