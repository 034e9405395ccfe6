"""Hold a quantized weight, check the operands of the operator gemm_quantized of torch_ops.py, and compute it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_plugins._arguments import (
    address,
    check,
    check_contiguous,
    check_device,
    check_dtype,
    check_is_tensor,
    check_shape,
    type_name,
)
from qwen_plugins._gemm import check_bias, check_out, check_x, columns_of, launch_layer, linear_layer, swiglu

if TYPE_CHECKING:
    import numpy as np

    from qwen_plugins.quantized import PackedWeight

HALF_TYPES = (torch.float16, torch.bfloat16)
_ROW_UNIT, _COLUMN_UNIT = 64, 128  # csrc/kernels/gemm/packed_weight.h
# int32 words of 16 rows and 128 columns: their bits, and what csrc/kernels/gemm/gemm.h calls the weight.
_WORDS = {256: 4, 512: 8}
_KINDS = {256: "int4", 512: "int8"}


@dataclass(frozen=True)
class QuantizedWeight:
    """Hold an int4 or int8 weight, ``scales * (codes - zeros)``, packed for the kernels, for `qwen_plugins.gemm`.

    Made by `from_codes`, or by `from_packed` from what `qwen_plugins.quantized.pack` returns.

    codes: int32 [padded in_features / 128, padded out_features / 16, 256 with 4 bits, 512 with 8].
    scales: float16 or bfloat16 [groups of the padded in_features or 1, padded out_features]. In the type of x they are
        the fastest with many rows.
    zeros: uint8, shaped as the scales; None: all zero points are in the middle, 8 or 128.
    permutation: int32 or int64 [in_features]: column j of the weight multiplies column permutation[j] of x (GPTQ's
        act-order); None: column j.
    group_size: columns that share a scale: 32, 64 or 128; 0: all.
    out_features, in_features: without padding.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    permutation: Tensor | None
    group_size: int
    out_features: int
    in_features: int

    @classmethod
    def from_packed(
        cls, packed: PackedWeight, permutation: np.ndarray[Any, Any] | None = None, device: torch.device | str = "cpu"
    ) -> QuantizedWeight:
        """Copy a packed weight to the device; `permutation` is an integer array [in_features]."""
        if permutation is not None:
            check_permutation(torch.from_numpy(permutation), packed.in_features)

        def tensor(array: Any, dtype: torch.dtype | None = None) -> Tensor:
            # Through integers: NumPy has no bfloat16 of its own.
            source = array.view("int16") if dtype is not None else array
            loaded = torch.from_numpy(source).to(device, copy=True)
            return loaded if dtype is None else loaded.view(dtype)

        return cls(
            codes=tensor(packed.codes),
            scales=tensor(packed.scales, getattr(torch, packed.format.scale_dtype)),
            zeros=None if packed.zeros is None else tensor(packed.zeros),
            permutation=None if permutation is None else tensor(permutation),
            group_size=packed.format.group_size,
            out_features=packed.out_features,
            in_features=packed.in_features,
        )

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        permutation: Tensor | None = None,
        *,
        bits: int,
        group_size: int,
    ) -> QuantizedWeight:
        """Pack a weight on the host, and return it on the device of the codes.

        Args:
            codes: uint8 [out_features, in_features], below 2 ** bits.
            scales: float16 or bfloat16 [out_features, groups], finite.
            zeros: uint8 [out_features, groups]; None: all 2 ** (bits - 1).
            permutation: int32 or int64 [in_features], on the device of the codes; None: none.
            bits: 4 or 8.
            group_size: columns that share a scale: 32, 64 or a multiple of 128, which divides in_features; 0: all.

        Raises:
            TypeError, ValueError: an argument has another type, shape or value.
        """
        from qwen_plugins import quantized

        for name, tensor in (("codes", codes), ("scales", scales)):
            check_is_tensor(name, tensor)
        check_dtype("scales", scales, HALF_TYPES)
        if permutation is not None:
            check_permutation(permutation, codes.shape[-1])
            check_device("permutation", permutation, codes)
        packed = quantized.pack(
            codes.cpu().numpy(),
            _as_numpy(scales),
            None if zeros is None else zeros.cpu().numpy(),
            bits=bits,
            group_size=group_size,
        )
        weight = cls.from_packed(packed, None, codes.device)
        return weight if permutation is None else cls(**{**vars(weight), "permutation": permutation.contiguous()})

    @property
    def bits(self) -> int:
        """Return the bits of a code, 4 or 8."""
        return _WORDS[self.codes.shape[-1]]

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """Return the weight on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return QuantizedWeight(**{**vars(self), **moved})

    def dequantize(self) -> Tensor:
        """Return the weight as float32 [out_features, in_features], exactly, its columns as those of x are."""
        weight = _dequantize(self.codes, self.scales, self.zeros, self.group_size)
        weight = weight[: self.out_features, : self.in_features]
        if self.permutation is None:
            return weight.contiguous()
        return torch.empty_like(weight).index_copy_(1, self.permutation.long(), weight)


def check_permutation(permutation: Tensor, in_features: int) -> None:
    """Check that each of in_features columns is named once."""
    check_is_tensor("permutation", permutation)
    check_dtype("permutation", permutation, (torch.int32, torch.int64))
    check_shape("permutation", permutation, (in_features,))
    in_order = torch.arange(in_features, device=permutation.device, dtype=permutation.dtype)
    check(
        bool(torch.equal(permutation.sort().values, in_order)),
        f"permutation must name each of {in_features} columns once",
    )


def gemm(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    permutation: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    out_features: int,
    activation: str | None,
    constant_weight: bool,
    out: Tensor | None = None,
) -> Tensor:
    """Check the operands and compute y; the arguments are those of `qwen_plugins.gemm` and of its QuantizedWeight."""
    check_x(x)
    _check_weight(x, codes, scales, zeros, permutation, group_size, out_features)
    check_bias(bias, x, out_features)
    columns = columns_of(out_features, activation)
    shape = (*x.shape[:-1], columns)
    if out is None:
        out = x.new_empty(shape)
    else:
        check_out(out, shape, x, weight=codes, scales=scales, zeros=zeros, bias=bias)
    if permutation is not None:
        x = x.index_select(-1, permutation)
    if x.is_cuda:
        _on_gpu(x, codes, scales, zeros, bias, group_size, out_features, activation, constant_weight, out)
    elif x.device.type == "cpu":
        _on_cpu(x, codes, scales, zeros, bias, group_size, out_features, activation, out)
    return out


def _check_weight(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    permutation: Tensor | None,
    group_size: int,
    out_features: int,
) -> None:
    in_features = x.shape[-1]
    check(group_size in (0, 32, 64, 128), f"group_size must be 32, 64, 128 or 0, not {group_size}")
    if group_size and in_features % group_size:
        raise ValueError(f"x must have columns in groups of {group_size}, not {in_features}")
    check(out_features > 0, f"out_features must be at least 1, not {out_features}")
    rows = -(-out_features // _ROW_UNIT) * _ROW_UNIT
    columns = -(-in_features // _COLUMN_UNIT) * _COLUMN_UNIT
    check_dtype("codes", codes, (torch.int32,))
    # Comparisons, which torch.compile follows where sizes are dynamic; it cannot look them up.
    if codes.dim() != 3 or codes.shape[:2] != (columns // 128, rows // 16) or codes.shape[2] not in tuple(_WORDS):
        raise ValueError(
            f"codes must have the shape {(columns // 128, rows // 16, '256 or 512')} for x of {tuple(x.shape)} and "
            f"{out_features} out_features, not {tuple(codes.shape)}"
        )
    check_dtype("scales", scales, HALF_TYPES)
    groups = (columns // group_size if group_size else 1, rows)
    check_shape("scales", scales, groups)
    if zeros is not None:
        check_dtype("zeros", zeros, (torch.uint8,))
        check_shape("zeros", zeros, groups)
    if permutation is not None:
        check_dtype("permutation", permutation, (torch.int32, torch.int64))
        check_shape("permutation", permutation, (in_features,))
    for name, tensor in (("codes", codes), ("scales", scales), ("zeros", zeros), ("permutation", permutation)):
        if tensor is not None:
            check_contiguous(name, tensor)
            check_device(name, tensor, x)


def _on_cpu(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    out_features: int,
    activation: str | None,
    out: Tensor,
) -> None:
    weight = _dequantize(codes, scales, zeros, group_size)[:out_features, : x.shape[-1]]
    z = F.linear(x.float(), weight, None if bias is None else bias.float())
    if activation == "swiglu":
        z = swiglu(z)
    out.copy_(z)


def _dequantize(codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int) -> Tensor:
    """Return the padded weight, float32: csrc/kernels/gemm/packed_weight.h draws the layout."""
    chunks, row_blocks, words = codes.shape
    bits = _WORDS[words]
    # Of a pair of neighbouring columns: its place in a word, and the place in the pair.
    shifts = torch.tensor(
        [[bits * i, bits * i + 16] for i in range(16 // bits)], dtype=torch.int32, device=codes.device
    )
    blocks = codes.view(chunks, row_blocks, words // 128, 8, 4, 2, 2, 1, 1)
    values = (blocks >> shifts) & (2**bits - 1)
    chunk, row_block, block, row, lane, half, word, pair, element = range(9)
    in_order = values.permute(row_block, half, row, chunk, block, word, pair, lane, element)
    matrix = in_order.reshape(16 * row_blocks, -1, group_size or 128 * chunks).float()
    middle: Any = 2 ** (bits - 1) if zeros is None else zeros.t().unsqueeze(-1).float()
    return (scales.t().unsqueeze(-1).float() * (matrix - middle)).flatten(1)


def _on_gpu(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    out_features: int,
    activation: str | None,
    constant_weight: bool,
    out: Tensor,
) -> None:
    for name, tensor in (("codes", codes), ("scales", scales), ("zeros", zeros)):
        check(address(tensor) % 16 == 0, f"{name} must begin at a multiple of 16 bytes, but its address is a view's")
    layer = linear_layer(
        codes.data_ptr(),
        address(bias),
        x.shape[-1],
        out_features,
        activation,
        x.dtype,
        constant_weight,
        _KINDS[codes.shape[-1]],
        group_size,
        type_name(scales.dtype),
        scales.data_ptr(),
        address(zeros),
    )
    launch_layer(layer, x, out)


def _as_numpy(tensor: Tensor) -> Any:
    """Return float16, or bfloat16 of ml_dtypes."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    import ml_dtypes

    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
