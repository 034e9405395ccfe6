"""Define the decoder in terms of a small set of operations, which each back end implements.

A back end either computes at once (PyTorch) or adds layers to a network (TensorRT): `T` is its type of tensor. Weights
are given by name (see checkpoints/weights.py), so that each back end loads and keeps them in its own way. The tokens of
a batch's sequences are packed, one sequence after the other without padding: activations are [tokens, hidden_size].
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from ..checkpoints.config import ModelConfig

T = TypeVar("T")


class Operations(Protocol[T]):
    """Define the operations of the decoder. Linear layers compute y = x · weightᵀ (+ bias), with weights [out, in]."""

    def embedding(self, input_ids: T, weight: str) -> T:
        """Look up token ids, [tokens]; return [tokens, hidden_size]."""

    def linear(self, x: T, weight: str, bias: str | None = None) -> T:
        """Apply a linear layer to [tokens, in]; return [tokens, out]."""

    def rms_norm(self, x: T, weight: str, residual: T | None = None) -> tuple[T, T]:
        """Return RMSNorm(h) and h, [tokens, size], where h = x + residual, or x without a residual."""

    def gpt_attention(self, qkv: T, layer: int, q_norm: str | None, k_norm: str | None) -> T:
        """Compute causal attention of [tokens, (heads + 2 · kv_heads) · head_size]; return [tokens, heads · head_size].

        It applies RMSNorm to each head of q and k if weights are given, then the rotary embedding (and Qwen v1's logn),
        writes the new keys and values to the cache, and attends over the cache.
        """

    def linear_swiglu(self, x: T, weight: str, bias: str | None = None) -> T:
        """Apply a linear layer with 2 · intermediate_size outputs, gate first; return silu(gate) · up."""

    def last_token(self, x: T, residual: T) -> tuple[T, T]:
        """Select the row of each sequence's last token from both: [tokens, hidden_size] to [sequences, hidden_size]."""


def decoder(ops: Operations[T], config: ModelConfig, input_ids: T, last_token_only: bool = True) -> T:
    """Compute the logits after the last token of each sequence, [sequences, vocab_size], or after every token."""
    x = ops.embedding(input_ids, "embedding.weight")
    residual = None
    for layer in range(config.num_layers):
        last = layer == config.num_layers - 1
        x, residual = decoder_layer(ops, config, layer, x, residual, last_token_only and last)
    x, _ = ops.rms_norm(x, "final_norm.weight", residual)
    return ops.linear(x, "embedding.weight" if config.tied_embedding else "lm_head.weight")


def decoder_layer(
    ops: Operations[T], config: ModelConfig, layer: int, x: T, residual: T | None, last_token_only: bool = False
) -> tuple[T, T]:
    """Compute one layer. Its input and its output are x + residual; the RMSNorm that follows computes each sum.

    last_token_only: for the last layer: what follows its attention, most of its arithmetic, is computed for the last
        token of each sequence alone.
    """
    name = f"layers.{layer}"

    def bias(module: str, present: bool) -> str | None:
        return f"{module}.bias" if present else None

    x, residual = ops.rms_norm(x, f"{name}.input_norm.weight", residual)
    qkv = ops.linear(x, f"{name}.attention.qkv.weight", bias(f"{name}.attention.qkv", config.qkv_bias))
    q_norm = f"{name}.attention.q_norm.weight" if config.qk_norm else None
    k_norm = f"{name}.attention.k_norm.weight" if config.qk_norm else None
    x = ops.gpt_attention(qkv, layer, q_norm, k_norm)
    if last_token_only:
        x, residual = ops.last_token(x, residual)
    x = ops.linear(x, f"{name}.attention.output.weight", bias(f"{name}.attention.output", config.output_bias))

    x, residual = ops.rms_norm(x, f"{name}.post_attention_norm.weight", residual)
    x = ops.linear_swiglu(x, f"{name}.mlp.gate_up.weight", bias(f"{name}.mlp.gate_up", config.mlp_bias))
    x = ops.linear(x, f"{name}.mlp.down.weight", bias(f"{name}.mlp.down", config.mlp_bias))
    return x, residual
