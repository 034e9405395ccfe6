"""Keep the import path `qwen_model.session` of `qwen_model.engine.session` working."""

from .engine.session import BeamOutput, GenerationResult, Output, Session, StreamEvent, Timing

__all__ = ["BeamOutput", "GenerationResult", "Output", "Session", "StreamEvent", "Timing"]
