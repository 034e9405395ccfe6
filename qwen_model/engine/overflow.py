"""Explain logits that are not finite, as when activations overflow in float16."""

from __future__ import annotations

from ..common.errors import QwenModelError
from ..interface.engine_config import EngineConfig


def not_finite(config: EngineConfig, num_prompts: int, index: int) -> QwenModelError:
    """Return the error for NaN or infinities among the logits of one prompt of a batch."""
    name = f"prompt {index}" if num_prompts > 1 else "the prompt"
    problem = f"the logits of {name} are NaN or infinite"
    if config.dtype != "float16":
        return QwenModelError(f"{problem} in {config.dtype}: the weights may be damaged; build from another checkpoint")
    note = " (TensorRT 8.6 has no bfloat16)" if config.backend == "tensorrt" else ""
    return QwenModelError(
        f"{problem}: activations exceeded 65504, the largest number of float16; build the engine with --dtype bfloat16 "
        f"or float32{note}"
    )
