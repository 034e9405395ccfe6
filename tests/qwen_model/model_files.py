"""Random checkpoints of every architecture, with dimensions that nothing divides well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from tests.qwen_model.reference_models import DeciCoder, QwenV1

DIMENSIONS = {
    "vocab_size": 317,
    "hidden_size": 84,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
SIZES = {
    **DIMENSIONS,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
HUGGING_FACE = {
    "Qwen2ForCausalLM": transformers.Qwen2Config,
    "Qwen3ForCausalLM": transformers.Qwen3Config,
    "LlamaForCausalLM": transformers.LlamaConfig,
}
QWEN_V1 = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "vocab_size": 317,
    "hidden_size": 80,
    "intermediate_size": 344,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "kv_channels": 16,
    "seq_length": 64,
    "max_position_embeddings": 512,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "no_bias": True,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "bf16": True,
}
DECICODER = {
    "architectures": ["DeciCoderForCausalLM"],
    **DIMENSIONS,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights so large that attention is far from uniform, and norms and biases that do something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 1.3 / parameter.shape[1] ** 0.5, generator=generator)
        else:
            parameter.data.uniform_(0.3, 1.2, generator=generator)


def hugging_face_model(architecture: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A model of transformers' own class, in float32."""
    sizes = {**SIZES, **changes}
    if architecture == "Qwen3ForCausalLM":
        sizes.setdefault("head_dim", 18)
    model = getattr(transformers, architecture)(HUGGING_FACE[architecture](**sizes)).eval()
    randomise(model, seed)
    return model


def save_hugging_face(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def save_reference(model: torch.nn.Module, config: dict[str, Any], folder: Path, dtype: str = "float32") -> Path:
    """A checkpoint in the form of the published ones, for an architecture that transformers does not have."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.to(getattr(torch, dtype)).contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def qwen_v1(seed: int = 0, **changes: Any) -> tuple[QwenV1, dict[str, Any]]:
    config = {**QWEN_V1, **changes}
    model = QwenV1(config).eval()
    randomise(model, seed)
    return model, config


def decicoder(seed: int = 0, **changes: Any) -> tuple[DeciCoder, dict[str, Any]]:
    config = {**DECICODER, **changes}
    model = DeciCoder(config).eval()
    randomise(model, seed)
    return model, config


def random_prompt(length: int, seed: int = 0, vocab_size: int = 317) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (length,), generator=generator).tolist()


def save_scripted_model(folder: Path, script: list[int], vocab_size: int = 300, hidden_size: int = 64) -> Path:
    """A LLaMA that says `script[i + 1]` after `script[i]`; the tokens of a script are all different."""
    generator = torch.Generator().manual_seed(0)
    embedding, head = torch.zeros(vocab_size, hidden_size), torch.zeros(vocab_size, hidden_size)
    embedding[script] = torch.nn.functional.normalize(torch.randn(len(script), hidden_size, generator=generator))
    embedding *= hidden_size**0.5
    head[script[1:]] = embedding[script[:-1]]
    layer, ones = "model.layers.0.", torch.ones(hidden_size)
    norms = ["model.norm", layer + "input_layernorm", layer + "post_attention_layernorm"]
    tensors = {f"{name}.weight": ones.clone() for name in norms}
    tensors |= {f"{layer}self_attn.{name}_proj.weight": torch.zeros(hidden_size, hidden_size) for name in "qkvo"}
    tensors |= {f"{layer}mlp.{name}_proj.weight": torch.zeros(32, hidden_size) for name in ("gate", "up")}
    tensors |= {f"{layer}mlp.down_proj.weight": torch.zeros(hidden_size, 32)}
    save_file({**tensors, "model.embed_tokens.weight": embedding, "lm_head.weight": head}, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
