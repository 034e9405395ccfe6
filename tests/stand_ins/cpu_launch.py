"""qwen_plugins.launch in NumPy for float32 on a CPU: what `KernelOperations` calls, on addresses of the process.

Rows of codes have another type than x; their numbers are int8 or e4m3, as a layer's `weight_format` says.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from qwen_model.interface.memory import PAGE_SIZE
from tests.stand_ins import numpy_plugins

STREAM = 7
DataType = SimpleNamespace(__members__={name: name for name in ("float32", "int8", "float8_e4m3fn")})
Activation = SimpleNamespace(none="none", swiglu="swiglu")
RotaryStyle = SimpleNamespace(neox="neox")
CacheDataType = SimpleNamespace(__members__={"same": "same"})


def view(address: int, *shape: int, dtype: type = np.float32) -> np.ndarray:
    count = int(np.prod(shape))
    memory = (ctypes.c_byte * (count * np.dtype(dtype).itemsize)).from_address(address)
    return np.frombuffer(memory, dtype).reshape(shape)


CODES = {"int8": numpy_plugins.INT8, "float8_e4m3fn": numpy_plugins.FP8}
BYTES = {"float32": np.float32, "int8": np.uint8, "float8_e4m3fn": np.uint8}


def rows_of(address: int, rows: int, columns: int, stride: int) -> np.ndarray:
    return view(address, rows, stride)[:, :columns]


@dataclass
class WeightFormat:
    """As x, or codes of 8 bits as x has them: "int8" or "float8_e4m3fn"; group_size 128: in blocks."""

    codes: str = ""
    group_size: int = 0

    def for_launch(self) -> "WeightFormat":
        return self


def kernel_format(weight_format: Any) -> WeightFormat:
    """In the place of the function of qwen_model/interface/weight_formats.py."""
    codes = {None: "", "int8": "int8", "fp8": "float8_e4m3fn"}[weight_format.activation]
    return WeightFormat(codes, weight_format.group_size)


@dataclass(kw_only=True)
class LinearLayer:
    weight: int
    weight_format: WeightFormat
    scales: int
    zeros: int
    bias: int
    in_features: int
    out_features: int
    activation: str
    dtype: str
    constant_weight: bool
    kernels: Sequence[tuple[int, str]]
    input_scale: int = 0
    output_scale: int = 0

    @property
    def columns(self) -> int:
        return self.out_features // (2 if self.activation == "swiglu" else 1)

    def workspace_bytes(self, rows: int) -> int:
        return 0 if rows < 4 else 16 * rows


def gemm(
    layer: LinearLayer, *, x: int, x_row_stride: int, y: int, rows: int, workspace: int, stream: int, x_scales: int = 0
) -> None:
    assert stream == STREAM
    assert layer.dtype == "float32"
    assert layer.constant_weight
    assert layer.zeros == 0
    if layer.workspace_bytes(rows):
        view(workspace, layer.workspace_bytes(rows), dtype=np.uint8)[:] = 0xFF
    if layer.weight_format.codes:
        inputs = _scaled_operands(layer, x, x_row_stride, rows, x_scales)
    else:
        assert layer.scales == x_scales == layer.output_scale == 0
        weight = view(layer.weight, layer.out_features, layer.in_features)
        inputs = [rows_of(x, rows, layer.in_features, x_row_stride), weight]
    inputs += [view(layer.bias, layer.out_features)] if layer.bias else []
    fields = {"bias": int(layer.bias != 0), "activation": int(layer.activation == "swiglu"), "constant_weight": 1}
    result = numpy_plugins.gemm(fields, inputs)[0]
    if layer.output_scale:
        _write_codes(result, y, layer.weight_format.codes, layer.output_scale, 0)
    else:
        view(y, rows, layer.columns)[:] = result


def _scaled_operands(layer: LinearLayer, x: int, stride: int, rows: int, x_scales: int) -> list[np.ndarray]:
    dtype, size = CODES[layer.weight_format.codes], layer.weight_format.group_size
    codes = view(layer.weight, layer.out_features, layer.in_features, dtype=dtype).astype(np.float32)
    if size:
        blocks = [-(-extent // size) for extent in codes.shape]
        scales = view(layer.scales, *blocks).repeat(size, 0)[: len(codes)].repeat(size, 1)[:, : layer.in_features]
    else:
        scales = view(layer.scales, layer.out_features, 1)
    assert (x_scales == layer.input_scale) if layer.input_scale else x_scales
    of_x = view(layer.input_scale, 1) if layer.input_scale else view(x_scales, rows, 1)
    assert stride == layer.in_features
    return [view(x, rows, layer.in_features, dtype=dtype).astype(np.float32) * of_x, codes * scales]


def _write_codes(numbers: np.ndarray, q: int, quant_dtype: str, static_scale: int, scales: int) -> None:
    assert (static_scale == 0) != (scales == 0)
    dtype = CODES[quant_dtype]
    codes, of_rows = numpy_plugins.quantized_rows(numbers, dtype, view(static_scale, 1) if static_scale else None)
    view(q, *numbers.shape, dtype=dtype)[:] = codes
    if scales:
        view(scales, len(numbers), 1)[:] = of_rows


def quantize(
    *,
    x: int,
    x_row_stride: int,
    q: int,
    rows: int,
    columns: int,
    dtype: str,
    quant_dtype: str,
    static_scale: int,
    scales: int,
    stream: int,
) -> None:
    assert stream == STREAM
    assert dtype == "float32"
    _write_codes(rows_of(x, rows, columns, x_row_stride), q, quant_dtype, static_scale, scales)


@dataclass(kw_only=True)
class RmsNormLayer:
    weight: int
    hidden_size: int
    dtype: str
    weight_dtype: str
    eps: float
    unit_offset: bool
    batch_invariant: bool = False


def rms_norm(layer: RmsNormLayer, *, y: int, rows: int, **operands: int) -> None:
    view(y, rows, layer.hidden_size)[:] = _norm(layer, rows=rows, **operands)


def rms_norm_quant(
    layer: RmsNormLayer, *, q: int, quant_dtype: str, static_scale: int, scales: int, **operands: int
) -> None:
    _write_codes(_norm(layer, **operands), q, quant_dtype, static_scale, scales)


def _norm(layer: RmsNormLayer, *, x: int, residual: int, residual_out: int, rows: int, stream: int) -> np.ndarray:
    assert stream == STREAM
    assert layer.dtype == layer.weight_dtype == "float32"
    assert not layer.unit_offset
    size = layer.hidden_size
    inputs = [view(x, rows, size), view(layer.weight, size)]
    inputs += [view(residual, rows, size)] if residual else []
    outputs = numpy_plugins.rms_norm({"eps": layer.eps, "residual": int(residual != 0)}, inputs)
    if residual:
        view(residual_out, rows, size)[:] = outputs[1]
    return outputs[0]


def gather_rows(
    *, table: int, ids: int, y: int, table_rows: int, row_size: int, rows: int, dtype: str, stream: int
) -> None:
    assert stream == STREAM
    gathered = view(table, table_rows, row_size, dtype=BYTES[dtype])[view(ids, rows, dtype=np.int32)]
    view(y, rows, row_size, dtype=BYTES[dtype])[:] = gathered


@dataclass(kw_only=True)
class AttentionHeads:
    num_heads: int
    num_kv_heads: int
    head_size: int
    rotary_dim: int
    dtype: str
    rotary_table: int
    rotary_offsets: int
    rotary_style: str
    query_scale: int
    q_norm_weight: int
    k_norm_weight: int
    norm_eps: float


def prefill_attention(*, cu_seqlens: int, tokens: int, past_lengths: int, sequences: int, **operands: Any) -> None:
    bounds = view(cu_seqlens, sequences + 1, dtype=np.int32)
    assert bounds[-1] == tokens
    assert ("queries" in operands) == ("context_scale" in operands)
    if queries := operands.pop("queries", 0):
        columns = operands["heads"].num_heads * operands["heads"].head_size
        view(queries, tokens, columns)[:] = np.nan  # scratch
    run_attention(bounds, view(past_lengths, sequences, dtype=np.int32), **operands)


def decode_attention_workspace_bytes(heads: AttentionHeads, *, sequences: int) -> int:
    return 16 * sequences


def decode_attention(
    *,
    past_lengths: int,
    sequences: int,
    workspace: int,
    semaphores: int,
    heads: AttentionHeads,
    batch_invariant: bool,
    **operands: Any,
) -> None:
    view(workspace, decode_attention_workspace_bytes(heads, sequences=sequences), dtype=np.uint8)[:] = 0xFF
    assert not view(semaphores, sequences, heads.num_heads, dtype=np.int32).any()
    bounds = np.arange(sequences + 1, dtype=np.int32)
    run_attention(bounds, view(past_lengths, sequences, dtype=np.int32), heads=heads, **operands)


def run_attention(
    bounds: np.ndarray,
    past: np.ndarray,
    *,
    heads: AttentionHeads,
    cache: int,
    cache_dtype: str,
    max_positions: int,
    pages: int,
    pages_row_stride: int,
    qkv: int,
    qkv_row_stride: int,
    context: int,
    softmax_scale: float,
    stream: int,
    context_dtype: str = "",
    context_scale: int = 0,
) -> None:
    assert stream == STREAM
    assert cache_dtype == "same"
    assert max_positions == PAGE_SIZE
    numbers = view(pages, len(past), pages_row_stride, dtype=np.int32)
    memory = view(cache, int(numbers.max()) + 1, 2, heads.num_kv_heads, PAGE_SIZE, heads.head_size)
    # [sequences, pages, 2, kv_heads, PAGE_SIZE, size] and, contiguous, [sequences, 2, kv_heads, positions, size].
    gathered = memory[numbers].transpose(0, 2, 3, 1, 4, 5)
    contiguous = np.ascontiguousarray(gathered).reshape(len(past), 2, heads.num_kv_heads, -1, heads.head_size)
    found = _attend(bounds, past, heads, contiguous, qkv, qkv_row_stride, softmax_scale)
    if context_scale:
        _write_codes(found, context, context_dtype, context_scale, 0)
    else:
        view(context, *found.shape)[:] = found
    written = contiguous.reshape(gathered.shape).transpose(0, 3, 1, 2, 4, 5)
    for sequence, (first, end) in enumerate(zip(past, past + np.diff(bounds), strict=True)):
        used = slice(first // PAGE_SIZE, (end - 1) // PAGE_SIZE + 1)
        memory[numbers[sequence, used]] = written[sequence, used]


def _attend(
    bounds: np.ndarray,
    past: np.ndarray,
    heads: AttentionHeads,
    cache: np.ndarray,
    qkv: int,
    qkv_row_stride: int,
    softmax_scale: float,
) -> np.ndarray:
    assert heads.dtype == "float32"
    assert heads.rotary_style == "neox"
    assert np.isclose(softmax_scale, heads.head_size**-0.5)
    offsets = view(heads.rotary_offsets, len(past), dtype=np.int32)
    table_rows = int((offsets + past + np.diff(bounds)).max())
    size = heads.head_size
    columns = (heads.num_heads + 2 * heads.num_kv_heads) * size
    inputs = [
        rows_of(qkv, int(bounds[-1]), columns, qkv_row_stride),
        cache,
        bounds,
        past,
        offsets,
        *([view(heads.rotary_table, table_rows, heads.rotary_dim)] if heads.rotary_dim else []),
        np.zeros((len(past), heads.num_heads), np.int32),
        *([view(heads.query_scale, table_rows)] if heads.query_scale else []),
        *([view(heads.q_norm_weight, size), view(heads.k_norm_weight, size)] if heads.q_norm_weight else []),
    ]
    fields = {
        "num_heads": heads.num_heads,
        "num_kv_heads": heads.num_kv_heads,
        "head_size": size,
        "rotary_embedding_dim": heads.rotary_dim,
        "query_scale": int(heads.query_scale != 0),
        "qk_norm": int(heads.q_norm_weight != 0),
        "norm_eps": heads.norm_eps,
    }
    return numpy_plugins.gpt_attention(fields, inputs)[0]
