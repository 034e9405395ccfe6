"""Choose an engine's limits from what the user asked for and the length that the model was trained for."""

from __future__ import annotations

import dataclasses

from ..checkpoints.config import ModelConfig
from ..common.errors import QwenModelError
from ..interface.engine_config import Limits


def engine_limits(
    model: ModelConfig,
    max_batch_size: int | None,
    max_input_len: int | None,
    max_output_len: int | None,
    max_num_tokens: int | None = None,
) -> Limits:
    """Return the limits; those not given are the defaults, or less if the model was trained for less.

    Raises:
        QwenModelError: a limit is not positive, or the limits exceed what the model can do.
    """
    asked = {
        "max_batch_size": max_batch_size,
        "max_input_len": max_input_len,
        "max_output_len": max_output_len,
        "max_num_tokens": max_num_tokens,
    }
    limits = dataclasses.replace(Limits(), **{name: value for name, value in asked.items() if value is not None})
    room = usable_positions(model)
    if model.full_attention_length:
        room = min(room, model.full_attention_length)
    if max_input_len is None:
        inputs = room * 2 // 3 if max_output_len is None else room - max_output_len
        limits = _at_most(limits, "max_input_len", inputs, f"{limits.max_output_len} tokens of output", room)
    if max_output_len is None:
        outputs = room - limits.max_input_len
        limits = _at_most(limits, "max_output_len", outputs, f"prompts of {limits.max_input_len} tokens", room)
    if max_num_tokens is None:
        most = limits.max_batch_size * limits.max_input_len
        limits = dataclasses.replace(limits, max_num_tokens=min(limits.max_num_tokens, most))
    if 0 < model.full_attention_length < limits.max_positions:
        raise QwenModelError(
            f"the model attends to sequences of more than {model.full_attention_length} tokens through a sliding "
            "window or chunks (sliding_window, dual_chunk_attention_config), which is not supported: the engine's "
            f"{limits.max_positions} are too many, give a smaller --max-input-len or --max-output-len"
        )
    return limits


def _at_most(limits: Limits, name: str, left: int, taken_by: str, room: int) -> Limits:
    """Lower the limit `name` to the tokens that are left; raise QwenModelError if none are."""
    if left < 1:
        raise QwenModelError(
            f"{taken_by} leave none of the model's {room} for {name}: give smaller ones, or both --max-input-len and "
            "--max-output-len, or a --rotary-scaling"
        )
    return dataclasses.replace(limits, **{name: min(getattr(limits, name), left)})


def usable_positions(model: ModelConfig) -> int:
    """Return the longest sequence, in tokens, that the model was trained for, times the rotary scaling's factor."""
    rotary = model.rotary
    stretched = rotary.original_max_positions * rotary.factor if rotary.scaling != "none" else 0
    return max(model.max_positions, int(stretched))
