"""The former place of `qwen_model.common.errors`, kept for code that imports it."""

from .common.errors import QwenModelError

__all__ = ["QwenModelError"]
