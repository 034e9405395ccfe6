"""Reading config.json: what the published ones say, and what is wrong or not supported."""

import dataclasses
import json

import pytest
import transformers

from qwen_model import QwenModelError
from qwen_model.checkpoints.config import ModelConfig, read_config
from qwen_model.engine.limits import engine_limits
from tests.qwen_model.model_files import DECICODER, QWEN_V1

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
    "torch_dtype": "bfloat16",
}
QWEN_7B_V1_0 = {
    "activation": "swiglu",
    "architectures": ["QWenLMHeadModel"],
    "bf16": False,
    "ffn_hidden_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "model_type": "qwen",
    "n_embd": 4096,
    "n_head": 32,
    "n_inner": None,
    "n_layer": 32,
    "n_positions": 8192,
    "no_bias": True,
    "padded_vocab_size": 151936,
    "params_dtype": "torch.bfloat16",
    "pos_emb": "rotary",
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "vocab_size": 151936,
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


def test_qwen_7b_v1_0():
    """As it was first published, with the names of its time; its type is that of its tensors."""
    expected = dataclasses.replace(read_config({**QWEN_7B, "seq_length": 2048}), dtype="")
    assert read_config(QWEN_7B_V1_0) == expected
    with pytest.raises(QwenModelError, match="n_embd 4096 and hidden_size 2048 differ"):
        read_config({**QWEN_7B_V1_0, "hidden_size": 2048})


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
    """Of Qwen v1. In the others transformers looks at it only with a scaling, and then its shapes don't fit."""
    assert read_config({**LLAMA, "partial_rotary_factor": 0.5}).rotary.dim == 16
    linear = {"type": "linear", "factor": 2.0}
    assert read_config({**LLAMA, "partial_rotary_factor": 1.0, "rope_scaling": linear}).rotary.dim == 16
    with pytest.raises(QwenModelError, match=r"partial_rotary_factor 0\.5 with rotary scaling 'linear'"):
        read_config({**LLAMA, "partial_rotary_factor": 0.5, "rope_scaling": linear})
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


WINDOW = {"use_sliding_window": True, "sliding_window": 64}


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({"sliding_window": 64, "use_sliding_window": False}, 0),
        ({"sliding_window": 64}, 0),
        ({"use_sliding_window": True, "sliding_window": None}, 0),
        ({**WINDOW, "max_window_layers": 2}, 0),
        ({**WINDOW, "max_window_layers": 1}, 64),
        ({**WINDOW, "max_window_layers": 0}, 64),
        (WINDOW, 0),  # max_window_layers is 28 where it is not given
        ({**WINDOW, "num_hidden_layers": 29}, 64),
        ({**WINDOW, "layer_types": ["full_attention"] * 2}, 0),
        ({**WINDOW, "layer_types": ["full_attention", "sliding_attention"]}, 64),
        ({"dual_chunk_attention_config": {"chunk_size": 32, "local_size": 8}}, 32),
        ({"dual_chunk_attention_config": {"chunk_size": 32, "original_max_position_embeddings": 24}}, 24),
        ({"dual_chunk_attention_config": None}, 0),
        ({**WINDOW, "max_window_layers": 1, "dual_chunk_attention_config": {"chunk_size": 32}}, 32),
    ],
)
def test_the_length_up_to_which_attention_is_full(changes, length):
    """Windows are read as transformers reads them, below; chunks as in the published code of Qwen2.5-1M."""
    values = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], **changes}
    assert read_config(values).full_attention_length == length
    layer_types = transformers.Qwen2Config(**{**values, "dual_chunk_attention_config": None}).layer_types
    if "dual_chunk_attention_config" not in changes:
        assert ("sliding_attention" in layer_types) == (length > 0)


def test_llama_has_no_window():
    assert read_config({**LLAMA, **WINDOW}).full_attention_length == 0


def test_limits_stay_within_full_attention():
    model = read_config({**LLAMA, "dual_chunk_attention_config": {"chunk_size": 48}})
    assert engine_limits(model, None, None, None).max_positions == 48
    assert engine_limits(model, None, 40, 8).max_positions == 48
    with pytest.raises(QwenModelError, match=r"more than 48 tokens.*the engine's 49 are too many"):
        engine_limits(model, None, 40, 9)


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_both_names_of_a_type(key, dtype):
    values = {name: value for name, value in LLAMA.items() if name != "torch_dtype"}
    assert read_config(values).dtype == ""
    assert read_config({**values, key: dtype}).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel' is not supported.*Qwen2ForCausalLM"),
        ({"architectures": None, "model_type": "mamba"}, "mamba"),
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"hidden_size": "96"}, "hidden_size must be a positive integer, below 2.31, not '96'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, below 2.31, not 0"),
        ({"vocab_size": True}, "vocab_size must be a positive integer, below 2.31, not True"),
        ({"num_attention_heads": 7}, "96 is not a multiple of the 7"),
        ({"num_key_value_heads": 4}, "6 attention heads are not a multiple of the 4"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a number from.*, not -1"),
        ({"rope_theta": "x"}, "rope_theta must be a number from"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"use_sliding_window": "yes"}, "use_sliding_window must be true or false, not 'yes'"),
        ({**WINDOW, "max_window_layers": -1}, "max_window_layers must be an integer of at least 0, below 2.31, not -1"),
        ({"dual_chunk_attention_config": [1]}, "dual_chunk_attention_config must be an object"),
        ({"num_hidden_layers": 1_000_000}, "1000000 layers are more than the 10000"),
        ({"vocab_size": 10**30}, "vocab_size must be a positive integer, below 2.31, not 1000"),
        ({"rope_theta": 10**39}, "rope_theta must be a number from 1e-12 to 1e.12, not 1000"),
        ({"rope_theta": float("nan")}, "rope_theta must be a number from.*, not nan"),
        ({"rms_norm_eps": 1e-94}, "rms_norm_eps must be a number from.*, not 1e-94"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be a number from.*, not inf"),
        ({"architectures": ["x" * 10000]}, r"^.{,400}$"),
        ({"hidden_act": ["gelu"] * 10000}, r"^.{,400}$"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: .sliding_attention. is not supported"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'longrope' is not supported.*yarn"),
        ({"rope_scaling": {"type": "linear"}}, "'linear' needs a factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be a number from"),
        ({"head_dim": 3}, "even number of the 3 elements.*not 3"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list of names, not 'LlamaForCausalLM'"),
        ({"architectures": [3]}, "architectures must be a list of names"),
        ({"layer_types": 3}, "layer_types must be a list, not 3"),
        ({"layer_types": ["linear_attention"]}, "layer_types: 'linear_attention' is not supported"),
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
            "original_max_position_embeddings must be a positive integer, below 2.31, not '512'",
        ),
        ({"rope_scaling": {"type": "yarn", **YARN}, "rope_theta": 1}, "rope_theta above 1"),
        ({"rope_scaling": {"type": "llama3", **YARN, "low_freq_factor": 4}}, "low_freq_factor below"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2}, "'dynamic' needs.*at least 4.*not 2"),
        ({"num_key_value_heads_per_layer": [1, 2]}, "num_key_value_heads_per_layer"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(QwenModelError, match=message):
        read_config({**LLAMA, "architectures": ["Qwen2ForCausalLM"], **changes})


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
