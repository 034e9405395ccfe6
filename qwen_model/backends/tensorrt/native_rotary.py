"""Add the rotary embedding in TensorRT's own layers before the attention plug-in (`build --disable-plugin rotary`).

It is there to compare with the rotary embedding inside the plug-in. Cosines and sines are gathered once for all layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorrt as trt

from qwen_plugins import tensorrt as layers

from ...checkpoints.config import ModelConfig
from .compat import MAJOR, set_type
from .operations import TensorRTOperations


class NativeRotaryOperations(TensorRTOperations):
    """Add the same operations, except that native layers normalise and rotate q and k before the attention plug-in."""

    def __init__(self, network: Any, config: ModelConfig, dtype: Any, inputs: Mapping[str, Any], *rest: Any):
        """See `TensorRTOperations`."""
        inside = dataclasses.replace(config, rotary=dataclasses.replace(config.rotary, dim=0))
        super().__init__(network, inside, dtype, {**inputs, "rotary_table": None}, *rest)
        self._dim = config.rotary.dim
        self._layer = "rotary"  # prefix of layers' names
        self._tokens = self._length(inputs["input_ids"])
        self._cos, self._sin = self._cos_and_sin(inputs)

    def attention(self, qkv: Any, layer: int, into: tuple[str, ...] = ()) -> Any:
        """See `qwen_model.network.decoder.Operations`."""
        self._layer = f"layers.{layer}.rotary"
        return self._attend(self._rotated(qkv, self._head_norms(layer)), layer, {}, into)

    def _rotated(self, qkv: Any, head_norms: Mapping[str, str]) -> Any:
        """Normalise q and k if the model does, and rotate them in float32.

        qkv and the result are [tokens, (heads + 2 · kv_heads) · head_size].
        """
        config, dim, half = self._config, self._dim, self._dim // 2
        rotated_heads = config.num_heads + config.num_kv_heads
        heads = self._reshaped(qkv, (-1, rotated_heads + config.num_kv_heads, config.head_size), self._dtype)
        values = self._columns(heads, rotated_heads, rotated_heads + config.num_kv_heads, 0, config.head_size)
        if head_norms:
            q = self._columns(heads, 0, config.num_heads, 0, config.head_size)
            k = self._columns(heads, config.num_heads, rotated_heads, 0, config.head_size)
            normalised = [self.norm(q, head_norms["q_norm_weight"])[0], self.norm(k, head_norms["k_norm_weight"])[0]]
            heads = self._joined(normalised, 1, self._dtype)
        first = self._cast(self._columns(heads, 0, rotated_heads, 0, half), trt.float32)
        second = self._cast(self._columns(heads, 0, rotated_heads, half, dim), trt.float32)
        rotated = [
            self._float(self._float(first, "PROD", self._cos), "SUB", self._float(second, "PROD", self._sin)),
            self._float(self._float(second, "PROD", self._cos), "SUM", self._float(first, "PROD", self._sin)),
        ]
        parts = [self._cast(part, self._dtype) for part in rotated]
        if dim < config.head_size:
            parts.append(self._columns(heads, 0, rotated_heads, dim, config.head_size))
        together = self._joined([self._joined(parts, 2, self._dtype), values], 1, self._dtype)
        packed = (rotated_heads + config.num_kv_heads) * config.head_size
        return self._reshaped(together, (-1, packed), self._dtype)

    def _cos_and_sin(self, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
        """Gather cosines and sines of every token: float32 [tokens, 1, dim / 2] each."""
        gathered = set_type(
            self._network.add_gather(inputs["rotary_table"], self._rows(inputs), 0), trt.float32, self._network
        )
        table = self._reshaped(gathered, (-1, 1, self._dim), trt.float32)
        half = self._dim // 2
        cos, sin = (self._columns(table, 0, 1, start, start + half, trt.float32) for start in (0, half))
        return cos, sin

    def _rows(self, inputs: Mapping[str, Any]) -> Any:
        """Compute each token's row in the rotary table: int32 [tokens].

        Token t of sequence i, where cu_seqlens[i] <= t < cu_seqlens[i + 1], has row
        t + rotary_offsets[i] + past_lengths[i] - cu_seqlens[i].
        """
        cu_seqlens, past_lengths = inputs["cu_seqlens"], inputs["past_lengths"]
        sequences = self._length(past_lengths)
        begins, ends = (self._slice(cu_seqlens, (start,), (0,), sequences) for start in (0, 1))
        shifts = self._int(self._int(inputs["rotary_offsets"], "SUM", past_lengths), "SUB", begins)
        every = layers.constant(self._network, np.arange(self._max_tokens), trt.int32, "rotary/tokens")
        tokens = self._slice(every, (0,), (0,), self._tokens)
        column = self._reshaped(tokens, (-1, 1))
        before_end, before_begin = (
            self._cast(self._int(column, "LESS", self._reshaped(bounds, (1, -1))), trt.int32)
            for bounds in (ends, begins)
        )
        inside = self._int(before_end, "SUB", before_begin)  # [tokens, sequences]: 1 for the token's own sequence
        shift = self._int(inside, "PROD", self._reshaped(shifts, (1, -1)))
        summed = self._network.add_reduce(shift, trt.ReduceOperation.SUM, axes=1 << 1, keep_dims=False)
        return self._int(tokens, "SUM", self._named(summed).get_output(0))

    def _columns(self, tensor: Any, head: int, last_head: int, start: int, end: int, dtype: Any = None) -> Any:
        """Slice a range of heads and of columns from [tokens, heads, columns]."""
        static = (last_head - head, end - start)
        sizes = layers.constant(self._network, np.array(static), trt.int32, f"{self._layer}/sizes")
        size = self._joined([self._tokens, sizes], 0)
        return self._slice(tensor, (0, head, start), (0, *static), size, dtype or self._dtype)

    def _slice(self, tensor: Any, start: Sequence[int], shape: Sequence[int], size: Any, dtype: Any = None) -> Any:
        """Slice to the shape that the tensor `size` holds; `shape` repeats its static dimensions."""
        layer = self._network.add_slice(tensor, start, shape, (1,) * len(start))
        layer.set_input(2, size)
        return self._output(layer, dtype)

    def _length(self, tensor: Any) -> Any:
        """Compute the length of a tensor of one dimension: int32 [1]."""
        length = self._named(self._network.add_shape(tensor)).get_output(0)
        return length if MAJOR < 10 else self._cast(length, trt.int32)  # int64 from 10 on

    def _joined(self, tensors: list[Any], axis: int, dtype: Any = None) -> Any:
        layer = self._network.add_concatenation(tensors)
        layer.axis = axis
        return self._output(layer, dtype)

    def _reshaped(self, tensor: Any, shape: tuple[int, ...], dtype: Any = None) -> Any:
        layer = self._network.add_shuffle(tensor)
        layer.reshape_dims = shape
        return self._output(layer, dtype)

    def _cast(self, tensor: Any, dtype: Any) -> Any:
        layer = self._named(self._network.add_cast(tensor, dtype))
        output = layer.get_output(0)
        if not layers.is_strongly_typed(self._network):  # else TensorRT 8.6 may call it float32
            layer.set_output_type(0, dtype)
            output.dtype = dtype
        return output

    def _float(self, a: Any, operation: str, b: Any) -> Any:
        layer = self._network.add_elementwise(a, b, getattr(trt.ElementWiseOperation, operation))
        return self._output(layer, trt.float32)

    def _int(self, a: Any, operation: str, b: Any) -> Any:
        return self._output(self._network.add_elementwise(a, b, getattr(trt.ElementWiseOperation, operation)))

    def _output(self, layer: Any, dtype: Any = None) -> Any:
        """Name the layer and return its output with this type; None: an integer type, which TensorRT infers."""
        self._named(layer)
        return layer.get_output(0) if dtype is None else set_type(layer, dtype, self._network)

    def _named(self, layer: Any) -> Any:
        layer.name = f"{self._layer}/{self._network.num_layers}"
        return layer
