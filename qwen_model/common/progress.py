"""Define the callback by which long work reports its progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the phase ("weights", "TensorRT" or "plan"), the bytes done, and the bytes in all (0: not known)."""
