"""The former place of `qwen_model.interface.sampling`, kept for code that imports it."""

from .interface.sampling import SamplingOptions

__all__ = ["SamplingOptions"]
