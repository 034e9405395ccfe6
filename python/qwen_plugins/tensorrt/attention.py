"""Add the GptAttention plug-in: attention over a key-value cache, with the rotary embedding inside."""

import numbers
from typing import Any

import tensorrt as trt

from .._numbers import HEAD_SIZES, KV_CACHE_TYPES
from .layers import (
    add_plugin,
    check_network,
    check_positive,
    check_shape,
    check_type,
    checked_dtype,
    free_name,
    one_scale,
    parameter,
    tensor_shape,
)
from .native import NativeLayers

# TensorRT-LLM's names and numbers.
_POSITION_EMBEDDING_TYPES = {"learned_absolute": 0, "rope_gptj": 1, "rope_gpt_neox": 2}
_PAGE_SIZE = 64


def gpt_attention(
    network: Any,
    qkv: Any,
    past_key_value: Any,
    cu_seqlens: Any,
    past_lengths: Any,
    rotary_offsets: Any,
    rotary_table: Any,
    semaphores: Any,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    rotary_embedding_dim: int | None = None,
    position_embedding_type: str = "rope_gpt_neox",
    q_scaling: float = 1.0,
    query_scale: Any = None,
    q_norm_weight: Any = None,
    k_norm_weight: Any = None,
    norm_eps: float = 1e-6,
    pages: Any = None,
    tokens_per_block: int = _PAGE_SIZE,
    kv_cache_dtype: str = "auto",
    context_dtype: str = "auto",
    context_scale: Any = None,
    dtype: Any = None,
    name: str | None = None,
) -> tuple[Any, Any]:
    """Add causal attention of packed sequences over their key-value cache, with what precedes it in a decoder layer.

    The layer applies, each in float32, an RMSNorm to each head of q and k where norm weights are given, the rotary
    embedding, and query_scale to q. It then writes k and v to the cache, and computes the context of each token,
    softmax(q · Kᵀ / (q_scaling · √head_size)) · V, over the tokens of its sequence up to itself.

    With as many tokens as sequences the layer runs a kernel for one new token of each sequence, otherwise kernels for
    prompts. Lengths are read on the GPU only, so that one CUDA graph of a decode step serves sequences of any length.

    Args:
        network: ``INetworkDefinition`` to add to.
        qkv: ``ITensor`` [tokens, (num_heads + 2 · num_kv_heads) · head_size] of ``dtype``: for each token the heads
            of q, then of k, then of v; the tokens of one sequence after those of another.
        past_key_value: ``ITensor``, the cache: keys, then values. Mark present_key_value as an output of the network
            and bind it to the memory of this input: then only the new tokens are written, and nothing is copied.
            Without pages [max_batch, 2, num_kv_heads, max_positions, head_size] of ``dtype``; sequence i has row i.
            With pages [num_pages, 2, num_kv_heads, tokens_per_block, head_size] of ``dtype``, or with 8 bits an element
            int32 [num_pages, 2 · num_kv_heads · tokens_per_block · (head_size / 4 + 1)]. present_key_value must then
            have the memory of this input.
        cu_seqlens: ``ITensor`` int32 [sequences + 1]: 0, then the running sums of the sequences' new tokens, at least
            one each.
        past_lengths: ``ITensor`` int32 [sequences]: tokens in the cache before these; with the new ones at most
            max_positions.
        rotary_offsets: ``ITensor`` int32 [sequences]: a token at position p of sequence i uses row
            rotary_offsets[i] + p of rotary_table and query_scale. Zeros unless sequences have tables of their own.
        rotary_table: [rows, rotary_embedding_dim] float32, an ``ITensor`` or an array: of each row the cosines, then
            the sines. None without a rotary embedding.
        semaphores: ``ITensor`` int32 [max_batch, num_heads], an input of the network bound to memory that is zero at
            first; each launch leaves it zero. All layers of a network share one tensor, but each execution context
            needs its own, since launches that overlap must not share it. Zero it after a launch that was aborted.
        num_heads: heads of q.
        num_kv_heads: heads of k and v, a divisor of num_heads.
        head_size: 32, 64, 80, 96, 128 or 256.
        rotary_embedding_dim: how many elements of a head are rotated, even; None: head_size, or 0 without a
            rotary_table.
        position_embedding_type: TensorRT-LLM's name: "rope_gpt_neox" rotates element i together with element
            i + rotary_embedding_dim / 2, "rope_gptj" 2i with 2i + 1, "learned_absolute" none.
        q_scaling: divides the scores, as √head_size does, above 0; TensorRT-LLM's name.
        query_scale: [rows] float32, an ``ITensor`` or an array, or None: factors of q (Qwen v1's logn).
        q_norm_weight, k_norm_weight: [head_size] of ``dtype``, ``ITensor`` or array, both or none (Qwen3).
        norm_eps: added to the mean squares of the heads, above 0.
        pages: ``ITensor`` int32 [sequences, max_pages], or None: the cache is not divided into pages. Position p of
            sequence i is in page pages[i, p / tokens_per_block]; entries behind a sequence's last position are not
            read. Sequences may share pages that none of them writes to.
        tokens_per_block: positions of a page, 64; TensorRT-LLM's name.
        kv_cache_dtype: of the elements of a cache of pages: "auto" (``dtype``), "int8" or "fp8" (e4m3). With 8 bits a
            head's keys, and its values, are in each page tokens_per_block · head_size codes, then a float32 scale for
            each position; an element is code · scale.
        context_dtype: "auto" (``dtype``), or "int8" or "fp8" (e4m3) with pages: the context is quantized where it is
            written, q = saturate(round(context / context_scale)), and is int32 to TensorRT, four codes in each number.
        context_scale: one float32 above 0, with a context_dtype: an ``ITensor`` of shape [] or [1], or a number.
        dtype: ``tensorrt.DataType`` of qkv, cache, norm weights and context; None: ``qkv.dtype``. Pass it in TensorRT
            8.6 where qkv reports float32 but will be computed in float16.
        name: of the layer, and prefix of its constants' names, unique in the network; None: gpt_attention with a
            number.

    Returns:
        (context [tokens, num_heads · head_size], quantized as int32 [tokens, num_heads · head_size / 4],
        present_key_value of the shape of past_key_value).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value.
        RuntimeError: TensorRT refused the layer; its log has the reason.
    """
    check_network(network)
    tensor_shape(qkv, "qkv")
    dtype = checked_dtype(dtype, qkv, "qkv")
    _check_heads(num_heads, num_kv_heads, head_size)
    rotary_dim = _rotary_dim(rotary_embedding_dim, head_size, position_embedding_type, rotary_table)
    check_positive(q_scaling, "q_scaling")
    check_positive(norm_eps, "norm_eps")
    _check_pages(pages, tokens_per_block, kv_cache_dtype)
    _check_context(pages, context_dtype, context_scale)
    if (q_norm_weight is None) != (k_norm_weight is None):
        raise ValueError("only one of q_norm_weight and k_norm_weight is given; expected both or none")

    name = name or free_name(network, "gpt_attention")
    tensors = _Tensors(network, name)
    packed = (num_heads + 2 * num_kv_heads) * head_size
    tensors.add("qkv", qkv, (-1, packed), "[tokens, (num_heads + 2 * num_kv_heads) * head_size]")
    cache: tuple[int, ...]
    if pages is None:
        cache, cache_type = (-1, 2, num_kv_heads, -1, head_size), dtype
        meaning = "[max_batch, 2, num_kv_heads, max_positions, head_size]"
    elif kv_cache_dtype == "auto":
        cache, cache_type = (-1, 2, num_kv_heads, tokens_per_block, head_size), dtype
        meaning = "[num_pages, 2, num_kv_heads, tokens_per_block, head_size]"
    else:
        cache, cache_type = (-1, 2 * num_kv_heads * tokens_per_block * (head_size // 4 + 1)), trt.int32
        meaning = "[num_pages, 2 * num_kv_heads * tokens_per_block * (head_size / 4 + 1)]"
    tensors.add("past_key_value", past_key_value, cache, meaning, cache_type)
    tensors.add("cu_seqlens", cu_seqlens, (-1,), "[sequences + 1]", trt.int32)
    tensors.add("past_lengths", past_lengths, (-1,), "[sequences]", trt.int32)
    if pages is not None:
        tensors.add("pages", pages, (-1, -1), "[sequences, max_pages]", trt.int32)
    tensors.add("rotary_offsets", rotary_offsets, (-1,), "[sequences]", trt.int32)
    tensors.add_parameter("rotary_table", rotary_table, (-1, rotary_dim), "[rows, rotary_embedding_dim]", trt.float32)
    tensors.add("semaphores", semaphores, (-1, num_heads), "[max_batch, num_heads]", trt.int32)
    tensors.add_parameter("query_scale", query_scale, (-1,), "[rows]", trt.float32)
    tensors.add_parameter("q_norm_weight", q_norm_weight, (head_size,), "[head_size]", dtype)
    tensors.add_parameter("k_norm_weight", k_norm_weight, (head_size,), "[head_size]", dtype)
    if context_scale is not None:
        tensors.inputs.append(one_scale(tensors.layers, context_scale, "context_scale"))
    fields = {
        "type_id": int(dtype),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_size": head_size,
        "rotary_embedding_dim": rotary_dim,
        "position_embedding_type": _POSITION_EMBEDDING_TYPES[position_embedding_type] if rotary_dim > 0 else 0,
        "q_scaling": float(q_scaling),
        "query_scale": int(query_scale is not None),
        "qk_norm": int(q_norm_weight is not None),
        "norm_eps": float(norm_eps),
    }
    if pages is not None:
        fields |= {"tokens_per_block": tokens_per_block, "kv_cache_type": KV_CACHE_TYPES[kv_cache_dtype]}
    if context_scale is not None:
        fields["context_type"] = KV_CACHE_TYPES[context_dtype]
    version = "1" if pages is None else "2"
    types = [dtype if context_scale is None else trt.int32, cache_type]
    context, present = add_plugin(network, "GptAttention", tensors.inputs, fields, name, types, version)
    return context, present


class _Tensors:
    """Collects the inputs of the plug-in in their order."""

    def __init__(self, network: Any, name: str) -> None:
        self.layers = NativeLayers(network, name)
        self.inputs: list[Any] = []

    def add(self, what: str, value: Any, expected: tuple[int, ...], meaning: str, dtype: Any = None) -> None:
        """Add a tensor of that shape and, where one is given, type."""
        check_shape(tensor_shape(value, what), expected, what, meaning)
        if dtype is not None:
            check_type(value, dtype, what)
        self.inputs.append(value)

    def add_parameter(self, what: str, value: Any, expected: tuple[int, ...], meaning: str, dtype: Any) -> None:
        """Add a tensor, or a constant for an array; nothing for None."""
        if value is not None:
            self.inputs.append(parameter(self.layers, value, expected, what, meaning, dtype))


def _check_heads(num_heads: int, num_kv_heads: int, head_size: int) -> None:
    for what, value in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads), ("head_size", head_size)):
        if not isinstance(value, numbers.Integral):
            raise TypeError(f"{what} is a {type(value).__name__}; expected an integer")
    if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads != 0:
        raise ValueError(f"num_heads is {num_heads} and num_kv_heads {num_kv_heads}; expected a divisor of num_heads")
    if head_size not in HEAD_SIZES:
        raise ValueError(f"head_size is {head_size}; expected one of {', '.join(map(str, HEAD_SIZES))}")


def _check_pages(pages: Any, tokens_per_block: int, kv_cache_dtype: str) -> None:
    if tokens_per_block != _PAGE_SIZE:
        raise ValueError(f"tokens_per_block is {tokens_per_block!r}; expected {_PAGE_SIZE}")
    if kv_cache_dtype not in KV_CACHE_TYPES:
        names = ", ".join(KV_CACHE_TYPES)
        raise ValueError(f"kv_cache_dtype is {kv_cache_dtype!r}; expected one of {names}")
    if pages is None and kv_cache_dtype != "auto":
        raise ValueError(f"kv_cache_dtype is {kv_cache_dtype!r}; expected pages with it")


def _check_context(pages: Any, context_dtype: str, context_scale: Any) -> None:
    if context_dtype not in KV_CACHE_TYPES:
        raise ValueError(f"context_dtype is {context_dtype!r}; expected one of {', '.join(KV_CACHE_TYPES)}")
    if (context_dtype == "auto") != (context_scale is None):
        expected = "no context_scale" if context_dtype == "auto" else "a context_scale"
        raise ValueError(f"context_dtype is {context_dtype!r}; expected {expected} with it")
    if pages is None and context_dtype != "auto":
        raise ValueError(f"context_dtype is {context_dtype!r}; expected pages with it")


def _rotary_dim(given: int | None, head_size: int, position_embedding_type: str, rotary_table: Any) -> int:
    """Return how many elements of a head are rotated; 0 without a rotary embedding."""
    if position_embedding_type not in _POSITION_EMBEDDING_TYPES:
        names = ", ".join(_POSITION_EMBEDDING_TYPES)
        raise ValueError(f"position_embedding_type is {position_embedding_type!r}; expected one of {names}")
    none = rotary_table is None
    if given is None:
        given = 0 if none else head_size
    if given < 0 or given > head_size or given % 2 != 0:
        raise ValueError(f"rotary_embedding_dim is {given}; expected an even number up to head_size, {head_size}")
    if (given == 0) != none:
        expected = "no rotary_table" if given == 0 else "a rotary_table"
        raise ValueError(f"rotary_embedding_dim is {given}; expected {expected} with it")
    if given > 0 and position_embedding_type == "learned_absolute":
        raise ValueError("position_embedding_type is 'learned_absolute'; expected no rotary_table with it")
    return given
