"""The decoder's kernels beside the normalisations, for PyTorch tensors on an NVIDIA GPU.

`swiglu`, and attention with the rotary embedding and the key-value cache inside: `prefill_attention` of prompts and
`decode_attention` of one new token a sequence. They launch on PyTorch's current stream, wait for nothing, and can be
captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen_plugins._arguments import (
    CurrentDevice,
    address,
    check,
    check_int32,
    check_matrix,
    check_output,
    core,
    float_type_number,
)
from qwen_plugins._numbers import HEAD_SIZES, ROTARY_STYLES


def swiglu(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """silu(gate) · up of `gate_up` [rows, 2 · size], the gate first: [rows, size].

    float32, float16 or bfloat16, computed in float32; rows may be strided, their elements must be contiguous.
    """
    check_matrix("gate_up", gate_up)
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    check(gate_up.shape[1] % 2 == 0, f"gate_up must have an even number of columns, not {gate_up.shape[1]}")
    if out is None:
        out = gate_up.new_empty(rows, size)
    check_output(out, (rows, size), gate_up)
    with CurrentDevice(gate_up) as stream:
        core().swiglu(
            gate_up=gate_up.data_ptr(),
            y=out.data_ptr(),
            gate_up_row_stride=gate_up.stride(0),
            rows=rows,
            size=size,
            dtype=float_type_number(gate_up.dtype),
            stream=stream,
        )
    return out


@dataclass(frozen=True)
class AttentionInputs:
    """What attention takes besides the projections and the lengths.

    kv_cache: keys and values of one layer, [sequences, 2, kv_heads, max_positions, head_size], contiguous.
    rotary_table: float32 [rows, rotary_dim], cosines then sines.
    rotary_offsets: int32 [sequences] on the device: position p of sequence i has row `rotary_offsets[i] + p` of the
        table and of query_scale (not checked); None: row p.
    rotary_style: "neox", where element i turns with element i + rotary_dim / 2, or "gptj", 2i with 2i + 1.
    query_scale: float32 [rows], multiplies q; None: 1.
    q_norm, k_norm: [head_size], weights of an RMSNorm of each head before the rotation; None: none.
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


def prefill_attention(
    qkv: Tensor,
    inputs: AttentionInputs,
    cu_seqlens: Tensor,
    past_lengths: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of prompts, or of further parts of them: [tokens, heads · head_size].

    qkv: [tokens, (heads + 2 · kv_heads) · head_size], the sequences' tokens one after the other; not changed.
    cu_seqlens: int32 [sequences + 1] on the device: 0, then where each sequence ends in qkv (not checked).
    past_lengths: int32 [sequences] on the device: tokens in the cache before these; None: none. The new keys and values
        are written after them (not checked: there must be room); row i of the cache is sequence i's.
    softmax_scale: None: 1 / sqrt(head_size).
    """
    _check_qkv(qkv, inputs)
    cache = inputs.kv_cache
    sequences = len(cu_seqlens) - 1
    check(0 <= sequences <= len(cache), f"{sequences} sequences do not fit in a cache of {len(cache)}")
    check_int32("cu_seqlens", cu_seqlens, sequences + 1, qkv)
    if past_lengths is not None:
        check_int32("past_lengths", past_lengths, sequences, qkv)
    _check_offsets(inputs, sequences, qkv)
    check(sequences > 0 or len(qkv) == 0, f"{len(qkv)} tokens of no sequence")
    out = _context(out, qkv, inputs)
    with CurrentDevice(qkv) as stream:
        core().prefill_attention(
            heads=_heads(inputs),
            cache=cache.data_ptr(),
            max_positions=cache.shape[3],
            qkv=qkv.data_ptr(),
            qkv_row_stride=qkv.stride(0),
            context=out.data_ptr(),
            cu_seqlens=cu_seqlens.data_ptr(),
            past_lengths=address(past_lengths),
            sequences=sequences,
            tokens=len(qkv),
            softmax_scale=_softmax_scale(softmax_scale, cache),
            stream=stream,
        )
    return out


@dataclass(frozen=True)
class DecodeAttentionWorkspace:
    """Memory for one launch of `decode_attention` at a time; to be kept from launch to launch."""

    partial_results: Tensor  # uint8; contents do not matter between launches
    semaphores: Tensor  # int32 [sequences, heads]; zero between launches


def decode_attention_workspace(inputs: AttentionInputs) -> DecodeAttentionWorkspace:
    """The workspace for up to as many sequences as the cache has."""
    cache = inputs.kv_cache
    count = core().decode_attention_workspace_bytes(_heads(inputs), len(cache))
    return DecodeAttentionWorkspace(
        torch.empty(count, dtype=torch.uint8, device=cache.device),
        torch.zeros(len(cache), inputs.num_heads, dtype=torch.int32, device=cache.device),
    )


def decode_attention(
    qkv: Tensor,
    inputs: AttentionInputs,
    past_lengths: Tensor,
    workspace: DecodeAttentionWorkspace,
    *,
    softmax_scale: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of one new token for each sequence: [sequences, heads · head_size].

    qkv: [sequences, (heads + 2 · kv_heads) · head_size], the new tokens' projections; not changed.
    past_lengths: int32 [sequences], on the device: tokens in the cache so far, below max_positions (not checked). The
        new key and value are written there; row i of the cache is sequence i's.
    workspace: of `decode_attention_workspace`, for one launch at a time.
    softmax_scale: None: 1 / sqrt(head_size).
    """
    _check_qkv(qkv, inputs)
    cache = inputs.kv_cache
    check(len(qkv) <= len(cache), f"{len(qkv)} sequences do not fit in a cache of {len(cache)}")
    check_int32("past_lengths", past_lengths, len(qkv), qkv)
    _check_offsets(inputs, len(qkv), qkv)
    out = _context(out, qkv, inputs)
    if len(qkv) == 0:
        return out
    heads = _heads(inputs)
    _check_workspace(workspace, core().decode_attention_workspace_bytes(heads, len(qkv)), inputs, qkv)
    with CurrentDevice(qkv) as stream:
        core().decode_attention(
            heads=heads,
            cache=cache.data_ptr(),
            max_positions=cache.shape[3],
            qkv=qkv.data_ptr(),
            qkv_row_stride=qkv.stride(0),
            context=out.data_ptr(),
            past_lengths=past_lengths.data_ptr(),
            sequences=len(qkv),
            softmax_scale=_softmax_scale(softmax_scale, cache),
            workspace=workspace.partial_results.data_ptr(),
            semaphores=workspace.semaphores.data_ptr(),
            stream=stream,
        )
    return out


def _heads(inputs: AttentionInputs) -> Any:
    cache = inputs.kv_cache
    return core().AttentionHeads(
        num_heads=inputs.num_heads,
        num_kv_heads=cache.shape[2],
        head_size=cache.shape[4],
        rotary_dim=inputs.rotary_table.shape[1],
        dtype=float_type_number(cache.dtype),
        rotary_table=inputs.rotary_table.data_ptr(),
        rotary_offsets=address(inputs.rotary_offsets),
        rotary_style=ROTARY_STYLES[inputs.rotary_style],
        query_scale=address(inputs.query_scale),
        q_norm_weight=address(inputs.q_norm),
        k_norm_weight=address(inputs.k_norm),
        norm_eps=inputs.norm_eps,
    )


def _softmax_scale(scale: float | None, cache: Tensor) -> float:
    head_size: int = cache.shape[4]
    return head_size**-0.5 if scale is None else scale


def _check_offsets(inputs: AttentionInputs, sequences: int, like: Tensor) -> None:
    if inputs.rotary_offsets is not None:
        check_int32("rotary_offsets", inputs.rotary_offsets, sequences, like)


def _context(out: Tensor | None, qkv: Tensor, inputs: AttentionInputs) -> Tensor:
    """Where the result goes: `out` if it is right for it, or new memory."""
    shape = (len(qkv), inputs.num_heads * inputs.kv_cache.shape[4])
    if out is None:
        return qkv.new_empty(shape)
    check_output(out, shape, qkv)
    return out


def _check_workspace(
    workspace: DecodeAttentionWorkspace, num_bytes: int, inputs: AttentionInputs, like: Tensor
) -> None:
    partial, semaphores = workspace.partial_results, workspace.semaphores
    right = partial.numel() >= num_bytes and semaphores.numel() >= len(like) * inputs.num_heads
    check(
        right and partial.device == like.device == semaphores.device,
        f"workspace must be that of decode_attention_workspace for this cache and device, {like.device}: {num_bytes} "
        f"bytes and {len(like) * inputs.num_heads} semaphores, not {partial.numel()} and {semaphores.numel()} on "
        f"{partial.device}",
    )


def _check_qkv(qkv: Tensor, inputs: AttentionInputs) -> None:
    check_matrix("qkv", qkv)
    cache, table = inputs.kv_cache, inputs.rotary_table
    check(
        cache.dim() == 5 and cache.shape[1] == 2, f"kv_cache must be [n, 2, heads, positions, size], not {cache.shape}"
    )
    check(cache.is_contiguous(), "kv_cache must be contiguous")
    check(cache.dtype == qkv.dtype and cache.device == qkv.device, "kv_cache must be of the type and device of qkv")
    kv_heads, head_size = cache.shape[2], cache.shape[4]
    check(head_size in HEAD_SIZES, f"head_size must be one of {HEAD_SIZES}, not {head_size}")
    check(
        inputs.num_heads % kv_heads == 0, f"{inputs.num_heads} heads are not a multiple of {kv_heads} key-value heads"
    )
    columns = (inputs.num_heads + 2 * kv_heads) * head_size
    check(qkv.shape[1] == columns, f"qkv must have {columns} columns, not {qkv.shape[1]}")
    check(
        inputs.rotary_style in ROTARY_STYLES,
        f"rotary_style must be one of {list(ROTARY_STYLES)}, not {inputs.rotary_style!r}",
    )
    right = table.dtype == torch.float32 and table.dim() == 2 and table.is_contiguous()
    check(right and table.device == qkv.device, "rotary_table must be contiguous float32 [rows, rotary_dim] on the GPU")
    scale = inputs.query_scale
    if scale is not None:
        right = scale.dtype == table.dtype and tuple(scale.shape) == (len(table),) and scale.is_contiguous()
        check(
            right and scale.device == qkv.device,
            f"query_scale must be contiguous float32 [{len(table)}], as rotary_table has rows, on {qkv.device}, not "
            f"{scale.dtype} {list(scale.shape)} on {scale.device}",
        )
    check((inputs.q_norm is None) == (inputs.k_norm is None), "q_norm and k_norm go together")
    for name, weight in (("q_norm", inputs.q_norm), ("k_norm", inputs.k_norm)):
        if weight is not None:
            right = tuple(weight.shape) == (head_size,) and weight.dtype == qkv.dtype and weight.device == qkv.device
            check(right and weight.is_contiguous(), f"{name} must be [{head_size}] of the type and device of qkv")
