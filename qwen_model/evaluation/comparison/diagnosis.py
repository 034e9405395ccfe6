"""Find a reason for a wrong result: compute it again with each known fault, and see which gives what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ...interface.probe import Array
from .case import Case
from .errors import LIMIT, ROUNDING, Error, error_of
from .faults import faults

MOST_COLUMNS = 0.9
"""The share of columns up to which an error is called one of these columns."""
TF32_ERRORS = (2.0**-14, 2.0**-9)
"""The range of relative errors that products of numbers rounded to TF32 (11 bits) or float16 have."""


def likely_reason(cases: Sequence[Case], found: Mapping[str, Array], own: Mapping[str, Error], dtype: str) -> str:
    """Say, in a sentence without its end, what a wrong result looks like.

    cases: of the result, one for each place that weights are read from.
    found: the results of the step.
    own, dtype: PyTorch's errors of the right operations in the type of the results.
    """
    name = cases[0].name
    wrong, exact = found[name], cases[0].values[name]
    if not np.isfinite(wrong).all():
        return f"{(~np.isfinite(wrong)).sum()} of its {wrong.size} numbers are not finite"
    if not wrong.any():
        return "its numbers are all zero"

    for case in cases:
        if reason := _explanation(case, found, own, dtype):
            return f"it computes as if {reason}"
    return _described(wrong, exact, own[name], dtype)


def _explanation(case: Case, found: Mapping[str, Array], own: Mapping[str, Error], dtype: str) -> str:
    """Return the fault that gives what was found, or ""."""

    def explains(name: str, result: Array) -> bool:
        return name not in found or error_of(found[name], result).ratio(own[name], dtype) <= LIMIT

    partly = ""
    try:
        for text, results in faults(case):
            if not explains(case.name, results[case.name]):
                continue
            if all(explains(name, result) for name, result in results.items()):
                return text
            partly = partly or f"{text}, but not all of q, k and v"
    except KeyError:  # a weight of this format cannot be read back
        pass
    return partly


def _described(found: Array, exact: Array, own: Error, dtype: str) -> str:
    """Describe where the errors are, for a fault that is not known."""
    factor = float((found * exact).sum() / np.square(exact).sum())
    if error_of(found, exact * factor).ratio(own, dtype) <= LIMIT:
        return f"its numbers are {factor:.4g} times the right ones"
    wrong = np.abs(found - exact) > LIMIT * max(own.max, ROUNDING[dtype]) * np.abs(exact).max()
    rows, columns = (np.flatnonzero(wrong.any(axis)) for axis in (1, 0))
    places = []
    if 0 < len(rows) < len(found):
        places.append(f"tokens {_ranges(rows)} of {len(found)}")
    if 0 < len(columns) < MOST_COLUMNS * found.shape[1]:
        places.append(f"columns {_ranges(columns)} of {found.shape[1]}")
    if places:
        return f"no known fault explains it; it is wrong in {' and '.join(places)}"
    if dtype == "float32" and TF32_ERRORS[0] < error_of(found, exact).rms < TF32_ERRORS[1]:
        return "its error is that of products in TF32 or float16"
    return "no known fault explains it"


def _ranges(indices: Array, most: int = 4) -> str:
    """Write ascending indices as ranges: "0 to 3, 7"."""
    parts = np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1)
    texts = [f"{part[0]} to {part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts[:most]]
    return ", ".join(texts) + (", ..." if len(parts) > most else "")
