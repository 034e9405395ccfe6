"""Round a weight to codes, with the scales that give the least squared error.

A scale from a group's largest number wastes codes on outliers: a smaller one, which clips them, is nearer for the rest.
So several are tried for each group, and the best is refined by least squares: the scale that fits its own codes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..checkpoints.module_weights import WeightFormat
from ..checkpoints.quantized_weight import Codes, QuantizedWeight
from ..checkpoints.tensor_files import Weight, as_numpy

Floats = npt.NDArray[np.float32]

CLIPPING = {4: np.linspace(1.0, 0.55, 7, dtype=np.float32), 8: np.linspace(1.0, 0.8, 3, dtype=np.float32)}
"""The parts of a group's range that are tried, by the bits of a code."""
CHUNK = 1 << 17
"""Numbers of a weight that are rounded at a time, which fit a core's cache."""


@dataclass(frozen=True)
class Rounded:
    """Hold a weight as codes.

    squared_error, squared_sum: of all its numbers, and of the numbers themselves; weighted as the search weighted them.
    """

    weight: QuantizedWeight
    squared_error: float
    squared_sum: float

    @property
    def relative_error(self) -> float:
        """Return the root of the mean squared error, relative to that of the numbers."""
        return float((self.squared_error / self.squared_sum) ** 0.5) if self.squared_sum else 0.0


def round_weight(weight: Weight, weight_format: WeightFormat, importance: Floats | None = None) -> Rounded:
    """Round a weight [out, in] of any floating-point type to the codes of `weight_format`.

    importance: float32 [in], how much an error at each input counts, such as the mean square of x; None: all alike.
    """
    out_features, in_features = weight.shape
    size = weight_format.group_size or in_features
    rows = max(1, CHUNK // in_features)
    groups = in_features // size
    codes = np.empty((out_features, in_features), np.uint8)
    scales = np.empty((out_features, groups), np.float16 if weight_format.scale_dtype == "float16" else np.float32)
    zeros = None if weight_format.symmetric else np.empty((out_features, groups), np.uint8)
    weights = None if importance is None else importance.reshape(groups, size)

    def round_rows(start: int) -> tuple[float, float]:
        part = slice(start, start + rows)
        w = as_numpy(weight[part]).astype(np.float32, copy=False).reshape(-1, groups, size)
        group = _Groups(w, weight_format, weights)
        scale, zero, q, error = group.best()
        codes[part] = q.reshape(len(w), in_features)
        scales[part] = scale
        if zeros is not None:
            zeros[part] = zero
        return float(error.sum(dtype=np.float64)), float(_weighted(w, w, weights).sum(dtype=np.float64))

    with ThreadPoolExecutor(min(16, len(os.sched_getaffinity(0)))) as threads:
        sums = list(threads.map(round_rows, range(0, out_features, rows)))
    quantized = QuantizedWeight(weight_format.bits, codes, scales, zeros, None, weight_format.scale_dtype)
    return Rounded(quantized, sum(error for error, _ in sums), sum(total for _, total in sums))


class _Groups:
    """Search the scales of the groups of some rows: w is float32 [rows, groups, size].

    For given codes q, less their zero points, the scale of the least error is Σ w·q / Σ q², and the error is then
    Σ w² - (Σ w·q)² / Σ q²: of each scale that is tried only the codes are made.
    """

    def __init__(self, w: Floats, weight_format: WeightFormat, importance: Floats | None):
        self._w = w
        self._importance = importance
        self._bits = weight_format.bits
        self._symmetric = weight_format.symmetric
        self._to_scale_dtype: Callable[[Floats], Floats] = {"float16": as_float16, "bfloat16": as_bfloat16}[
            weight_format.scale_dtype
        ]
        self._signed: Floats = np.empty_like(w)  # codes less their zero points

    def best(self) -> tuple[Floats, Floats, Codes, Floats]:
        """Return scales and zero points [rows, groups], codes as w, and the squared error of each group."""
        gain = np.full(self._w.shape[:2], -1.0, np.float32)
        best_scale, best_zero = np.zeros_like(gain), np.zeros_like(gain)
        for scale, zero in self._candidates():
            fitted, fitted_gain = self._fitted(scale, zero)
            better = fitted_gain > gain
            for kept, new in ((gain, fitted_gain), (best_scale, fitted), (best_zero, zero)):
                np.copyto(kept, new, where=better)
        scale = self._to_scale_dtype(self._fitted(best_scale, best_zero)[0])
        self._round(scale, best_zero)
        codes = (self._signed + best_zero[:, :, None]).astype(np.uint8)
        np.multiply(self._signed, scale[:, :, None], out=self._signed)
        np.subtract(self._signed, self._w, out=self._signed)
        return scale, best_zero, codes, _weighted(self._signed, self._signed, self._importance)

    def _candidates(self) -> Iterator[tuple[Floats, Floats]]:
        """Yield scales, and the zero points that belong to them."""
        top, middle = float((1 << self._bits) - 1), np.float32(1 << self._bits - 1)
        low, high = self._w.min(axis=2), self._w.max(axis=2)
        if self._symmetric:
            largest = np.maximum(high, -low)
            zero = np.full_like(largest, middle)
            for ratio in CLIPPING[self._bits]:
                yield largest * (ratio / (middle - 1)), zero
            return
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        for ratio in CLIPPING[self._bits]:
            scale = (high - low) * (ratio / np.float32(top))
            yield scale, np.clip(np.rint(_divided(-low * ratio, scale)), 0, top)

    def _round(self, scale: Floats, zero: Floats) -> None:
        """Set `_signed` to the nearest codes, less their zero points."""
        signed, middle = self._signed, 1 << self._bits - 1
        np.multiply(self._w, _divided(np.ones_like(scale), scale)[:, :, None], out=signed)
        if self._symmetric:
            np.rint(signed, out=signed)
            np.clip(signed, np.float32(-middle), np.float32(middle - 1), out=signed)
            return
        np.add(signed, zero[:, :, None], out=signed)
        np.rint(signed, out=signed)
        np.clip(signed, np.float32(0), np.float32(2 * middle - 1), out=signed)
        np.subtract(signed, zero[:, :, None], out=signed)

    def _fitted(self, scale: Floats, zero: Floats) -> tuple[Floats, Floats]:
        """Return the scales that fit the codes of these scales best, and how much less than Σ w² the error is."""
        self._round(scale, zero)
        products = _weighted(self._w, self._signed, self._importance)
        squares = _weighted(self._signed, self._signed, self._importance)
        fitted = _divided(products, squares)
        return fitted, fitted * products


def _weighted(one: Floats, other: Floats, importance: Floats | None) -> Floats:
    """Sum the products of each group, [rows, groups]."""
    if importance is None:
        return np.asarray(np.einsum("rgk,rgk->rg", one, other))
    return np.asarray(np.einsum("rgk,rgk,gk->rg", one, other, importance))


def _divided(numerator: Floats, denominator: Floats) -> Floats:
    """Divide; 0 where the denominator is 0."""
    with np.errstate(over="ignore"):
        return np.divide(numerator, denominator, out=np.zeros_like(denominator), where=denominator != 0)


def as_float16(scale: Floats) -> Floats:
    """Round to float16, saturating; the numbers are float32."""
    return np.minimum(scale, np.float32(65504.0)).astype(np.float16).astype(np.float32)


def as_bfloat16(scale: Floats) -> Floats:
    """Round to bfloat16, to nearest even; the numbers are float32."""
    bits = scale.astype(np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)
