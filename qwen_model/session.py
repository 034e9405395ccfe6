"""The former place of `qwen_model.engine.session`, kept for code that imports it."""

from .engine.session import BeamOutput, GenerationResult, Output, Session, StreamEvent, Timing

__all__ = ["BeamOutput", "GenerationResult", "Output", "Session", "StreamEvent", "Timing"]
