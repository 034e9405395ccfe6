"""List the inputs of the network that the plug-ins run: packed tokens, what describes them, and the cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..checkpoints.config import ModelConfig
from ..interface.engine_config import Limits
from .rotary import rotary_table

Shape = tuple[int, ...]
Profile = dict[str, tuple[Shape, Shape, Shape]]
"""The least, the typical and the largest shape of inputs by name: an optimization profile of TensorRT."""
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


def network_inputs(model: ModelConfig, limits: Limits, dtype: str) -> dict[str, NetworkInput]:
    """Return every input of the network, by name; `dtype` is that of the weights and the cache."""
    batch, tokens = limits.max_batch_size, limits.max_batch_size * limits.max_input_len
    rows = logit_rows(limits)
    sequences = NetworkInput("int32", (-1,), Range(1, 1, batch), Range(1, 1, batch))
    inputs = {
        "input_ids": NetworkInput("int32", (-1,), Range(1, 1, batch), Range(1, limits.max_input_len, tokens)),
        "cu_seqlens": NetworkInput("int32", (-1,), Range(2, 2, batch + 1), Range(2, 2, batch + 1)),
        "past_lengths": sequences,
        "rotary_offsets": sequences,
        "last_token_ids": NetworkInput("int32", (-1,), Range(1, 1, batch), Range(1, 1, rows)),
        "semaphores": NetworkInput("int32", (batch, model.num_heads)),
    }
    table = rotary_table(model, limits.max_positions)
    table_rows = len(table.values)
    # A prompt table (see RotaryTable.prompt_table) has a row for each token of the prompts.
    most = max(table_rows, tokens) if model.rotary.scaling == "dynamic" else table_rows
    table_range = (Range(table_rows, table_rows, table_rows), Range(1, table_rows, most))
    inputs["rotary_table"] = NetworkInput("float32", (-1, model.rotary.dim), *table_range)
    if table.query_scale is not None:
        inputs["query_scale"] = NetworkInput("float32", (-1,), *table_range)
    cache = (batch, 2, model.num_kv_heads, limits.max_positions, model.head_size)
    for layer in range(model.num_layers):
        inputs[f"past_key_value_{layer}"] = NetworkInput(dtype, cache)
    return inputs


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
