"""Imports of what the package does without until it is used."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import QwenModelError

ANY_BACK_END = ("torch", "tensorrt")
"""The extras that bring what all of the package needs beyond NumPy."""

PACKAGES = {"cuda": "cuda-bindings", "cuda.bindings": "cuda-bindings"}
"""Of modules that are called otherwise."""


def import_extra(module: str, needed_for: str, extra: str | None = None) -> Any:
    """The module of that name, or an error that says which extra of the package brings it; None: any back end's.

    Raises:
        QwenModelError: it is not installed, or it is and cannot be imported.
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
    """Our compiled kernels must be there, which they are not in a source tree.

    Raises:
        QwenModelError: they have not been built, or cannot be loaded.
    """
    try:
        importlib.import_module("qwen_plugins._core")
    except ModuleNotFoundError as error:
        raise QwenModelError("qwen-plugins is not built: pip install .") from error
    except ImportError as error:
        raise QwenModelError(f"the kernels of qwen-plugins cannot be loaded: {error}") from error
