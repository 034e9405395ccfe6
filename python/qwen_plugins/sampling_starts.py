"""Describe sequences that begin in slots of the sampling kernels, as these read them from device memory; no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
MAX_BIASES = 512
"""The most biases of a sequence: kMaxBiases of csrc/kernels/sampling/sampling.h."""

SETTINGS = np.dtype(
    [
        ("temperature", "<f4"),
        ("top_p", "<f4"),
        ("min_p", "<f4"),
        ("repetition_penalty", "<f4"),
        ("presence_penalty", "<f4"),
        ("frequency_penalty", "<f4"),
        ("top_k", "<i4"),
        ("greedy", "<i4"),
        ("seed", "<u8"),
        ("step", "<u8"),
        ("draw_stream", "<u4"),
        ("num_biases", "<i4"),
        ("counts", "<u8"),
    ]
)
"""SamplingSettings of csrc/kernels/sampling/sampling.h."""
START = np.dtype(
    [
        ("settings", SETTINGS),
        ("slot", "<i4"),
        ("first_bias", "<i4"),
        ("first_token", "<i4"),
        ("prompt_length", "<i4"),
        ("output_length", "<i4"),
        ("reserved", "<i4"),
    ]
)
"""SamplingStart of csrc/kernels/sampling/sampling.h."""
BIAS = np.dtype([("token", "<i4"), ("value", "<f4")])
"""SamplingBias of csrc/kernels/sampling/sampling.h."""


_COPIED = (
    *("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("top_k", "greedy", "seed", "draw_stream"),
)
"""The settings that are as a `SequenceStart` has them."""


@dataclass(frozen=True, kw_only=True)
class SequenceStart:
    """Describe how the tokens of a sequence are chosen that begins in a slot, or comes back to one.

    Attributes:
        slot: from 0 on.
        greedy: choose the largest logit after biases, penalties and mask; temperature, top_k, top_p, min_p, seed and
            draw_stream are not used.
        temperature: above 0.
        top_k: how many of the most likely tokens may be chosen; 0: all.
        top_p: above 0, at most 1: the most likely tokens that together have this probability may be chosen.
        min_p: 0 to 1: tokens with at least this fraction of the probability of the likeliest may be chosen.
        repetition_penalty: above 0; 1: none. It holds for the tokens of prompt and output.
        presence_penalty, frequency_penalty: subtracted from the logits of tokens that the output has, once or as often
            as it has them.
        logit_bias: added to the logits of these tokens, by token id; at most `MAX_BIASES`.
        seed: from 0 to 2**64 - 1.
        draw_stream: from 0 to 2**32 - 1: sequences with one seed draw differently from different streams.
        prompt, output: token ids; those outside of the vocabulary are ignored. The length of the output is the number
            of tokens drawn before.

    Raises:
        ValueError: a value is out of range.
    """

    slot: int
    greedy: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    draw_stream: int = 0
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()

    def __post_init__(self) -> None:
        _check(self.slot >= 0, f"slot must be at least 0, not {self.slot}")
        for name in ("temperature", "repetition_penalty"):
            # Beyond float32 it would be infinity, and infinity times a logit of 0 or -infinity is NaN.
            value, limit = getattr(self, name), LARGEST_FLOAT32
            _check(0 < value <= limit, f"{name} must be above 0 and at most {limit:.2e}, not {value}")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(abs(value) <= 1e30, f"{name} must be a finite number, at most 1e30, not {value}")
        _check(0 <= self.top_k < 2**31, f"top_k must be at least 0, not {self.top_k}")
        _check(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, not {self.top_p}")
        _check(0 <= self.min_p <= 1, f"min_p must be from 0 to 1, not {self.min_p}")
        _check(0 <= self.seed < 2**64, f"seed must be in 64 bits, not {self.seed}")
        _check(0 <= self.draw_stream < 2**32, f"draw_stream must be in 32 bits, not {self.draw_stream}")
        count = len(self.logit_bias)
        _check(count <= MAX_BIASES, f"logit_bias may have at most {MAX_BIASES} tokens, not {count}")
        for token, value in self.logit_bias.items():
            _check(0 <= token < 2**31, f"logit_bias: a token id must be from 0 to 2**31 - 1, not {token}")
            _check(abs(value) <= 1e30, f"logit_bias: token {token} must have a number of at most 1e30, not {value}")

    @property
    def penalizes(self) -> bool:
        """Tell whether the choice depends on the tokens so far, which are then counted."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def takes_largest(self) -> bool:
        """Tell whether the largest logit is chosen, whatever it is."""
        return self.greedy and not self.penalizes and not self.logit_bias


@dataclass(frozen=True)
class PackedStarts:
    """Hold the starts of some sequences as one array of bytes, to be copied to the device.

    Attributes:
        data: uint8; the records of `START`, one for each sequence, are at its beginning.
        biases, tokens: where those of all sequences begin in `data`, in bytes.
    """

    data: npt.NDArray[np.uint8]
    biases: int
    tokens: int


def pack_starts(starts: Sequence[SequenceStart], counts: int = 0, counts_row_bytes: int = 0) -> PackedStarts:
    """Pack starts for `qwen_plugins.launch.start_sampling`.

    Args:
        starts: of different slots.
        counts: device address of the counts of slot 0; needed where a sequence has penalties.
        counts_row_bytes: from the counts of one slot to those of the next, see `counts_row_size`.
    """
    records = np.zeros(len(starts), START)
    settings = records["settings"]
    for name in _COPIED:
        settings[name] = [getattr(start, name) for start in starts]
    settings["step"] = [len(start.output) for start in starts]
    settings["num_biases"] = [len(start.logit_bias) for start in starts]
    records["slot"] = [start.slot for start in starts]
    records["first_bias"] = np.cumsum(settings["num_biases"]) - settings["num_biases"]
    counted = np.array([start.penalizes for start in starts], bool)
    settings["counts"] = np.where(counted, counts + records["slot"].astype(np.int64) * counts_row_bytes, 0)
    records["prompt_length"] = np.where(counted, [len(start.prompt) for start in starts], 0)
    records["output_length"] = np.where(counted, settings["step"], 0)
    num_tokens = records["prompt_length"] + records["output_length"]
    records["first_token"] = np.cumsum(num_tokens) - num_tokens
    biases = [bias for start in starts for bias in sorted(start.logit_bias.items())]
    tokens = [np.asarray(part, np.int32) for s in starts if s.penalizes for part in (s.prompt, s.output)]
    parts = [records, np.array(biases, BIAS), np.concatenate([*tokens, np.zeros(0, np.int32)])]
    data = np.concatenate([part.view(np.uint8) for part in parts])
    return PackedStarts(data, records.nbytes, records.nbytes + parts[1].nbytes)


def initial_settings(slots: int) -> npt.NDArray[np.uint8]:
    """Return the settings of slots in which no sequence has started, as bytes: the largest logit is chosen."""
    settings = np.zeros(slots, SETTINGS)
    for name in ("temperature", "top_p", "repetition_penalty", "greedy"):
        settings[name] = 1
    return settings.view(np.uint8)


def counts_row_size(vocab_size: int) -> int:
    """Return how many counts, of 2 bytes, there are for a slot."""
    return (vocab_size + 31) // 32 * 32


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
