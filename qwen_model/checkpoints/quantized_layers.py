"""Find the quantized layers of a published checkpoint, and unpack them: GPTQ, AWQ (gemm), compressed-tensors.

A word holds 32 / bits codes, from its low bits on. GPTQ packs a weight along its inputs and its zero points along the
outputs, both transposed; AWQ packs both along the outputs, in an order of its own; compressed-tensors packs the weight
along its inputs, and zero points along the outputs, neither transposed.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ..common.errors import QwenModelError
from .module_weights import WeightFormat
from .quantization_config import BITS, PublishedQuantization
from .quantized_weight import Codes, QuantizedWeight, Scales
from .tensor_files import WEIGHT_DTYPES, Shape, StoredTensor, as_numpy

Words = npt.NDArray[np.int32]

PACKED = {"gptq": "qweight", "awq": "qweight", "compressed-tensors": "weight_packed"}
SCALES = {"gptq": "scales", "awq": "scales", "compressed-tensors": "weight_scale"}
"""The last parts of the names of a layer's packed weight and scales, by method."""
SUFFIXES = (
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
)
COLUMNS = 128
"""The columns of words that are unpacked at a time."""
_AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of each of a word's eight outputs


@dataclass(frozen=True)
class QuantizedLayer:
    """Describe one quantized layer of a checkpoint, whose tensors have the shapes that they must have.

    name: of the layer, without a tensor's.
    tensors: by the last part of their names.
    group_size: in inputs; 0: one group.
    """

    name: str
    quantization: PublishedQuantization
    tensors: Mapping[str, StoredTensor]
    out_features: int
    in_features: int
    bits: int
    group_size: int

    @property
    def groups(self) -> int:
        """Return the number of groups of inputs."""
        return self.in_features // self.group_size if self.group_size else 1

    def read_format(self) -> WeightFormat:
        """Read the zero points and the order of inputs, and return the format in which an engine has the layer.

        Raises:
            QwenModelError: they are damaged.
        """
        self._check_weight_shape()
        return WeightFormat(
            f"int{self.bits}",
            self.group_size,
            symmetric=self._zeros() is None,
            layout=2,
            permuted=self.permutation is not None,
            scale_dtype=self.scale_dtype,
        )

    def read(self) -> QuantizedWeight:
        """Read and unpack the layer.

        Raises:
            QwenModelError: scales are not finite, or 0 where they must not be, or the order of inputs or the shape is
                damaged.
        """
        self._check_weight_shape()
        permutation = self.permutation
        codes = {"gptq": self._gptq_codes, "awq": self._awq_codes}.get(
            self.quantization.method, self._compressed_tensors_codes
        )()
        if permutation is not None:
            codes = np.take(codes, permutation, axis=1)
        weight = QuantizedWeight(self.bits, codes, self._scales(), self._zeros(), permutation, self.scale_dtype)
        weight.check(self.name)
        return weight

    def _check_weight_shape(self) -> None:
        if "weight_shape" in self.tensors:
            shape = self._array("weight_shape").tolist()
            if shape != [self.out_features, self.in_features]:
                raise QwenModelError(
                    f"{self.name}.weight_shape must be {[self.out_features, self.in_features]}, the shape that "
                    f"config.json and the other tensors give, not {shape}"
                )

    def _array(self, suffix: str) -> npt.NDArray[Any]:
        return as_numpy(self.tensors[suffix].read(()))

    def _gptq_codes(self) -> Codes:
        return _by_columns(self._array("qweight"), lambda words: _along_rows(words, self.bits))

    def _awq_codes(self) -> Codes:
        return _by_columns(self._array("qweight"), _awq_unpacked)

    def _compressed_tensors_codes(self) -> Codes:
        return _along_rows(self._array("weight_packed"), self.bits)[:, : self.in_features]

    @property
    def scale_dtype(self) -> str:
        """Return the type of the scales in an engine: that of the checkpoint, or float16 where it is wider."""
        dtype = self.tensors[SCALES[self.quantization.method]].dtype
        return dtype if dtype == "bfloat16" else "float16"

    def _scales(self) -> Scales:
        stored = self._array(SCALES[self.quantization.method])
        scales = stored if by_output(self.quantization.method) else np.ascontiguousarray(stored.T)
        if scales.dtype in (np.float64, np.float32) and self.scale_dtype == "float16":
            with np.errstate(over="ignore"):  # `check` finds infinities
                return scales.astype(np.float16)
        return scales

    def _zeros(self) -> Codes | None:
        """Return the zero points, uint8 [out, groups]; None: all are in the middle of the codes."""
        stored = self._stored_zeros()
        if stored is None:
            return None
        middle = 1 << self.bits - 1
        if (stored == middle).all():
            return None
        if self.quantization.method == "gptq":
            # Whatever the file says: some that say to be of the first format are of the second.
            if (stored == middle - 1).all():
                return None
            if self.quantization.zeros_less_one:
                stored = (stored + np.uint8(1)) & np.uint8((1 << self.bits) - 1)
        return stored

    def _stored_zeros(self) -> Codes | None:
        if self.quantization.method == "gptq":
            return np.ascontiguousarray(_along_rows(self._array("qzeros"), self.bits).T)[: self.out_features]
        if self.quantization.method == "awq":
            return _awq_unpacked(np.ascontiguousarray(self._array("qzeros").T))
        if "weight_zero_point" not in self.tensors:
            return None
        words = np.ascontiguousarray(self._array("weight_zero_point").T)
        return np.ascontiguousarray(_along_rows(words, self.bits).T)[: self.out_features]

    @cached_property
    def permutation(self) -> npt.NDArray[np.int32] | None:
        """Read the order of inputs in which groups are contiguous, int32 [in]; None: their own.

        Raises:
            QwenModelError: groups are of different sizes.
        """
        by_output_first = by_output(self.quantization.method)
        suffix = "weight_g_idx" if by_output_first else "g_idx"
        if suffix not in self.tensors:
            return None
        group_of_input = self._array(suffix)
        if by_output_first and (group_of_input == -1).all():  # compressed-tensors has not set it
            return None
        in_order = np.arange(self.in_features) // (self.group_size or self.in_features)
        if (group_of_input == in_order).all():
            return None
        permutation = np.argsort(group_of_input, kind="stable").astype(np.int32)
        if not (group_of_input[permutation] == in_order).all():
            raise QwenModelError(
                f"{self.name}.{suffix} is not supported: it must give each of {self.groups} groups "
                f"{self.group_size or self.in_features} inputs"
            )
        return permutation


def fused_format(layers: Sequence[QuantizedLayer]) -> WeightFormat:
    """Return the format of layers that are computed as one, as q, k and v.

    Raises:
        QwenModelError: they have other bits, groups or orders of inputs.
    """
    first = layers[0]
    formats = [layer.read_format() for layer in layers]
    for layer, found in zip(layers[1:], formats[1:], strict=True):
        if (layer.bits, layer.group_size) != (first.bits, first.group_size):
            how = f"{formats[0].text}; {found.text}"
        elif not _same_order(layer.permutation, first.permutation):
            how = "their inputs are in different orders (g_idx)"
        else:
            continue
        raise QwenModelError(
            f"{first.name} and {layer.name} are quantized differently ({how}), which is not supported: they are "
            "computed as one layer"
        )
    return dataclasses.replace(formats[0], symmetric=all(each.symmetric for each in formats))


def _same_order(one: npt.NDArray[np.int32] | None, other: npt.NDArray[np.int32] | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(one, other)


def _by_columns(words: Words, unpack: Callable[[Words], Codes]) -> Codes:
    """Unpack [rows, columns], given transposed, some columns at a time in each of several threads."""
    starts = range(0, words.shape[1], COLUMNS)
    with ThreadPoolExecutor(min(16, len(os.sched_getaffinity(0)))) as threads:
        parts = threads.map(lambda start: unpack(np.ascontiguousarray(words[:, start : start + COLUMNS].T)), starts)
        return np.concatenate(list(parts))


def _along_rows(words: Words, bits: int) -> Codes:
    """Unpack [rows, words] to [rows, words · 32 / bits]."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return octets
    codes = np.empty((len(octets), octets.shape[1], 2), np.uint8)
    np.bitwise_and(octets, 15, out=codes[:, :, 0])
    np.right_shift(octets, 4, out=codes[:, :, 1])
    return codes.reshape(len(octets), -1)


def _awq_unpacked(words: Words) -> Codes:
    """Unpack [words, columns], where a word has eight rows, to [8 · words, columns]."""
    octets = words.view(np.uint8).reshape(*words.shape, 4)
    codes = np.empty((len(words), 8, words.shape[1]), np.uint8)
    for row, nibble in enumerate(_AWQ_NIBBLES):
        octet = octets[:, :, nibble // 2]
        if nibble % 2:
            np.right_shift(octet, 4, out=codes[:, row])
        else:
            np.bitwise_and(octet, 15, out=codes[:, row])
    return codes.reshape(-1, words.shape[1])


def find_layer(
    name: str, shape: Shape, quantization: PublishedQuantization, tensors: Mapping[str, StoredTensor]
) -> QuantizedLayer | None:
    """Find the quantized tensors of the layer `name`, whose weight has this shape; None: it has none.

    tensors: of the checkpoint, by name.

    Raises:
        QwenModelError: tensors are missing, or do not fit the shape or the configuration.
    """
    own = {suffix: tensors[f"{name}.{suffix}"] for suffix in SUFFIXES if f"{name}.{suffix}" in tensors}
    if PACKED.get(quantization.method) not in own:
        return None
    out_features, in_features = shape
    bits, groups = _bits_and_groups(name, shape, quantization, own)
    group_size = in_features // groups if groups > 1 else 0
    expected = _expected_tensors(quantization.method, out_features, in_features, bits, groups)
    for suffix, (right_shape, dtypes, needed) in expected.items():
        if suffix not in own:
            if needed:
                raise QwenModelError(f"{name} is quantized with {quantization.method}, but {name}.{suffix} is missing")
            continue
        tensor = own[suffix]
        if tensor.shape != right_shape or tensor.dtype not in dtypes:
            raise QwenModelError(
                f"{name}.{suffix} must be {' or '.join(dtypes)} {list(right_shape)}, not {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
    return QuantizedLayer(name, quantization, own, out_features, in_features, bits, group_size)


def _bits_and_groups(
    name: str, shape: Shape, quantization: PublishedQuantization, own: Mapping[str, StoredTensor]
) -> tuple[int, int]:
    """Return bits and number of groups by the shapes of packed weight and scales, compared with the configuration."""
    out_features, in_features = shape
    method = quantization.method
    packed, scales = own[PACKED[method]].shape, own.get(SCALES[method])
    if len(packed) != 2 or scales is None or len(scales.shape) != 2:
        raise QwenModelError(f"{name} is not a layer of {method}: it must have a packed weight and scales of two axes")
    groups = scales.shape[1] if by_output(method) else scales.shape[0]
    by_bits: dict[str, Callable[[int], Shape]] = {
        "gptq": lambda bits: (in_features * bits // 32, out_features),
        "awq": lambda bits: (in_features, out_features * bits // 32),
        "compressed-tensors": lambda bits: (out_features, -(-in_features * bits // 32)),
    }
    possible = [bits for bits in BITS if by_bits[method](bits) == packed and bits in quantization.bits]
    declared = {-(-in_features // size) if size else 1 for size in quantization.group_sizes}
    whole_words = by_output(method) or not (in_features % 8 or out_features % 8)
    if not possible or not whole_words:
        raise QwenModelError(
            f"{name}.{PACKED[method]} {list(packed)} is not a weight of {out_features} outputs and {in_features} "
            f"inputs in {' or '.join(map(str, sorted(quantization.bits))) or 'no'} bits, as {quantization.where} says"
        )
    if groups not in declared or in_features % groups:
        sizes = " or ".join(str(size) if size else "all" for size in sorted(quantization.group_sizes))
        raise QwenModelError(
            f"{name} has {groups} groups of scales for {in_features} inputs, which are not groups of {sizes} inputs, "
            f"as {quantization.where} says"
        )
    return possible[0], groups


def by_output(method: str) -> bool:
    """Tell whether a method's tensors have outputs first."""
    return method == "compressed-tensors"


def _expected_tensors(
    method: str, out_features: int, in_features: int, bits: int, groups: int
) -> dict[str, tuple[Shape, tuple[str, ...], bool]]:
    """Return shape and types of a layer's tensors, by the last part of their names, and whether each is needed."""
    int32, per_word = ("int32",), 32 // bits
    words_of_outputs = -(-out_features // per_word)
    if method == "compressed-tensors":
        return {
            "weight_packed": ((out_features, -(-in_features // per_word)), int32, True),
            "weight_scale": ((out_features, groups), WEIGHT_DTYPES, True),
            "weight_zero_point": ((words_of_outputs, groups), int32, False),
            "weight_shape": ((2,), ("int32", "int64"), False),
            "weight_g_idx": ((in_features,), int32, False),
        }
    packed = (in_features, words_of_outputs) if method == "awq" else (in_features // per_word, out_features)
    expected: dict[str, tuple[Shape, tuple[str, ...], bool]] = {
        "qweight": (packed, int32, True),
        "qzeros": ((groups, words_of_outputs), int32, True),
        "scales": ((groups, out_features), WEIGHT_DTYPES, True),
    }
    return expected if method == "awq" else {**expected, "g_idx": ((in_features,), int32, False)}
