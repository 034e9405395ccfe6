"""Imports of what the package does without until it is used."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import QwenModelError


def import_extra(module: str, needed_for: str, extra: str = "torch") -> Any:
    """The module of that name, or an error that says which extra of the package brings it.

    Raises:
        QwenModelError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise QwenModelError(
            f'{needed_for} needs {error.name}, which is not installed: pip install "qwen-plugins[{extra}]"'
        ) from error
