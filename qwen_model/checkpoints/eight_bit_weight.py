"""Hold the weight of a linear layer whose x is quantized to 8 bits, too, whatever the checkpoint's form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..common.errors import QwenModelError
from .module_weights import BLOCK_SIZE, WeightFormat

Floats = npt.NDArray[np.float32]
LARGEST_CODES = {"int8": 127.0, "fp8": 448.0}
"""The largest numbers of codes, by the kind of the weight: a scale is the largest magnitude divided by these."""


@dataclass(frozen=True)
class EightBitWeight:
    """Hold the weight of a linear layer: W = scales · codes.

    kind: of codes, and of x: "int8" or "fp8" (e4m3).
    codes: [out, in], int8, or for fp8 uint8, the bits of its numbers.
    scales: float32 [out, 1], or those of blocks of 128 x 128 (fp8): [⌈out / 128⌉, ⌈in / 128⌉].
    input_scale: the scale of x; None: each token's is made at run time.
    """

    kind: str
    codes: npt.NDArray[Any]
    scales: Floats
    input_scale: float | None = None

    @property
    def format(self) -> WeightFormat:
        """Return the format as engines record it."""
        in_blocks = self.scales.shape != (len(self.codes), 1)
        scale = "token" if self.input_scale is None else "tensor"
        return eight_bit_format(self.kind, scale, BLOCK_SIZE if in_blocks else 0)

    @property
    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """Return the tensors of an engine's module by the fields of `ModuleWeights` that they are for."""
        found = {"weight": self.codes, "scales": self.scales}
        if self.input_scale is None:
            return found
        return {**found, "input_scale": np.array([self.input_scale], np.float32)}

    def dequantized(self) -> Floats:
        """Return W, float32 [out, in]."""
        w = e4m3_numbers()[self.codes] if self.kind == "fp8" else self.codes.astype(np.float32)
        w *= _by_number(self.scales, self.codes.shape)
        return w

    def check(self, name: str) -> None:
        """Raise QwenModelError, with the layer's `name`, if scales or numbers are not finite, or scales cannot be."""
        scales = self.scales if self.input_scale is None else np.append(self.scales, np.float32(self.input_scale))
        if not np.isfinite(scales).all() or (scales < 0).any():
            raise QwenModelError(f"{name} has scales that are not finite, or below 0")
        if self.input_scale == 0:
            raise QwenModelError(f"{name} has an input_scale of 0")
        if self.kind == "fp8" and ((self.codes & 0x7F) == 0x7F).any():
            raise QwenModelError(f"{name} has numbers that are not finite")
        zero = self.scales == 0
        if zero.any() and (self._magnitude_bits() * _by_number(zero, self.codes.shape)).any():
            raise QwenModelError(f"{name} has scales of 0 for numbers that are not 0")

    def _magnitude_bits(self) -> npt.NDArray[Any]:
        """Return codes that are 0 where a number is: e4m3 has -0, too."""
        return self.codes & 0x7F if self.kind == "fp8" else self.codes


def eight_bit_format(kind: str, activation_scale: str, group_size: int = 0) -> WeightFormat:
    """Return the format of weights of `kind`, "int8" or "fp8", for x of the same kind.

    activation_scale: "token" or "tensor". group_size: 128: blocks (fp8); 0: a scale for each output.
    """
    return WeightFormat(
        kind, group_size, activation=kind, layout=1, scale_dtype="float32", activation_scale=activation_scale
    )


def joined(parts: Sequence[EightBitWeight], name: str) -> EightBitWeight:
    """Join weights of one format along their outputs, as q, k and v; the scale of x is the largest of theirs.

    name: of the module, for the error.

    Raises:
        QwenModelError: a block would belong to several of them.
    """
    if len(parts) == 1:
        return parts[0]
    in_blocks = parts[0].format.group_size
    if in_blocks and any(len(part.codes) % BLOCK_SIZE for part in parts[:-1]):
        rows = ", ".join(str(len(part.codes)) for part in parts)
        raise QwenModelError(
            f"{name} is computed as one layer of {rows} outputs, whose blocks of {BLOCK_SIZE} x {BLOCK_SIZE} numbers "
            "cannot be joined, which is not supported: outputs must be multiples of it"
        )
    input_scales = [part.input_scale for part in parts if part.input_scale is not None]
    return EightBitWeight(
        parts[0].kind,
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scales for part in parts]),
        max(input_scales, default=None),
    )


@cache
def e4m3_numbers() -> Floats:
    """Return the number that each byte stands for in e4m3 (float8_e4m3fn), float32 [256]."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    numbers = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    numbers[codes & 0x7F == 0x7F] = np.nan
    return np.where(codes & 0x80, -numbers, numbers).astype(np.float32)


def e4m3_codes(numbers: Floats) -> npt.NDArray[np.uint8]:
    """Round numbers to e4m3, to nearest even and saturating; return its bytes. NaN has no code here."""
    magnitudes = np.minimum(np.abs(numbers), np.float32(LARGEST_CODES["fp8"]))
    exponents = np.frexp(np.maximum(magnitudes, np.float32(2.0**-6)))[1] - 1  # numbers below 2^-6 are subnormal
    eighths = np.rint(np.ldexp(magnitudes, 3 - exponents)).astype(np.int32)  # 8 to 16, and less if subnormal
    return (((exponents + 6) << 3) + eighths + 128 * np.signbit(numbers)).astype(np.uint8)


def _by_number(scales: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Return scales that multiply codes of this shape: [out, 1], or those of blocks repeated to [out, in]."""
    rows, columns = shape
    if scales.shape == (rows, 1):
        return scales
    return scales.repeat(BLOCK_SIZE, axis=0)[:rows].repeat(BLOCK_SIZE, axis=1)[:, :columns]
