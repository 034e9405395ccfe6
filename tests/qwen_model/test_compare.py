"""The command `qwen-model compare`: exit status, files, messages."""

import dataclasses
import json

import pytest

from qwen_model import build_engine, compare, quantize
from qwen_model.checkpoints.architectures import ARCHITECTURES
from qwen_model.packaged_model import packaged_model_dir
from tests.qwen_model.evaluation.comparison.models import save_engine

IDS = ["--input-ids", "5,90,7,1000"]


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory):
    return str(save_engine(None, tmp_path_factory.mktemp("compare") / "engine", "float16"))


def run(*arguments):
    """The exit status."""
    try:
        compare.main([*arguments])
    except SystemExit as stopped:
        return stopped.code or 0
    return 0


def test_a_right_engine(engine_dir, tmp_path, capsys):
    output = tmp_path / "errors.json"
    assert run("--engine-dir", engine_dir, *IDS, "--until-step", "2", "--device", "cpu", "--output", str(output)) == 0
    text = capsys.readouterr().out
    assert "No operation is off" in text
    assert "decode, the worst of 2 steps" in text
    assert text.count("layer 5") == 2
    found = json.loads(output.read_text())
    assert found["passed"]
    assert found["prompt"] == [5, 90, 7, 1000]
    assert len(found["errors"]["engine"]["isolated"]) == 3
    assert found["errors"]["pytorch"]["chained"][0]["lm_head"]["rms"] > 0


def test_a_wrong_engine(engine_dir, tmp_path, capsys):
    """Its weights were changed after it was built."""
    import shutil

    from safetensors.torch import load_file, save_file

    wrong = shutil.copytree(engine_dir, tmp_path / "engine")
    path = wrong / "weights" / "layer_003.safetensors"
    tensors = load_file(path)
    gate_up = tensors["layers.3.mlp.gate_up.weight"]
    tensors["layers.3.mlp.gate_up.weight"] = gate_up.roll(len(gate_up) // 2, 0)
    save_file(tensors, path)
    output = tmp_path / "errors.json"
    assert run("--engine-dir", str(wrong), *IDS, "--device", "cpu", "--output", str(output)) == 1
    text = capsys.readouterr().out
    assert "off: layers.3.mlp.gate_up in the prompt" in text
    assert "gate and up were swapped" in text
    assert json.loads(output.read_text())["finding"]["name"] == "layers.3.mlp.gate_up"


def test_a_wrong_table(tmp_path, monkeypatch, capsys):
    """Whoever adds an architecture and mixes up two names finds them."""
    entry = ARCHITECTURES["Qwen2ForCausalLM"]
    names = dataclasses.replace(entry.weights, gate="mlp.up_proj", up="mlp.gate_proj")
    monkeypatch.setitem(ARCHITECTURES, "Qwen2ForCausalLM", dataclasses.replace(entry, weights=names))
    engine = save_engine(None, tmp_path / "engine", "float32")
    assert run("--engine-dir", str(engine), *IDS, "--device", "cpu") == 1
    said = "off: layers.0.mlp.gate_up in the prompt, where Qwen2ForCausalLM of transformers"
    text = capsys.readouterr().out
    assert said in text
    assert "it computes as if gate and up were swapped" in text
    assert run("--save-reference", str(tmp_path / "file"), *IDS) == 1
    assert said in capsys.readouterr().out


def test_a_saved_reference(engine_dir, tmp_path, capsys):
    file = str(tmp_path / "reference")
    model = ["--model-dir", str(packaged_model_dir())]
    assert run("--save-reference", file, "import os", *model, "--until-step", "1") == 0
    assert run("--reference", file, "import os", "--engine-dir", engine_dir, "--device", "cpu") == 0
    assert "No operation is off" in capsys.readouterr().out
    assert run("--reference", file, "import re", "--engine-dir", engine_dir) == 2
    assert "another prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input-ids", "1,99999"], "tokens from 0 to 5119: 99999 is not"),
        (["--input-ids", "x"], "takes integers"),
        (["--until-step", "-1"], "0 or more"),
        (["--engine-dir", "nothing"], "nothing is not an engine"),
        (["--save-reference", "a", "--reference", "b"], "--save-reference takes neither"),
        (["text", "--input-ids", "1"], "not both"),
        (["--picture", "x.gif"], "--picture"),
        (["--input-ids", ",".join(["1"] * 41)], "exceed the engine's 40 tokens of input"),
        (["--model-dir", "nothing"], "nothing"),
        (["--input-ids", ""], "there is none"),
        (["--output", "no/folder.json"], "there is no folder no"),
        (["--output", "."], ". cannot be written: it is a folder"),
        (["--save-reference", "."], ". cannot be written: it is a folder"),
        (["--save-reference", "a", "--output", "b.json"], "neither --output nor --picture"),
    ],
)
def test_wrong_use(engine_dir, arguments, message, capsys):
    engine = [] if "--engine-dir" in arguments or "--save-reference" in arguments else ["--engine-dir", engine_dir]
    assert run(*engine, *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kv_cache_dtype": "int8"},
            "the engine's key-value cache has int8, beside whose error no other would be seen",
        ),
        ({"max_batch_size": 1, "max_num_tokens": 2}, "tokens is more than the engine's steps of 2"),
    ],
)
def test_engines_that_are_not_compared(tmp_path, options, message, capsys):
    engine = save_engine(None, tmp_path / "engine", "float16", **options)
    assert run("--engine-dir", str(engine), *IDS) == 2
    assert message in capsys.readouterr().err


def test_quantized_weights_are_compared_with_the_same_weights(tmp_path, capsys):
    """The reference is of the quantized checkpoint, dequantized; the checkpoint before quantization is refused."""
    checkpoint, engine = tmp_path / "checkpoint", tmp_path / "engine"
    quantize.main(["--output-dir", str(checkpoint), "--quantization", "int4", "--group-size", "32"])
    build_engine(checkpoint, output_dir=engine, dtype="float32")
    common = ["--engine-dir", str(engine), *IDS, "--until-step", "1", "--device", "cpu"]
    assert run(*common, "--model-dir", str(checkpoint)) == 0
    assert "checked against nothing: weights are quantized" in capsys.readouterr().out
    assert run(*common) == 2
    assert "quantized (int4, groups of 32), and those of" in capsys.readouterr().err
    build_engine(checkpoint, output_dir=tmp_path / "head", dtype="float32", head_quantization="int8")
    assert run("--engine-dir", str(tmp_path / "head"), *IDS, "--model-dir", str(checkpoint), "--device", "cpu") == 2
    assert "output projection was quantized by build" in capsys.readouterr().err


def test_the_picture(engine_dir, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "errors.svg"
    assert run("--engine-dir", engine_dir, *IDS, "--device", "cpu", "--picture", str(path)) == 0
    assert path.read_text().lstrip().startswith("<?xml")
