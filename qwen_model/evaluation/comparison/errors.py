"""Measure errors beside exact results, and compare them with the errors of PyTorch's own operations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...interface.probe import Array

LIMIT = 4.0
"""An operation whose error is more than this many times PyTorch's own is off."""
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8, "float64": 2.0**-53}
"""The largest relative error of rounding to a type. PyTorch's error counts as at least this."""


@dataclass(frozen=True)
class Error:
    """Hold an error beside the size of the exact result.

    rms: root mean square of the differences over that of the result.
    max: the largest difference over the largest number of the result.

    Both are infinite where the result is not finite, or the exact result is zero and the other is not.
    """

    rms: float
    max: float

    def largest(self, other: Error) -> Error:
        """Return the larger of each number."""
        return Error(max(self.rms, other.rms), max(self.max, other.max))

    def ratio(self, own: Error, dtype: str) -> float:
        """Divide by PyTorch's `own` error in `dtype`: the larger of the two quotients.

        Where PyTorch's own result is not finite either, the numbers do not fit into the type and the ratio is 0.
        """
        if not np.isfinite(own.rms):
            return 0.0
        least = ROUNDING[dtype]
        return max(self.rms / max(own.rms, least), self.max / max(own.max, least))


def error_of(found: Array, exact: Array) -> Error:
    """Measure the error of an array beside the exact one of the same shape."""
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(found.astype(np.float64) - exact)
    if not np.isfinite(difference).all():
        return Error(np.inf, np.inf)
    return Error(_quotient(_rms(difference), _rms(exact)), _quotient(difference.max(), np.abs(exact).max()))


def _rms(x: Array) -> float:
    return float(np.sqrt(np.square(x).mean()))


def _quotient(error: float, size: float) -> float:
    return float(error / size) if size else (np.inf if error else 0.0)
