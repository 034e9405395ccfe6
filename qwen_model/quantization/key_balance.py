"""Keep the keys of a head of one size, so that int8 codes with one scale do not round the small ones away.

Qwen2 and Qwen2.5 have key biases of some hundreds in a few channels, beside numbers of a few units. Such a channel of
the keys is divided by s, and that of the queries that meet it multiplied by s: attention's scores stay what they were.
s is a power of two, so no number of the weights is rounded but the smallest of float16, and the same for both channels
of a pair that the rotary embedding turns together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.config import ModelConfig
from ..checkpoints.module_weights import WeightFormat
from ..checkpoints.tensor_files import as_numpy
from ..checkpoints.weights import weight_groups

Floats = npt.NDArray[np.float32]

USUAL_KEY = 4.0
"""Keys without a bias are a few units: channels with larger biases are divided until these are no larger than this."""


def key_factors(
    checkpoint: Checkpoint, model: ModelConfig, formats: Mapping[str, WeightFormat]
) -> tuple[dict[str, Floats], float]:
    """Return what the rows of the projections to q, k and v are multiplied by, [out] for each module that needs it.

    Also the largest bias of keys in a module that cannot have factors, 0 if there is none: its weight has scales for
    blocks of rows.
    """
    factors, largest = {}, 0.0
    for module, bias in _biases(checkpoint, model):
        keys = _key_biases(bias, model)
        if np.abs(keys).max() <= USUAL_KEY:
            continue
        weight_format = formats.get(module)
        if weight_format is not None and weight_format.activation is not None and weight_format.group_size:
            largest = max(largest, float(np.abs(keys).max()))
        else:
            factors[module] = row_factors(keys, model, len(bias))
    return factors, largest


def _biases(checkpoint: Checkpoint, model: ModelConfig) -> Iterator[tuple[str, Floats]]:
    """Yield the projections to q, k and v that have a bias and no RMSNorm after it, with their biases."""
    for group in weight_groups(model, "float32"):
        for name, module in group.modules.items():
            normed = name.replace("attention.qkv", "attention.k_norm") in group.modules
            if name.endswith(".attention.qkv") and module.bias is not None and not normed:
                yield name, as_numpy(checkpoint.read(module.bias)).astype(np.float32)


def _key_biases(bias: Floats, model: ModelConfig) -> Floats:
    """Return the part of the keys, [kv heads, head size]."""
    start = model.num_heads * model.head_size
    return bias[start : start + model.num_kv_heads * model.head_size].reshape(model.num_kv_heads, model.head_size)


def row_factors(keys: Floats, model: ModelConfig, rows: int) -> Floats:
    """Return the factors, [rows], of the projections to q, k and v with these biases of keys, [kv heads, head size]."""
    size = np.abs(keys)
    pairs = size[:, : model.rotary.dim].reshape(model.num_kv_heads, 2, -1)  # channel i turns with i + dim / 2
    pairs[:] = pairs.max(axis=1, keepdims=True)
    scales = np.exp2(np.ceil(np.log2(np.maximum(size / USUAL_KEY, 1.0)))).astype(np.float32)
    queries = np.repeat(scales, model.num_heads // model.num_kv_heads, axis=0)
    found = np.ones(rows, np.float32)
    found[: queries.size] = queries.reshape(-1)
    found[queries.size : queries.size + scales.size] = 1 / scales.reshape(-1)
    return found
