"""Define the decoder in terms of a small set of operations, which each back end implements.

A back end either computes at once (PyTorch) or adds layers to a network (TensorRT): `T` is its type of tensor. The
network names modules ("layers.3.attention.qkv", see checkpoints/weights.py); whether a module has a bias, in which
format its weight is and whether the head is the embedding's table, the back end finds in its records. The tokens of a
batch's sequences are packed, one sequence after the other without padding: activations are [tokens, hidden_size].
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from ..checkpoints.config import ModelConfig

T = TypeVar("T")


class Operations(Protocol[T]):
    """Define the operations of the decoder. Linear layers compute y = x · weightᵀ (+ bias), with weights [out, in].

    into: the linear layers that read an operation's output, by which a back end knows whether to quantize it there.
    """

    def embedding(self, input_ids: T, module: str) -> T:
        """Look up token ids, [tokens]; return [tokens, hidden_size]."""

    def norm(self, x: T, module: str, residual: T | None = None, into: tuple[str, ...] = ()) -> tuple[T, T]:
        """Return RMSNorm(h) and h, [tokens, size], where h = x + residual, or x without a residual."""

    def linear(
        self, x: T, module: str, activation: str | None = None, into: tuple[str, ...] = (), reduce: bool = False
    ) -> T:
        """Apply a linear layer to [tokens, in]; return [tokens, out].

        activation: "swiglu": of the 2 · intermediate_size outputs, gate first, return silu(gate) · up.
        reduce: tensor parallelism divides the layer's inputs, and sums the devices' results here.
        """

    def attention(self, qkv: T, layer: int, into: tuple[str, ...] = ()) -> T:
        """Compute causal attention of [tokens, (heads + 2 · kv_heads) · head_size]; return [tokens, heads · head_size].

        It applies RMSNorm to each head of q and k if the layer has "attention.q_norm" and "attention.k_norm", then the
        rotary embedding (and Qwen v1's logn), writes new keys and values to the cache, and attends over the cache.
        """

    def last_token(self, x: T, residual: T) -> tuple[T, T]:
        """Select the row of each sequence's last token from both: [tokens, hidden_size] to [sequences, hidden_size]."""


def decoder(ops: Operations[T], config: ModelConfig, input_ids: T, last_token_only: bool = True) -> T:
    """Compute the logits after the last token of each sequence, [sequences, vocab_size], or after every token."""
    x = ops.embedding(input_ids, "embedding")
    residual = None
    for layer in range(config.num_layers):
        last = layer == config.num_layers - 1
        x, residual = decoder_layer(ops, layer, x, residual, last_token_only and last)
    x, _ = ops.norm(x, "final_norm", residual, into=("lm_head",))
    return ops.linear(x, "lm_head")


def decoder_layer(
    ops: Operations[T], layer: int, x: T, residual: T | None, last_token_only: bool = False
) -> tuple[T, T]:
    """Compute one layer. Its input and its output are x + residual; the RMSNorm that follows computes each sum.

    last_token_only: for the last layer: what follows its attention, most of its arithmetic, is computed for the last
        token of each sequence alone.
    """
    name = f"layers.{layer}"
    qkv, output = f"{name}.attention.qkv", f"{name}.attention.output"
    gate_up, down = f"{name}.mlp.gate_up", f"{name}.mlp.down"

    x, residual = ops.norm(x, f"{name}.input_norm", residual, into=(qkv,))
    x = ops.attention(ops.linear(x, qkv), layer, into=(output,))
    if last_token_only:
        x, residual = ops.last_token(x, residual)
    x = ops.linear(x, output, reduce=True)

    x, residual = ops.norm(x, f"{name}.post_attention_norm", residual, into=(gate_up,))
    x = ops.linear(x, gate_up, activation="swiglu", into=(down,))
    return ops.linear(x, down, reduce=True), residual
