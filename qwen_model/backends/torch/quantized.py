"""Compute linear layers of quantized weights, and of x as it is, with PyTorch's own functions, for any device.

The weights are kept as codes, a byte each, and dequantized for every product, some rows at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ...checkpoints.module_weights import ModuleWeights
from ...interface.weight_formats import packed_weight

BLOCK_NUMBERS = 1 << 24
"""The numbers of a weight that are dequantized at a time."""


def unpacked_modules(modules: Mapping[str, ModuleWeights[Tensor]]) -> dict[str, ModuleWeights[Tensor]]:
    """Return the modules with quantized weights in layout 1: codes [out, in], scales and zero points [out, groups]."""
    return {name: _unpacked(module) if module.format.layout != 1 else module for name, module in modules.items()}


def _unpacked(module: ModuleWeights[Tensor]) -> ModuleWeights[Tensor]:
    from qwen_plugins import quantized

    assert module.scales is not None  # quantized weights have scales
    device, scale_dtype = module.weight.device, module.scales.dtype
    packed = packed_weight(module.map(_as_array))
    codes, scales, zeros = quantized.unpack(packed)
    return dataclasses.replace(
        module,
        weight=torch.from_numpy(codes).to(device),
        scales=torch.from_numpy(scales.view(np.int16)).view(scale_dtype).to(device),
        zeros=None if zeros is None else torch.from_numpy(zeros).to(device),
        format=dataclasses.replace(module.format, layout=1),
    )


def _as_array(tensor: Tensor) -> NDArray[Any]:
    """Return a tensor as an array; numbers of 16 bits, which may be bfloat16, as their bits."""
    bits: NDArray[Any] = (tensor.view(torch.int16) if tensor.dtype.itemsize == 2 else tensor).cpu().numpy()
    return bits.view(np.uint16) if bits.dtype == np.int16 else bits


def dequantized(module: ModuleWeights[Tensor]) -> Tensor:
    """Return the weight that a quantized module of either layout stands for, float32 [out, in]."""
    if module.format.layout != 1:
        module = _unpacked(module)
    w = torch.cat(list(_dequantized(module, torch.float32)))
    if module.permutation is None:
        return w
    natural = torch.empty_like(w)
    natural[:, module.permutation.long()] = w
    return natural


def linear(x: Tensor, module: ModuleWeights[Tensor]) -> Tensor:
    """Compute x · Wᵀ + bias for a module of `unpacked_modules`; W is rounded to the type of x."""
    if module.permutation is not None:
        x = x.index_select(1, module.permutation)
    blocks = [F.linear(x, weight) for weight in _dequantized(module, x.dtype)]
    y = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
    return y if module.bias is None else y + module.bias


def _dequantized(module: ModuleWeights[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the rows of W, in the order of the codes, some at a time."""
    assert module.scales is not None  # quantized weights have scales
    out_features, in_features = module.weight.shape
    rows = max(1, BLOCK_NUMBERS // in_features)
    groups = module.scales.shape[1]
    for start in range(0, out_features, rows):
        part = slice(start, start + rows)
        w = module.weight[part].view(-1, groups, in_features // groups).float()
        w -= float(1 << module.format.bits - 1) if module.zeros is None else module.zeros[part].float().unsqueeze(2)
        w *= module.scales[part].float().unsqueeze(2)
        yield w.view(-1, in_features).to(dtype)
