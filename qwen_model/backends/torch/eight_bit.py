"""Quantize x, and compute linear layers of quantized x and weights, with PyTorch's own functions, for any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checkpoints.module_weights import BLOCK_SIZE, ModuleWeights
from .paged_cache import CODE_TYPES
from .quantized import BLOCK_NUMBERS

EXACT_INPUTS = 1024
"""The most products of two codes of int8 whose sum float32 holds exactly."""


@dataclass(frozen=True)
class QuantizedTensor:
    """Hold a quantized x: scales · codes.

    codes: int8 or float8_e4m3fn [tokens, size].
    scales: float32 [tokens, 1], or [1] where one scale is for all tokens.
    """

    codes: Tensor
    scales: Tensor

    @property
    def per_token(self) -> bool:
        """Tell whether each token has a scale."""
        return self.scales.dim() == 2

    def gathered(self, rows: Tensor) -> QuantizedTensor:
        """Return the tokens at `rows`."""
        codes = self.codes.view(torch.uint8)[rows].view(self.codes.dtype)
        return QuantizedTensor(codes, self.scales[rows] if self.per_token else self.scales)


Activations = Tensor | QuantizedTensor


def quantized(x: Tensor, kind: str, scale: Tensor | None = None) -> QuantizedTensor:
    """Quantize x, [tokens, size], to "int8" or "fp8"; scale: float32 [1]; None: each token has its own."""
    from qwen_plugins import quantize

    return QuantizedTensor(*quantize(x, CODE_TYPES[kind], scale))


def linear(x: QuantizedTensor, module: ModuleWeights[Tensor]) -> Tensor:
    """Compute x · Wᵀ + bias, float32. Sums of products of int8 are exact, those of fp8 are sums of float32."""
    assert module.scales is not None  # quantized weights have scales
    out_features, in_features = module.weight.shape
    rows = max(BLOCK_SIZE, BLOCK_NUMBERS // in_features // BLOCK_SIZE * BLOCK_SIZE)
    sums = []
    for start in range(0, out_features, rows):
        w = module.weight[start : start + rows]
        if x.codes.dtype == torch.int8:
            sums.append(_integer_sums(x.codes, w) * module.scales[start : start + rows, 0])
        else:
            sums.append(F.linear(x.codes.float(), _scaled(w, module, start)))
    y = (sums[0] if len(sums) == 1 else torch.cat(sums, dim=1)) * x.scales
    return y if module.bias is None else y + module.bias.float()


def _scaled(codes: Tensor, module: ModuleWeights[Tensor], start: int) -> Tensor:
    """Return scales · codes of fp8, for the rows of the weight from `start` on, at a block's edge."""
    w, scales = codes.view(torch.float8_e4m3fn).float(), module.scales
    assert scales is not None
    if not module.format.group_size:
        return w.mul_(scales[start : start + len(w)])
    blocks = scales[start // BLOCK_SIZE :].repeat_interleave(BLOCK_SIZE, 0)[: len(w)]
    return w.mul_(blocks.repeat_interleave(BLOCK_SIZE, 1)[:, : w.shape[1]])


def _integer_sums(x: Tensor, w: Tensor) -> Tensor:
    """Return x · wᵀ of int8 codes, rounded once to float32."""
    parts = [
        F.linear(x[:, start : start + EXACT_INPUTS].float(), w[:, start : start + EXACT_INPUTS].float())
        for start in range(0, x.shape[1], EXACT_INPUTS)
    ]
    if len(parts) == 1:
        return parts[0]
    return torch.stack(parts).to(torch.int32).sum(0, dtype=torch.int32).float()
