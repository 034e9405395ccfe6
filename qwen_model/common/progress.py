"""How long work tells what it has done."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with what is being done ("weights", "TensorRT", "plan"), and the bytes done and in all (0: not known)."""
