"""Export `qwen_model.engine.session` and its results once more, for code that imports them from here."""

from .engine.results import BeamOutput, GenerationResult, Output, StreamEvent, Timing
from .engine.session import Session

__all__ = ["BeamOutput", "GenerationResult", "Output", "Session", "StreamEvent", "Timing"]
