"""Pack quantized weights for the GEMM kernels, and unpack them: on the host, with NumPy arrays.

A weight of out_features rows and in_features columns is ``scales * (codes - zeros)``, with a scale and a zero point for
each row and group of columns. The packed layout, the same on all GPUs, is in ``csrc/kernels/gemm/packed_weight.h``.

    packed = quantized.pack(codes, scales, bits=4, group_size=128)
    codes, scales, zeros = quantized.unpack(packed)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_plugins import launch

__all__ = ["GROUP_SIZES", "LAYOUT", "PackedWeight", "WeightFormat", "dequantize", "pack", "unpack"]

LAYOUT = 2
"""The number of the packed layout; engines hold it."""
GROUP_SIZES = (32, 64, 128)
"""The numbers of columns that can share a scale in a packed weight, beside 0: all."""
_SCALE_DTYPES = ("float16", "bfloat16")

Array = NDArray[Any]


@dataclass(frozen=True)
class WeightFormat:
    """Describe how a weight is stored.

    bits: of a code: 4 or 8; 16: the weight has the type of x and is not quantized, and the rest has no meaning.
    group_size: columns that share a scale: 32, 64 or 128; 0: all.
    has_zeros: each scale has a zero point; else all of them are in the middle, 8 or 128.
    scale_dtype: "float16" or "bfloat16", whatever the type of x is; "float32" with an activation.
    activation: "int8" or "fp8" (e4m3): x and the weight, of 8 bits, are signed codes in rows, which are not packed;
        group_size is 0 or, with "fp8", 128 for blocks of 128 rows and columns. None: x is not quantized.
    activation_scale: with an activation, "token": a scale for each row of x; "tensor": one for all.
    """

    bits: int = 16
    group_size: int = 0
    has_zeros: bool = False
    scale_dtype: str = "float16"
    activation: str | None = None
    activation_scale: str = "token"

    def __post_init__(self) -> None:
        if self.activation is not None:
            self._check_activation()
            return
        if self.bits not in (4, 8, 16):
            raise ValueError(f"bits must be 4, 8 or 16, not {self.bits!r}")
        if self.group_size not in (0, *GROUP_SIZES):
            raise ValueError(f"group_size must be 32, 64, 128 or 0 (all columns), not {self.group_size!r}")
        if self.scale_dtype not in _SCALE_DTYPES:
            raise ValueError(f"scale_dtype must be float16 or bfloat16, not {self.scale_dtype!r}")

    def _check_activation(self) -> None:
        if self.activation not in ("int8", "fp8"):
            raise ValueError(f'activation must be "int8", "fp8" or None, not {self.activation!r}')
        if self.activation_scale not in ("token", "tensor"):
            raise ValueError(f'activation_scale must be "token" or "tensor", not {self.activation_scale!r}')
        group_sizes = (0, 128) if self.activation == "fp8" else (0,)
        if self.bits != 8 or self.has_zeros or self.scale_dtype != "float32" or self.group_size not in group_sizes:
            raise ValueError(
                f"with {self.activation} activations a weight must have 8 bits, float32 scales, no zeros and a "
                f"group_size of {' or '.join(map(str, group_sizes))}, not {self}"
            )

    @property
    def middle(self) -> int:
        """Return the zero point of formats without zero points."""
        return 1 << (self.bits - 1)

    def for_launch(self) -> launch.WeightFormat:
        """Return the format as `qwen_plugins.launch` takes it."""
        kinds = {4: launch.WeightKind.int4, 8: launch.WeightKind.int8, 16: launch.WeightKind.same}
        kinds_of_rows = {"int8": launch.WeightKind.int8_rows, "fp8": launch.WeightKind.fp8_rows}
        return launch.WeightFormat(
            kind=kinds[self.bits] if self.activation is None else kinds_of_rows[self.activation],
            group_size=self.group_size,
            has_zeros=self.has_zeros,
            scale_dtype=launch.DataType.__members__[self.scale_dtype],
        )


@dataclass(frozen=True)
class PackedWeight:
    """Hold a packed weight as contiguous arrays, which the kernels read as they are from memory aligned to 16 bytes.

    codes: int32 [padded in_features / 128, padded out_features / 16, 256 with 4 bits, 512 with 8].
    scales: float16 or bfloat16 [groups of the padded in_features or 1, padded out_features].
    zeros: uint8, shaped as the scales; None: the format has none.

    out_features are padded to a multiple of 64 and in_features to a multiple of 128, with weights of zero.
    """

    codes: Array
    scales: Array
    zeros: Array | None
    format: WeightFormat
    out_features: int
    in_features: int


def pack(
    codes: Array,
    scales: Array,
    zeros: Array | None = None,
    *,
    bits: int,
    group_size: int,
    scale_dtype: str | None = None,
) -> PackedWeight:
    """Return the packed form of a quantized weight.

    Args:
        codes: uint8 [out_features, in_features], below 2 ** bits.
        scales: float16 or bfloat16 (of ml_dtypes) [out_features, groups]; or uint16, the bits of `scale_dtype`.
        zeros: uint8 [out_features, groups], below 2 ** bits; None: all 2 ** (bits - 1).
        bits: 4 or 8.
        group_size: columns that share a scale: 32, 64 or a multiple of 128, which divides in_features; 0: all columns.
            Groups of more than 128 columns become several of 128 with the same scale.
        scale_dtype: "float16" or "bfloat16", where scales are uint16: then packed and unpacked ones are, too.

    Raises:
        TypeError: an array has another type.
        ValueError: a shape, a code, a zero point or the format is none of these.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, not {bits!r}")
    _check_matrix("codes", codes, ("uint8",))
    out_features, in_features = codes.shape
    repeats = group_size // 128 if group_size > 128 and group_size % 128 == 0 else 1
    if group_size and in_features % group_size:
        raise ValueError(f"group_size must divide in_features, but {in_features} columns are no groups of {group_size}")
    _check_matrix("scales", scales, _SCALE_DTYPES if scale_dtype is None else ("uint16",))
    weight_format = WeightFormat(
        bits, group_size // repeats, zeros is not None, scales.dtype.name if scale_dtype is None else scale_dtype
    )
    groups = (out_features, in_features // group_size if group_size else 1)
    _check_shape("scales", scales, groups)
    _check_codes("codes", codes, bits)
    if zeros is not None:
        _check_matrix("zeros", zeros, ("uint8",))
        _check_shape("zeros", zeros, groups)
        _check_codes("zeros", zeros, bits)
        zeros = np.ascontiguousarray(np.repeat(zeros, repeats, axis=1))
    packed_codes, packed_scales, packed_zeros = launch.pack_weight(
        weight_format.for_launch(),
        codes=np.ascontiguousarray(codes),
        scales=np.ascontiguousarray(np.repeat(scales, repeats, axis=1)).view(np.uint16),
        zeros=zeros,
        threads=_threads(),
    )
    return PackedWeight(
        packed_codes, packed_scales.view(scales.dtype), packed_zeros, weight_format, out_features, in_features
    )


def unpack(packed: PackedWeight) -> tuple[Array, Array, Array | None]:
    """Return codes, scales and zeros as `pack` takes them, in groups of at most 128 columns or of all."""
    codes, scales, zeros = launch.unpack_weight(
        packed.format.for_launch(),
        rows=packed.out_features,
        k=packed.in_features,
        codes=packed.codes,
        scales=packed.scales.view(np.uint16),
        zeros=packed.zeros,
        threads=_threads(),
    )
    return codes, scales.view(packed.scales.dtype), zeros


def dequantize(packed: PackedWeight) -> NDArray[np.float32]:
    """Return the weight, float32 [out_features, in_features]: exactly what the kernels multiply by."""
    codes, scales, zeros = unpack(packed)
    group_size = packed.format.group_size or packed.in_features
    middle: Any = packed.format.middle if zeros is None else np.repeat(zeros, group_size, axis=1).astype(np.float32)
    return np.repeat(scales.astype(np.float32), group_size, axis=1) * (codes.astype(np.float32) - middle)


def _threads() -> int:
    return min(16, len(os.sched_getaffinity(0)))


def _check_matrix(name: str, array: Any, dtypes: tuple[str, ...]) -> None:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, not {type(array).__name__}")
    if array.dtype.name not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(dtypes)}, not {array.dtype.name}")
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"{name} must have 2 dimensions of at least 1, not the shape {array.shape}")


def _check_shape(name: str, array: Array, shape: tuple[int, int]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} must have the shape {shape}, not {array.shape}")


def _check_codes(name: str, array: Array, bits: int) -> None:
    if bits == 4 and int(array.max()) > 15:
        raise ValueError(f"{name} must be below 16 with 4 bits, but one is {array.max()}")
