"""Keep the import path `qwen_model.config` of `qwen_model.checkpoints.config` working."""

from .checkpoints.config import ModelConfig, RotaryConfig, read_config

__all__ = ["ModelConfig", "RotaryConfig", "read_config"]
