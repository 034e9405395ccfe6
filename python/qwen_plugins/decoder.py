"""The decoder's kernels beside the normalisations, for PyTorch tensors on an NVIDIA GPU.

`swiglu`, `rotary_cache` (what comes before attention over prompts) and `decode_attention`. They launch on PyTorch's
current stream, wait for nothing, and can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HEAD_SIZES = (32, 64, 80, 96, 128, 256)


def swiglu(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """silu(gate) · up of `gate_up` [rows, 2 · size], the gate first: [rows, size].

    float32, float16 or bfloat16, computed in float32; rows may be strided, their elements must be contiguous.
    """
    _check_matrix("gate_up", gate_up)
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    _check(gate_up.shape[1] % 2 == 0, f"gate_up must have an even number of columns, not {gate_up.shape[1]}")
    if out is None:
        out = gate_up.new_empty(rows, size)
    _check_output(out, (rows, size), gate_up)
    with _device_of(gate_up) as stream:
        _core().swiglu(
            gate_up=gate_up.data_ptr(),
            y=out.data_ptr(),
            gate_up_row_stride=gate_up.stride(0),
            rows=rows,
            size=size,
            dtype=_data_type(gate_up.dtype),
            stream=stream,
        )
    return out


@dataclass(frozen=True)
class AttentionInputs:
    """What attention takes besides the projections; `rotary_rows` has one entry for each token of the call.

    kv_cache: keys and values of one layer, [sequences, 2, kv_heads, max_positions, head_size], contiguous.
    rotary_table: float32 [rows, rotary_dim], cosines then sines; the rotation is in the NeoX style.
    rotary_rows: int32 [tokens], the row of each token.
    query_scale: float32 [rows], multiplies q; None: 1.
    q_norm, k_norm: [head_size], weights of an RMSNorm of each head before the rotation; None: none.
    """

    num_heads: int
    kv_cache: Tensor
    rotary_table: Tensor
    rotary_rows: Tensor
    query_scale: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    norm_eps: float = 1e-6


def rotary_cache(qkv: Tensor, inputs: AttentionInputs, sequences: Tensor, positions: Tensor) -> None:
    """Normalise and rotate q and k in place, and write k and v to the cache.

    `qkv` is packed, [tokens, (heads + 2 · kv_heads) · head_size]. Token i goes to position `positions[i]` of sequence
    `sequences[i]`: both int32 [tokens], on the device, not checked.
    """
    _check_qkv(qkv, inputs)
    _check_int32("sequences", sequences, len(qkv), qkv)
    _check_int32("positions", positions, len(qkv), qkv)
    with _device_of(qkv) as stream:
        _core().rotary_cache(
            heads=_heads(inputs),
            cache=inputs.kv_cache.data_ptr(),
            max_positions=inputs.kv_cache.shape[3],
            qkv=qkv.data_ptr(),
            qkv_row_stride=qkv.stride(0),
            sequences=sequences.data_ptr(),
            positions=positions.data_ptr(),
            tokens=len(qkv),
            stream=stream,
        )


def decode_attention_workspace(inputs: AttentionInputs) -> Tensor:
    """The workspace for up to as many sequences as the cache has; to be kept from launch to launch."""
    import torch

    count = _core().decode_attention_workspace_bytes(_heads(inputs), inputs.kv_cache.shape[0])
    return torch.zeros(count, dtype=torch.uint8, device=inputs.kv_cache.device)


def decode_attention(
    qkv: Tensor,
    inputs: AttentionInputs,
    past_lengths: Tensor,
    workspace: Tensor,
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
    _check(len(qkv) <= len(cache), f"{len(qkv)} sequences do not fit in a cache of {len(cache)}")
    _check_int32("past_lengths", past_lengths, len(qkv), qkv)
    head_size = cache.shape[4]
    shape = (len(qkv), inputs.num_heads * head_size)
    if out is None:
        out = qkv.new_empty(shape)
    _check_output(out, shape, qkv)
    if len(qkv) == 0:
        return out
    heads = _heads(inputs)
    _check_workspace(workspace, _core().decode_attention_workspace_bytes(heads, len(cache)), qkv)
    with _device_of(qkv) as stream:
        _core().decode_attention(
            heads=heads,
            cache=cache.data_ptr(),
            max_positions=cache.shape[3],
            qkv=qkv.data_ptr(),
            qkv_row_stride=qkv.stride(0),
            context=out.data_ptr(),
            past_lengths=past_lengths.data_ptr(),
            sequences=len(qkv),
            softmax_scale=head_size**-0.5 if softmax_scale is None else softmax_scale,
            workspace=workspace.data_ptr(),
            workspace_sequences=len(cache),
            stream=stream,
        )
    return out


def _core() -> Any:
    from qwen_plugins import _core

    return _core


class _device_of:  # noqa: N801 - used like a function
    """Makes a tensor's device the current one; gives its stream."""

    def __init__(self, tensor: Tensor):
        import torch

        self._guard = torch.cuda.device(tensor.device)

    def __enter__(self) -> int:
        import torch

        self._guard.__enter__()
        return torch.cuda.current_stream().cuda_stream

    def __exit__(self, *error: object) -> None:
        self._guard.__exit__(*error)


def _heads(inputs: AttentionInputs) -> Any:
    cache = inputs.kv_cache
    return _core().AttentionHeads(
        num_heads=inputs.num_heads,
        num_kv_heads=cache.shape[2],
        head_size=cache.shape[4],
        rotary_dim=inputs.rotary_table.shape[1],
        dtype=_data_type(cache.dtype),
        rotary_table=inputs.rotary_table.data_ptr(),
        rotary_rows=inputs.rotary_rows.data_ptr(),
        query_scale=_address(inputs.query_scale),
        q_norm_weight=_address(inputs.q_norm),
        k_norm_weight=_address(inputs.k_norm),
        norm_eps=inputs.norm_eps,
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _data_type(dtype: torch.dtype) -> int:
    """The number of the type in csrc/kernels/data_type.h."""
    numbers = {"torch.float32": 0, "torch.float16": 1, "torch.bfloat16": 7}
    _check(str(dtype) in numbers, f"the type must be float32, float16 or bfloat16, not {dtype}")
    return numbers[str(dtype)]


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_matrix(name: str, tensor: Tensor) -> None:
    _check(tensor.device.type == "cuda", f"{name} must be on an NVIDIA GPU, not on {tensor.device}")
    _check(tensor.dim() == 2, f"{name} must have 2 dimensions, not {tensor.dim()}")
    _check(tensor.shape[1] <= 1 or tensor.stride(1) == 1, f"the rows of {name} must be contiguous")


def _check_output(out: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    same = tuple(out.shape) == shape and out.dtype == like.dtype and out.device == like.device and out.is_contiguous()
    _check(
        same,
        f"out must be contiguous {list(shape)} of {like.dtype} on {like.device}, not {list(out.shape)} of {out.dtype} "
        f"on {out.device} with strides {out.stride()}",
    )


def _check_int32(name: str, tensor: Tensor, length: int, like: Tensor) -> None:
    right = str(tensor.dtype) == "torch.int32" and tuple(tensor.shape) == (length,) and tensor.is_contiguous()
    _check(
        right and tensor.device == like.device,
        f"{name} must be contiguous int32 [{length}] on {like.device}, not {tensor.dtype} {list(tensor.shape)} on "
        f"{tensor.device}",
    )


def _check_workspace(workspace: Tensor, num_bytes: int, like: Tensor) -> None:
    right = str(workspace.dtype) == "torch.uint8" and workspace.is_contiguous() and workspace.device == like.device
    _check(
        right and workspace.numel() >= num_bytes,
        f"workspace must be that of decode_attention_workspace for this cache, {num_bytes} bytes on {like.device}, not "
        f"{workspace.numel()} elements of {workspace.dtype} on {workspace.device}",
    )


def _check_qkv(qkv: Tensor, inputs: AttentionInputs) -> None:
    _check_matrix("qkv", qkv)
    cache, table = inputs.kv_cache, inputs.rotary_table
    _check(
        cache.dim() == 5 and cache.shape[1] == 2, f"kv_cache must be [n, 2, heads, positions, size], not {cache.shape}"
    )
    _check(cache.is_contiguous(), "kv_cache must be contiguous")
    _check(cache.dtype == qkv.dtype and cache.device == qkv.device, "kv_cache must be of the type and device of qkv")
    kv_heads, head_size = cache.shape[2], cache.shape[4]
    _check(head_size in HEAD_SIZES, f"head_size must be one of {HEAD_SIZES}, not {head_size}")
    _check(
        inputs.num_heads % kv_heads == 0, f"{inputs.num_heads} heads are not a multiple of {kv_heads} key-value heads"
    )
    columns = (inputs.num_heads + 2 * kv_heads) * head_size
    _check(qkv.shape[1] == columns, f"qkv must have {columns} columns, not {qkv.shape[1]}")
    _check_int32("rotary_rows", inputs.rotary_rows, len(qkv), qkv)
    right = str(table.dtype) == "torch.float32" and table.dim() == 2 and table.is_contiguous()
    _check(
        right and table.device == qkv.device, "rotary_table must be contiguous float32 [rows, rotary_dim] on the GPU"
    )
    scale = inputs.query_scale
    if scale is not None:
        right = scale.dtype == table.dtype and tuple(scale.shape) == (len(table),) and scale.is_contiguous()
        _check(
            right and scale.device == qkv.device,
            f"query_scale must be contiguous float32 [{len(table)}], as rotary_table has rows, on {qkv.device}, not "
            f"{scale.dtype} {list(scale.shape)} on {scale.device}",
        )
    _check((inputs.q_norm is None) == (inputs.k_norm is None), "q_norm and k_norm go together")
    for name, weight in (("q_norm", inputs.q_norm), ("k_norm", inputs.k_norm)):
        if weight is not None:
            right = tuple(weight.shape) == (head_size,) and weight.dtype == qkv.dtype and weight.device == qkv.device
            _check(right and weight.is_contiguous(), f"{name} must be [{head_size}] of the type and device of qkv")
