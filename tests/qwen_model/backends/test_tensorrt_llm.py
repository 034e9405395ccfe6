"""The network over TensorRT-LLM's functions, on a stand-in of them: logits, arguments of its attention, refusals."""

import dataclasses

import numpy as np
import pytest

import qwen_model
from qwen_model.checkpoints.checkpoint import Checkpoint
from qwen_model.checkpoints.config import ModelConfig
from qwen_model.checkpoints.weights import network_modules
from qwen_model.network.decoder import decoder
from tests.qwen_model.model_files import random_prompt
from tests.qwen_model.tensorrt_reference import ARCHITECTURES, save_model
from tests.stand_ins import numpy_tensorrt, numpy_tensorrt_llm

VERSIONS = ["0.9", "0.11", "1.2"]
LENGTHS = np.array([19, 1, 24])


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
