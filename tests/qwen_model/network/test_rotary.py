"""Inverse frequencies beside transformers, and the tables made of them."""

import copy
import math

import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from qwen_model.checkpoints.config import read_config
from qwen_model.checkpoints.rotary_config import RotaryConfig
from qwen_model.network.rotary import inverse_frequencies, qwen_ntk_alpha, rotary_stretch, rotary_table
from tests.qwen_model.model_files import QWEN_V1

SIZES = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 512}
SCALINGS = [
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 8.0},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 16.0, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.7},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5},
]


@pytest.mark.parametrize("base", [10000.0, 1e6])
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("length", [100, 700, 4001])
def test_as_transformers(scaling, base, length):
    theirs = transformers.LlamaConfig(**SIZES, rope_parameters={**scaling, "rope_theta": base})
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, "cpu", seq_len=length)
    values = {**SIZES, "architectures": ["LlamaForCausalLM"], "vocab_size": 9, "intermediate_size": 9}
    ours = read_config({**values, "num_hidden_layers": 1, "rope_theta": base, "rope_scaling": scaling}).rotary
    np.testing.assert_allclose(inverse_frequencies(ours, length), expected.numpy(), rtol=3e-6)
    assert ours.attention_factor == pytest.approx(factor)


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FORMS = [
    {},
    {"rope_theta": 5e5},
    {"rope_theta": 5e5, "rope_scaling": None},
    {"rope_theta": 5e5, "partial_rotary_factor": 0.5},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}},
    {"rope_theta": 10, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}},
    {"rope_theta": 5e5, "rope_scaling": {"rope_type": "dynamic", "type": "linear", "factor": 2.0}},
    {"rope_theta": 5e5, "rope_scaling": YARN},
    {"rope_theta": 5e5, "rope_scaling": YARN, "original_max_position_embeddings": 256},
    {"rope_theta": 5e5, "rope_scaling": {**YARN, "factor": None}},
    {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": None}, "original_max_position_embeddings": 32},
    {"rope_scaling": {**YARN, "beta_fast": None, "beta_slow": None, "mscale": 0.7, "mscale_all_dim": 0.0}},
    {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    {"rope_scaling": LLAMA3},
    {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}},
    {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}, "original_max_position_embeddings": 256},
    {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "original_max_position_embeddings": 100},
    {"rope_scaling": {"type": "linear", "factor": 2.0}, "original_max_position_embeddings": 100},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "original_max_position_embeddings": 100},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_of_the_settings_is_read_as_transformers_reads_it(form):
    values = {**SIZES, "architectures": ["LlamaForCausalLM"], "vocab_size": 9, "intermediate_size": 9}
    values |= {"num_hidden_layers": 1, **form}
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig.from_dict(copy.deepcopy(values)))
    ours = read_config(values).rotary
    np.testing.assert_allclose(inverse_frequencies(ours), theirs.inv_freq.numpy(), rtol=3e-6)
    assert ours.attention_factor == pytest.approx(theirs.attention_scaling)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 256, 257, 1000, 4096, 4097])
def test_qwens_alpha(length):
    """The formula as the design has it."""
    assert qwen_ntk_alpha(length, 64) == max(2 ** math.ceil(math.log(length / 64, 2) + 1) - 1, 1)


def test_qwens_table_has_a_block_for_each_stretch():
    table = rotary_table(read_config(QWEN_V1), 300)
    assert table.values.shape == (4 * 300, 16)
    for length in (1, 64, 65, 128, 129, 256, 257, 300):
        alpha = max(2 ** math.ceil(math.log(length / 64, 2) + 1) - 1, 1)
        frequencies = (10000 * alpha ** (16 / 14)) ** (-np.arange(0, 16, 2) / 16)
        angles = np.arange(300)[:, None] * frequencies
        rows = table.values[table.offset(length) : table.offset(length) + 300]
        np.testing.assert_allclose(rows, np.concatenate([np.cos(angles), np.sin(angles)], axis=1), atol=2e-5)
        assert table.prompt_table([length], [0], [length]) is None


def test_logn_begins_after_the_trained_length():
    table = rotary_table(read_config({**QWEN_V1, "use_dynamic_ntk": False}), 100)
    expected = [math.log(i, 64) if i > 64 else 1.0 for i in range(1, 101)]
    np.testing.assert_allclose(table.query_scale, expected, rtol=1e-6)
    assert rotary_table(read_config(QWEN_V1), 64).query_scale is None


def test_prompts_longer_than_the_trained_length_bring_a_table_of_their_own():
    """Of dynamic NTK with Qwen v1's logn: each prompt of the batch has the rows that it has alone."""
    config = read_config({**QWEN_V1, "use_dynamic_ntk": False}).with_rotary_scaling(
        {"rope_type": "dynamic", "factor": 2.0}
    )
    table = rotary_table(config, 300)
    assert table.prompt_table([64, 3], [0, 0], [64, 3]) is None
    assert table.prompt_table([1, 1], [200, 3], [200, 3]) is None  # generated
    lengths = [40, 200, 65, 1]
    own = table.prompt_table(lengths, [0] * 4, lengths)
    assert own.starts == [0, 40, 240, 305]
    assert len(own.values) == len(own.query_scale) == sum(lengths)
    for start, length in zip(own.starts, lengths, strict=True):
        stretch = 2 * max(length, 64) / 64 - 1
        frequencies = (10000 * stretch ** (16 / 14)) ** (-np.arange(0, 16, 2) / 16)
        angles = np.arange(length)[:, None] * frequencies
        rows = slice(start, start + length)
        np.testing.assert_allclose(own.values[rows], np.concatenate([np.cos(angles), np.sin(angles)], 1), atol=2e-5)
        logn = [math.log(i, 64) if i > 64 else 1.0 for i in range(1, length + 1)]
        np.testing.assert_allclose(own.query_scale[rows], logn, rtol=1e-6)
    chunks = table.prompt_table([30, 70, 1], [100, 170, 150], [200, 200, 200])
    assert chunks.starts == [-100, -140, -50]
    whole = table.prompt_table([200], [0], [200])
    for start, first, end in ((-100, 100, 130), (-140, 170, 200), (-50, 150, 151)):
        np.testing.assert_array_equal(chunks.values[start + first : start + end], whole.values[first:end])
        np.testing.assert_array_equal(chunks.query_scale[start + first : start + end], whole.query_scale[first:end])
    after = slice(-140 + 200, -140 + 240)  # of tokens that were generated before the sequence lost its pages
    np.testing.assert_array_equal(chunks.values[after], table.values[200:240])


def test_prompts_of_equal_stretch_have_equal_rotations():
    """Prefixes of the cache are shared where it is equal."""
    lengths = range(1, 300)
    for scaling in ("none", "linear", "dynamic", "qwen_dynamic", "llama3", "yarn"):
        rotary = RotaryConfig(dim=16, base=1e4, scaling=scaling, factor=2.0, original_max_positions=64)
        rotations: dict[int, set[bytes]] = {}
        for length in lengths:
            rotations.setdefault(rotary_stretch(rotary, length), set()).add(
                inverse_frequencies(rotary, length).tobytes()
            )
        assert all(len(found) == 1 for found in rotations.values()), scaling
        if scaling not in ("dynamic", "qwen_dynamic"):
            assert len(rotations) == 1
