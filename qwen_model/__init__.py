"""Qwen and its relatives: build an engine from a Hugging Face checkpoint, and generate text with it.

qwen_model.build_engine("Qwen2.5-7B-Instruct", output_dir="engine", rmsnorm_plugin=True)
session = qwen_model.load_engine("engine")
session.generate("What is RMSNorm?", chat=True).outputs[0].text
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import ModelConfig
    from .engine import BuildSummary, build_engine, load_engine
    from .errors import QwenModelError
    from .sampling import SamplingOptions
    from .session import GenerationResult, Output, Session, StreamEvent

__all__ = [
    "BuildSummary",
    "GenerationResult",
    "ModelConfig",
    "Output",
    "QwenModelError",
    "SamplingOptions",
    "Session",
    "StreamEvent",
    "build_engine",
    "load_engine",
]

_MODULES = {
    "config": ("ModelConfig",),
    "engine": ("BuildSummary", "build_engine", "load_engine"),
    "errors": ("QwenModelError",),
    "sampling": ("SamplingOptions",),
    "session": ("GenerationResult", "Output", "Session", "StreamEvent"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import qwen_model` and `--help` are quick."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
