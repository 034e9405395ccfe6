"""Compute how much device memory an engine needs."""

from __future__ import annotations

import math

from ..checkpoints.config import ModelConfig
from ..checkpoints.weights import weight_groups
from .engine_config import Limits

ITEM_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4}


def required_bytes(config: ModelConfig, limits: Limits, dtype: str) -> tuple[int, int]:
    """Return the bytes of the weights, and those of the key-value cache."""
    cached = 2 * config.num_layers * config.num_kv_heads * config.head_size * limits.max_positions
    return weight_bytes(config, dtype), cached * limits.max_batch_size * ITEM_SIZES[dtype]


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """Return the bytes of the weights."""
    specs = (spec for group in weight_groups(config, dtype) for spec in group.specs)
    return sum(math.prod(spec.shape) * ITEM_SIZES[spec.dtype] for spec in specs)
