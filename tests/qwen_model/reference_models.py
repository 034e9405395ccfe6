"""Qwen v1 and DeciCoder written out plainly in PyTorch: no cache, one sequence, every score computed.

They are in no version of transformers. Names of modules are those of the published checkpoints.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class RmsNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt(torch.mean(x * x, dim=-1, keepdim=True) + self.eps) * self.weight


def rotate(x: Tensor, base: float) -> Tensor:
    """NeoX style, over all of [heads, tokens, head_size]."""
    tokens, size = x.shape[-2:]
    angles = torch.arange(tokens)[:, None] * base ** (-torch.arange(0, size, 2) / size)
    turn = torch.polar(torch.ones_like(angles), angles)
    pairs = torch.complex(x[..., : size // 2].contiguous(), x[..., size // 2 :].contiguous()) * turn
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[heads, tokens, head_size] each; to [tokens, heads * head_size]."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


class QwenV1(nn.Module):
    """Qwen-7B's modelling code, as the design document has it."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        hidden = config["hidden_size"]
        self.config = config
        self.transformer = nn.Module()
        self.transformer.wte = nn.Embedding(config["vocab_size"], hidden)
        self.transformer.h = nn.ModuleList(QwenV1Block(config) for _ in range(config["num_hidden_layers"]))
        self.transformer.ln_f = RmsNorm(hidden, config["layer_norm_epsilon"])
        self.lm_head = nn.Linear(hidden, config["vocab_size"], bias=False)

    def forward(self, ids: list[int], prompt_length: int | None = None) -> Tensor:
        """Logits [tokens, vocabulary]. The stretch of the base is fixed when the prompt is seen."""
        x = self.transformer.wte(torch.tensor(ids))
        base = self.base(prompt_length or len(ids))
        for block in self.transformer.h:
            x = block(x, base)
        return self.lm_head(self.transformer.ln_f(x))

    def base(self, length: int) -> float:
        alpha = 1.0
        if self.config["use_dynamic_ntk"]:
            alpha = max(2.0 ** math.ceil(math.log(length / self.config["seq_length"], 2) + 1) - 1, 1.0)
        size = self.config["kv_channels"]
        return self.config["rotary_emb_base"] * alpha ** (size / (size - 2))


class QwenV1Block(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"] // 2
        projected = config["kv_channels"] * config["num_attention_heads"]
        self.config = config
        self.ln_1 = RmsNorm(hidden, config["layer_norm_epsilon"])
        self.ln_2 = RmsNorm(hidden, config["layer_norm_epsilon"])
        self.attn = nn.Module()
        self.attn.c_attn = nn.Linear(hidden, 3 * projected)
        self.attn.c_proj = nn.Linear(projected, hidden, bias=False)
        self.mlp = nn.Module()
        self.mlp.w1 = nn.Linear(hidden, inner, bias=False)
        self.mlp.w2 = nn.Linear(hidden, inner, bias=False)
        self.mlp.c_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor, base: float) -> Tensor:
        heads = self.config["num_attention_heads"]
        q, k, v = (
            part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in self.attn.c_attn(self.ln_1(x)).chunk(3, -1)
        )
        q, k = rotate(q, base), rotate(k, base)
        if self.config["use_logn_attn"]:
            trained = self.config["seq_length"]
            scale = [math.log(i, trained) if i > trained else 1.0 for i in range(1, len(x) + 1)]
            q = q * torch.tensor(scale)[:, None]
        x = x + self.attn.c_proj(causal_attention(q, k, v))
        y = self.ln_2(x)
        return x + self.mlp.c_proj(self.mlp.w1(y) * nn.functional.silu(self.mlp.w2(y)))


class DeciCoder(nn.Module):
    """LLaMA's layer with few key-value heads, each repeated for its group of query heads."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        hidden = config["hidden_size"]
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config["vocab_size"], hidden)
        self.model.layers = nn.ModuleList(DeciCoderLayer(config) for _ in range(config["num_hidden_layers"]))
        self.model.norm = RmsNorm(hidden, config["rms_norm_eps"])
        self.lm_head = nn.Linear(hidden, config["vocab_size"], bias=False)

    def forward(self, ids: list[int], prompt_length: int | None = None) -> Tensor:
        x = self.model.embed_tokens(torch.tensor(ids))
        for layer in self.model.layers:
            x = layer(x)
        return self.lm_head(self.model.norm(x))


class DeciCoderLayer(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        size = hidden // self.heads
        self.base = config["rope_theta"]
        self.input_layernorm = RmsNorm(hidden, config["rms_norm_eps"])
        self.post_attention_layernorm = RmsNorm(hidden, config["rms_norm_eps"])
        self.self_attn = nn.Module()
        self.self_attn.q_proj = nn.Linear(hidden, self.heads * size, bias=False)
        self.self_attn.k_proj = nn.Linear(hidden, self.kv_heads * size, bias=False)
        self.self_attn.v_proj = nn.Linear(hidden, self.kv_heads * size, bias=False)
        self.self_attn.o_proj = nn.Linear(self.heads * size, hidden, bias=False)
        self.mlp = nn.Module()
        self.mlp.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.mlp.up_proj = nn.Linear(hidden, inner, bias=False)
        self.mlp.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.input_layernorm(x)
        q = self.self_attn.q_proj(y).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        k = self.self_attn.k_proj(y).unflatten(-1, (self.kv_heads, -1)).transpose(0, 1)
        v = self.self_attn.v_proj(y).unflatten(-1, (self.kv_heads, -1)).transpose(0, 1)
        group = self.heads // self.kv_heads
        k, v = (part.repeat_interleave(group, dim=0) for part in (rotate(k, self.base), v))
        x = x + self.self_attn.o_proj(causal_attention(rotate(q, self.base), k, v))
        y = self.post_attention_layernorm(x)
        return x + self.mlp.down_proj(nn.functional.silu(self.mlp.gate_proj(y)) * self.mlp.up_proj(y))
