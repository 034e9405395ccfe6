"""Build, load and run engines."""

from .build import BuildSummary, build_engine
from .load import load_engine

__all__ = ["BuildSummary", "build_engine", "load_engine"]
