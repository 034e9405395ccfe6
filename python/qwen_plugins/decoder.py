"""Export `qwen_plugins.attention` and `qwen_plugins.activation` once more, for code that imports them from here."""

from qwen_plugins.activation import swiglu
from qwen_plugins.attention import (
    HEAD_SIZES,
    PAGE_SIZE,
    ROTARY_STYLES,
    AttentionInputs,
    DecodeAttentionWorkspace,
    decode_attention,
    decode_attention_workspace,
    prefill_attention,
    split_quantized_cache,
)

__all__ = [
    "HEAD_SIZES",
    "PAGE_SIZE",
    "ROTARY_STYLES",
    "AttentionInputs",
    "DecodeAttentionWorkspace",
    "decode_attention",
    "decode_attention_workspace",
    "prefill_attention",
    "split_quantized_cache",
    "swiglu",
]
