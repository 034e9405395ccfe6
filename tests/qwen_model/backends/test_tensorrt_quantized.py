"""Engines of the TensorRT and TensorRT-RTX back ends with quantized weights, on these, CUDA and kernels in NumPy."""

import dataclasses

import numpy as np
import pytest

import qwen_model
from qwen_model import QwenModelError
from qwen_model.interface.engine_config import EngineConfig
from tests import stand_ins
from tests.qwen_model.eight_bit_networks import SCHEMES, quantize_layers, save_checkpoint
from tests.qwen_model.model_files import hugging_face_model, random_prompt, save_hugging_face
from tests.qwen_model.quantized_files import Layout, save_layout
from tests.stand_ins import numpy_cuda

HEADS = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
NEW_TOKENS = 12
CHECKPOINTS = {
    "gptq desc_act": (Layout("gptq", desc_act=True), {}),
    "awq": (Layout("awq", symmetric=False, group_size=64), {"head_quantization": "int8"}),
    "w8a16": (Layout("compressed-tensors", bits=8, group_size=-1), {}),
    "gptq dynamic": (Layout("gptq", dynamic={"mlp.down_proj": (8, 64)}, ignored=("layers.1.mlp.down_proj",)), {}),
}


@pytest.fixture(params=["8.6.0", "10.14.1", "11.1.0", "rtx"])
def backend(request, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if request.param == "rtx":
        pytest.importorskip("onnx")
        monkeypatch.setattr(numpy_cuda.device, "capability", (8, 9))
    with stand_ins.installed(request.param):
        yield "tensorrt-rtx" if request.param == "rtx" else "tensorrt"


def tokens_and_logits(folder, device):
    dataclasses.replace(EngineConfig.read(folder), end_token_ids=()).write(folder)
    session = qwen_model.load_engine(folder, device=device)
    prompt = random_prompt(40, seed=3)
    return session.generate(prompt, max_new_tokens=NEW_TOKENS).outputs[0].output_ids, session.logits(prompt)


@pytest.mark.parametrize("options", [{}, {"disable_plugins": ["gemm"]}], ids=["plugin", "layers"])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_tokens_are_those_of_the_torch_back_end(backend, checkpoint, options, tmp_path):
    if options and backend == "tensorrt-rtx":
        pytest.skip("it has no layers in place of plug-ins")
    layout, chosen = checkpoint
    model_dir, _, _ = save_layout(tmp_path, layout, **HEADS)
    settings = {"dtype": "float32", "max_batch_size": 2, "max_input_len": 60, "max_output_len": 20, **chosen}
    qwen_model.build_engine(model_dir, output_dir=tmp_path / "torch", **settings)
    summary = qwen_model.build_engine(model_dir, output_dir=tmp_path / "engine", backend=backend, **settings, **options)
    assert summary.config.weight_formats
    expected, expected_logits = tokens_and_logits(tmp_path / "torch", "cpu")
    tokens, logits = tokens_and_logits(tmp_path / "engine", None)
    assert tokens == expected
    np.testing.assert_allclose(logits, expected_logits, atol=2e-4)


IN_BLOCKS = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 384}


def save_eight_bit_model(folder, scheme, **changes):
    """Return the folder of a checkpoint with quantized x."""
    sizes = {**HEADS, **(IN_BLOCKS if scheme.blocks else {}), **changes}
    reference = hugging_face_model("Qwen2ForCausalLM", **sizes)
    save_hugging_face(reference, folder / "plain")
    quantize_layers(reference, scheme, random_prompt(40, seed=4))
    return save_checkpoint(reference, scheme, folder / "plain", folder / "model")


@pytest.mark.parametrize(
    ("scheme", "options"),
    [*((each, {}) for each in SCHEMES.values()), (SCHEMES["int8 static"], {"disable_plugins": ["rotary"]})],
    ids=[*SCHEMES, "int8 static, rotary in layers"],
)
def test_quantized_x_is_that_of_the_torch_back_end(backend, scheme, options, tmp_path):
    """Until a rounding error moves a number to the next code, which later tokens multiply."""
    if options and backend == "tensorrt-rtx":
        pytest.skip("it has no layers in place of plug-ins")
    model_dir = save_eight_bit_model(tmp_path, scheme)
    settings = {"dtype": "float32", "max_batch_size": 2, "max_input_len": 60, "max_output_len": 20}
    qwen_model.build_engine(model_dir, output_dir=tmp_path / "torch", **settings)
    summary = qwen_model.build_engine(model_dir, output_dir=tmp_path / "engine", backend=backend, **settings, **options)
    assert set(summary.config.weight_formats.values()) == {scheme.format}
    expected, expected_logits = tokens_and_logits(tmp_path / "torch", "cpu")
    tokens, logits = tokens_and_logits(tmp_path / "engine", None)
    assert tokens[0] == expected[0]
    errors = np.abs(logits - expected_logits).max(-1) / np.abs(expected_logits).max()
    assert errors.min() < 1e-5
    assert np.sqrt(np.square(errors).mean()) < 0.1


def test_engines_with_quantized_x_need_their_plug_ins_and_whole_words(backend, tmp_path):
    model_dir = save_eight_bit_model(tmp_path, SCHEMES["int8 static"], intermediate_size=170)
    settings = {"dtype": "float32", "max_batch_size": 2, "max_input_len": 60, "max_output_len": 20}
    with pytest.raises(QwenModelError, match=r"mlp.down has 170 inputs, and plug-ins take multiples of 4 where"):
        qwen_model.build_engine(model_dir, output_dir=tmp_path / "engine", backend=backend, **settings)
    if backend == "tensorrt":
        settings["disable_plugins"] = ["gemm"]
        with pytest.raises(QwenModelError, match=r"the plug-ins gemm cannot be disabled in an engine of"):
            qwen_model.build_engine(model_dir, output_dir=tmp_path / "engine", backend=backend, **settings)
    assert not (tmp_path / "engine").exists()
