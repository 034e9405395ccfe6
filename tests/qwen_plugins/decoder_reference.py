"""SwiGLU and attention in float64, and random inputs for them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.double().chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


@dataclass
class Case:
    """Sequences with some tokens in the cache and, packed, their next tokens' projections."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    rotary_dim: int
    dtype: torch.dtype
    past_lengths: list[int]
    new_tokens: list[int]
    max_positions: int
    qk_norm: bool = False
    logn: bool = False
    device: str = "cpu"
    seed: int = 0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        columns = (self.num_heads + 2 * self.num_kv_heads) * self.head_size
        sequences = len(self.past_lengths)
        place = {"dtype": self.dtype, "device": self.device}
        self.qkv = normal(sum(self.new_tokens), columns).to(**place)
        # One row of the cache more than there are sequences; what is not yet written is poisoned.
        cache = torch.full((sequences + 1, 2, self.num_kv_heads, self.max_positions, self.head_size), math.nan)
        for sequence, length in enumerate(self.past_lengths):
            cache[sequence, :, :, :length] = normal(2, self.num_kv_heads, length, self.head_size)
        self.cache = cache.to(**place)
        self.offset = 3  # rows of the rotary table and positions are not the same
        angles = torch.rand(self.max_positions + self.offset, self.rotary_dim // 2, generator=generator) * 2 * math.pi
        self.rotary_table = torch.cat([angles.cos(), angles.sin()], -1).to(self.device)
        self.query_scale = None
        if self.logn:
            self.query_scale = 1 + torch.rand(len(angles), generator=generator).to(self.device)
        self.q_norm = self.k_norm = None
        if self.qk_norm:
            self.q_norm = (normal(self.head_size) * 0.2 + 1).to(**place)
            self.k_norm = (normal(self.head_size) * 0.2 + 1).to(**place)
        self.sequences = torch.arange(sequences).repeat_interleave(torch.tensor(self.new_tokens))
        starts = [torch.arange(past, past + new) for past, new in zip(self.past_lengths, self.new_tokens, strict=True)]
        self.positions = torch.cat(starts)
        self.rotary_rows = (self.positions + self.offset).int().to(self.device)

    def reference(self) -> tuple[Tensor, Tensor]:
        """The context [tokens, heads * head_size] and the cache afterwards, in float64 on the CPU."""
        q, k, v = self._prepared()
        cache = self.cache.double().cpu()
        cache[self.sequences, 0, :, self.positions] = k
        cache[self.sequences, 1, :, self.positions] = v
        context = []
        for token, (sequence, position) in enumerate(zip(self.sequences, self.positions, strict=True)):
            keys, values = cache[sequence, :, :, : position + 1]
            group = self.num_heads // self.num_kv_heads
            scores = torch.einsum("hd,hnd->hn", q[token], keys.repeat_interleave(group, 0)) / math.sqrt(self.head_size)
            context.append(torch.einsum("hn,hnd->hd", scores.softmax(-1), values.repeat_interleave(group, 0)).flatten())
        return torch.stack(context), cache

    def _prepared(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [tokens, heads, head_size], q and k normalised, rotated and scaled."""
        heads = self.qkv.double().cpu().unflatten(-1, (-1, self.head_size))
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self._normalised(q, self.q_norm), self._normalised(k, self.k_norm)
        rows = self.rotary_table.double().cpu()[self.rotary_rows.cpu()]
        q, k = self._rotated(q, rows), self._rotated(k, rows)
        if self.query_scale is not None:
            q = q * self.query_scale.double().cpu()[self.rotary_rows.cpu()][:, None, None]
        return q, k, v

    def _normalised(self, x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.norm_eps).sqrt() * weight.double().cpu()

    def _rotated(self, x: Tensor, rows: Tensor) -> Tensor:
        half = self.rotary_dim // 2
        turn = torch.complex(rows[:, None, :half], rows[:, None, half:])
        pairs = torch.complex(x[..., :half].contiguous(), x[..., half : 2 * half].contiguous()) * turn
        return torch.cat([pairs.real, pairs.imag, x[..., 2 * half :]], -1)


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Largest error over the largest value; NaN where there should be none is an infinite error."""
    result, expected = result.double().cpu(), expected.double().cpu()
    if not torch.equal(result.isnan(), expected.isnan()):
        return math.inf
    difference = (result - expected).abs().nan_to_num(0).max()
    return float(difference / expected.abs().nan_to_num(0).max())
