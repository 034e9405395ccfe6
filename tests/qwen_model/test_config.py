"""Reading config.json: what the published ones say, and what is wrong or not supported."""

import dataclasses
import json

import pytest

from qwen_model import QwenModelError
from qwen_model.checkpoints.config import ModelConfig, read_config
from tests.qwen_model.checkpoints import DECICODER, QWEN_V1

QWEN_7B = {
    "architectures": ["QWenLMHeadModel"],
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "seq_length": 8192,
    "layer_norm_epsilon": 1e-6,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "bf16": True,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}


def test_qwen_7b():
    config = read_config(QWEN_7B)
    assert (config.num_kv_heads, config.intermediate_size, config.head_size) == (32, 11008, 128)
    assert (config.qkv_bias, config.output_bias, config.qk_norm, config.tied_embedding) == (True, False, False, False)
    assert (config.rotary.scaling, config.rotary.original_max_positions) == ("qwen_dynamic", 8192)
    assert (config.logn_length, config.dtype) == (8192, "bfloat16")


def test_defaults_of_llama():
    config = read_config(LLAMA)
    assert (config.num_kv_heads, config.head_size, config.norm_eps, config.dtype) == (6, 16, 1e-5, "bfloat16")
    assert (config.rotary.base, config.rotary.dim, config.rotary.scaling) == (10000.0, 16, "none")


@pytest.mark.parametrize(
    "values",
    [
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **YARN}, "dtype": "bfloat16"},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN}},
    ],
    ids=["transformers 4", "transformers 5"],
)
def test_both_places_of_rotary_settings(values):
    rotary = read_config({**LLAMA, **values}).rotary
    assert (rotary.base, rotary.scaling, rotary.factor, rotary.original_max_positions) == (1e6, "yarn", 4.0, 32768)
    assert rotary.attention_factor == pytest.approx(1.1386, abs=1e-4)


def test_partial_rotary_embedding():
    assert read_config({**LLAMA, "partial_rotary_factor": 0.5}).rotary.dim == 8
    assert read_config({**QWEN_V1, "rotary_pct": 0.25}).rotary.dim == 4


def test_model_type_is_enough():
    values = {**LLAMA, "architectures": None, "model_type": "llama"}
    assert read_config(values).architecture == "LlamaForCausalLM"


def test_round_trip():
    for values in (QWEN_7B, LLAMA, QWEN_V1, DECICODER):
        config = read_config(values)
        assert ModelConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_rotary_scaling_in_place_of_the_checkpoints():
    config = read_config({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert config.with_rotary_scaling({"rope_type": "none"}).rotary.scaling == "none"
    dynamic = config.with_rotary_scaling({"rope_type": "dynamic", "factor": 3.0}).rotary
    assert (dynamic.scaling, dynamic.factor, dynamic.original_max_positions) == ("dynamic", 3.0, 128)
    for wrong in ([1], {"factor": 2.0}, {"rope_type": "linear", "factor": "x"}):
        with pytest.raises(QwenModelError, match="rotary scaling"):
            config.with_rotary_scaling(wrong)


def test_a_sliding_window_that_is_switched_off():
    """As the published Qwen2 and Qwen3 have it."""
    read_config({**LLAMA, "sliding_window": 64, "use_sliding_window": False})
    read_config({**LLAMA, "sliding_window": None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported.*Qwen2ForCausalLM"),
        ({"architectures": None, "model_type": "mamba"}, "mamba"),
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"hidden_size": "96"}, "hidden_size must be a positive integer, not '96'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, not 0"),
        ({"vocab_size": True}, "vocab_size must be a positive integer, not True"),
        ({"num_attention_heads": 7}, "96 is not a multiple of the 7"),
        ({"num_key_value_heads": 4}, "6 attention heads are not a multiple of the 4"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a positive number, not -1"),
        ({"rope_theta": "x"}, "rope_theta must be a positive number"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: .sliding_attention. is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'longrope' is not supported.*yarn"),
        ({"rope_scaling": {"type": "linear"}}, "'linear' needs a factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be a positive number"),
        ({"partial_rotary_factor": 0.2}, "even number of the 16 elements.*not 3"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list of names, not 'LlamaForCausalLM'"),
        ({"architectures": [3]}, "architectures must be a list of names"),
        ({"layer_types": 3}, "layer_types must be a list, not 3"),
        ({"layer_types": ["linear_attention"]}, "layer_types: 'linear_attention' is not supported"),
        ({"sliding_window": 64}, "sliding_window 64"),
        ({"quantization_config": "awq"}, "quantization_config.*'awq'"),
        ({"torch_dtype": "float64"}, "torch_dtype 'float64' is not supported.*bfloat16"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not supported"),
        ({"rope_scaling": [1]}, r"rope_scaling must be an object, not \[1\]"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2}},
            "rope_parameters and another rope_scaling",
        ),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling has 'factor' but no 'rope_type'"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters has 'full_attention' but no 'rope_type'"),
        ({"rope_scaling": {"type": 3}}, "rope_type 3 is not supported"),
        ({"rope_scaling": {"type": "yarn", **YARN, "truncate": "no"}}, "truncate must be true or false, not 'no'"),
        (
            {"rope_scaling": {"type": "yarn", **YARN, "original_max_position_embeddings": "512"}},
            "original_max_position_embeddings must be a positive integer, not '512'",
        ),
        ({"rope_scaling": {"type": "yarn", **YARN}, "rope_theta": 1}, "rope_theta above 1"),
        ({"rope_scaling": {"type": "llama3", **YARN, "low_freq_factor": 4}}, "low_freq_factor below"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2}, "'dynamic' needs.*at least 4.*not 2"),
        ({"num_key_value_heads_per_layer": [1, 2]}, "num_key_value_heads_per_layer"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(QwenModelError, match=message):
        read_config({**LLAMA, **changes})


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "none", "factor": 4}, "'none' has no 'factor'"),
        ({"rope_type": "linear", "factor": 2, "rope_theta": 5}, "'linear' has no 'rope_theta'"),
        ({"rope_type": "yarn", **YARN, "beta_fasst": 8}, "'yarn' has no 'beta_fasst'"),
    ],
)
def test_a_rotary_scaling_of_the_users_is_read_whole(scaling, message):
    with pytest.raises(QwenModelError, match=message):
        read_config(LLAMA).with_rotary_scaling(scaling)


@pytest.mark.parametrize("text", [None, "{", "[1]"])
def test_files_that_are_no_config(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(QwenModelError, match=r"no config.json|is not JSON|JSON object"):
        ModelConfig.from_model_dir(tmp_path)
