"""Build engines from Hugging Face checkpoints of Qwen and its relatives, and generate text with them.

qwen_model.build_engine("Qwen2.5-7B-Instruct", output_dir="engine")
session = qwen_model.load_engine("engine")
session.generate("What is RMSNorm?", chat=True).outputs[0].text
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoints.config import ModelConfig
    from .common.errors import QwenModelError
    from .engine import BuildSummary, build_engine, load_engine
    from .engine.export import ExportSummary, export_onnx
    from .engine.quantize import QuantizeSummary, quantize_checkpoint
    from .engine.results import GenerationResult, Output, StreamEvent
    from .engine.session import Session
    from .interface.sampling import SamplingOptions

__all__ = [
    "BuildSummary",
    "ExportSummary",
    "GenerationResult",
    "ModelConfig",
    "Output",
    "QuantizeSummary",
    "QwenModelError",
    "SamplingOptions",
    "Session",
    "StreamEvent",
    "build_engine",
    "export_onnx",
    "load_engine",
    "quantize_checkpoint",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())  # else logging prints warnings by itself

_MODULES = {
    "checkpoints.config": ("ModelConfig",),
    "common.errors": ("QwenModelError",),
    "engine": ("BuildSummary", "build_engine", "load_engine"),
    "engine.export": ("ExportSummary", "export_onnx"),
    "engine.quantize": ("QuantizeSummary", "quantize_checkpoint"),
    "engine.results": ("GenerationResult", "Output", "StreamEvent"),
    "engine.session": ("Session",),
    "interface.sampling": ("SamplingOptions",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import qwen_model` and `--help` are quick."""
    if name == "__version__":
        return import_module(".common.version", __name__).package_version()
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
