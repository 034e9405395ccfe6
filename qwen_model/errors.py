"""Keep the import path `qwen_model.errors` of `qwen_model.common.errors` working."""

from .common.errors import QwenModelError

__all__ = ["QwenModelError"]
