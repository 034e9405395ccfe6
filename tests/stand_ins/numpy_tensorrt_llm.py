"""The functions of tensorrt_llm that qwen_model calls, over the NumPy stand-in of TensorRT, by their public signatures.

gpt_attention has the parameters of one version, refuses others, and computes prompts with the rotary embedding that its
arguments describe.
"""

from __future__ import annotations

import enum
import inspect
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np

from tests import stand_ins
from tests.stand_ins import numpy_plugins, numpy_tensorrt

np_bfloat16 = np.dtype("V2", metadata={"dtype": "bfloat16"})
TENSORRT = {"0.9": "10.1.0", "0.11": "10.1.0", "1.2": "10.14.1"}  # 0.9 really comes with 9.3
REQUIRED = (
    *("qkv", "past_key_value", "sequence_length", "host_past_key_value_lengths", "host_max_attention_window_sizes"),
    *("host_sink_token_length", "context_lengths", "cache_indirection", "host_request_types", "layer_idx"),
    *("num_heads", "num_kv_heads", "hidden_size_per_head", "q_scaling"),
)
OPTIONAL = (
    *("rotary_embedding_dim", "rotary_embedding_base", "rotary_embedding_scale_type", "rotary_embedding_scale"),
    *("rotary_embedding_max_positions", "position_embedding_type", "kv_orig_quant_scale", "kv_quant_orig_scale"),
    *("attention_output_orig_quant_scale", "kv_cache_quant_mode", "max_context_length", "mask_type", "alibi_slopes"),
    *("tp_size", "tp_rank", "do_cross_attention", "encoder_input_lengths", "relative_attention_bias", "max_distance"),
    *("host_context_lengths", "qkv_bias", "use_cache"),
)
PAGES = {
    "0.9": ("kv_cache_block_pointers", "host_kv_cache_block_pointers"),
    "0.11": ("kv_cache_block_offsets", "host_kv_cache_block_offsets", "host_kv_cache_pool_pointers"),
}
PAGES["1.2"] = (*PAGES["0.11"], "host_kv_cache_pool_mapping")
PROGRESS = ("host_runtime_perf_knobs", "host_context_progress")
ADDED = {
    "0.9": ("cross_qkv", "cross_qkv_length", "medusa_position_offsets", "medusa_packed_mask"),
    "0.11": ("rotary_cos_sin", "qk_tanh_scale", "rotary_embedding_original_max_positions", "cross_qkv"),
    "1.2": (
        *("rotary_inv_freq", "rotary_cos_sin", "attn_logit_softcapping_scale", "attention_mask", "logn_scaling"),
        *("long_rope_rotary_inv_freq", "long_rope_rotary_cos_sin", "mrope_rotary_cos_sin", "skip_attn", *PROGRESS),
    ),
}
RotaryScalingType = enum.IntEnum("RotaryScalingType", ["none", "linear", "dynamic", "longrope", "llama3"], start=0)
PositionEmbeddingType = enum.IntEnum(
    "PositionEmbeddingType", ["learned_absolute", "rope_gptj", "rope_gpt_neox"], start=0
)


class Tensor:
    """tensorrt_llm's: an ITensor and the layer that made it."""

    def __init__(self, trt_tensor: Any, producer: Any = None) -> None:
        self.trt_tensor, self.producer = trt_tensor, producer

    dtype = property(lambda self: self.trt_tensor.dtype)
    shape = property(lambda self: self.trt_tensor.shape)

    def view(self, shape: Sequence[int]) -> Tensor:
        return added([self], tuple(shape), lambda x: x.reshape(shape))

    def __add__(self, other: Tensor) -> Tensor:
        return added([self, other], self.shape, np.add)

    def __mul__(self, other: Tensor) -> Tensor:
        return added([self, other], self.shape, np.multiply)


class Parameter:
    def __init__(self, value: Tensor) -> None:
        self.value = value


class Network:
    """The network that functions add to, and the version of gpt_attention."""

    def __init__(self, version: str) -> None:
        self.trt_network = numpy_tensorrt.INetworkDefinition(strongly_typed=True)
        self.version = version
        self.attentions: list[dict[str, Any]] = []


def added(inputs: list[Tensor], shape: tuple[int, ...], compute: Any, dtype: Any = None) -> Tensor:
    tensors = [tensor.trt_tensor for tensor in inputs]
    (found,) = {tensor.known_type for tensor in tensors} if dtype is None else {dtype}
    layer = network.trt_network.add(tensors, shape, found, compute)
    return _create_tensor(layer.get_output(0), layer)


def _create_tensor(trt_tensor: Any, producer: Any) -> Tensor:
    assert any(trt_tensor is producer.get_output(i) for i in range(producer.num_outputs))
    producer.name = f"tensorrt_llm's layer {network.trt_network.num_layers}"
    return Tensor(trt_tensor, producer)


def constant(ndarray: np.ndarray) -> Tensor:
    assert ndarray.flags.c_contiguous
    array = ndarray.view(ml_dtypes.bfloat16) if ndarray.dtype == np_bfloat16 else ndarray
    return added([], array.shape, lambda: array, numpy_tensorrt.type_of(array))


def embedding(input: Tensor, weight: Tensor) -> Tensor:
    return added([input, weight], (*input.shape, weight.shape[1]), lambda ids, table: table[ids], weight.dtype)


def matmul(input: Tensor, mat2: Tensor, transa: bool = False, transb: bool = False) -> Tensor:
    assert (transa, transb) == (False, True)
    return added([input, mat2], (input.shape[0], mat2.shape[0]), lambda x, w: x @ w.T)


def silu(input: Tensor) -> Tensor:
    return added([input], input.shape, lambda x: x / (1 + np.exp(-x)))


def split(tensor: Tensor, split_size_or_sections: list[int], dim: int = 0) -> list[Tensor]:
    assert dim == 1
    assert sum(split_size_or_sections) == tensor.shape[1]
    ends = np.cumsum(split_size_or_sections)
    return [
        added([tensor], (tensor.shape[0], size), lambda x, end=end, size=size: x[:, end - size : end])
        for end, size in zip(ends, split_size_or_sections, strict=True)
    ]


def chunk(tensor: Tensor, chunks: int, dim: int = 0) -> list[Tensor]:
    return split(tensor, [tensor.shape[dim] // chunks] * chunks, dim)


def concat(inputs: list[Tensor], dim: int = 0) -> Tensor:
    assert dim == 1
    width = sum(tensor.shape[1] for tensor in inputs)
    return added(inputs, (inputs[0].shape[0], width), lambda *arrays: np.concatenate(arrays, 1))


def gather_last_token_logits(hidden_states: Tensor, last_token_ids: Tensor, remove_input_padding: bool) -> Tensor:
    assert remove_input_padding
    shape = (last_token_ids.shape[0], hidden_states.shape[1])
    return added([hidden_states, last_token_ids], shape, lambda x, ends: x[ends - 1], hidden_states.dtype)


def _gpt_attention(**arguments: Any) -> tuple[Tensor, Tensor | None]:
    given = functional.gpt_attention.__signature__.bind(**arguments).arguments
    pages = [given.get(name) for name in PAGES[network.version]]
    paged = given["past_key_value"] is None
    assert all((page is not None) == paged for page in pages), "pages are given if there is no contiguous cache"
    assert isinstance(given["max_context_length"], int)
    assert all(given[name] is not None for name in REQUIRED if name != "past_key_value")
    needed = ("host_context_lengths", *(PROGRESS if network.version == "1.2" else ()))
    assert all(given[name] is not None for name in needed)
    assert given["position_embedding_type"] == PositionEmbeddingType.rope_gpt_neox
    network.attentions.append(given)
    heads, kv_heads, size = (given[name] for name in ("num_heads", "num_kv_heads", "hidden_size_per_head"))
    tables = [given[name] for name in ("rotary_cos_sin", "rotary_inv_freq") if name in given]

    def compute(qkv: np.ndarray, lengths: np.ndarray, *tables: np.ndarray) -> np.ndarray:
        context = np.empty((len(qkv), heads * size), qkv.dtype)
        for end, length in zip(np.cumsum(lengths), lengths, strict=True):
            positions = np.arange(length)
            tokens = qkv[end - length : end].reshape(length, -1, size)
            q, k, v = np.split(tokens, [heads, heads + kv_heads], axis=1)
            rows = _rotary_rows(given, positions, tables)
            q, k = numpy_plugins.rotate(q, rows), numpy_plugins.rotate(k, rows)
            attended = numpy_plugins.attend(q, k.swapaxes(0, 1), v.swapaxes(0, 1), positions)
            context[end - length : end] = attended.reshape(length, -1)
        return context

    qkv = given["qkv"]
    assert qkv.shape[1] == (heads + 2 * kv_heads) * size
    context = added([qkv, given["context_lengths"], *tables], (qkv.shape[0], heads * size), compute, qkv.dtype)
    return context, None if paged else given["past_key_value"]


def _rotary_rows(given: dict[str, Any], positions: np.ndarray, tables: Sequence[np.ndarray]) -> np.ndarray:
    """Return [positions, dim], cosines before sines: of the table, or, where there is none, by base and scale."""
    dim = given["rotary_embedding_dim"]
    if tables:
        assert tables[0].shape == (1, given["rotary_embedding_max_positions"] * dim)
        pairs = tables[0].reshape(-1, dim // 2, 2)[positions]
        for frequencies in tables[1:]:  # what decode steps use is what the table was made of
            np.testing.assert_allclose(np.cos(positions[:, None] * frequencies), pairs[..., 0], atol=1e-4)
        return np.concatenate([pairs[..., 0], pairs[..., 1]], axis=1)
    assert given["rotary_embedding_scale_type"] in (RotaryScalingType.none, RotaryScalingType.linear)
    angles = positions[:, None] / given["rotary_embedding_base"] ** (np.arange(0, dim, 2) / dim)
    angles = (angles / given["rotary_embedding_scale"]).astype(np.float32)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


def params(version: str, lengths: np.ndarray, layers: int, paged: bool) -> dict[str, types.SimpleNamespace]:
    """Make `AttentionParams` and `KeyValueCacheParams` with the attributes that they have in a version."""

    def numbers(values: Any = 0) -> Tensor:
        return Tensor(numpy_tensorrt.tensor_of(np.atleast_1d(np.asarray(values, np.int32))))

    attention = ("sequence_length", "host_request_types", *(PROGRESS if version == "1.2" else ()))
    cache = ("host_past_key_value_lengths", "host_max_attention_window_sizes", "host_sink_token_length")
    pages = {name: numbers() if paged else None for name in PAGES[version]}
    unused = ("encoder_input_lengths", "encoder_max_input_length", "embed_positions")
    return {
        "attention_params": types.SimpleNamespace(
            **{name: numbers() for name in attention},
            **dict.fromkeys(unused),
            **({"rotary_inv_freq": None} if version == "1.2" else {}),
            context_lengths=numbers(lengths),
            host_context_lengths=numbers(lengths),
            max_context_length=int(lengths.max()),
        ),
        "kv_cache_params": types.SimpleNamespace(
            **{name: numbers() for name in cache},
            **pages,
            cache_indirection=numbers(),
            past_key_value=None if paged else [numbers(layer) for layer in range(layers)],
        ),
    }


def value(tensor: Tensor, inputs: Sequence[Tensor]) -> np.ndarray:
    """Run the network."""
    trt_network = network.trt_network
    given = {layer_input for layer in trt_network.layers for layer_input in layer.inputs if layer_input.is_input}
    assert {known.trt_tensor for known in inputs} <= given
    arrays = {known: known.given for known in given}
    for layer in trt_network.layers:
        layer.run(arrays)
    return arrays[tensor.trt_tensor]


@contextmanager
def installed(version: str) -> Iterator[Network]:
    """Put the stand-ins of TensorRT and of that version of tensorrt_llm in place, and yield a network to add to."""
    global network, functional
    with stand_ins.installed(TENSORRT[version]):
        network = Network(version)
        functional = types.ModuleType("tensorrt_llm.functional")
        names = (Tensor, constant, embedding, matmul, silu, split, chunk, concat, gather_last_token_logits)
        functional.__dict__.update({known.__name__: known for known in (*names, _create_tensor)})
        functional.RotaryScalingType, functional.PositionEmbeddingType = RotaryScalingType, PositionEmbeddingType

        def gpt_attention(**arguments: Any) -> tuple[Tensor, Tensor | None]:
            return _gpt_attention(**arguments)

        keyword = inspect.Parameter.KEYWORD_ONLY
        optional = (*OPTIONAL, *PAGES[version], *ADDED[version])
        gpt_attention.__signature__ = inspect.Signature(
            [
                *(inspect.Parameter(name, keyword) for name in REQUIRED),
                *(inspect.Parameter(name, keyword, default=None) for name in optional),
            ]
        )
        functional.gpt_attention = gpt_attention
        common = types.SimpleNamespace(default_trtnet=lambda: network.trt_network)
        utils = types.SimpleNamespace(np_bfloat16=np_bfloat16)
        package = types.ModuleType("tensorrt_llm")
        package.functional = functional
        modules = {"": package, ".functional": functional, "._common": common, "._utils": utils}
        replaced = {f"tensorrt_llm{name}": module for name, module in modules.items()}
        forget()
        sys.modules.update(replaced)
        try:
            yield network
        finally:
            for name in replaced:
                del sys.modules[name]
            forget()


def forget() -> None:
    """Forget what was imported with another tensorrt_llm."""
    for name in [name for name in sys.modules if name.startswith(OURS)]:
        del sys.modules[name]
    for package in ("qwen_plugins", "qwen_model.backends"):
        vars(sys.modules.get(package, types)).pop("tensorrt_llm", None)


OURS = ("qwen_plugins.tensorrt_llm", "qwen_model.backends.tensorrt_llm")
