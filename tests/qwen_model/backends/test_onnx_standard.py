"""Graphs of standard operators in ONNX Runtime on the CPU, beside the torch back end: logits and greedy tokens."""

import numpy as np
import pytest

import qwen_model
from qwen_model.engine.export import export_onnx
from tests.qwen_model import model_files
from tests.qwen_model.model_files import random_prompt
from tests.qwen_model.test_against_transformers import CASES

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from tests.qwen_model.onnx_runtime import OnnxModel  # noqa: E402

NEW_TOKENS = 64
REFERENCES = {
    "qwen": (model_files.qwen_v1, {}),
    "qwen-without-ntk-and-logn": (model_files.qwen_v1, {"use_dynamic_ntk": False, "use_logn_attn": False}),
    "qwen-rotates-half-a-head": (model_files.qwen_v1, {"rotary_pct": 0.5}),
    "decicoder": (model_files.decicoder, {}),
    "decicoder-one-kv-head": (model_files.decicoder, {"num_key_value_heads": 1}),
}


def save_checkpoint(case, folder):
    if case in REFERENCES:
        make, changes = REFERENCES[case]
        model, config = make(**changes)
        return model_files.save_reference(model, config, folder)
    architecture, changes = CASES[case]
    return model_files.save_hugging_face(model_files.hugging_face_model(architecture, **changes), folder)


@pytest.fixture(scope="module", params=[*REFERENCES, *CASES])
def pair(request, tmp_path_factory):
    """The exported model, checked by ONNX's checker, and the torch back end's session on the same weights."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = save_checkpoint(request.param, folder / "model")
    qwen_model.build_engine(
        checkpoint, output_dir=folder / "engine", dtype="float32", max_input_len=160, max_output_len=NEW_TOKENS
    )
    export_onnx(checkpoint, output=folder / "model.onnx", operators="standard")
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    return OnnxModel(folder / "model.onnx"), qwen_model.load_engine(folder / "engine", device="cpu")


# 64 tokens are Qwen v1's trained length, 48 that of the dynamic case.
@pytest.mark.parametrize("length", [1, 7, 64, 140])
def test_logits(pair, length):
    model, session = pair
    prompt = random_prompt(length, seed=length)
    expected = session.logits(prompt)
    assert np.abs(model.begin([prompt])[0] - expected).max() < 1e-4 * np.abs(expected).max()


def test_greedy_tokens_of_a_padded_batch(pair):
    model, session = pair
    prompts = [random_prompt(length, seed=200 + length) for length in (2, 40, 70)]
    expected = session.generate(prompts, max_new_tokens=NEW_TOKENS).outputs
    assert model.generate(prompts, NEW_TOKENS) == [output.output_ids for output in expected]


def test_a_prompt_in_two_parts(pair):
    """Several tokens after a past: the same logits as in one part."""
    model, session = pair
    prompt = random_prompt(30, seed=9)
    model.begin([prompt[:20]])
    logits = model.more([prompt[20:]])[0]
    expected = session.logits(prompt)[20:]
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packaged")
    qwen_model.build_engine(output_dir=folder / "engine", dtype="float32")
    return folder, qwen_model.load_engine(folder / "engine", device="cpu")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_packaged_model(dtype, packaged):
    """Its text; in float16, which ONNX Runtime has on a CPU, too, logits that differ by rounding."""
    folder, session = packaged
    export_onnx(output=folder / f"{dtype}.onnx", operators="standard", dtype=dtype)
    model = OnnxModel(folder / f"{dtype}.onnx")
    prompt = session.tokenizer.encode("def add(a, b):\n    return")
    expected = session.logits(prompt)
    tolerance = 1e-4 if dtype == "float32" else 0.02
    assert np.abs(model.begin([prompt])[0] - expected).max() < tolerance * np.abs(expected).max()
    if dtype == "float32":
        tokens = session.generate([prompt], max_new_tokens=NEW_TOKENS).outputs[0].output_ids
        assert model.generate([prompt], NEW_TOKENS)[0][: len(tokens)] == tokens


def test_bfloat16_is_what_the_standard_says(tmp_path):
    """ONNX Runtime runs no bfloat16 on a CPU; TensorRT does."""
    export_onnx(output=tmp_path / "model.onnx", operators="standard", dtype="bfloat16")
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
