"""A network so small that a test computes it in milliseconds."""

from typing import Any

from qwen_model.checkpoints.config import ModelConfig
from qwen_model.checkpoints.rotary_config import RotaryConfig


def small_config(**changed: Any) -> ModelConfig:
    """Return the sizes of a network of two layers, four heads of queries and two of keys; `changed` are other ones."""
    config: dict[str, Any] = {
        "architecture": "Qwen2ForCausalLM",
        "vocab_size": 50,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 32,
        "max_positions": 16,
        "norm_eps": 1e-5,
        "rotary": RotaryConfig(dim=24),
    }
    return ModelConfig(**{**config, **changed})
