"""The TensorRT back end on TensorRT, CUDA and kernels in NumPy, beside the torch back end: logits, tokens, errors."""

import numpy as np
import pytest

import qwen_model
from tests.qwen_model import checkpoints, stand_ins
from tests.qwen_model.checkpoints import random_prompt

VERSIONS = ["8.6.0", "10.14.1", "11.1.0"]
LIMITS = {"max_batch_size": 6, "max_input_len": 60, "max_output_len": 30}


@pytest.fixture(params=VERSIONS)
def trt(request, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with stand_ins.installed(request.param) as module:
        yield module


def save_model(architecture, folder):
    """A random checkpoint with heads of a size that the attention plug-in has."""
    if architecture == "QWenLMHeadModel":
        model, config = checkpoints.qwen_v1(hidden_size=96, num_attention_heads=3, kv_channels=32, seq_length=24)
        return checkpoints.save_reference(model, config, folder / "qwen")
    if architecture == "DeciCoderForCausalLM":
        model, config = checkpoints.decicoder(hidden_size=128, num_attention_heads=4)
        return checkpoints.save_reference(model, config, folder / "deci")
    head = {"head_dim": 32} if architecture == "Qwen3ForCausalLM" else {}
    model = checkpoints.hugging_face_model(architecture, hidden_size=128, num_attention_heads=4, **head)
    return checkpoints.save_hugging_face(model, folder / "model")


def both(model_dir, tmp_path, **options):
    """A session of each back end."""
    settings = {"dtype": "float32", **LIMITS, **options}
    found = []
    for backend in ("torch", "tensorrt"):
        qwen_model.build_engine(model_dir, output_dir=tmp_path / backend, backend=backend, **settings)
        device = "cpu" if backend == "torch" else None
        found.append(qwen_model.load_engine(tmp_path / backend, device=device))
    return found


ARCHITECTURES = [
    "QWenLMHeadModel",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "LlamaForCausalLM",
    "DeciCoderForCausalLM",
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rmsnorm_plugin", [True, False], ids=["plugin", "native"])
def test_logits_and_tokens_are_those_of_the_torch_back_end(trt, architecture, rmsnorm_plugin, tmp_path):
    expected, session = both(save_model(architecture, tmp_path), tmp_path, rmsnorm_plugin=rmsnorm_plugin)
    prompt = random_prompt(50)
    np.testing.assert_allclose(session.logits(prompt), expected.logits(prompt), atol=2e-4)
    prompts = [random_prompt(length, seed=length) for length in (1, 40, 7, 7)]
    ours, theirs = (which.generate(prompts, max_new_tokens=25) for which in (session, expected))
    assert [output.output_ids for output in ours.outputs] == [output.output_ids for output in theirs.outputs]


@pytest.mark.parametrize("scaling", ["linear", "dynamic", "yarn"])
def test_rotary_scalings(trt, scaling, tmp_path):
    model_dir = tmp_path / "model"
    checkpoints.save_hugging_face(
        checkpoints.hugging_face_model(
            "Qwen2ForCausalLM", hidden_size=128, num_attention_heads=4, max_position_embeddings=32
        ),
        model_dir,
    )
    expected, session = both(model_dir, tmp_path, rotary_scaling={"rope_type": scaling, "factor": 4.0})
    prompts = [random_prompt(length, seed=length) for length in (50, 5, 33)]
    ours, theirs = (which.generate(prompts, max_new_tokens=20) for which in (session, expected))
    assert [output.output_ids for output in ours.outputs] == [output.output_ids for output in theirs.outputs]
    np.testing.assert_allclose(session.logits(prompts[0]), expected.logits(prompts[0]), atol=2e-4)
