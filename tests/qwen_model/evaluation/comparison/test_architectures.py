"""Random checkpoints of every architecture: no false alarms, and a wrong entry in architectures.py is found."""

import dataclasses

import pytest
import torch

from qwen_model.checkpoints import config as config_file
from qwen_model.checkpoints.architectures import ARCHITECTURES
from qwen_model.evaluation.comparison import make_reference as making
from qwen_model.evaluation.comparison.compare import compare_engine
from qwen_model.evaluation.comparison.errors import Error
from qwen_model.evaluation.comparison.make_reference import make_reference
from tests.qwen_model.evaluation.comparison.models import save_engine, save_model
from tests.qwen_model.model_files import hugging_face_model, random_prompt, save_hugging_face

DTYPES = ("float32", "float16", "bfloat16")
ROPE = {"rope_theta": 10000.0}
CASES = {
    "qwen": ("QWenLMHeadModel", {}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2-tied-one-kv-head": ("Qwen2ForCausalLM", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "llama": ("LlamaForCausalLM", {}),
    "llama-biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-dynamic": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, **ROPE}, "max_position_embeddings": 16},
    ),
    "qwen2-yarn": (
        "Qwen2ForCausalLM",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **ROPE}},
    ),
    "decicoder": ("DeciCoderForCausalLM", {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_no_false_alarms(case, seed, tmp_path):
    architecture, changes = CASES[case]
    model_dir = save_model(architecture, tmp_path / "model", seed, **changes)
    reference = make_reference(model_dir, random_prompt(20, seed), 3, DTYPES)
    assert reference.difference is None
    assert (reference.original is None) == (architecture in ("QWenLMHeadModel", "DeciCoderForCausalLM"))
    for dtype in DTYPES:
        options = {"max_input_len": 24, "max_output_len": 8}
        engine = save_engine(model_dir, tmp_path / dtype, dtype, **options)
        found = compare_engine(engine, reference, model_dir, "cpu")
        assert found.finding is None
        assert found.passed


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_checkpoint_in_half_precision(dtype, tmp_path):
    model = hugging_face_model("Qwen2ForCausalLM").to(getattr(torch, dtype))
    model_dir = save_hugging_face(model, tmp_path / "model")
    reference = make_reference(model_dir, random_prompt(20), 1, [dtype])
    assert reference.difference is None
    engine = save_engine(model_dir, tmp_path / "engine", dtype)
    for checkpoint in (model_dir, None):
        found = compare_engine(engine, reference, checkpoint, "cpu")
        assert found.passed
        assert found.passes.isolated[0]["embedding"] == Error(0.0, 0.0)


def weights(**names):
    def change(monkeypatch, architecture):
        entry = ARCHITECTURES[architecture]
        wrong = dataclasses.replace(entry, weights=dataclasses.replace(entry.weights, **names))
        monkeypatch.setitem(ARCHITECTURES, architecture, wrong)

    return change


def reading(change):
    """`change` of the configuration that is read from config.json."""

    def changed(monkeypatch, architecture):
        monkeypatch.setattr(making.ModelConfig, "from_model_dir", lambda folder: change(read(folder)))

    read = config_file.ModelConfig.from_model_dir
    return changed


def rotary(**values):
    return reading(lambda model: dataclasses.replace(model, rotary=dataclasses.replace(model.rotary, **values)))


QKV = ("self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj")
WRONG = {
    "gate and up": (weights(gate="mlp.up_proj", up="mlp.gate_proj"), {}, "mlp.gate_up", "gate and up were swapped"),
    "norms": (
        weights(input_norm="post_attention_layernorm", post_attention_norm="input_layernorm"),
        *({}, "input_norm", "the weight were that of layers.0.post_attention_norm"),
    ),
    "order": (weights(qkv=QKV), {"num_key_value_heads": 6}, "attention.qkv", "rows were in the order k, q, v"),
    "eps": (reading(lambda model: dataclasses.replace(model, norm_eps=1e-5)), {}, "input_norm", "eps were 1e-06, not"),
    "base": (rotary(base=1e6), {}, "attention.q", "the base of the rotary embedding were 10000, not 1e+06"),
    "part": (rotary(dim=6), {"hidden_size": 72}, "attention.q", "12 elements of each head were rotated, not 6"),
    "scaling": (
        rotary(scaling="linear", factor=3.0),
        *({}, "attention.q", "the rotary scaling 'linear' were missing"),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_entry_is_found(case, tmp_path, monkeypatch):
    change, options, name, reason = WRONG[case]
    model_dir = save_model("LlamaForCausalLM", tmp_path / "model", **options)
    change(monkeypatch, "LlamaForCausalLM")
    found = make_reference(model_dir, random_prompt(20), 1, ["float32"]).difference
    assert found is not None
    assert found.name == f"layers.0.{name}"
    assert reason in found.reason
