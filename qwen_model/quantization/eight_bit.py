"""Round weights to the codes of layers that compute in 8 bits: int8, or fp8 (e4m3)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoints.eight_bit_weight import LARGEST_CODES, EightBitWeight, e4m3_codes, e4m3_numbers
from ..checkpoints.tensor_files import Weight, as_numpy
from .search import CHUNK, Floats, as_bfloat16, as_float16


def round_to_eight_bits(
    weight: Weight,
    kind: str,
    parts: Sequence[int] = (),
    input_scale: float | None = None,
    scale_dtype: str = "float32",
) -> tuple[EightBitWeight, float]:
    """Round a weight [out, in] of any floating-point type, with the scales of its largest numbers.

    kind: "int8" or "fp8".
    parts: numbers of rows, one after the other, each of which has one scale; (): each row has its own.
    input_scale: of x; None: each token's is made at run time.
    scale_dtype: that the scales are rounded to before the weight is, for files that keep them in this type: "float16",
        "bfloat16" or "float32".

    Returns the weight, and the root of its mean squared error, relative to that of the numbers.
    """
    out_features, in_features = weight.shape
    rows = max(1, CHUNK // in_features)
    starts = range(0, out_features, rows)
    codes: npt.NDArray[Any] = np.empty((out_features, in_features), np.int8 if kind == "int8" else np.uint8)
    largest = np.empty((out_features, 1), np.float32)

    def numbers(start: int) -> Floats:
        return as_numpy(weight[start : start + rows]).astype(np.float32, copy=False)

    def find_largest(start: int) -> None:
        largest[start : start + rows, 0] = np.abs(numbers(start)).max(axis=1)

    def round_rows(start: int) -> tuple[float, float]:
        w, scale = numbers(start), scales[start : start + rows]
        scaled = np.asarray(w / np.where(scale == 0, np.float32(1), scale), np.float32)
        rounded: Floats
        if kind == "int8":
            rounded = np.clip(np.rint(scaled), -127, 127)
            codes[start : start + rows] = rounded
        else:
            codes[start : start + rows] = found = e4m3_codes(scaled)
            rounded = e4m3_numbers()[found]
        rounded *= scale
        return float(np.square(rounded - w).sum(dtype=np.float64)), float(np.square(w).sum(dtype=np.float64))

    with ThreadPoolExecutor(min(16, len(os.sched_getaffinity(0)))) as threads:
        list(threads.map(find_largest, starts))
        scales = _scales(_shared(largest, parts), kind, scale_dtype)
        errors, sums = np.sum(list(threads.map(round_rows, starts)), axis=0)
    return EightBitWeight(kind, codes, scales, input_scale), float((errors / sums) ** 0.5) if sums else 0.0


def _shared(largest: Floats, parts: Sequence[int]) -> Floats:
    """Give the rows of each part the largest number of all of them."""
    if not parts:
        return largest
    starts = np.cumsum([0, *parts[:-1]])
    return np.repeat(np.maximum.reduceat(largest, starts), parts, axis=0)


def _scales(largest: Floats, kind: str, dtype: str) -> Floats:
    """Return the scales of rows with these largest numbers, which `dtype` holds, and which are 0 for zeros alone."""
    scales = np.asarray(largest / np.float32(LARGEST_CODES[kind]), np.float32)
    if dtype == "float16":
        return np.where(largest == 0, np.float32(0), np.maximum(as_float16(scales), np.float32(2.0**-24)))
    return as_bfloat16(scales) if dtype == "bfloat16" else scales
