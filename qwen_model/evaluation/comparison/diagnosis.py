"""Find a reason for a wrong result: compute it again with each known fault, and see which gives what was found."""

from __future__ import annotations

import numpy as np

from ...interface.probe import Array
from .case import Case
from .errors import LIMIT, Error, error_of
from .faults import faults

TF32_ERRORS = (2.0**-14, 2.0**-9)
"""The range of relative errors that products of numbers rounded to TF32 (11 bits) or float16 have."""


def likely_reason(case: Case, found: Array, own: Error, dtype: str) -> str:
    """Say, in a sentence without its end, what a wrong result `found` looks like.

    own, dtype: PyTorch's error of the right operation in the type of the result.
    """
    exact = case.values[case.name]
    if not np.isfinite(found).all():
        return f"{_share(~np.isfinite(found))} of its numbers are not finite"
    if not found.any():
        return "its numbers are all zero"
    try:
        for text, result in faults(case):
            if np.isfinite(result).all() and error_of(found, result).ratio(own, dtype) <= LIMIT:
                return f"it computes as if {text}"
    except KeyError:  # a weight of this format cannot be read back
        pass
    return _described(found, exact, own, dtype)


def _described(found: Array, exact: Array, own: Error, dtype: str) -> str:
    """Describe where the errors are, for a fault that is not known."""
    factor = float((found * exact).sum() / np.square(exact).sum())
    if error_of(found, exact * factor).ratio(own, dtype) <= LIMIT:
        return f"its numbers are {factor:.4g} times the right ones"
    rows = [error_of(row, right).ratio(own, dtype) > LIMIT for row, right in zip(found, exact, strict=True)]
    columns = np.abs(found - exact).max(0) > LIMIT * max(own.max, 2.0**-24) * np.abs(exact).max()
    places = [
        *([f"{sum(rows)} of {len(rows)} tokens ({_ranges(np.flatnonzero(rows))})"] if 0 < sum(rows) < len(rows) else []),
        *([f"columns {_ranges(np.flatnonzero(columns))} of {len(columns)}"] if 0 < columns.mean() < 0.9 else []),
    ]
    if places:
        return f"no known fault explains it; it is wrong in {' and '.join(places)}"
    if dtype == "float32" and TF32_ERRORS[0] < error_of(found, exact).rms < TF32_ERRORS[1]:
        return "its error is that of products in TF32 or float16"
    return "no known fault explains it"


def _share(where: Array) -> str:
    return f"{where.sum()} of {where.size}"


def _ranges(indices: Array, most: int = 4) -> str:
    """Write ascending indices as ranges: "0 to 3, 7"."""
    parts = np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1)
    texts = [f"{part[0]} to {part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts[:most]]
    return ", ".join(texts) + (", ..." if len(parts) > most else "")
