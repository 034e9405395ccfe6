"""The plug-ins in NumPy: they compute in float32 and round to their type."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

try:  # with the compiled module, not its stand-in: packing is a function of the host
    from qwen_plugins import quantized
except ModuleNotFoundError:  # it is built for another version of Python
    quantized = None  # type: ignore[assignment]


Arrays = list[np.ndarray]
Shape = tuple[int, ...]
Outputs = list[tuple[Shape, int]]  # -1 for what is not known yet, and the number of the type


def rms_norm(fields: dict[str, Any], inputs: Arrays) -> Arrays:
    x, weight, *residual = inputs
    assert len(residual) == fields["residual"]
    h = x + residual[0] if residual else x
    y = normalise(h, weight, fields["eps"]).astype(x.dtype)
    return [y, h] if residual else [y]


def normalise(h: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    wide = h.astype(np.float32)
    return wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + np.float32(eps)) * weight.astype(np.float32)


def rms_norm_quantization(fields: dict[str, Any], inputs: Arrays) -> Arrays:
    assert fields["smoothing"] == 0
    x, weight, *rest = inputs
    h = x + rest.pop(0) if fields["residual"] else x
    y = normalise(h, weight, fields["eps"])
    found = quantize(fields, [y, *rest])
    return [*found, h] if fields["residual"] else found


def quantize(fields: dict[str, Any], inputs: Arrays) -> Arrays:
    """Return codes as int32, and the scales of rows where none is given."""
    assert fields["int32_output"] == 1
    x, *scale = inputs
    codes, scales = quantized_rows(x.astype(np.float32), KINDS[fields["out_type_id"]], *scale)
    return [codes.view(np.int32), *([] if scale else [scales])]


INT8, FP8 = np.dtype(np.int8), np.dtype(ml_dtypes.float8_e4m3fn)
KINDS = {2: INT8, 6: FP8}  # nvinfer1::DataType
TYPES = {0: np.float32, 1: np.float16, 7: ml_dtypes.bfloat16}
LARGEST = {INT8: np.float32(127), FP8: np.float32(448)}


def quantized_rows(x: np.ndarray, kind: np.dtype, scale: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and scales of x, float32 [rows, columns]; scale: of all rows."""
    largest = LARGEST[kind]
    if scale is None:
        scale = np.maximum(np.abs(x).max(-1, keepdims=True) / largest, np.finfo(np.float32).tiny)
    steps = np.clip(x / scale, -128 if kind == INT8 else -largest, largest)
    return (np.rint(steps) if kind == INT8 else steps).astype(kind), scale


def gemm(fields: dict[str, Any], inputs: Arrays) -> Arrays:
    """Compute a linear layer; with a quantized weight this is version "2", with a quantized x version "3"."""
    if "x_type_id" in fields:
        return eight_bit_gemm(fields, inputs)
    x, weight, *bias = inputs
    if "weight_bits" in fields:
        weight, bias = dequantized(fields, inputs[1:])
    return [activated(fields, x, weight, bias).astype(x.dtype)]


def eight_bit_gemm(fields: dict[str, Any], inputs: Arrays) -> Arrays:
    kind = KINDS[fields["x_type_id"]]
    x, weight, scales, x_scales, *rest = inputs
    x, weight = (np.ascontiguousarray(words).view(kind).astype(np.float32) for words in (x, weight))
    assert weight.shape == (fields["out_features"], fields["in_features"])
    if size := fields["group_size"]:
        scales = scales.repeat(size, 0)[: len(weight)].repeat(size, 1)[:, : weight.shape[1]]
    else:
        assert scales.shape == (len(weight),)
        scales = scales[:, None]
    assert x_scales.shape == ((len(x), 1) if fields["has_per_token_scaling"] else (1,))
    y_scale = rest.pop(0) if fields["quantize_output"] else None
    y = activated(fields, x * x_scales, weight * scales, rest)
    if y_scale is not None:
        return [quantized_rows(y, kind, y_scale)[0].view(np.int32)]
    return [y.astype(TYPES[fields["type_id"]])]


def activated(fields: dict[str, Any], x: np.ndarray, weight: np.ndarray, bias: Arrays) -> np.ndarray:
    """Return y, float32, of a linear layer."""
    assert len(bias) == fields["bias"]
    assert fields["constant_weight"] == 1
    z = x.astype(np.float32) @ weight.astype(np.float32).T
    if bias:
        z = z + bias[0].astype(np.float32)
    if fields["activation"]:
        gate, up = np.split(z, 2, axis=-1)
        z = gate / (1 + np.exp(-gate)) * up
    return z


def dequantized(fields: dict[str, Any], inputs: Arrays) -> tuple[np.ndarray, Arrays]:
    """Return the weight that the inputs of Gemm "2" stand for, and the inputs behind them."""
    codes, scales, *rest = inputs
    scale_dtype = {1: "float16", 7: "bfloat16"}[fields["scale_type_id"]]
    zeros = rest.pop(0).view(np.uint8) if fields["zeros"] else None
    weight_format = quantized.WeightFormat(fields["weight_bits"], fields["group_size"], zeros is not None, scale_dtype)
    packed = quantized.PackedWeight(
        codes, scales.view(scale_dtype), zeros, weight_format, fields["out_features"], fields["in_features"]
    )
    return quantized.dequantize(packed), rest


def gpt_attention(fields: dict[str, Any], inputs: Arrays) -> Arrays:
    """Compute attention; write the new keys and values to the cache in place. With pages this is version "2"."""
    qkv, pool, cu_seqlens, past_lengths, *rest = inputs
    pages = rest.pop(0) if fields.get("tokens_per_block") else None
    offsets = rest.pop(0)
    heads, kv_heads, size = fields["num_heads"], fields["num_kv_heads"], fields["head_size"]
    table = rest.pop(0) if fields["rotary_embedding_dim"] else None
    semaphores = rest.pop(0)
    assert semaphores.shape[0] >= len(past_lengths)
    assert semaphores.shape[1:] == (heads,)
    assert not semaphores.any()
    query_scale = rest.pop(0) if fields["query_scale"] else None
    context_scale = rest.pop() if fields.get("context_type") else None
    norms = rest if fields["qk_norm"] else None
    cache = Cache(pool, pages, kv_heads, size, fields.get("kv_cache_type", 0))
    decoding = len(qkv) == len(past_lengths)
    context_dtype = qkv.dtype if context_scale is None else np.float32
    context = np.zeros((len(qkv), heads, size), context_dtype)  # rows behind the last sequence are padding
    for sequence, past in enumerate(past_lengths):
        start, end = (sequence, sequence + 1) if decoding else cu_seqlens[sequence : sequence + 2]
        tokens = qkv[start:end].reshape(end - start, -1, size)
        q, k, v = np.split(tokens, [heads, heads + kv_heads], axis=1)
        positions = past + np.arange(end - start)
        rows = offsets[sequence] + positions
        for rowed in (table, query_scale):
            assert rowed is None or 0 <= rows.min() <= rows.max() < len(rowed)
        if norms is not None:
            q = normalise(q, norms[0], fields["norm_eps"]).astype(q.dtype)
            k = normalise(k, norms[1], fields["norm_eps"]).astype(k.dtype)
        if table is not None:
            q, k = rotate(q, table[rows]), rotate(k, table[rows])
        if query_scale is not None:
            q = (q.astype(np.float32) * query_scale[rows][:, None, None]).astype(q.dtype)
        cache.write(sequence, positions, k, v)
        keys, values = cache.read(sequence, past + end - start)
        context[start:end] = attend(q, keys, values, positions).astype(context_dtype)
    rows = context.reshape(len(qkv), -1)
    if context_scale is not None:
        rows = quantized_rows(rows, CODES[fields["context_type"]][0], context_scale)[0].view(np.int32)
    return [rows, pool]


PAGE_SIZE = 64
CODES = {1: (np.dtype(np.int8), 127), 2: (np.dtype(ml_dtypes.float8_e4m3fn), 448)}


class Cache:
    """Keys and values of a layer: rows of a cache, or pages of a pool, of floating-point numbers or of 8-bit codes."""

    def __init__(self, pool: np.ndarray, pages: np.ndarray | None, kv_heads: int, head_size: int, kind: int) -> None:
        self.pages = np.arange(len(pool))[:, None] if pages is None else pages
        self.scales: np.ndarray | None = None
        if kind == 0:
            self.rows = pool
            assert pages is None or pool.shape == (len(pool), 2, kv_heads, PAGE_SIZE, head_size)
        else:
            blocks = pool.view(np.uint8).reshape(len(pool), 2, kv_heads, -1)
            count = blocks.shape[-1] // (head_size + 4) * head_size
            codes, self.largest = CODES[kind]
            self.rows = blocks[..., :count].reshape(*blocks.shape[:3], -1, head_size).view(codes)
            self.scales = blocks[..., count:].view(np.float32)
        self.page_size = self.rows.shape[3]

    def write(self, sequence: int, positions: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        page, place = self.pages[sequence, positions // self.page_size], positions % self.page_size
        assert (page >= 0).all()
        assert (page < len(self.rows)).all(), "a page that is not there"
        for kind, new in enumerate((k, v)):  # [tokens, kv_heads, head_size]
            if self.scales is not None:
                new = new.astype(np.float32)
                scales = np.abs(new).max(-1) / np.float32(self.largest)
                self.scales[page, kind, :, place] = scales
                new = new / np.where(scales == 0, np.float32(1), scales)[..., None]
                new = np.rint(new) if self.rows.dtype == np.int8 else new
            self.rows[page, kind, :, place] = new.astype(self.rows.dtype)

    def read(self, sequence: int, length: int) -> np.ndarray:
        """Return float32 [2, kv_heads, length, head_size]."""
        used = self.pages[sequence, : -(-length // self.page_size)]
        found = self.rows[used].astype(np.float32)  # [pages, 2, kv_heads, page_size, head_size]
        if self.scales is not None:
            found *= self.scales[used][..., None]
        found = found.transpose(1, 2, 0, 3, 4)
        return found.reshape(*found.shape[:2], -1, found.shape[-1])[:, :, :length]


def rotate(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    dim = rows.shape[-1]
    cos, sin = np.split(rows[:, None], 2, axis=-1)
    first, second = np.split(x[..., :dim].astype(np.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin, x[..., dim:].astype(np.float32)]
    return np.concatenate(turned, axis=-1).astype(x.dtype)


def attend(q: np.ndarray, keys: np.ndarray, values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Attend with q [tokens, heads, head_size] to [kv_heads, length, head_size]; no token sees those after it."""
    group = q.shape[1] // len(keys)
    keys, values = np.repeat(keys, group, axis=0), np.repeat(values, group, axis=0)
    scores = np.einsum("thd,hld->htl", q.astype(np.float32), keys) / np.sqrt(np.float32(q.shape[-1]))
    scores[:, positions[:, None] < np.arange(keys.shape[1])] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("htl,hld->thd", weights / weights.sum(-1, keepdims=True), values)


PLUGINS: dict[str, Callable[[dict[str, Any], Arrays], Arrays]] = {
    "RmsNorm": rms_norm,
    "RmsNormQuantization": rms_norm_quantization,
    "QuantizePerToken": quantize,
    "QuantizeTensor": quantize,
    "Gemm": gemm,
    "QwenGemm": gemm,
    "GptAttention": gpt_attention,
}


def norm_outputs(fields: dict[str, Any], shapes: list[Shape]) -> Outputs:
    return [(shapes[0], fields["type_id"])] * (1 + fields["residual"])


def norm_quant_outputs(fields: dict[str, Any], shapes: list[Shape]) -> Outputs:
    scales = [row_scales(shapes[0])] if fields["dyn_act_scaling"] else []
    q = words(shapes[0]) if fields.get("int32_output") else (shapes[0], fields["out_type_id"])
    return [q, *scales, *[(shapes[0], fields["type_id"])] * fields["residual"]]


def words(shape: Shape) -> tuple[Shape, int]:
    """The output that codes of this shape are as int32."""
    assert shape[-1] % 4 == 0
    return (*shape[:-1], shape[-1] // 4), 3


def row_scales(shape: Shape) -> tuple[Shape, int]:
    return (*shape[:-1], 1), 0


def gemm_outputs(fields: dict[str, Any], shapes: list[Shape]) -> Outputs:
    out_features = fields.get("out_features", shapes[1][0])
    shape = (*shapes[0][:-1], out_features // (2 if fields["activation"] else 1))
    return [words(shape) if fields.get("quantize_output") else (shape, fields["type_id"])]


def attention_outputs(fields: dict[str, Any], shapes: list[Shape]) -> Outputs:
    context = (shapes[0][0], fields["num_heads"] * fields["head_size"])
    cache_type = 3 if fields.get("kv_cache_type") else fields["type_id"]
    return [words(context) if fields.get("context_type") else (context, fields["type_id"]), (shapes[1], cache_type)]


PLUGIN_OUTPUTS: dict[str, Callable[[dict[str, Any], list[Shape]], Outputs]] = {
    "RmsNorm": norm_outputs,
    "RmsNormQuantization": norm_quant_outputs,
    "QuantizePerToken": lambda fields, shapes: [words(shapes[0]), row_scales(shapes[0])],
    "QuantizeTensor": lambda fields, shapes: [words(shapes[0])],
    "Gemm": gemm_outputs,
    "QwenGemm": gemm_outputs,
    "GptAttention": attention_outputs,
}
