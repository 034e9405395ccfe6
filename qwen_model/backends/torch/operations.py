"""Implement the decoder's operations with PyTorch's own functions, for any device."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checkpoints.config import ModelConfig
from ...checkpoints.module_weights import ModuleWeights
from ...interface.memory import PAGE_SIZE
from ...tuning.linear_layers import quantizing_reader
from . import eight_bit, quantized
from .eight_bit import Activations, QuantizedTensor
from .paged_cache import CODE_TYPES, PagedCache


@dataclass
class Step:
    """Describe the packed tokens of one pass through the network to attention and to the choice of rows.

    The host's numbers are for PyTorch's own functions; kernels read the device's.
    """

    lengths: list[int]  # new tokens of each sequence
    past_lengths: list[int]  # tokens of each in the cache before these
    cu_seqlens: Tensor  # int32 [sequences + 1]: where each sequence begins in the packed tokens, and the end
    device_past_lengths: Tensor  # int32 [sequences]: past_lengths on the device
    pages: Tensor  # int32 [sequences, pages of one]: position p of sequence i is in page pages[i, p // PAGE_SIZE]
    rotary_table: Tensor  # float32 [rows, rotary_dim]: cosines, then sines
    rotary_offsets: Tensor  # int32 [sequences]: position p of sequence i has row rotary_offsets[i] + p
    query_scale: Tensor | None  # float32 [rows]: multiplies q
    logit_rows: Tensor  # int32 [rows]: the packed tokens whose logits are computed
    decoding: bool  # each sequence has one new token, whose logits are computed
    num_decoding: int = 0  # the first so many sequences have one new token each, and prompts follow
    prompt_cu_seqlens: Tensor | None = None  # int32 [prompts + 1]: cu_seqlens of those that follow, from 0

    @cached_property
    def sequences(self) -> Tensor:
        """Return the sequence of each token: [tokens]."""
        lengths = torch.tensor(self.lengths, device=self.pages.device)
        return torch.repeat_interleave(lengths, output_size=sum(self.lengths))

    @cached_property
    def positions(self) -> Tensor:
        """Return the position of each token in its sequence: [tokens]."""
        if self.decoding:
            return self.device_past_lengths
        tokens = torch.arange(sum(self.lengths), device=self.pages.device)
        return tokens + (self.device_past_lengths - self.cu_seqlens[:-1])[self.sequences]

    @cached_property
    def token_pages(self) -> Tensor:
        """Return the page that the key and the value of each token are written to: [tokens]."""
        return self.pages[self.sequences, self.positions // PAGE_SIZE]

    @cached_property
    def rotary_rows(self) -> Tensor:
        """Return the row of each token in the rotary table: [tokens]."""
        offsets = self.rotary_offsets if self.decoding else self.rotary_offsets[self.sequences]
        return offsets + self.positions

    def runs(self) -> list[tuple[int, int]]:
        """Group neighbouring sequences of equal length: (number of sequences, length) of each group."""
        return [(len(list(run)), length) for length, run in groupby(self.lengths)]


class TorchOperations:
    """Compute every operation with PyTorch's own functions. Call `begin` before each pass through the network.

    An output is a `QuantizedTensor` where the linear layers that read it take that, and else a tensor.
    """

    step: Step

    def __init__(
        self,
        config: ModelConfig,
        modules: Mapping[str, ModuleWeights[Tensor]],
        cache: PagedCache,
        disabled: Collection[str] = (),
    ):
        """Take the weights of each module, quantized ones in layout 1 (see `unpacked_modules`), and the cache.

        disabled: names of `PLUGINS` whose operations PyTorch's own functions compute.
        """
        self.config = config
        self.modules = modules
        self.cache = cache
        self._readers: dict[tuple[str, ...], ModuleWeights[Tensor] | None] = {}
        norms = (plain_rms_norm, None) if "rms_norm" in disabled else _plugin_rms_norms()
        self._rms_norm: Callable[..., Any] = norms[0]
        self._rms_norm_quant: Callable[..., Any] | None = norms[1]

    def begin(self, step: Step) -> None:
        """Set the step of the next pass, which runs on the current stream."""
        self.step = step

    def token_ids(self, table: Tensor, rows: Tensor) -> Tensor:
        """Return table[rows], int32 [tokens]: the ids of a step's tokens, some of which only the device knows."""
        return table.index_select(0, rows)

    def quantized_for(self, into: tuple[str, ...], x: Tensor) -> Activations:
        """Quantize x for the linear layers that read it, if they take it so."""
        reader = self.reader(into)
        return x if reader is None else eight_bit.quantized(x, reader.format.kind, reader.input_scale)

    def reader(self, into: tuple[str, ...]) -> ModuleWeights[Tensor] | None:
        """Return a module of `into`, if these linear layers take a quantized x."""
        if into not in self._readers:
            self._readers[into] = quantizing_reader(self.modules, into)
        return self._readers[into]

    def embedding(self, input_ids: Activations, module: str) -> Activations:
        """See `qwen_model.network.decoder.Operations`."""
        assert isinstance(input_ids, Tensor)
        return F.embedding(input_ids, self.modules[module].weight)

    def norm(
        self, x: Activations, module: str, residual: Activations | None = None, into: tuple[str, ...] = ()
    ) -> tuple[Activations, Activations]:
        """See `qwen_model.network.decoder.Operations`."""
        assert isinstance(x, Tensor)
        weight, eps, reader = self.modules[module].weight, self.config.norm_eps, self.reader(into)
        if reader is None or self._rms_norm_quant is None:
            found: Any = self._rms_norm(x, weight, eps, residual=residual)
            y, h = (found, x) if residual is None else found
            return self.quantized_for(into, y), h
        options = {"quant_dtype": CODE_TYPES[reader.format.kind], "scale": reader.input_scale}
        found = self._rms_norm_quant(x, weight, eps, residual=residual, **options)
        codes, *rest = (found,) if isinstance(found, Tensor) else found
        scales = rest.pop(0) if reader.input_scale is None else reader.input_scale
        return QuantizedTensor(codes, scales), x if residual is None else rest[0]

    def linear(
        self,
        x: Activations,
        module: str,
        activation: str | None = None,
        into: tuple[str, ...] = (),
        reduce: bool = False,
    ) -> Activations:
        """See `qwen_model.network.decoder.Operations`."""
        weights = self.modules[module]
        if isinstance(x, QuantizedTensor):
            y = eight_bit.linear(x, weights)
        elif weights.format.bits:
            y = quantized.linear(x, weights)
        else:
            y = F.linear(x, weights.weight, weights.bias)
        if activation is not None:
            gate, up = y.chunk(2, dim=-1)
            y = F.silu(gate) * up
        reader = self.reader(into)
        if reader is None or reader.input_scale is None:  # else a kernel quantizes before it would round
            y = y.to(self.cache.dtype)
        return self.quantized_for(into, y)

    def last_token(self, x: Activations, residual: Activations) -> tuple[Activations, Activations]:
        """See `qwen_model.network.decoder.Operations`."""
        assert isinstance(residual, Tensor)
        if self.step.decoding:
            return x, residual
        rows = self.step.logit_rows
        return x.gathered(rows) if isinstance(x, QuantizedTensor) else x[rows], residual[rows]

    def attention(self, qkv: Activations, layer: int, into: tuple[str, ...] = ()) -> Activations:
        """See `qwen_model.network.decoder.Operations`."""
        assert isinstance(qkv, Tensor)
        return self.quantized_for(into, self._context(qkv, layer))

    def _context(self, qkv: Tensor, layer: int) -> Tensor:
        q, k, v = self.split_heads(qkv)
        q, k = self.norm_and_rotate(q, k, layer)
        step, cache = self.step, self.cache
        cache.write(layer, k, v, step.token_pages, step.positions % PAGE_SIZE)
        if step.decoding:
            return self._attend_decoding(q, layer)
        if cache.kind == "auto" and not any(step.past_lengths):
            return self.attend_prompts(q, k, v)
        return self._attend_chunks(q, layer)

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return views of q, k and v: [tokens, heads, head_size] each."""
        config = self.config
        heads = qkv.view(len(qkv), -1, config.head_size)
        q, k, v = heads.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        return q, k, v

    def head_norms(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """Return the weights of the RMSNorm of q's heads and of k's, [head_size] each; None: there is none."""
        q_norm, k_norm = (self.modules.get(f"layers.{layer}.attention.{name}_norm") for name in "qk")
        return None if q_norm is None else q_norm.weight, None if k_norm is None else k_norm.weight

    def norm_and_rotate(self, q: Tensor, k: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Apply the RMSNorm of each head, if there is one, and the rotary embedding to [tokens, heads, head_size]."""
        q_norm, k_norm = self.head_norms(layer)
        if q_norm is not None and k_norm is not None:
            q = self._rms_norm(q, q_norm, self.config.norm_eps)
            k = self._rms_norm(k, k_norm, self.config.norm_eps)
        return self._rotate(q, True), self._rotate(k, False)

    def _rotate(self, x: Tensor, is_query: bool) -> Tensor:
        """Apply the rotary embedding to [tokens, heads, head_size], computed in float32."""
        step, dim = self.step, self.config.rotary.dim
        cos, sin = step.rotary_table[step.rotary_rows].unsqueeze(1).chunk(2, dim=-1)
        first, second = x[..., :dim].float().chunk(2, dim=-1)
        rotated = [first * cos - second * sin, second * cos + first * sin, x[..., dim:].float()]
        y = torch.cat(rotated, dim=-1)
        if is_query and step.query_scale is not None:
            y *= step.query_scale[step.rotary_rows].view(-1, 1, 1)
        return y.to(x.dtype)

    def attend_prompts(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Compute causal attention within each prompt, neighbours of equal length in one call."""
        grouped = self.config.num_heads != self.config.num_kv_heads
        contexts, start = [], 0
        for count, length in self.step.runs():
            end = start + count * length
            qs, ks, vs = (x[start:end].view(count, length, -1, x.shape[-1]).transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, enable_gqa=grouped)
            contexts.append(out.transpose(1, 2).reshape(end - start, -1))
            start = end
        return contexts[0] if len(contexts) == 1 else torch.cat(contexts)

    def _attend_chunks(self, q: Tensor, layer: int) -> Tensor:
        """Compute causal attention of each sequence's tokens over its cache, which has them already."""
        contexts = []
        for index, (queries, past) in enumerate(zip(q.split(self.step.lengths), self.step.past_lengths, strict=True)):
            end = past + len(queries)
            keys, values = self._cached(layer, slice(index, index + 1), end).unbind(1)
            mask = torch.ones(len(queries), end, dtype=torch.bool, device=q.device).tril(past)
            grouped = self._grouped(queries).permute(1, 2, 0, 3).flatten(1, 2)  # [kv_heads, group * tokens, head_size]
            masks = mask.repeat(self.config.num_heads // self.config.num_kv_heads, 1)
            out = F.scaled_dot_product_attention(grouped[None], keys, values, attn_mask=masks)[0]
            heads = out.unflatten(1, (-1, len(queries)))  # [kv_heads, group, tokens, head_size]
            contexts.append(heads.permute(2, 0, 1, 3).flatten(1))
        return torch.cat(contexts)

    def _attend_decoding(self, q: Tensor, layer: int) -> Tensor:
        """Compute attention of one token per sequence over its cache; query heads of one key head are batched."""
        lengths = [past + 1 for past in self.step.past_lengths]
        cached = self._cached(layer, slice(None), max(lengths))
        mask = None
        if min(lengths) != max(lengths):
            positions = torch.arange(max(lengths), device=q.device)
            mask = (positions <= self.step.device_past_lengths[:, None])[:, None, None]
            # An earlier request may have left NaN or infinities there, which a mask does not remove from the products.
            cached = cached.masked_fill(~mask[..., None], 0.0)
        keys, values = cached.unbind(1)
        return F.scaled_dot_product_attention(self._grouped(q), keys, values, attn_mask=mask).reshape(len(q), -1)

    def _cached(self, layer: int, sequences: slice, positions: int) -> Tensor:
        """Return the first positions of sequences in the cache: [sequences, 2, kv_heads, positions, head_size]."""
        pages = self.step.pages[sequences, : -(-positions // PAGE_SIZE)]
        return self.cache.read(layer, pages)[..., :positions, :]

    def _grouped(self, q: Tensor) -> Tensor:
        """Return a view of q in which the heads of one key head are together: [tokens, kv_heads, group, head_size]."""
        return q.view(len(q), self.config.num_kv_heads, -1, self.config.head_size)


def plain_rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute RMSNorm with elementary operations, rounding where transformers' modules do."""
    if residual is not None:
        x = x + residual
    wide = x.float()
    y = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return y if residual is None else (y, x)


def _plugin_rms_norms() -> tuple[Callable[..., Any], Callable[..., Any] | None]:
    """Return RMSNorm, and RMSNorm with quantization."""
    from qwen_plugins import rms_norm, rms_norm_quant

    return rms_norm, rms_norm_quant
