"""Import optional dependencies when they are first used."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import QwenModelError

BACK_END_MODULES = {
    "torch": ("torch", "safetensors"),
    "tensorrt": ("tensorrt", "cuda.bindings", "safetensors", "ml_dtypes"),
    "tensorrt-rtx": ("tensorrt_rtx", "safetensors", "ml_dtypes"),  # and onnx to build, cuda.bindings to run
}
"""The modules that each back end needs; the extra of its name brings them, and all that tokenizers and chats need."""

OLDEST_DRIVERS = {12: 525, 13: 580}
"""By the release of CUDA."""

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
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        extras = " or ".join(f'pip install "qwen-plugins[{name}]"' for name in ([extra] if extra else BACK_END_MODULES))
        missing = PACKAGES.get(error.name or "", error.name)
        raise QwenModelError(f"{needed_for} needs {missing}, which is not installed: {extras}") from error
    except Exception as error:  # a library that does not fit the others raises anything: OSError, AttributeError, ...
        raise QwenModelError(f"{needed_for} needs {module}, which cannot be imported: {error}") from error
    if getattr(found, "__file__", "") is None:  # a folder without __init__.py
        folder = next(iter(found.__path__), "")
        raise QwenModelError(f"{needed_for} needs {module}, of which only a part is installed, in {folder}")
    return found


def cuda_release() -> int:
    """Return the release of CUDA, such as 12, of the kernels; of a source tree, the one that it is built with."""
    try:
        core = importlib.import_module("qwen_plugins._core")
    except ImportError:
        return max(OLDEST_DRIVERS)
    return int(core.CUDA_VERSION) // 1000


def oldest_driver() -> str:
    """Return the oldest driver that the kernels run with, and why: "580, which CUDA 13 needs"."""
    release = cuda_release()
    return f"{driver_of(release)}, which CUDA {release} needs"


def driver_of(release: int) -> int:
    """Return the oldest driver of a release of CUDA, or that of the newest that is known."""
    return OLDEST_DRIVERS.get(release, max(OLDEST_DRIVERS.values()))


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
