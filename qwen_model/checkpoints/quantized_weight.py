"""Hold a quantized weight in one form, whatever the checkpoint's: codes, scales and zero points as NumPy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..common.errors import QwenModelError
from .module_weights import WeightFormat

Codes = npt.NDArray[np.uint8]
Scales = npt.NDArray[Any]


@dataclass(frozen=True)
class QuantizedWeight:
    """Hold the weight of a linear layer: W[:, permutation] = scales · (codes - zeros), each scale for one group.

    codes: uint8 [out, in], 0 to 15 (int4) or 0 to 255 (int8).
    scales: float16 or float32 [out, groups].
    scale_dtype: "float16" or "bfloat16", the type that the scales have in an engine.
    zeros: uint8 [out, groups]; None: symmetric, 8 or 128.
    permutation: int32 [in], the column of W that each column of the codes belongs to; None: its own.
    """

    bits: int
    codes: Codes
    scales: Scales
    zeros: Codes | None = None
    permutation: npt.NDArray[np.int32] | None = None
    scale_dtype: str = "float16"

    @property
    def format(self) -> WeightFormat:
        """Return the format as engines record it."""
        groups = self.scales.shape[1]
        return WeightFormat(
            f"int{self.bits}",
            group_size=0 if groups == 1 else self.codes.shape[1] // groups,
            symmetric=self.zeros is None,
            layout=2,
            permuted=self.permutation is not None,
            scale_dtype=self.scale_dtype,
        )

    def dequantized(self) -> npt.NDArray[np.float32]:
        """Return W, float32 [out, in]; each number is exact for scales of float16 or bfloat16."""
        out_features, in_features = self.codes.shape
        groups = self.scales.shape[1]
        grouped = self.codes.reshape(out_features, groups, -1).astype(np.float32)
        grouped -= np.float32(1 << self.bits - 1) if self.zeros is None else self.zeros[:, :, None]
        grouped *= self.scales[:, :, None].astype(np.float32)
        w = grouped.reshape(out_features, in_features)
        if self.permutation is None:
            return w
        natural = np.empty_like(w)
        natural[:, self.permutation] = w
        return natural

    def check(self, name: str) -> None:
        """Raise QwenModelError, with the layer's `name`, if scales are not finite, or 0 for numbers that are not."""
        if not np.isfinite(self.scales).all():
            raise QwenModelError(f"{name} has scales that are not finite")
        rows, groups = np.nonzero(self.scales == 0)
        if len(rows):
            codes = self.codes.reshape(len(self.codes), self.scales.shape[1], -1)[rows, groups]
            zeros = 1 << self.bits - 1 if self.zeros is None else self.zeros[rows, groups][:, None]
            if (codes != zeros).any():
                raise QwenModelError(f"{name} has scales of 0 for numbers that are not 0")


def joined(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Join weights of the same bits, groups and order of inputs along their outputs, as q, k and v."""
    if len(parts) == 1:
        return parts[0]
    zeros = None
    if any(part.zeros is not None for part in parts):
        zeros = np.concatenate([part.zeros if part.zeros is not None else _mid_points(part) for part in parts])
    codes, scales = (np.concatenate(arrays) for arrays in ([p.codes for p in parts], [p.scales for p in parts]))
    return QuantizedWeight(parts[0].bits, codes, scales, zeros, parts[0].permutation, parts[0].scale_dtype)


def _mid_points(weight: QuantizedWeight) -> Codes:
    return np.full(weight.scales.shape, 1 << weight.bits - 1, np.uint8)
