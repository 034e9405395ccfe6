"""Compute how much device memory an engine needs."""

from __future__ import annotations

import math

from ..checkpoints.config import ModelConfig
from ..checkpoints.module_weights import NOT_QUANTIZED, Formats
from ..checkpoints.weights import WeightSpec, weight_groups
from .engine_config import Limits

ITEM_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "int32": 4, "uint8": 1}


def required_bytes(
    config: ModelConfig, limits: Limits, dtype: str, formats: Formats = NOT_QUANTIZED
) -> tuple[int, int]:
    """Return the bytes of the weights, and those of the key-value cache."""
    cached = 2 * config.num_layers * config.num_kv_heads * config.head_size * limits.max_positions
    return weight_bytes(config, dtype, formats), cached * limits.max_batch_size * ITEM_SIZES[dtype]


def weight_bytes(config: ModelConfig, dtype: str, formats: Formats = NOT_QUANTIZED) -> int:
    """Return the bytes of the weights. formats: of the quantized modules."""
    specs = (spec for group in weight_groups(config, dtype, formats) for spec in group.specs)
    return sum(spec_bytes(spec) for spec in specs)


def spec_bytes(spec: WeightSpec) -> int:
    """Return the bytes of a tensor in an engine."""
    return math.prod(spec.shape) * ITEM_SIZES[spec.dtype]
