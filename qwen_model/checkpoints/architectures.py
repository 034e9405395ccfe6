"""List the architectures: the names of their settings and weights, and the switches in which they differ.

A new architecture is one entry here; docs/adding_an_architecture.md walks through it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..common.errors import QwenModelError, shown


@dataclass(frozen=True)
class ConfigKeys:
    """Name the settings of `config.json` that are not called the same everywhere."""

    hidden_size: str = "hidden_size"
    num_heads: str = "num_attention_heads"
    num_kv_heads: str | None = "num_key_value_heads"  # None: as many as heads
    head_size: str = "head_dim"
    max_positions: str = "max_position_embeddings"
    norm_eps: str = "rms_norm_eps"
    rotary_base: str = "rope_theta"
    rotary_fraction: str | None = None  # of each head that is rotated; None: all of it


@dataclass(frozen=True)
class WeightNames:
    """Name the modules of a checkpoint, without `.weight` and `.bias`; those of a layer follow `layer` and a dot."""

    embedding: str = "model.embed_tokens"
    layer: str = "model.layers.{layer}"
    input_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # one name: fused already
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    attention_output: str = "self_attn.o_proj"
    post_attention_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"  # silu is applied to this one
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    final_norm: str = "model.norm"
    lm_head: str = "lm_head"


@dataclass(frozen=True)
class Architecture:
    """Say how an architecture differs from LLaMA. A switch that is a string is a key of `config.json`."""

    name: str
    model_type: str
    keys: ConfigKeys = field(default_factory=ConfigKeys)
    weights: WeightNames = field(default_factory=WeightNames)
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    default_head_size: int | None = None  # None: hidden_size / heads
    intermediate_divisor: int = 1  # intermediate_size of config.json counts this many projections together
    qwen_v1_rotary: bool = False  # use_dynamic_ntk and use_logn_attn
    window_switch: bool = False  # use_sliding_window and max_window_layers
    older_keys: Mapping[str, str] = field(default_factory=dict)  # names of earlier versions, and the current names


_QWEN_V1 = Architecture(
    name="QWenLMHeadModel",
    model_type="qwen",
    keys=ConfigKeys(
        num_kv_heads=None,
        head_size="kv_channels",
        max_positions="seq_length",
        norm_eps="layer_norm_epsilon",
        rotary_base="rotary_emb_base",
        rotary_fraction="rotary_pct",
    ),
    weights=WeightNames(
        embedding="transformer.wte",
        layer="transformer.h.{layer}",
        input_norm="ln_1",
        qkv=("attn.c_attn",),
        attention_output="attn.c_proj",
        post_attention_norm="ln_2",
        gate="mlp.w2",
        up="mlp.w1",
        down="mlp.c_proj",
        final_norm="transformer.ln_f",
    ),
    qkv_bias=True,
    intermediate_divisor=2,
    qwen_v1_rotary=True,
    older_keys={
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_layer": "num_hidden_layers",
        "ffn_hidden_size": "intermediate_size",
        "padded_vocab_size": "vocab_size",
    },
)

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        _QWEN_V1,
        Architecture(name="Qwen2ForCausalLM", model_type="qwen2", qkv_bias=True, window_switch=True),
        Architecture(
            name="Qwen3ForCausalLM",
            model_type="qwen3",
            qkv_bias="attention_bias",
            output_bias="attention_bias",
            qk_norm=True,
            default_head_size=128,
            window_switch=True,
        ),
        Architecture(
            name="LlamaForCausalLM",
            model_type="llama",
            qkv_bias="attention_bias",
            output_bias="attention_bias",
            mlp_bias="mlp_bias",
        ),
        Architecture(name="DeciCoderForCausalLM", model_type="decicoder"),
    )
}


def find_architecture(values: Mapping[str, Any]) -> Architecture:
    """Find the entry for a `config.json` by its `architectures`, else by its `model_type`.

    Raises:
        QwenModelError: there is none.
    """
    names = values.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise QwenModelError(f"config.json: architectures must be a list of names, not {shown(names)}")
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    if not names:
        for architecture in ARCHITECTURES.values():
            if architecture.model_type == values.get("model_type"):
                return architecture
    given = ", ".join(map(shown, names[:3])) or f"model_type {shown(values.get('model_type'))}"
    raise QwenModelError(f"config.json: {given} is not supported (supported: {', '.join(ARCHITECTURES)})")
