"""Compute how much device memory an engine needs, and how many pages its key-value cache gets.

`gpu_memory_utilization` is the part of a GPU's memory that may be in use once the engine is loaded, whoever uses it:
the cache gets what is left of that part after the weights and what steps need.
"""

from __future__ import annotations

import math

from ..checkpoints.config import ModelConfig
from ..checkpoints.module_weights import NOT_QUANTIZED, Formats
from ..checkpoints.weights import WeightSpec, weight_groups
from ..common.errors import OutOfMemoryError, QwenModelError
from .engine_config import Limits

ITEM_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "int32": 4, "uint8": 1, "int8": 1}
PAGE_SIZE = 64
"""Positions of a page of the key-value cache."""
GPU_MEMORY_UTILIZATION = 0.9


def block_bytes(head_size: int, item_size: int, kv_cache_dtype: str) -> int:
    """Return the bytes of the keys, or the values, of one head in a page.

    item_size: bytes of a number where `kv_cache_dtype` is "auto"; 8-bit codes are followed by a float32 for each token.
    """
    return PAGE_SIZE * (head_size * item_size if kv_cache_dtype == "auto" else head_size + 4)


def page_bytes(config: ModelConfig, dtype: str, kv_cache_dtype: str = "auto") -> int:
    """Return the bytes of one page of every layer."""
    blocks = 2 * config.num_layers * config.num_kv_heads
    return blocks * block_bytes(config.head_size, ITEM_SIZES[dtype], kv_cache_dtype)


def sequence_pages(limits: Limits) -> int:
    """Return the pages of a sequence of `max_positions` tokens."""
    return -(-limits.max_positions // PAGE_SIZE)


def most_pages(limits: Limits) -> int:
    """Return the most pages that can be in use: those of all sequences, and `UNUSED_PAGE`."""
    return limits.max_batch_size * sequence_pages(limits) + 1


def weight_bytes(config: ModelConfig, dtype: str, formats: Formats = NOT_QUANTIZED) -> int:
    """Return the bytes of the weights. formats: of the quantized modules."""
    specs = (spec for group in weight_groups(config, dtype, formats) for spec in group.specs)
    return sum(spec_bytes(spec) for spec in specs)


def spec_bytes(spec: WeightSpec) -> int:
    """Return the bytes of a tensor in an engine."""
    return math.prod(spec.shape) * ITEM_SIZES[spec.dtype]


def step_bytes(config: ModelConfig, limits: Limits, dtype: str) -> int:
    """Estimate the bytes of the largest step's activations: those of the MLP, the residual, and logits."""
    columns = 3 * config.intermediate_size + 3 * config.hidden_size
    logits = limits.max_batch_size * config.vocab_size * (ITEM_SIZES[dtype] + 4)
    return limits.step_tokens * columns * ITEM_SIZES[dtype] + logits


def pool_pages(config: ModelConfig, limits: Limits, dtype: str, kv_cache_dtype: str, available: float) -> int:
    """Return how many pages a cache has for which so many bytes are available: no more than can be used.

    Raises:
        OutOfMemoryError: they do not hold one sequence of `max_positions` tokens.
    """
    size, least = page_bytes(config, dtype, kv_cache_dtype), sequence_pages(limits) + 1
    pages = min(int(available // size), most_pages(limits))
    if pages < least:
        gib = 2.0**30
        raise OutOfMemoryError(
            f"the key-value cache has {max(available, 0.0) / gib:.2f} GiB, and one sequence of {limits.max_positions} "
            f"tokens needs {least * size / gib:.2f} GiB: give a larger --gpu-memory-utilization, or build with a "
            "smaller --max-input-len, --max-output-len, --max-num-tokens or --max-batch-size, or with --kv-cache-dtype"
        )
    return pages


def check_utilization(value: object) -> None:
    """Raise QwenModelError if it is not a part of the GPU's memory."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise QwenModelError(f"gpu_memory_utilization must be a number above 0 and at most 1, not {value!r}")
