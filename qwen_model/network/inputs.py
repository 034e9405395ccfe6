"""List the inputs of the network that the plug-ins run: packed tokens, what describes them, and the cache."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..checkpoints.config import ModelConfig
from ..interface.engine_config import Limits
from ..interface.memory import PAGE_SIZE, most_pages, page_bytes, sequence_pages
from .rotary import rotary_table

Shape = tuple[int, ...]
Profile = dict[str, tuple[Shape, Shape, Shape]]
"""The least, the typical and the largest shape of inputs by name: an optimization profile of TensorRT."""
MAX_ELEMENTS = 2**31 - 1
"""The most elements of a tensor in TensorRT 8.6."""
LOGIT_ROWS = 256
"""The most tokens of a chunk in which `prompt_logits` runs a prompt."""


@dataclass(frozen=True)
class Range:
    """Hold the range of an input's first dimension in a profile, and the size that the profile is optimized for."""

    min: int
    opt: int
    max: int


@dataclass(frozen=True)
class NetworkInput:
    """Describe an input: its type, its shape (-1: dynamic), and the range of its first dimension in each profile.

    dtype: "int32", or a floating-point type by its name.
    decode, prefill: in the profile of decode steps and in that of prompts; None: the shape is static.
    """

    dtype: str
    shape: Shape
    decode: Range | None = None
    prefill: Range | None = None


def network_inputs(model: ModelConfig, limits: Limits, dtype: str, kv_cache_dtype: str) -> dict[str, NetworkInput]:
    """Return every input of the network, by name.

    dtype: of the weights.
    kv_cache_dtype: see `EngineConfig`.
    """
    batch, tokens = limits.max_batch_size, limits.step_tokens
    rows = logit_rows(limits)
    each = Range(1, 1, batch)
    sequences = NetworkInput("int32", (-1,), each, each)
    typical = min(limits.max_input_len, tokens)
    inputs = {
        "input_ids": NetworkInput("int32", (-1,), each, Range(1, typical, tokens)),
        "cu_seqlens": NetworkInput("int32", (-1,), Range(2, 2, batch + 1), Range(2, 2, batch + 1)),
        "past_lengths": sequences,
        "pages": NetworkInput("int32", (-1, sequence_pages(limits)), each, each),
        "rotary_offsets": sequences,
        "last_token_ids": NetworkInput("int32", (-1,), each, Range(1, 1, rows)),
        "semaphores": NetworkInput("int32", (batch, model.num_heads)),
    }
    table = rotary_table(model, limits.max_positions)
    table_rows = len(table.values)
    # A prompt table (see RotaryTable.prompt_table) has a row for each token of the step.
    most = max(table_rows, tokens) if model.rotary.scaling == "dynamic" else table_rows
    table_range = (Range(table_rows, table_rows, table_rows), Range(1, table_rows, most))
    inputs["rotary_table"] = NetworkInput("float32", (-1, model.rotary.dim), *table_range)
    if table.query_scale is not None:
        inputs["query_scale"] = NetworkInput("float32", (-1,), *table_range)
    cache = cache_input(model, limits, dtype, kv_cache_dtype)
    return inputs | {f"past_key_value_{layer}": cache for layer in range(model.num_layers)}


def cache_input(model: ModelConfig, limits: Limits, dtype: str, kv_cache_dtype: str) -> NetworkInput:
    """Return the input that the cache of a layer is: pages, as many as fit in memory when the engine is loaded.

    A page of 8-bit elements and their scales is a row of int32: TensorRT would rewrite int8 tensors.
    """
    page: Shape = (2, model.num_kv_heads, PAGE_SIZE, model.head_size)
    if kv_cache_dtype != "auto":
        dtype, page = "int32", (page_bytes(model, dtype, kv_cache_dtype) // model.num_layers // 4,)
    most = min(most_pages(limits), MAX_ELEMENTS // math.prod(page))
    # While TensorRT builds an engine it allocates a tensor of the typical size.
    pages = Range(1, min(2, most), most)
    return NetworkInput(dtype, (-1, *page), pages, pages)


def profile_shapes(inputs: Mapping[str, NetworkInput]) -> tuple[Profile, Profile]:
    """Return the profiles of decode steps and of prompts: the shapes of each input that is not static, by name."""
    decode: Profile = {}
    prefill: Profile = {}
    for name, given in inputs.items():
        for profile, extent in ((decode, given.decode), (prefill, given.prefill)):
            if extent is not None:
                rest = given.shape[1:]
                profile[name] = ((extent.min, *rest), (extent.opt, *rest), (extent.max, *rest))
    return decode, prefill


def logit_rows(limits: Limits) -> int:
    """Return the largest number of rows of logits that one pass through the network computes."""
    return max(limits.max_batch_size, min(limits.max_input_len, LOGIT_ROWS))
