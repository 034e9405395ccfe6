"""Compute cosines and sines of the rotary embedding for every kind of scaling, in NumPy, for all back ends.

Su et al., "RoFormer" (2021). The scalings are those of transformers' `modeling_rope_utils` (linear, dynamic NTK,
Llama 3, YaRN) and of Qwen v1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from ..checkpoints.config import ModelConfig
from ..checkpoints.rotary_config import RotaryConfig

FloatArray = npt.NDArray[np.float32]
Lengths = Sequence[int] | npt.NDArray[np.int32]


def inverse_frequencies(rotary: RotaryConfig, length: int = 0) -> FloatArray:
    """Return the rotation of each pair of elements in radians per position, float32 [dim / 2].

    length: of the sequence in tokens; only the two dynamic scalings depend on it.
    """
    base = rotary.base
    if rotary.scaling == "dynamic":
        stretch = max(length, rotary.original_max_positions) / rotary.original_max_positions
        base *= (rotary.factor * stretch - (rotary.factor - 1)) ** (rotary.dim / (rotary.dim - 2))
    elif rotary.scaling == "qwen_dynamic":
        base *= qwen_ntk_alpha(length, rotary.original_max_positions) ** (rotary.dim / (rotary.dim - 2))
    exponents = np.arange(0, rotary.dim, 2, dtype=np.float32) / np.float32(rotary.dim)
    frequencies: FloatArray = (np.float32(1.0) / np.float32(base) ** exponents).astype(np.float32)
    if rotary.scaling == "linear":
        return frequencies / np.float32(rotary.factor)
    if rotary.scaling == "llama3":
        return _llama3(frequencies, rotary)
    if rotary.scaling == "yarn":
        return _yarn(frequencies, rotary)
    return frequencies


def rotary_stretch(rotary: RotaryConfig, prompt_length: int) -> int:
    """Return a number that is equal for prompts whose tokens are rotated by equal angles."""
    if rotary.scaling == "qwen_dynamic":
        return qwen_ntk_alpha(prompt_length, rotary.original_max_positions)
    if rotary.scaling == "dynamic":
        return max(prompt_length, rotary.original_max_positions)
    return 1


def qwen_ntk_alpha(length: int, trained_length: int) -> int:
    """Return Qwen v1's alpha, which scales the base by alpha ** (dim / (dim - 2)).

    It is 1 up to the trained length, then 3, 7, 15, ...
    """
    if length <= trained_length:
        return 1
    return int(2 ** math.ceil(math.log2(length / trained_length) + 1) - 1)


def _llama3(frequencies: FloatArray, rotary: RotaryConfig) -> FloatArray:
    """Scale as Llama 3 does: divide low frequencies by the factor, keep high ones, interpolate between."""
    turns = rotary.original_max_positions * frequencies / np.float32(2 * math.pi)  # over the trained length
    smooth = (turns - rotary.low_freq_factor) / (rotary.high_freq_factor - rotary.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return ((1 - smooth) * frequencies / rotary.factor + smooth * frequencies).astype(np.float32)


def _yarn(frequencies: FloatArray, rotary: RotaryConfig) -> FloatArray:
    """Scale as YaRN does (Peng et al., 2023, section 3.2), interpolating over the index of the dimension."""

    def dimension_that_turns(times: float) -> float:
        trained = rotary.original_max_positions
        return rotary.dim * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(rotary.base))

    low, high = dimension_that_turns(rotary.beta_fast), dimension_that_turns(rotary.beta_slow)
    if rotary.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary.dim - 1)
    ramp = (np.arange(rotary.dim // 2, dtype=np.float32) - low) / max(high - low, 0.001)
    scaled = np.clip(ramp, 0.0, 1.0)  # 0: kept, 1: divided by the factor
    return (frequencies / rotary.factor * scaled + frequencies * (1 - scaled)).astype(np.float32)


def cos_sin(positions: npt.NDArray[np.integer], frequencies: FloatArray, attention_factor: float = 1.0) -> FloatArray:
    """Return float32 [positions, dim]: the cosines of each position, then its sines."""
    angles = positions.astype(np.float32)[:, None] * frequencies
    table: FloatArray = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    return table * np.float32(attention_factor)


@dataclass(frozen=True)
class PromptTable:
    """Hold the rows of one step's tokens: position p of sequence i has row `starts[i] + p`."""

    values: FloatArray  # [tokens, dim]: cosines, then sines
    query_scale: FloatArray | None  # [tokens]
    starts: list[int]  # negative where the step begins late in a sequence


@dataclass(frozen=True)
class RotaryTable:
    """Hold cosines and sines for an engine's positions: a token at position p of a sequence uses row `offset + p`.

    The offset depends on the prompt's length alone. Qwen v1 fixes the stretch of the base when it sees the prompt, so
    there is one block of rows for each stretch that can occur. Dynamic NTK as in transformers computes the base
    anew at each step from the present length: the row of position p is that of length p + 1, and only a prompt longer
    than the trained length needs rows of its own (`prompt_table`).
    """

    config: ModelConfig
    max_positions: int
    values: FloatArray  # [rows, dim]: cosines, then sines
    query_scale: FloatArray | None  # [rows]: Qwen v1's logn, which multiplies q

    def offset(self, prompt_length: int) -> int:
        """Return the first row for a sequence whose prompt has this many tokens."""
        rotary = self.config.rotary
        if rotary.scaling != "qwen_dynamic":
            return 0
        alpha = qwen_ntk_alpha(prompt_length, rotary.original_max_positions)
        return (alpha.bit_length() - 1) * self.max_positions

    def offsets(self, prompt_lengths: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Return `offset` of each length."""
        return self._offsets[prompt_lengths]

    @cached_property
    def _offsets(self) -> npt.NDArray[np.int32]:
        return np.array([self.offset(length) for length in range(self.max_positions + 1)], np.int32)

    def prompt_table(self, lengths: Lengths, past_lengths: Lengths, prompt_lengths: Lengths) -> PromptTable | None:
        """Return a table for one step alone if a token of it needs another row than `values` has, else None.

        lengths: new tokens of each sequence.
        past_lengths: tokens of each before these.
        prompt_lengths: of the whole prompts, whose tokens need other rows than tokens generated at their positions.
        """
        rotary = self.config.rotary
        if (
            rotary.scaling != "dynamic"
            or not (np.asarray(prompt_lengths) > np.maximum(past_lengths, rotary.original_max_positions)).any()
        ):
            return None
        spans = [
            (int(past), int(past + length), int(prompt))
            for length, past, prompt in zip(lengths, past_lengths, prompt_lengths, strict=True)
        ]
        values = np.concatenate([self._prompt_rows(*span) for span in spans])
        scale = self.query_scale
        scales = None if scale is None else np.concatenate([scale[first:end] for first, end, _ in spans])
        begins = accumulate((end - first for first, end, _ in spans), initial=0)
        return PromptTable(values, scales, [begin - first for begin, (first, _, _) in zip(begins, spans, strict=False)])

    def _prompt_rows(self, first: int, end: int, prompt_length: int) -> FloatArray:
        """Return the rows of positions from `first` up to `end` of one sequence under dynamic NTK: [positions, dim]."""
        rotary = self.config.rotary
        rows = self.values[first:end]
        if prompt_length <= rotary.original_max_positions:
            return rows
        of_prompt = np.arange(first, min(end, prompt_length))
        frequencies = inverse_frequencies(rotary, prompt_length)
        return np.concatenate([cos_sin(of_prompt, frequencies), rows[len(of_prompt) :]])


def rotary_table(config: ModelConfig, max_positions: int) -> RotaryTable:
    """Compute the table for sequences of up to `max_positions` tokens."""
    rotary = config.rotary
    positions = np.arange(max_positions)
    if rotary.scaling == "qwen_dynamic":
        trained = rotary.original_max_positions
        stretches = qwen_ntk_alpha(max_positions, trained).bit_length()
        lengths = [trained * 2**power for power in range(stretches)]
        blocks = [cos_sin(positions, inverse_frequencies(rotary, length)) for length in lengths]
        values = np.concatenate(blocks)
    else:
        values = cos_sin(positions, inverse_frequencies(rotary), rotary.attention_factor)
        if rotary.scaling == "dynamic":
            for position in range(rotary.original_max_positions, max_positions):
                values[position] = cos_sin(
                    positions[position : position + 1], inverse_frequencies(rotary, position + 1)
                )
    scale = None
    if 0 < config.logn_length < max_positions:
        logn = np.maximum(np.log(positions + 1) / math.log(config.logn_length), 1.0)
        scale = np.tile(logn, len(values) // max_positions).astype(np.float32)
    return RotaryTable(config, max_positions, values, scale)
