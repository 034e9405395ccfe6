"""Define the network in ONNX's own operators: RMSNormalization, RotaryEmbedding and Attention of opset 23, and others.

Inputs and outputs have the names that Optimum and ONNX Runtime GenAI give those of Hugging Face models. Sequences are
padded to one length, and `decoder`'s [tokens, ...] is [batch_size, sequence_length, ...].
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...checkpoints.config import ModelConfig
from ...checkpoints.weights import Modules, WeightSpec
from ...interface.back_end import ReadWeight
from ...network.decoder import decoder
from .graph import Graph
from .standard_rotary import RotaryTensors, needs_prompt_lengths

VERSIONS = 23, 11  # ONNX's opset and IR: the first with Attention and RMSNormalization
BATCH, SEQUENCE, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"


class StandardOperations:
    """Implement `Operations` but `last_token`: a graph gives the logits after every token, as Optimum's do."""

    def __init__(
        self,
        graph: Graph,
        config: ModelConfig,
        modules: Modules,
        read_weight: ReadWeight,
        rotary: RotaryTensors,
        mask: str,
        past_key_values: list[tuple[str, str]],
    ):
        """Take what the layers share.

        read_weight: reads a weight as a NumPy array of its type in the graph; called once for each.
        mask: bool, which tokens attend to which: [batch_size, 1, sequence_length, total_sequence_length].
        past_key_values: of each layer, [batch_size, kv_heads, past_sequence_length, head_size].
        """
        self._graph = graph
        self._config = config
        self._modules = modules
        self._read = read_weight
        self._rotary = rotary
        self._mask = mask
        self._past = past_key_values
        self.present_key_values: list[tuple[str, str]] = []

    def embedding(self, input_ids: str, module: str) -> str:
        """See `qwen_model.network.decoder.Operations`."""
        return self._op("Gather", module, self._weight(self._modules[module].weight), input_ids)

    def linear(
        self, x: str, module: str, activation: str | None = None, into: tuple[str, ...] = (), reduce: bool = False
    ) -> str:
        """See `qwen_model.network.decoder.Operations`."""
        weights = self._modules[module]
        y = self._op("MatMul", module, x, self._transposed(weights.weight, module))
        if weights.bias is not None:
            y = self._op("Add", module, y, self._weight(weights.bias))
        return y if activation is None else self._swiglu(y, module)

    def norm(self, x: str, module: str, residual: str | None = None, into: tuple[str, ...] = ()) -> tuple[str, str]:
        """See `qwen_model.network.decoder.Operations`."""
        h = x if residual is None else self._op("Add", module, x, residual)
        return self._rms_norm(h, module), h

    def attention(self, qkv: str, layer: int, into: tuple[str, ...] = ()) -> str:
        """See `qwen_model.network.decoder.Operations`."""
        config, name = self._config, f"layers.{layer}.attention"
        heads, kv_heads = config.num_heads, config.num_kv_heads
        sizes = np.array([heads, kv_heads, kv_heads], np.int64) * config.head_size
        q, k, v = self._graph.op("Split", [qkv, self._graph.constant(sizes, f"{name}/sizes")], name, 3, axis=-1)
        q = self._rotated(q, heads, f"{name}.q_norm", name)
        k = self._rotated(k, kv_heads, f"{name}.k_norm", name)
        if self._rotary.query_scale is not None:
            q = self._op("Mul", name, q, self._rotary.query_scale)
        # With the past as inputs of its own Attention has three outputs, and TensorRT takes those of one only.
        past_key, past_value = self._past[layer]
        key = self._op("Concat", name, past_key, k, axis=2)
        value = self._op("Concat", name, past_value, self._split_heads(v, kv_heads, name), axis=2)
        self.present_key_values.append((key, value))
        context = self._op("Attention", name, q, key, value, self._mask)
        return self._reshaped(self._op("Transpose", name, context, perm=[0, 2, 1, 3]), [0, 0, -1], name)

    def last_token(self, x: str, residual: str) -> tuple[str, str]:
        """Refuse: `decoder` is asked for the logits after every token."""
        raise NotImplementedError

    def _rotated(self, x: str, heads: int, norm: str, scope: str) -> str:
        """Split [..., heads · head_size] into heads; apply their RMSNorm, if there is one, and the rotary embedding."""
        x = self._split_heads(x, heads, scope)
        if norm in self._modules:
            x = self._rms_norm(x, norm)
        dim = self._config.rotary.dim
        # ONNX Runtime 1.23 asks for num_heads with the rotation of a part of each head.
        part = {} if dim == self._config.head_size else {"rotary_embedding_dim": dim, "num_heads": heads}
        return self._op("RotaryEmbedding", scope, x, self._rotary.cos, self._rotary.sin, **part)

    def _split_heads(self, x: str, heads: int, scope: str) -> str:
        """Return [batch_size, heads, sequence_length, head_size]."""
        x = self._reshaped(x, [0, 0, heads, self._config.head_size], scope)
        return self._op("Transpose", scope, x, perm=[0, 2, 1, 3])

    def _rms_norm(self, x: str, module: str) -> str:
        weight = self._weight(self._modules[module].weight)
        return self._op("RMSNormalization", module, x, weight, epsilon=self._config.norm_eps)

    def _swiglu(self, z: str, scope: str) -> str:
        gate, up = self._graph.op("Split", [z], scope, 2, axis=-1, num_outputs=2)
        silu = self._op("Mul", scope, gate, self._op("Sigmoid", scope, gate))
        return self._op("Mul", scope, silu, up)

    def _reshaped(self, x: str, shape: list[int], scope: str) -> str:
        return self._op("Reshape", scope, x, self._graph.constant(np.array(shape, np.int64), f"{scope}/shape"))

    def _weight(self, spec: WeightSpec) -> str:
        return self._graph.weight(spec.name, self._read(spec))

    def _transposed(self, spec: WeightSpec, scope: str) -> str:
        """Return a weight as [in, out], as MatMul takes it and quantizers of ONNX graphs expect it."""
        if self._graph.has_weight(spec.name):  # the embedding's table is the tied head's weight, too
            return self._op("Transpose", scope, spec.name, perm=[1, 0])
        return self._graph.weight(spec.name, self._read(spec).T)

    def _op(self, operator: str, scope: str, *inputs: str, **attributes: Any) -> str:
        return str(self._graph.op(operator, inputs, scope, **attributes))


def define(graph: Graph, config: ModelConfig, dtype: str, modules: Modules, read_weight: ReadWeight) -> None:
    """Add the network, with its inputs and outputs, to the graph."""
    input_ids = graph.input("input_ids", "int64", [BATCH, SEQUENCE])
    attention_mask = graph.input("attention_mask", "int64", [BATCH, TOTAL])
    position_ids = graph.input("position_ids", "int64", [BATCH, SEQUENCE])
    lengths = graph.input("prompt_lengths", "int64", [BATCH]) if needs_prompt_lengths(config) else None
    past = [_cache(graph, f"past_key_values.{layer}", dtype, config) for layer in range(config.num_layers)]
    rotary = RotaryTensors(graph, config, dtype, position_ids, lengths)
    mask = _attention_mask(graph, input_ids, attention_mask)
    ops = StandardOperations(graph, config, modules, read_weight, rotary, mask, past)
    logits = decoder(ops, config, input_ids, last_token_only=False)
    graph.output(logits, "logits", dtype, [BATCH, SEQUENCE, config.vocab_size])
    for layer, tensors in enumerate(ops.present_key_values):
        for tensor, kind in zip(tensors, ("key", "value"), strict=True):
            shape = (BATCH, config.num_kv_heads, TOTAL, config.head_size)
            graph.output(tensor, f"present.{layer}.{kind}", dtype, shape)


def _cache(graph: Graph, name: str, dtype: str, config: ModelConfig) -> tuple[str, str]:
    shape = (BATCH, config.num_kv_heads, PAST, config.head_size)
    return graph.input(f"{name}.key", dtype, shape), graph.input(f"{name}.value", dtype, shape)


def _attention_mask(graph: Graph, input_ids: str, attention_mask: str) -> str:
    """Compute the mask: a token attends to tokens up to itself that are no padding, and to itself.

    So a token of padding attends to something, and its numbers, which nothing reads, stay finite.
    """

    def op(operator: str, *inputs: str, **attributes: int) -> str:
        return str(graph.op(operator, inputs, "mask", **attributes))

    def integers(*values: int) -> str:
        return graph.constant(np.array(values, np.int64), "mask/axes")

    zero, one = (graph.constant(np.array(value, np.int64), "mask/number") for value in (0, 1))
    total, new = (
        op("Squeeze", op("Shape", tensor, start=1, end=2), integers(0)) for tensor in (attention_mask, input_ids)
    )
    keys = op("Range", zero, total, one)  # [total_sequence_length]
    queries = op("Unsqueeze", op("Range", op("Sub", total, new), total, one), integers(1))  # [sequence_length, 1]
    real = op("Unsqueeze", graph.cast(attention_mask, "bool", "mask"), integers(1, 2))
    causal, own = op("LessOrEqual", keys, queries), op("Equal", keys, queries)
    return op("And", causal, op("Or", real, own))
