"""Define the callback by which long work reports its progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the phase, what is done, and what is to be done in all (0: not known).

They are bytes in the phases "weights", "TensorRT" and "plan", and products in `GEMM_KERNELS`.
"""
GEMM_KERNELS = "GEMM kernels"
"""The phase in which kernels are timed."""


def no_progress(phase: str, done: int, total: int) -> None:
    """Report nothing."""
