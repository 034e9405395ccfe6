"""Compute attention, with the rotary embedding and the key-value cache inside, for PyTorch tensors on an NVIDIA GPU.

`prefill_attention` is for prompts, `decode_attention` for one new token of each sequence. Both launch on PyTorch's
current stream, do not synchronise, work inside CUDA graph capture, and compute no gradients. Arguments are checked
before anything is written; only the numbers in device memory (lengths, offsets) are not.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen_plugins import launch
from qwen_plugins._arguments import (
    CurrentDevice,
    address,
    check,
    check_array,
    check_contiguous,
    check_contiguous_rows,
    check_device,
    check_dtype,
    check_gpu,
    check_int32,
    check_is_tensor,
    check_rows,
    check_tensor,
    data_type,
    type_name,
    type_names,
)
from qwen_plugins._numbers import HEAD_SIZES
from qwen_plugins._quantize import check_quant_dtype, check_static_scale

__all__ = [
    "HEAD_SIZES",
    "PAGE_SIZE",
    "ROTARY_STYLES",
    "AttentionInputs",
    "DecodeAttentionWorkspace",
    "decode_attention",
    "decode_attention_workspace",
    "prefill_attention",
    "split_quantized_cache",
]

ROTARY_STYLES = dict(launch.RotaryStyle.__members__)
PAGE_SIZE: int = launch.PAGE_SIZE
"""Positions of a page of a paged cache."""

_QUANTIZED_TYPES = (torch.int8, torch.float8_e4m3fn)
_SCALE_BYTES = 4


@dataclass(frozen=True)
class AttentionInputs:
    """Hold what attention takes besides the projections and the lengths.

    Args:
        num_heads: query heads, a multiple of the cache's kv_heads.
        kv_cache: keys and values of one layer, [rows, 2, kv_heads, max_positions, head_size], contiguous, in the type
            of qkv. head_size is one of `HEAD_SIZES`. A cache of 8 bits is uint8 [rows, 2, kv_heads, max_positions,
            head_size + 4], whose last two dimensions together are codes, then their scales: `split_quantized_cache`.
        rotary_table: float32 [rows, rotary_dim], contiguous: cosines, then sines. rotary_dim is even, at most
            head_size, and 0 without a rotary embedding.
        rotary_offsets: int32 [sequences]: a token at position p of sequence i uses row ``rotary_offsets[i] + p`` of
            rotary_table and query_scale (not checked); None: row p.
        rotary_style: "neox" rotates element i together with element i + rotary_dim / 2, "gptj" 2i with 2i + 1.
        query_scale: float32 [rows], multiplies q; None: 1.
        q_norm, k_norm: [head_size], in the type of qkv: weights of an RMSNorm of each head before the rotation; None:
            no norm.
        norm_eps: added to the mean squares of these norms, above 0.
        pages: int32 [sequences, pages of each], whose rows may be strided: the row of kv_cache, of `PAGE_SIZE`
            positions, that has positions ``PAGE_SIZE * i`` and on of a sequence (not checked). Sequences may share
            pages that are not written to; entries that are not needed must name any row. None: sequence i has row i.
        cache_dtype: torch.int8 or torch.float8_e4m3fn for a cache of 8 bits, with a scale for each token and head,
            whose max_positions is a multiple of PAGE_SIZE; None: the type of qkv.
    """

    num_heads: int
    kv_cache: Tensor
    rotary_table: Tensor
    rotary_offsets: Tensor | None = None
    rotary_style: str = "neox"
    query_scale: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    norm_eps: float = 1e-6
    pages: Tensor | None = None
    cache_dtype: torch.dtype | None = None


def prefill_attention(
    qkv: Tensor,
    inputs: AttentionInputs,
    cu_seqlens: Tensor,
    past_lengths: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    context_dtype: torch.dtype | None = None,
    context_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Compute causal attention of prompts, or of further parts of them, and append their keys and values to the cache.

    Args:
        qkv: [tokens, (heads + 2 · kv_heads) · head_size], float16, bfloat16 or float32: the projections of all
            sequences' tokens, one sequence after the other. Rows may be strided.
        inputs: what else attention takes.
        cu_seqlens: int32 [sequences + 1]: 0, then where each sequence ends in qkv (not checked). Rows behind the last
            end are padding: they are not cached, and their results have no meaning.
        past_lengths: int32 [sequences]: tokens in the cache before these, which leave room for them (not checked);
            None: none.
        softmax_scale: factor of q · Kᵀ, above 0; None: 1 / sqrt(head_size).
        context_dtype: torch.int8 or torch.float8_e4m3fn to quantize the result where it is written:
            saturate(round(result / context_scale)); None: the type of qkv.
        context_scale: one float32 above 0 on the device of qkv, with a context_dtype.
        out: where the result is written, contiguous; None: in new memory.

    Returns:
        [tokens, heads · head_size], in the type of qkv or in context_dtype.

    Raises:
        TypeError, ValueError: for an argument that does not fit, before anything is written.
    """
    _check_inputs(qkv, inputs)
    check_is_tensor("cu_seqlens", cu_seqlens)
    sequences = cu_seqlens.numel() - 1
    check_int32("cu_seqlens", cu_seqlens, sequences + 1, qkv)
    most = _max_sequences(inputs)
    check(
        0 <= sequences <= most,
        f"cu_seqlens must have from 1 to {most + 1} elements for {_of_most(inputs)}, not {sequences + 1}",
    )
    check(sequences > 0 or len(qkv) == 0, f"qkv must have no rows without sequences, not {len(qkv)}")
    if past_lengths is not None:
        check_int32("past_lengths", past_lengths, sequences, qkv)
    if inputs.rotary_offsets is not None:
        check_int32("rotary_offsets", inputs.rotary_offsets, sequences, qkv)
    scale = _softmax_scale(softmax_scale, inputs)
    quantization = _context_quantization(context_dtype, context_scale, qkv)
    out = _context(out, qkv, inputs, context_dtype)
    queries = None if context_dtype is None else torch.empty_like(out, dtype=qkv.dtype)
    with CurrentDevice(qkv) as stream:
        launch.prefill_attention(
            heads=_heads(inputs, qkv.dtype),
            **_tensors(qkv, inputs, past_lengths, out),
            **quantization,
            queries=address(queries),
            cu_seqlens=cu_seqlens.data_ptr(),
            sequences=sequences,
            tokens=len(qkv),
            softmax_scale=scale,
            stream=stream,
        )
    return out


@dataclass(frozen=True)
class DecodeAttentionWorkspace:
    """Hold memory for the launches of `decode_attention`; launches that may overlap must not share it."""

    partial_results: Tensor  # uint8; contents do not matter between launches
    semaphores: Tensor  # int32 [sequences, heads]; zero between launches


def decode_attention_workspace(inputs: AttentionInputs, sequences: int | None = None) -> DecodeAttentionWorkspace:
    """Allocate the workspace of `decode_attention`.

    Args:
        inputs: those of `decode_attention`; only num_heads, the cache, the pages and the rotary table are used.
        sequences: the most of a launch; None: as many as the page table or, without one, the cache has rows.

    Returns:
        The workspace, on the device of the cache; it serves all layers with these heads, one launch after the other.
    """
    sequences = _max_sequences(inputs) if sequences is None else sequences
    device = inputs.kv_cache.device
    size = launch.decode_attention_workspace_bytes(_heads(inputs, torch.float16), sequences=sequences)
    return DecodeAttentionWorkspace(
        torch.empty(size, dtype=torch.uint8, device=device),
        torch.zeros(sequences, inputs.num_heads, dtype=torch.int32, device=device),
    )


def decode_attention(
    qkv: Tensor,
    inputs: AttentionInputs,
    past_lengths: Tensor,
    workspace: DecodeAttentionWorkspace,
    *,
    softmax_scale: float | None = None,
    batch_invariant: bool = False,
    context_dtype: torch.dtype | None = None,
    context_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Compute attention of one new token of each sequence, and append its key and value to the cache.

    Args:
        qkv: [sequences, (heads + 2 · kv_heads) · head_size], float16, bfloat16 or float32: the projections of the new
            tokens. Rows may be strided.
        inputs: what else attention takes.
        past_lengths: int32 [sequences]: tokens in the cache before this one, which leave room for it (not checked).
        workspace: of `decode_attention_workspace`, for this many heads and at least as many sequences.
        softmax_scale: factor of q · Kᵀ, above 0; None: 1 / sqrt(head_size).
        batch_invariant: give a sequence's result the same bits whatever other sequences there are, at some cost in
            speed.
        context_dtype, context_scale: as for `prefill_attention`.
        out: where the result is written, contiguous; None: in new memory.

    Returns:
        [sequences, heads · head_size], in the type of qkv or in context_dtype.

    Raises:
        TypeError, ValueError: for an argument that does not fit, before anything is written.
    """
    _check_inputs(qkv, inputs)
    sequences, most = len(qkv), _max_sequences(inputs)
    check(sequences <= most, f"qkv must have at most {most} rows for {_of_most(inputs)}, not {sequences}")
    check_int32("past_lengths", past_lengths, sequences, qkv)
    if inputs.rotary_offsets is not None:
        check_int32("rotary_offsets", inputs.rotary_offsets, sequences, qkv)
    scale = _softmax_scale(softmax_scale, inputs)
    quantization = _context_quantization(context_dtype, context_scale, qkv)
    out = _context(out, qkv, inputs, context_dtype)
    if sequences == 0:
        return out
    heads = _heads(inputs, qkv.dtype)
    _check_workspace(workspace, launch.decode_attention_workspace_bytes(heads, sequences=sequences), inputs, qkv)
    with CurrentDevice(qkv) as stream:
        launch.decode_attention(
            heads=heads,
            **_tensors(qkv, inputs, past_lengths, out),
            **quantization,
            batch_invariant=batch_invariant,
            sequences=sequences,
            softmax_scale=scale,
            workspace=workspace.partial_results.data_ptr(),
            semaphores=workspace.semaphores.data_ptr(),
            stream=stream,
        )
    return out


def split_quantized_cache(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Split a cache of 8 bits into codes and scales: a key or value is its codes times its scale.

    A scale is the largest magnitude of a token's head / 127 (int8) or / 448 (float8_e4m3fn), and codes are rounded to
    nearest even.

    Args:
        kv_cache: as `AttentionInputs` has it, uint8 [rows, 2, kv_heads, max_positions, head_size + 4].

    Returns:
        Views: codes, uint8 [rows, 2, kv_heads, max_positions, head_size], of which each byte is an int8 or
        float8_e4m3fn number, and scales, float32 [rows, 2, kv_heads, max_positions].
    """
    positions, token_bytes = kv_cache.shape[-2:]
    block = kv_cache.flatten(-2)
    codes = positions * (token_bytes - _SCALE_BYTES)
    return block[..., :codes].unflatten(-1, (positions, -1)), block[..., codes:].view(torch.float32)


def _head_size(inputs: AttentionInputs) -> int:
    size: int = inputs.kv_cache.shape[4]
    return size if inputs.cache_dtype is None else size - _SCALE_BYTES


def _max_sequences(inputs: AttentionInputs) -> int:
    return len(inputs.kv_cache if inputs.pages is None else inputs.pages)


def _of_most(inputs: AttentionInputs) -> str:
    count = _max_sequences(inputs)
    return f"a cache of {count} sequences" if inputs.pages is None else f"pages of {count} sequences"


def _tensors(qkv: Tensor, inputs: AttentionInputs, past_lengths: Tensor | None, context: Tensor) -> dict[str, Any]:
    """Return the arguments of the launches that describe what both read and write."""
    types = launch.CacheDataType
    cache, dtype, pages = inputs.kv_cache, inputs.cache_dtype, inputs.pages
    return {
        "qkv": qkv.data_ptr(),
        "qkv_row_stride": qkv.stride(0),
        "context": context.data_ptr(),
        "past_lengths": address(past_lengths),
        "cache": cache.data_ptr(),
        "max_positions": cache.shape[3],
        "cache_dtype": types.same if dtype is None else getattr(types, type_name(dtype)),
        "pages": address(pages),
        "pages_row_stride": 0 if pages is None else pages.stride(0) if len(pages) > 1 else pages.shape[1],
    }


def _heads(inputs: AttentionInputs, dtype: torch.dtype) -> Any:
    return launch.AttentionHeads(
        num_heads=inputs.num_heads,
        num_kv_heads=inputs.kv_cache.shape[2],
        head_size=_head_size(inputs),
        rotary_dim=inputs.rotary_table.shape[1],
        dtype=data_type(dtype),
        rotary_table=inputs.rotary_table.data_ptr(),
        rotary_offsets=address(inputs.rotary_offsets),
        rotary_style=ROTARY_STYLES[inputs.rotary_style],
        query_scale=address(inputs.query_scale),
        q_norm_weight=address(inputs.q_norm),
        k_norm_weight=address(inputs.k_norm),
        norm_eps=inputs.norm_eps,
    )


def _softmax_scale(scale: float | None, inputs: AttentionInputs) -> float:
    if scale is None:
        return float(_head_size(inputs) ** -0.5)
    _check_positive("softmax_scale", scale)
    return scale


def _check_positive(name: str, value: float) -> None:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    check(0 < value < math.inf, f"{name} must be a finite number above 0, not {value}")


def _context(out: Tensor | None, qkv: Tensor, inputs: AttentionInputs, dtype: torch.dtype | None) -> Tensor:
    """Return `out`, or new memory for the result, after the last checks of the arguments."""
    shape = (len(qkv), inputs.num_heads * _head_size(inputs))
    if out is not None:
        check_tensor("out", out)
        check_array("out", out, dtype or qkv.dtype, shape, qkv)
    check_gpu("qkv", qkv)
    return qkv.new_empty(shape, dtype=dtype) if out is None else out


def _context_quantization(dtype: torch.dtype | None, scale: Tensor | None, qkv: Tensor) -> dict[str, Any]:
    """Return the arguments of the launches for a result of 8 bits: none where `dtype` is None."""
    check((dtype is None) == (scale is None), "context_dtype and context_scale must both be given, or none of them")
    if dtype is None or scale is None:
        return {}
    check_quant_dtype("context_dtype", dtype)
    check_static_scale("context_scale", scale, qkv)
    return {"context_dtype": data_type(dtype), "context_scale": scale.data_ptr()}


def _check_workspace(workspace: DecodeAttentionWorkspace, size: int, inputs: AttentionInputs, qkv: Tensor) -> None:
    partial, semaphores = workspace.partial_results, workspace.semaphores
    count = len(qkv) * inputs.num_heads
    check(
        partial.numel() >= size and semaphores.numel() >= count,
        f"workspace must be that of decode_attention_workspace for this cache, with {size} bytes and {count} "
        f"semaphores, not {partial.numel()} and {semaphores.numel()}",
    )
    check_device("workspace.partial_results", partial, qkv)
    check_device("workspace.semaphores", semaphores, qkv)


def _check_inputs(qkv: Tensor, inputs: AttentionInputs) -> None:
    """Check all but lengths, output, workspace and that there is a GPU."""
    check_tensor("qkv", qkv)
    check_rows("qkv", qkv)
    _check_cache(qkv, inputs)
    _check_pages(qkv, inputs)
    kv_heads, head_size = inputs.kv_cache.shape[2], _head_size(inputs)
    columns = (inputs.num_heads + 2 * kv_heads) * head_size
    check(qkv.shape[1] == columns, f"qkv must have {columns} columns, not {qkv.shape[1]}")
    _check_rotary_embedding(qkv, inputs)
    check((inputs.q_norm is None) == (inputs.k_norm is None), "q_norm and k_norm must both be given, or none of them")
    _check_positive("norm_eps", inputs.norm_eps)
    for name, weight in (("q_norm", inputs.q_norm), ("k_norm", inputs.k_norm)):
        if weight is not None:
            check_tensor(name, weight)
            check_array(name, weight, qkv.dtype, (head_size,), qkv)


def _check_cache(qkv: Tensor, inputs: AttentionInputs) -> None:
    cache, heads = inputs.kv_cache, inputs.num_heads
    check_is_tensor("kv_cache", cache)
    quantized = inputs.cache_dtype is not None
    if quantized:
        _check_cache_dtype(inputs.cache_dtype)
        check_dtype("kv_cache", cache, (torch.uint8,), like=f"all caches of {type_name(inputs.cache_dtype)}")
    else:
        check_dtype("kv_cache", cache, (qkv.dtype,), like="qkv")
    last = f"head_size + {_SCALE_BYTES}" if quantized else "head_size"
    check(
        cache.dim() == 5 and cache.shape[1] == 2,
        f"kv_cache must have the shape (rows, 2, kv_heads, max_positions, {last}), not {tuple(cache.shape)}",
    )
    check(
        not quantized or cache.shape[3] % PAGE_SIZE == 0,
        f"kv_cache of 8 bits must have a multiple of {PAGE_SIZE} positions, not {cache.shape[3]}",
    )
    check_contiguous("kv_cache", cache)
    check_device("kv_cache", cache, qkv)
    kv_heads, head_size = cache.shape[2], _head_size(inputs)
    check(head_size in HEAD_SIZES, f"head_size must be one of {HEAD_SIZES}, not {head_size}")
    if not isinstance(heads, numbers.Integral):
        raise TypeError(f"num_heads must be an integer, not {type(heads).__name__}")
    check(
        kv_heads > 0 and heads > 0 and heads % kv_heads == 0,
        f"num_heads must be a multiple of the cache's kv_heads, {kv_heads}, not {heads}",
    )


def _check_cache_dtype(dtype: Any) -> None:
    if dtype not in _QUANTIZED_TYPES:
        raise TypeError(f"cache_dtype must be None, {type_names(_QUANTIZED_TYPES)}, not {type_name(dtype)}")


def _check_pages(qkv: Tensor, inputs: AttentionInputs) -> None:
    pages = inputs.pages
    if pages is None:
        return
    check_is_tensor("pages", pages)
    check_dtype("pages", pages, (torch.int32,))
    check(
        pages.dim() == 2 and pages.shape[1] > 0,
        f"pages must have the shape (sequences, pages of each), not {tuple(pages.shape)}",
    )
    check_contiguous_rows("pages", pages)
    check_device("pages", pages, qkv)
    positions = inputs.kv_cache.shape[3]
    check(positions == PAGE_SIZE, f"kv_cache must have rows of {PAGE_SIZE} positions with pages, not of {positions}")


def _check_rotary_embedding(qkv: Tensor, inputs: AttentionInputs) -> None:
    check(
        inputs.rotary_style in ROTARY_STYLES,
        f"rotary_style must be one of {tuple(ROTARY_STYLES)}, not {inputs.rotary_style!r}",
    )
    table, head_size = inputs.rotary_table, _head_size(inputs)
    check_is_tensor("rotary_table", table)
    check(table.dim() == 2, f"rotary_table must have 2 dimensions, not {table.dim()}")
    rows, rotary_dim = table.shape
    check_array("rotary_table", table, torch.float32, (rows, rotary_dim), qkv)
    check(
        rotary_dim % 2 == 0 and rotary_dim <= head_size,
        f"rotary_table must have an even number of columns up to head_size, {head_size}, not {rotary_dim}",
    )
    if inputs.query_scale is not None:
        check_array("query_scale", inputs.query_scale, torch.float32, (rows,), qkv)
