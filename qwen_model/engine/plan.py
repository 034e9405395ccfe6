"""Compute what an engine of a checkpoint would need, without building it."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.config import DTYPES, ModelConfig
from ..checkpoints.module_weights import Formats
from ..common.errors import QwenModelError
from ..common.files import check_readable
from ..interface.engine_config import BACKENDS, KV_CACHE_DTYPES, Limits
from ..interface.memory import GPU_MEMORY_UTILIZATION, PAGE_SIZE, page_bytes, step_bytes, weight_bytes
from ..quantization.formats import chosen_formats
from ..quantization.summary import WeightSummary, weight_summary
from .arguments import check_choice, check_timing_cache, chosen_capabilities, disabled_names, model_folder
from .back_ends import back_end
from .limits import engine_limits

CARDS = (8, 12, 16, 24, 48, 80)
"""Memory of graphics cards, in GB of 10^9 bytes, as their names have it; the driver and CUDA take some of it."""
CONTEXT_BYTES = 600 << 20
"""What a process with CUDA, cuBLASLt and captured steps takes beside weights, cache and activations: an estimate."""


@dataclass(frozen=True)
class MemoryPlan:
    """Say how much device memory an engine needs. Sizes are in bytes.

    dtype: of the engine on a GPU.
    weights: by format and part of the network.
    activations: of the largest step, an estimate.
    token_bytes: of one token in the key-value cache.
    sequences, positions: the sequences that are in the cache at the same time, and the tokens of each.
    dtype_here: the type that `build_engine` would choose on this machine, which may have no GPU; None: it cannot run.
    """

    dtype: str
    weights: WeightSummary
    weight_bytes: int
    activation_bytes: int
    token_bytes: int
    page_bytes: int
    sequences: int
    positions: int
    dtype_here: str | None = None

    @property
    def sequence_bytes(self) -> int:
        """Return the bytes of one sequence in the key-value cache, whose pages are whole."""
        return -(-self.positions // PAGE_SIZE) * self.page_bytes

    @property
    def total_bytes(self) -> int:
        """Return what the GPU must have free: weights, activations, cache, and what CUDA takes."""
        cache = self.sequences * self.sequence_bytes
        return self.weight_bytes + self.activation_bytes + cache + CONTEXT_BYTES

    def sequences_on(self, card_bytes: float) -> int:
        """Return how many sequences of so many positions have room on a card with this memory; 0: not even one."""
        left = card_bytes * GPU_MEMORY_UTILIZATION - self.weight_bytes - self.activation_bytes - CONTEXT_BYTES
        return max(0, int(left // self.sequence_bytes))


def memory_plan(
    model: ModelConfig, limits: Limits, dtype: str, formats: Formats, kv_cache_dtype: str = "auto", sequences: int = 1
) -> MemoryPlan:
    """Compute what an engine with these limits and formats of quantized modules needs.

    sequences: in the cache at the same time, each of `limits.max_positions` tokens.
    """
    page = page_bytes(model, dtype, kv_cache_dtype)
    return MemoryPlan(
        dtype=dtype,
        weights=weight_summary(model, dtype, formats, {}),
        weight_bytes=weight_bytes(model, dtype, formats),
        activation_bytes=step_bytes(model, limits, dtype),
        token_bytes=page // PAGE_SIZE,
        page_bytes=page,
        sequences=sequences,
        positions=limits.max_positions,
    )


def plan_engine(
    model_dir: str | os.PathLike[str] | None = None,
    *,
    backend: str = "torch",
    dtype: str | None = None,
    disable_plugins: Collection[str] = (),
    rmsnorm_plugin: bool | None = None,
    max_batch_size: int | None = None,
    max_input_len: int | None = None,
    max_output_len: int | None = None,
    max_num_tokens: int | None = None,
    kv_cache_dtype: str = "auto",
    quantization: str = "auto",
    group_size: int | None = None,
    symmetric: bool | None = None,
    head_quantization: str | None = None,
    per_token: bool = False,
    per_channel: bool = False,
    alpha: float | str | None = None,
    activation_aware: bool = False,
    calibration: str | os.PathLike[str] | None = None,
    rotary_scaling: Mapping[str, Any] | None = None,
    timing_cache: str | os.PathLike[str] | None = None,
    hardware_compatible: bool = False,
    compute_capabilities: Collection[str] | None = None,
) -> MemoryPlan:
    """Compute what `build_engine` with the same arguments would need on a GPU; only the headers of weights are read.

    Arguments that change nothing about the memory are checked, as `build_engine` does.

    max_batch_size: the sequences that are in the cache at the same time; None: 1, in the engine that None makes.
    dtype: None: the checkpoint's, which engines have on a GPU; see `MemoryPlan.dtype_here`.

    Raises:
        QwenModelError: as `build_engine`.
    """
    check_choice("backend", backend, BACKENDS)
    check_choice("kv_cache_dtype", kv_cache_dtype, KV_CACHE_DTYPES)
    chosen_capabilities(backend, hardware_compatible, compute_capabilities)
    disabled_names(disable_plugins, rmsnorm_plugin, backend)
    check_timing_cache(timing_cache, backend)
    if calibration is not None:
        check_readable(Path(calibration))
    source = model_folder(model_dir)
    model = ModelConfig.from_model_dir(source).with_rotary_scaling(rotary_scaling)
    limits = engine_limits(model, max_batch_size, max_input_len, max_output_len, max_num_tokens)
    checkpoint = Checkpoint(source, "torch" if importlib.util.find_spec("torch") else "numpy")
    checkpoint.check(model)
    checkpoint_dtype = model.dtype or checkpoint.dtype
    chosen = dtype or checkpoint_dtype
    check_choice("dtype", chosen, DTYPES)
    formats = chosen_formats(
        checkpoint,
        model,
        chosen,
        quantization,
        group_size,
        symmetric,
        head_quantization,
        per_token=per_token,
        per_channel=per_channel,
        alpha=alpha,
        activation_aware=activation_aware,
        calibration=calibration,
    )
    plan = memory_plan(model, limits, chosen, formats, kv_cache_dtype, max_batch_size or 1)
    return dataclasses.replace(plan, dtype_here=dtype or _dtype_here(backend, checkpoint_dtype))


def _dtype_here(backend: str, checkpoint_dtype: str) -> str | None:
    try:
        return back_end(backend).default_dtype(checkpoint_dtype)
    except QwenModelError:  # not installed: a plan needs no more than the checkpoint
        return None


def fitting_cards(plan: MemoryPlan, cards: Iterable[int] = CARDS) -> Mapping[int, int]:
    """Return how many sequences of the plan's length have room on each card, by its memory in GB."""
    return {card: plan.sequences_on(card * 1e9) for card in cards}
