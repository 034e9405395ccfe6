"""Compute the rotary embedding's cosines and sines inside an ONNX graph, for positions of any size."""

from __future__ import annotations

import math

import numpy as np

from ...checkpoints.config import ModelConfig
from ...network.rotary import inverse_frequencies
from .graph import Graph

SCOPE = "rotary"
LONGEST = 1 << 31  # tokens: the thresholds of Qwen v1's stretches end here


class RotaryTensors:
    """Hold what attention needs of the rotary embedding, computed once for all layers.

    cos, sin: [batch_size, sequence_length, dim / 2].
    query_scale: Qwen v1's logn, [batch_size, 1, sequence_length, 1]; None without it.
    """

    def __init__(self, graph: Graph, config: ModelConfig, dtype: str, position_ids: str, prompt_lengths: str | None):
        """Add the nodes, which compute in float32 and round to `dtype` at the end.

        position_ids: int64 [batch_size, sequence_length].
        prompt_lengths: int64 [batch_size]; needed where `needs_prompt_lengths`.
        """
        self._graph, self._rotary = graph, config.rotary
        positions = self._unsqueezed(graph.cast(position_ids, "float32", SCOPE), 2)  # [batch_size, sequence_length, 1]
        angles = self._op("Mul", positions, self._frequencies(position_ids, prompt_lengths))
        self.cos, self.sin = (self._table(function, angles, dtype) for function in ("Cos", "Sin"))
        self.query_scale = self._logn(positions, config.logn_length, dtype) if config.logn_length > 0 else None

    def _table(self, function: str, angles: str, dtype: str) -> str:
        table = self._op(function, angles)
        if self._rotary.attention_factor != 1.0:
            table = self._op("Mul", table, self._number(self._rotary.attention_factor))
        return self._graph.cast(table, dtype, SCOPE)

    def _frequencies(self, position_ids: str, prompt_lengths: str | None) -> str:
        """Return the rotation per position: [dim / 2], or [batch_size, 1, dim / 2] where it depends on a length."""
        if self._rotary.scaling == "dynamic":
            return self._dynamic_frequencies(position_ids)
        if prompt_lengths is not None:
            return self._stretched_frequencies(prompt_lengths)
        return self._graph.constant(inverse_frequencies(self._rotary), f"{SCOPE}/inverse_frequencies")

    def _dynamic_frequencies(self, position_ids: str) -> str:
        """Compute dynamic NTK as transformers does, for the sequence's length after this step."""
        rotary = self._rotary
        last = self._op("ReduceMax", position_ids, self._indices(1), keepdims=1)  # [batch_size, 1]
        length = self._op("Add", self._graph.cast(last, "float32", SCOPE), self._number(1))
        trained = self._number(rotary.original_max_positions)
        stretch = self._op("Div", self._op("Max", length, trained), trained)
        factor = self._number(rotary.factor)
        growth = self._op("Sub", self._op("Mul", factor, stretch), self._number(rotary.factor - 1))
        # base^(-e) · growth^(-e · dim / (dim - 2)), with the exponents e of the dimensions.
        powers = -np.arange(0, rotary.dim, 2, dtype=np.float32) / np.float32(rotary.dim - 2)
        power = self._graph.constant(powers, f"{SCOPE}/powers")
        unstretched = self._graph.constant(inverse_frequencies(rotary), f"{SCOPE}/inverse_frequencies")
        return self._op("Mul", unstretched, self._op("Pow", self._unsqueezed(growth, 2), power))

    def _stretched_frequencies(self, prompt_lengths: str) -> str:
        """Gather the frequencies of the prompt's stretch, as Qwen v1 does: trained length · 2^n is the last of n."""
        trained = self._rotary.original_max_positions
        thresholds = [trained << n for n in range(max(1, (LONGEST // trained).bit_length()))]
        tables = [inverse_frequencies(self._rotary, length) for length in (*thresholds, thresholds[-1] + 1)]
        limits = self._graph.constant(np.array(thresholds, np.int64), f"{SCOPE}/stretched_lengths")
        longer = self._op("Greater", self._unsqueezed(prompt_lengths, 1), limits)  # [batch_size, thresholds]
        stretch = self._op("ReduceSum", self._graph.cast(longer, "int64", SCOPE), self._indices(1), keepdims=1)
        table = self._graph.constant(np.stack(tables), f"{SCOPE}/inverse_frequencies")
        return self._op("Gather", table, stretch, axis=0)

    def _logn(self, positions: str, trained_length: int, dtype: str) -> str:
        logarithm = self._op("Log", self._op("Add", positions, self._number(1)))
        scale = self._op("Div", logarithm, self._number(math.log(trained_length)))
        return self._unsqueezed(self._graph.cast(self._op("Max", scale, self._number(1)), dtype, SCOPE), 1)

    def _op(self, operator: str, *inputs: str, **attributes: int) -> str:
        return str(self._graph.op(operator, inputs, SCOPE, **attributes))

    def _unsqueezed(self, tensor: str, axis: int) -> str:
        return self._op("Unsqueeze", tensor, self._indices(axis))

    def _indices(self, axis: int) -> str:
        return self._graph.constant(np.array([axis], np.int64), f"{SCOPE}/axis")

    def _number(self, value: float) -> str:
        return self._graph.constant(np.array(value, np.float32), f"{SCOPE}/number")


def needs_prompt_lengths(config: ModelConfig) -> bool:
    """Tell whether the rotation depends on the prompt's length, which a decode step cannot see (Qwen v1)."""
    return config.rotary.scaling == "qwen_dynamic"
