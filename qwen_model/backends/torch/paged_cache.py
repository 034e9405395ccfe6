"""Keep keys and values in pages: as they are, or as 8-bit codes with a scale for each token and head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...checkpoints.config import ModelConfig
from ...checkpoints.eight_bit_weight import LARGEST_CODES
from ...interface.memory import PAGE_SIZE, block_bytes

CODE_TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class PagedCache:
    """Hold the keys and values of all layers.

    A page has `PAGE_SIZE` positions of one layer; which positions of which sequence, callers know. A block is the
    keys, or the values, of one head in a page. In 8 bits it is its codes, [PAGE_SIZE, head_size], and then their
    scales, float32 [PAGE_SIZE]; a number is code * scale.
    """

    def __init__(self, config: ModelConfig, num_pages: int, dtype: torch.dtype, kind: str, device: torch.device):
        """Allocate pages of zeros.

        dtype: of keys and values as they come and go. kind: "auto": they are kept as they are; else "int8" or "fp8".
        """
        self.dtype, self.kind, self.num_pages = dtype, kind, num_pages
        self._head_size = config.head_size
        blocks = (config.num_layers, num_pages, 2, config.num_kv_heads)
        itemsize = dtype.itemsize
        # Zeros, not empty: attention over rows that nothing was written to must not meet NaN.
        memory = _zeros((*blocks, block_bytes(config.head_size, itemsize, kind)), device)
        if kind == "auto":
            memory = memory.view(dtype).view(*blocks, PAGE_SIZE, config.head_size)
        self.data = memory
        """[layers, num_pages, 2, kv_heads, PAGE_SIZE, head_size], or uint8 [layers, num_pages, 2, kv_heads, bytes]."""

    def write(self, layer: int, k: Tensor, v: Tensor, pages: Tensor, offsets: Tensor) -> None:
        """Write keys and values, [tokens, kv_heads, head_size], to positions `offsets` of `pages`, [tokens] each."""
        new = torch.stack([k, v], dim=1)  # [tokens, 2, kv_heads, head_size]
        pages, offsets = pages.long(), offsets.long()
        if self.kind == "auto":
            self.data[layer][pages, :, :, offsets] = new
            return
        codes, scales = quantize(new, self.kind)
        all_codes, all_scales = self._codes_and_scales(layer)
        all_codes[pages, :, :, offsets] = codes
        all_scales[pages, :, :, offsets] = scales

    def read(self, layer: int, pages: Tensor) -> Tensor:
        """Return what pages, [sequences, n], hold: [sequences, 2, kv_heads, n * PAGE_SIZE, head_size]."""
        pages = pages.long()
        if self.kind == "auto":
            found = self.data[layer][pages]
        else:
            codes, scales = self._codes_and_scales(layer)
            numbers = codes[pages].view(CODE_TYPES[self.kind]).float()
            found = (numbers * scales[pages].unsqueeze(-1)).to(self.dtype)
        return found.permute(0, 2, 3, 1, 4, 5).flatten(3, 4)

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy pages, given as (source, target), in all layers; no target is the source of another pair."""
        numbers = torch.tensor(pairs)
        if self.data.device.type == "cuda":
            numbers = numbers.pin_memory()  # so that the host does not wait for what runs
        sources, targets = numbers.to(self.data.device, non_blocking=True).unbind(1)
        self.data[:, targets] = self.data[:, sources]

    def _codes_and_scales(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return views: uint8 [num_pages, 2, kv_heads, PAGE_SIZE, head_size], float32 [..., PAGE_SIZE]."""
        codes, scales = self.data[layer].split([PAGE_SIZE * self._head_size, PAGE_SIZE * 4], dim=-1)
        return codes.unflatten(-1, (PAGE_SIZE, self._head_size)), scales.view(torch.float32)


def quantize(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return the codes of x, [..., size], as bytes of "int8" or "fp8", and one scale for each row: float32 [...]."""
    wide, largest = x.float(), LARGEST_CODES[kind]
    scales = wide.abs().amax(-1) / largest
    steps = (wide / scales.masked_fill(scales == 0, 1.0).unsqueeze(-1)).clamp(-largest, largest)
    codes = (steps.round() if kind == "int8" else steps).to(CODE_TYPES[kind])
    return codes.view(torch.uint8), scales


def _zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return bytes that are 0. On a CPU the system gives the memory when it is written to, unlike `torch.zeros`."""
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(shape, dtype=np.uint8))
    return torch.zeros(shape, dtype=torch.uint8, device=device)
