"""Gives vLLM's model the weights that the other implementations of benchmarks.generate have.

vLLM's own made-up weights, those of the normalisations too, are within 0.001 of zero: activations then are subnormal
numbers or zeros, and products of zeros can run faster than those of numbers that a model has.
"""

from __future__ import annotations

from typing import Any

WEIGHT_SCALE = 0.02


class WorkerExtension:
    """What vLLM's worker can do besides, by `LLM.collective_rpc`; vLLM makes it a base of its worker's class."""

    model_runner: Any

    def fill_weights(self) -> int:
        """As `benchmarks.generate_torch.random_weights`: ones in one dimension, else normal; how many were filled."""
        count = 0
        for weight in self.model_runner.get_model().parameters():
            if weight.dim() == 1:
                weight.data.fill_(1.0)
            else:
                weight.data.normal_(0.0, WEIGHT_SCALE)
            count += 1
        return count
