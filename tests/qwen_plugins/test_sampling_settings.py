"""Starts of sequences that are refused, and how they are packed, which needs no GPU."""

import math

import numpy as np
import pytest

from qwen_plugins import launch
from qwen_plugins.sampling_starts import BIAS, MAX_BIASES, SETTINGS, START, SequenceStart, initial_settings, pack_starts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slot": -1}, "slot must be at least 0, not -1"),
        ({"temperature": 0}, r"temperature must be above 0 and at most 3.40e\+38, not 0"),
        ({"temperature": 1e39}, r"temperature must be above 0 and at most 3.40e\+38, not 1e\+39"),
        ({"temperature": math.nan}, "temperature must be above 0"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"repetition_penalty": 1e39}, "repetition_penalty must be above 0"),
        ({"presence_penalty": math.inf}, "presence_penalty must be a finite number"),
        ({"frequency_penalty": math.nan}, "frequency_penalty must be a finite number"),
        ({"top_k": -1}, "top_k must be at least 0, not -1"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, not 0"),
        ({"min_p": 1.1}, "min_p must be from 0 to 1, not 1.1"),
        ({"seed": -1}, "seed must be in 64 bits, not -1"),
        ({"draw_stream": 2**32}, "draw_stream must be in 32 bits, not 4294967296"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias: a token id must be from 0"),
        ({"logit_bias": {1: math.nan}}, "logit_bias: token 1 must have a number"),
        ({"logit_bias": dict.fromkeys(range(513), 1.0)}, "logit_bias may have at most 512 tokens, not 513"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        SequenceStart(**({"slot": 0} | options))


def test_the_layout_is_that_of_the_kernels():
    assert START.itemsize == launch.SAMPLING_START_BYTES
    assert SETTINGS.itemsize == 64
    assert BIAS.itemsize == 8
    assert MAX_BIASES == launch.MAX_BIASES


def test_packing():
    starts = [
        SequenceStart(slot=4, logit_bias={9: 2.0, 3: -1.0}, prompt=[1, 2], output=[3]),
        SequenceStart(
            slot=1, presence_penalty=1.0, logit_bias={0: 0.5}, prompt=[1, 2], output=[7, 8, 9], seed=2**64 - 1
        ),
        SequenceStart(slot=0, repetition_penalty=2.0, prompt=[5]),
    ]
    packed = pack_starts(starts, 1000, 64)
    records = packed.data[: packed.biases].view(START)
    assert records["slot"].tolist() == [4, 1, 0]
    assert records["settings"]["counts"].tolist() == [0, 1064, 1000]  # the first has no penalties
    assert records["settings"]["step"].tolist() == [1, 3, 0]
    assert records["settings"]["seed"].tolist() == [0, 2**64 - 1, 0]
    assert records["first_bias"].tolist() == [0, 2, 3]
    assert records["prompt_length"].tolist() == [0, 2, 1]
    assert records["first_token"].tolist() == [0, 0, 5]
    assert packed.data[packed.biases : packed.tokens].view(BIAS).tolist() == [(3, -1.0), (9, 2.0), (0, 0.5)]
    assert packed.data[packed.tokens :].view(np.int32).tolist() == [1, 2, 7, 8, 9, 5]


def test_slots_begin_with_the_largest_logit():
    settings = initial_settings(3).view(SETTINGS)
    assert settings["greedy"].tolist() == [1, 1, 1]
    assert settings["repetition_penalty"].tolist() == [1.0, 1.0, 1.0]
    assert not settings["counts"].any()
