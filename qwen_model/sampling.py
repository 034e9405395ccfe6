"""Keep the import path `qwen_model.sampling` of `qwen_model.interface.sampling` working."""

from .interface.sampling import SamplingOptions

__all__ = ["SamplingOptions"]
