"""Defines the decoder in terms of a small set of operations, which each back end implements.

A back end either computes at once (PyTorch) or adds layers to a network (TensorRT): `T` is what it passes from one
operation to the next. Weights are given by name (see weights.py), so that each back end loads and keeps them its way.
Tokens of all sequences of a batch lie one after the other (packed, without padding): activations are
[tokens, hidden_size].
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from ..checkpoints.config import ModelConfig

T = TypeVar("T")


class Operations(Protocol[T]):
    """The operations of the decoder. Linear layers compute y = x · weightᵀ (+ bias), with weights [out, in]."""

    def embedding(self, input_ids: T, weight: str) -> T:
        """Look up [tokens] ids: [tokens, hidden_size]."""

    def linear(self, x: T, weight: str, bias: str | None = None) -> T:
        """Apply a linear layer to [tokens, in]: [tokens, out]."""

    def rms_norm(self, x: T, weight: str, residual: T | None = None) -> tuple[T, T]:
        """Return RMSNorm(h) and h, where h = x + residual, or x without a residual."""

    def gpt_attention(self, qkv: T, layer: int, q_norm: str | None, k_norm: str | None) -> T:
        """Compute causal attention of packed [tokens, (heads + 2 · kv_heads) · head_size]: [tokens, heads · head_size].

        Inside: RMSNorm of each head of q and k where weights are given, the rotary embedding (and Qwen v1's logn), the
        new keys and values written to the cache, attention over the cache.
        """

    def linear_swiglu(self, x: T, weight: str, bias: str | None = None) -> T:
        """Apply a linear layer with 2 · intermediate_size outputs, gate first, and return silu(gate) · up."""

    def last_token(self, x: T, residual: T) -> tuple[T, T]:
        """Select the rows of each sequence's last token from both: [tokens, ...] to [sequences, ...]."""


def decoder(ops: Operations[T], config: ModelConfig, input_ids: T, last_token_only: bool = True) -> T:
    """Compute the logits after the last token of each sequence [sequences, vocab_size], or after every token."""
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
    """Compute one layer. Its input is x + residual, as is its output: the next RMSNorm computes each sum.

    last_token_only: of the last layer, behind whose attention no token needs another: the rest of it, most of its
        arithmetic, is for the last token of each sequence alone.
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
