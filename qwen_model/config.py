"""The former place of `qwen_model.checkpoints.config`, kept for code that imports it."""

from .checkpoints.config import ModelConfig, RotaryConfig, read_config

__all__ = ["ModelConfig", "RotaryConfig", "read_config"]
