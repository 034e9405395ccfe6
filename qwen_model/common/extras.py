"""Import optional dependencies when they are first used."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import QwenModelError

ANY_BACK_END = ("torch", "tensorrt")
"""The extras of the back ends: each brings all that loading checkpoints and generating need."""

PACKAGES = {
    "cuda": "cuda-bindings",
    "cuda.bindings": "cuda-bindings",
    "lm_eval": "lm-eval",
    "rouge_score": "rouge-score",
    "tensorrt_rtx": "tensorrt-rtx-cu13",
}
"""The names of packages whose modules are called something else."""


def import_extra(module: str, needed_for: str, extra: str | None = None) -> Any:
    """Import an optional dependency.

    Args:
        module: its name.
        needed_for: what needs it, as errors say it: "the torch back end".
        extra: the extra of this package that brings it. None: either back end's does.

    Raises:
        QwenModelError: the module is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        extras = " or ".join(f'pip install "qwen-plugins[{name}]"' for name in ([extra] if extra else ANY_BACK_END))
        missing = PACKAGES.get(error.name or "", error.name)
        raise QwenModelError(f"{needed_for} needs {missing}, which is not installed: {extras}") from error
    except ImportError as error:
        raise QwenModelError(f"{needed_for} needs {module}, which cannot be imported: {error}") from error


def require_kernels() -> None:
    """Check that the compiled kernels can be imported; a source tree has none.

    Raises:
        QwenModelError: they have not been built, or cannot be loaded.
    """
    try:
        importlib.import_module("qwen_plugins._core")
    except ModuleNotFoundError as error:
        raise QwenModelError("qwen-plugins is not built: pip install .") from error
    except ImportError as error:
        raise QwenModelError(f"the kernels of qwen-plugins cannot be loaded: {error}") from error
