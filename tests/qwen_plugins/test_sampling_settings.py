"""The settings that SamplingState refuses, which needs no GPU."""

import math

import pytest
import torch

from qwen_plugins.sampling import SamplingState


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, r"temperature must be above 0 and at most 3.40e\+38, not 0"),
        ({"temperature": 1e39}, r"temperature must be above 0 and at most 3.40e\+38, not 1e\+39"),
        ({"temperature": math.nan}, "temperature must be above 0"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"repetition_penalty": 1e39}, "repetition_penalty must be above 0"),
        ({"top_k": -1}, "top_k must be at least 0, not -1"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, not 0"),
        ({"seed": -1}, "seed and step must be in 64 bits, not -1 and 0"),
        ({"step": 2**64}, "seed and step must be in 64 bits, not 0 and 18446744073709551616"),
    ],
)
def test_settings_out_of_range_change_nothing(options, message):
    buffers = [torch.full((40,), 7, dtype=torch.uint8) for _ in range(4)]
    state = SamplingState(2, 50, *buffers)
    with pytest.raises(ValueError, match=message):
        state.set(**options)
    assert all((buffer == 7).all() for buffer in buffers)
