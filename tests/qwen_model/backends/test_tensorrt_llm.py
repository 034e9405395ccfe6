"""The network over TensorRT-LLM's functions, on a stand-in of them: logits, arguments of its attention, refusals."""

import dataclasses

import numpy as np
import pytest

import qwen_model
from qwen_model.checkpoints.checkpoint import Checkpoint
from qwen_model.checkpoints.config import ModelConfig, RotaryConfig
from qwen_model.checkpoints.weights import network_modules
from qwen_model.network.decoder import decoder
from tests.qwen_model.model_files import random_prompt
from tests.qwen_model.small_config import small_config
from tests.qwen_model.tensorrt_reference import ARCHITECTURES, save_model
from tests.stand_ins import numpy_tensorrt, numpy_tensorrt_llm

VERSIONS = ["0.9", "0.11", "1.2"]
LENGTHS = np.array([19, 1, 24])
CONFIG = small_config(
    architecture="Qwen3ForCausalLM",
    hidden_size=64,
    max_positions=64,
    rotary=RotaryConfig(dim=24, base=5000.0, original_max_positions=16),
    qk_norm=True,
)


def operations_for(version, config, read_weight, dtype="float32", max_seq_len=24, paged=True):
    """The operations, and the inputs of the prompts of `LENGTHS`."""
    from qwen_model.backends.tensorrt_llm.operations import TensorRTLLMOperations

    ends = numpy_tensorrt_llm.Tensor(numpy_tensorrt.tensor_of(np.cumsum(LENGTHS).astype(np.int32)))
    params = numpy_tensorrt_llm.params(version, LENGTHS, config.num_layers, paged)
    modules = network_modules(config, dtype)
    return TensorRTLLMOperations(
        config, modules, read_weight, last_token_ids=ends, max_seq_len=max_seq_len, **params
    ), params


def logits_of(config, operations, prompts):
    ids = numpy_tensorrt_llm.Tensor(numpy_tensorrt.tensor_of(np.concatenate(prompts).astype(np.int32)))
    return numpy_tensorrt_llm.value(decoder(operations, config, ids), [ids])


@pytest.mark.parametrize("paged", [True, False], ids=["paged", "contiguous"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("version", VERSIONS)
def test_logits_are_those_of_the_torch_back_end(version, architecture, paged, tmp_path):
    folder = save_model(architecture, tmp_path / "model")
    qwen_model.build_engine(folder, output_dir=tmp_path / "engine", dtype="float32", max_input_len=40, max_output_len=1)
    session = qwen_model.load_engine(tmp_path / "engine", device="cpu")
    prompts = [random_prompt(int(length), seed=int(length)) for length in LENGTHS]
    expected = [session.logits(prompt)[-1] for prompt in prompts]

    config = ModelConfig.from_model_dir(folder)
    read = Checkpoint(folder, "numpy").read
    with numpy_tensorrt_llm.installed(version) as network:
        operations, params = operations_for(version, config, read, paged=paged)
        np.testing.assert_allclose(logits_of(config, operations, prompts), expected, atol=2e-4)
        assert {plugin.name for plugin in network.trt_network.plugins} == {"RmsNorm"}
        caches = params["kv_cache_params"].past_key_value or [None] * config.num_layers
        assert operations.present_key_values == caches
        assert [attention["layer_idx"] for attention in network.attentions] == list(range(config.num_layers))


def random_weight(spec):
    return np.random.default_rng(len(spec.name)).standard_normal(spec.shape, np.float32) * 0.2


def rotary(**changes):
    return dataclasses.replace(CONFIG, rotary=dataclasses.replace(CONFIG.rotary, **changes))


def test_bfloat16_weights_have_the_type_that_tensorrt_llm_knows():
    with numpy_tensorrt_llm.installed("1.2") as network:
        operations, _ = operations_for("1.2", CONFIG, random_weight, "bfloat16")
        ids = numpy_tensorrt_llm.Tensor(numpy_tensorrt.tensor_of(np.zeros(3, np.int32)))
        x, residual = operations.norm(operations.embedding(ids, "embedding"), "layers.0.input_norm")
        assert x.dtype == residual.dtype == numpy_tensorrt.DataType.BF16
        assert [plugin.fields["type_id"] for plugin in network.trt_network.plugins] == [x.dtype.value]


@pytest.mark.parametrize(
    ("scaling", "type_name", "scale"),
    [({"scaling": "linear", "factor": 4.0}, "linear", 4.0), ({"scaling": "llama3", "factor": 8.0}, "llama3", 1.0)],
)
def test_arguments_of_the_rotary_embedding(scaling, type_name, scale):
    config = rotary(**scaling)
    with numpy_tensorrt_llm.installed("1.2") as network:
        operations, _ = operations_for("1.2", config, random_weight)
        assert np.isfinite(logits_of(config, operations, [np.full(length, 3) for length in LENGTHS])).all()
        for arguments in network.attentions:
            assert arguments["rotary_embedding_scale_type"].name == type_name
            assert arguments["rotary_embedding_scale"] == scale
            assert (arguments["rotary_embedding_dim"], arguments["rotary_embedding_base"]) == (24, 5000.0)
            assert arguments["rotary_embedding_max_positions"] == 24
        first, second = network.attentions
        assert first["rotary_cos_sin"] is second["rotary_cos_sin"], "one table for all layers"


@pytest.mark.parametrize(
    ("version", "config", "message"),
    [
        ("1.2", rotary(scaling="yarn", factor=2.0), "cannot apply 'yarn'.* 24 tokens"),
        ("1.2", rotary(scaling="qwen_dynamic"), "cannot apply 'qwen_dynamic'"),
        ("1.2", dataclasses.replace(CONFIG, logn_length=16), "cannot apply logn"),
        ("1.2", dataclasses.replace(CONFIG, full_attention_length=20), "max_seq_len 24 is too large"),
        ("0.11", rotary(scaling="llama3", factor=8.0), "needs TensorRT-LLM 0.12 or later"),
    ],
)
def test_what_gpt_attention_cannot_compute_is_refused(version, config, message):
    with numpy_tensorrt_llm.installed(version) as network:
        with pytest.raises(qwen_model.QwenModelError, match=message):
            operations_for(version, config, random_weight)
        assert network.trt_network.num_layers == 0, "nothing was added"
