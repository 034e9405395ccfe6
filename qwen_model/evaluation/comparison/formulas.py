"""Write out the decoder's formulas in NumPy, in the type of their arguments."""

from __future__ import annotations

import numpy as np

from ...interface.probe import Array


def rms_norm(h: Array, weight: Array, eps: float) -> Array:
    """Compute RMSNorm over the last axis."""
    with np.errstate(divide="ignore", invalid="ignore"):
        result: Array = h / np.sqrt(np.square(h).mean(-1, keepdims=True) + eps) * weight
    return result


def silu(x: Array) -> Array:
    """Compute x · sigmoid(x)."""
    with np.errstate(over="ignore"):
        result: Array = x / (1 + np.exp(-x))
    return result


def rotate(x: Array, table: Array, interleaved: bool = False) -> Array:
    """Rotate [tokens, heads, head_size] by cosines, then sines, [tokens, dim].

    Element i is rotated together with i + dim / 2 (the NeoX style), or 2i with 2i + 1 if `interleaved`.
    """
    dim = table.shape[-1]
    cos, sin = np.split(table[:, None], 2, axis=-1)
    turned = x[..., :dim]
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else np.split(turned, 2, axis=-1)
    parts = first * cos - second * sin, second * cos + first * sin
    joined = np.stack(parts, -1).reshape(turned.shape) if interleaved else np.concatenate(parts, -1)
    return np.concatenate([joined, x[..., dim:]], axis=-1)


def attend(q: Array, k: Array, v: Array, scale: float, visible: Array, strided_groups: bool = False) -> Array:
    """Compute attention of [tokens, heads, head_size] to [positions, kv_heads, head_size].

    visible: [tokens, positions], whether a token sees a position.
    strided_groups: query head h reads kv head h % kv_heads, and not h // (heads / kv_heads).
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    order = np.arange(heads) % kv_heads if strided_groups else np.arange(heads) // (heads // kv_heads)
    scores = np.einsum("thd,phd->htp", q, k[:, order]) * scale
    scores = np.where(visible, scores, -np.inf)
    largest = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(largest), largest, 0.0))
    sums = np.maximum(weights.sum(-1, keepdims=True), np.finfo(np.float64).tiny)  # a token that sees none gives zeros
    context: Array = np.einsum("htp,phd->thd", weights / sums, v[:, order])
    return context.reshape(len(q), -1)
