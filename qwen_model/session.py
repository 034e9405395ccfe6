"""Former place of `qwen_model.engine.session` and of its results, kept for code that imports it."""

from .engine.results import BeamOutput, GenerationResult, Output, StreamEvent, Timing
from .engine.session import Session

__all__ = ["BeamOutput", "GenerationResult", "Output", "Session", "StreamEvent", "Timing"]
