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
    rotary_style: str = "neox"
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
        # Rows of the rotary table and positions are not the same, nor the same for all sequences.
        offsets = torch.tensor([3 + 2 * sequence for sequence in range(sequences)], dtype=torch.int32)
        rows = self.max_positions + 3 + 2 * sequences
        angles = torch.rand(rows, self.rotary_dim // 2, generator=generator) * 2 * math.pi
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
        self.rotary_offsets = offsets.to(self.device)
        lengths = torch.tensor(self.new_tokens, dtype=torch.int32)
        self.cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int().to(self.device)

    @property
    def rotary_rows(self) -> Tensor:
        """Return each token's row of the rotary table, [tokens] on the CPU."""
        return self.rotary_offsets.cpu()[self.sequences] + self.positions

    def reference(self) -> tuple[Tensor, Tensor]:
        """Return the context [tokens, heads * head_size] and the cache afterwards, in float64 on the CPU."""
        _, k, v = self._prepared()
        cache = self.cache.double().cpu()
        cache[self.sequences, 0, :, self.positions] = k
        cache[self.sequences, 1, :, self.positions] = v
        return self.context_over(cache), cache

    def context_over(self, cache: Tensor) -> Tensor:
        """Return the context over a cache in float64, on the CPU, that has the new tokens' keys and values."""
        q, _, _ = self._prepared()
        group = self.num_heads // self.num_kv_heads
        context = []
        for sequence, past in enumerate(self.past_lengths):
            own = self.sequences == sequence
            length = past + self.new_tokens[sequence]
            keys, values = cache[sequence, :, :, :length].repeat_interleave(group, 1)
            scores = torch.einsum("thd,hnd->thn", q[own], keys) / math.sqrt(self.head_size)
            future = torch.arange(length) > self.positions[own][:, None]
            weights = scores.masked_fill(future[:, None], -math.inf).softmax(-1)
            context.append(torch.einsum("thn,hnd->thd", weights, values).flatten(1))
        return torch.cat(context)

    def _prepared(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v [tokens, heads, head_size], q and k normalised, rotated and scaled."""
        heads = self.qkv.double().cpu().unflatten(-1, (-1, self.head_size))
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self._normalised(q, self.q_norm), self._normalised(k, self.k_norm)
        rows = self.rotary_table.double().cpu()[self.rotary_rows]
        q, k = self._rotated(q, rows), self._rotated(k, rows)
        if self.query_scale is not None:
            q = q * self.query_scale.double().cpu()[self.rotary_rows][:, None, None]
        return q, k, v

    def _normalised(self, x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.norm_eps).sqrt() * weight.double().cpu()

    def _rotated(self, x: Tensor, rows: Tensor) -> Tensor:
        half = self.rotary_dim // 2
        turn = torch.complex(rows[:, None, :half], rows[:, None, half:])
        if self.rotary_style == "gptj":
            first, second = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
        else:
            first, second = x[..., :half], x[..., half : 2 * half]
        pairs = torch.complex(first.contiguous(), second.contiguous()) * turn
        if self.rotary_style == "gptj":
            rotated = torch.view_as_real(pairs).flatten(-2)
        else:
            rotated = torch.cat([pairs.real, pairs.imag], -1)
        return torch.cat([rotated, x[..., 2 * half :]], -1)


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Return the largest error over the largest value; infinite where NaN is in other places than expected."""
    result, expected = result.double().cpu(), expected.double().cpu()
    if not torch.equal(result.isnan(), expected.isnan()):
        return math.inf
    difference = (result - expected).abs().nan_to_num(0).max()
    return float(difference / expected.abs().nan_to_num(0).max())
