"""TensorRT engines beside a reference, on TensorRT, CUDA and plug-ins in NumPy: every result is compared."""

import pytest

from qwen_model.common.errors import QwenModelError
from qwen_model.evaluation.comparison.compare import compare_engine
from qwen_model.evaluation.comparison.make_reference import make_reference
from qwen_model.evaluation.comparison.reference import result_names
from tests import stand_ins
from tests.qwen_model.evaluation.comparison.models import save_engine
from tests.qwen_model.model_files import random_prompt
from tests.qwen_model.tensorrt_reference import ARCHITECTURES, save_model
from tests.stand_ins import numpy_plugins

VERSIONS = ["8.6.0", "10.14.1", "11.1.0"]


@pytest.fixture(params=VERSIONS)
def trt(request, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with stand_ins.installed(request.param) as module:
        yield module


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint of each architecture with its reference."""
    found = {}

    def make(architecture):
        if architecture not in found:
            model_dir = save_model(architecture, tmp_path_factory.mktemp("models") / "model")
            dtypes = ("float32", "float16", "bfloat16")
            found[architecture] = model_dir, make_reference(model_dir, random_prompt(20), 2, dtypes)
        return found[architecture]

    return make


def compared(made, architecture, folder, dtype="float32", **options):
    model_dir, reference = made(architecture)
    engine = save_engine(model_dir, folder / "engine", dtype, backend="tensorrt", **options)
    return compare_engine(engine, reference, model_dir)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_false_alarms(trt, made, architecture, tmp_path):
    found = compared(made, architecture, tmp_path)
    assert found.finding is None
    assert found.passed
    hidden = {name for name in result_names(found.config.model) if name.endswith("attention.q")}
    for errors in (*found.passes.isolated, *found.passes.chained):
        assert set(errors) == set(result_names(found.config.model)) - hidden


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(trt, made, dtype, tmp_path):
    if dtype == "bfloat16" and not hasattr(trt, "bfloat16"):
        pytest.skip("this TensorRT has no bfloat16")
    assert compared(made, "Qwen2ForCausalLM", tmp_path, dtype).passed


@pytest.mark.parametrize("disabled", ["rms_norm", "gemm", "rotary"])
def test_native_layers(trt, made, disabled, tmp_path):
    if disabled == "rotary" and trt.__version__.startswith("8."):
        with pytest.raises(QwenModelError, match="built with --disable-plugin rotary, and TensorRT 8"):
            compared(made, "Qwen3ForCausalLM", tmp_path, disable_plugins=[disabled])
        return
    assert compared(made, "Qwen3ForCausalLM", tmp_path, disable_plugins=[disabled]).passed


def test_a_prompt_with_a_rotary_table_of_its_own(trt, tmp_path):
    from tests.qwen_model import model_files

    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 16}
    model = model_files.hugging_face_model("LlamaForCausalLM", **sizes, rope_parameters=rope)
    model_dir = model_files.save_hugging_face(model, tmp_path / "model")
    reference = make_reference(model_dir, random_prompt(20), 2, ["float32"])
    engine = save_engine(
        model_dir, tmp_path / "engine", "float32", backend="tensorrt", max_input_len=24, max_output_len=8
    )
    assert compare_engine(engine, reference, model_dir).passed


def test_a_prompt_of_more_tokens_than_rows_of_logits(trt, made, tmp_path, monkeypatch):
    monkeypatch.setattr("qwen_model.backends.tensorrt.back_end.LOGIT_ROWS", 10)
    with pytest.raises(QwenModelError, match=r"a prompt of 20 tokens is too long for .*: give at most 10"):
        compared(made, "Qwen2ForCausalLM", tmp_path)


def interleaved(x, rows):
    half = rows.shape[-1] // 2
    cos, sin = rows[:, None, :half], rows[:, None, half:]
    turned = x.copy()
    turned[..., ::2] = x[..., ::2] * cos - x[..., 1::2] * sin
    turned[..., 1::2] = x[..., 1::2] * cos + x[..., ::2] * sin
    return turned


def test_a_fault_of_a_plugin_is_found(trt, made, tmp_path, monkeypatch):
    monkeypatch.setattr(numpy_plugins, "rotate", interleaved)
    found = compared(made, "LlamaForCausalLM", tmp_path)
    assert not found.passed
    assert found.finding.name == "layers.0.attention.k"
    assert "interleaved" in found.finding.reason


def test_a_fault_inside_of_attention_is_found_by_its_result(trt, made, tmp_path, monkeypatch):
    right = numpy_plugins.attend

    def unscaled(q, keys, values, positions):
        return right(q * q.shape[-1] ** 0.5, keys, values, positions)

    monkeypatch.setattr(numpy_plugins, "attend", unscaled)
    found = compared(made, "Qwen2ForCausalLM", tmp_path)
    assert found.finding.name == "layers.0.attention"
    assert "the softmax were not scaled" in found.finding.reason


def test_a_plan_of_another_checkpoint(trt, made, tmp_path):
    """The engine that shows results is right; the one that was given is not."""
    model_dir, reference = made("Qwen2ForCausalLM")
    from tests.qwen_model import model_files

    sizes = {"hidden_size": 128, "num_attention_heads": 4}
    other = model_files.save_hugging_face(
        model_files.hugging_face_model("Qwen2ForCausalLM", seed=9, **sizes), tmp_path / "other"
    )
    engine = save_engine(other, tmp_path / "engine", "float32", backend="tensorrt")
    found = compare_engine(engine, reference, model_dir)
    assert found.finding is None
    assert not found.passed


def test_the_checkpoint_is_needed(trt, made, tmp_path):
    model_dir, reference = made("Qwen2ForCausalLM")
    engine = save_engine(model_dir, tmp_path / "engine", "float32", backend="tensorrt")
    with pytest.raises(QwenModelError, match="give --model-dir"):
        compare_engine(engine, reference)
