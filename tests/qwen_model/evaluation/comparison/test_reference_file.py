"""A reference in a file is what it was, and a wrong one is one clear line."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from qwen_model.common.errors import QwenModelError
from qwen_model.evaluation.comparison import reference_file
from qwen_model.evaluation.comparison.compare import check_prompt, compare_engine
from qwen_model.evaluation.comparison.errors import Error
from qwen_model.evaluation.comparison.make_reference import make_reference
from qwen_model.evaluation.comparison.reference import Finding
from qwen_model.evaluation.comparison.reference_file import read_reference, write_reference
from tests.qwen_model.evaluation.comparison.models import save_engine, save_model

PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_model("Qwen2ForCausalLM", tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def reference(model_dir):
    return make_reference(model_dir, PROMPT, 1, ["float32", "float16"])


@pytest.fixture(scope="module")
def engine_dir(model_dir, tmp_path_factory):
    return save_engine(model_dir, tmp_path_factory.mktemp("engines") / "engine", "float32")


def without_arrays(reference):
    return dataclasses.replace(reference, values=[], samples={})


def test_what_is_written_is_read(reference, tmp_path):
    finding = Finding("layers.0.mlp.down", 1, Error(0.5, float("inf")), 9.0, "its numbers are all zero")
    reference = dataclasses.replace(reference, difference=finding)
    write_reference(tmp_path / "file", reference)
    found = read_reference(tmp_path / "file")
    assert without_arrays(found) == without_arrays(reference)
    for ours, theirs in zip([*reference.values, reference.samples], [*found.values, found.samples], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            np.testing.assert_array_equal(theirs[name], value)


def test_an_engine_is_compared_with_a_file(reference, engine_dir, tmp_path):
    """Without the checkpoint: hypotheses would be computed with the engine's own weights."""
    write_reference(tmp_path / "file", reference)
    assert compare_engine(engine_dir, read_reference(tmp_path / "file"), device="cpu").passed


def test_a_file_is_written_whole_or_not_at_all(reference, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(QwenModelError, match="cannot be written"):
        write_reference(tmp_path / "folder" / "no" / "file", reference)
    assert list((tmp_path / "folder").iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        ({}, "is no file of reference values"),
        ({"format_version": 99}, "is of format 99, this version reads format 1"),
        ({"format_version": 1, "output": []}, "is damaged"),
        ("{", "is not JSON"),
    ],
)
def test_other_files(content, message, tmp_path):
    path = tmp_path / "file"
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        save_file({"x": np.zeros(1)}, path, {reference_file.FORMAT: text} if content else None)
    with pytest.raises(QwenModelError, match=message):
        read_reference(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": [3, 1, 4, 1, "5"]}, "tokens are not integers"),
        ({"prompt": [3, 1, 4, 1]}, "values are not those of the tokens"),
        ({"output": []}, "errors are not those of the steps"),
    ],
)
def test_parts_that_do_not_belong_together(reference, change, message, tmp_path):
    write_reference(tmp_path / "file", dataclasses.replace(reference, **change))
    with pytest.raises(QwenModelError, match=message):
        read_reference(tmp_path / "file")


def test_a_file_that_is_cut(reference, tmp_path):
    write_reference(tmp_path / "file", reference)
    (tmp_path / "cut").write_bytes((tmp_path / "file").read_bytes()[:5000])
    with pytest.raises(QwenModelError, match="cannot be read as safetensors"):
        read_reference(tmp_path / "cut")


def test_another_prompt_or_number_of_steps(reference):
    check_prompt(reference, PROMPT, 1)
    check_prompt(reference, None, None)
    with pytest.raises(QwenModelError, match="another prompt: 5 tokens"):
        check_prompt(reference, [3, 1], None)
    with pytest.raises(QwenModelError, match="has 1 decode steps, not 2"):
        check_prompt(reference, None, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 6}, "its num_kv_heads is 6, not 2"),
        ({"seed": 1}, "the reference is of other weights"),
    ],
)
def test_another_model(reference, change, message, tmp_path):
    model_dir = save_model("Qwen2ForCausalLM", tmp_path / "model", **change)
    engine = save_engine(model_dir, tmp_path / "engine", "float32")
    with pytest.raises(QwenModelError, match=message):
        compare_engine(engine, reference, device="cpu")


def test_another_type(reference, model_dir, tmp_path):
    engine = save_engine(model_dir, tmp_path / "engine", "bfloat16")
    with pytest.raises(QwenModelError, match="no errors of PyTorch in bfloat16"):
        compare_engine(engine, reference, device="cpu")


def test_too_long(reference, model_dir, tmp_path):
    engine = save_engine(model_dir, tmp_path / "engine", "float32", max_input_len=4)
    with pytest.raises(QwenModelError, match="exceed the engine's 4 tokens of input"):
        compare_engine(engine, reference, device="cpu")
