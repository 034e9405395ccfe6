"""Checkpoints that compute in 8 bits: written here, and read by this package and by transformers with their numbers."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import qwen_model
from qwen_model import quantize_checkpoint
from qwen_model.interface.engine_config import EngineConfig
from tests.qwen_model.conftest import save_byte_tokenizer
from tests.qwen_model.model_files import hugging_face_model, random_prompt, save_hugging_face
from tests.qwen_model.quantization.test_smoothing import MODELS
from tests.qwen_model.quantized_files import SIZES

TEXTS = "".join(f"{number} is a number, and so is {number * number}.\n" for number in range(100))
OPTIONS = {
    "smoothquant": {"quantization": "smoothquant"},
    "smoothquant auto per channel": {"quantization": "smoothquant", "alpha": "auto", "per_channel": True},
    "smoothquant per token and channel": {"quantization": "smoothquant", "per_token": True, "per_channel": True},
    "smoothquant per token": {"quantization": "smoothquant", "per_token": True, "alpha": "none"},
    "fp8": {"quantization": "fp8"},
    "fp8 static": {"quantization": "fp8"},
}
HEADS = {
    "int4, int8 head": {"group_size": 32, "head_quantization": "int8"},
    "int4 activation-aware": {"group_size": 32, "activation_aware": True},
    "smoothquant, int8 head": {"quantization": "smoothquant", "per_token": True, "head_quantization": "int8"},
}


def outliers(model):
    """Make some inputs fifty times larger than others, as in large models."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight[::16] *= 50
            layer.mlp.gate_proj.weight[:, ::16] /= 50
            layer.mlp.up_proj.weight[:, ::16] /= 50
    return model


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def plain_dir(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    model = outliers(hugging_face_model("Qwen2ForCausalLM", seed=7, **SIZES)).to(getattr(torch, request.param))
    (folder / "texts.txt").write_text(TEXTS)
    return save_byte_tokenizer(save_hugging_face(model, folder))


def settings(name, plain_dir):
    """Options with the texts, where they are calibrated."""
    options = {**OPTIONS, **HEADS}[name]
    calibrated = name == "fp8 static" or options.get("activation_aware") or "smoothquant" in name
    calibrated = calibrated and options.get("alpha") != "none"
    return {**options, "calibration": plain_dir / "texts.txt"} if calibrated else options


def engine_of(folder, engine_dir, **options):
    qwen_model.build_engine(
        folder, output_dir=engine_dir, dtype="float32", max_batch_size=1, max_input_len=60, **options
    )
    config = dataclasses.replace(EngineConfig.read(engine_dir), end_token_ids=())
    config.write(engine_dir)
    return qwen_model.load_engine(engine_dir, device="cpu")


@pytest.mark.parametrize("name", [*OPTIONS, *HEADS])
def test_transformers_computes_the_same(tmp_path, plain_dir, name):
    """But for numbers that a rounding error moves to the next code; per token, its int8 codes are of other steps.

    Those are of a token's largest number divided by 127.5, ours and vLLM's by 127.
    """
    pytest.importorskip("compressed_tensors")
    quantize_checkpoint(plain_dir, output_dir=tmp_path / "out", **settings(name, plain_dir))
    session = engine_of(tmp_path / "out", tmp_path / "engine")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    prompt = random_prompt(40, seed=3)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0].float().numpy()
        tokens = model.generate(
            torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    errors = np.abs(session.logits(prompt) - expected).max(1) / np.abs(expected).max()
    assert np.median(errors) < (0.1 if "per token" in name or name == "smoothquant, int8 head" else 1e-5)
    assert session.generate(prompt, max_new_tokens=16).outputs[0].output_ids == tokens[0, 40:].tolist()


def check_as_built(plain_dir, work, options):
    """An engine of the written checkpoint has what one that is quantized as it is built has."""
    written = quantize_checkpoint(plain_dir, output_dir=work / "out", **options)
    build = {"quantization": "int4", "head_quantization": "none", **options}
    summary = qwen_model.build_engine(
        plain_dir, output_dir=work / "expected", dtype="float32", max_batch_size=1, **build
    )
    qwen_model.build_engine(written.output_dir, output_dir=work / "engine", dtype="float32", max_batch_size=1)
    for path in sorted((work / "expected" / "weights").iterdir()):
        tensors, others = load_file(path), load_file(work / "engine" / "weights" / path.name)
        assert tensors.keys() == others.keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, others[key]), key
    assert summary.weights.relative_errors == pytest.approx(written.weights.relative_errors, rel=1e-3)


@pytest.mark.parametrize("name", [*OPTIONS, *HEADS])
@pytest.mark.parametrize("plain_dir", ["float32"], indirect=True)  # to which scales and norms are not rounded
def test_as_an_engine_quantized_in_the_same_way(tmp_path, plain_dir, name):
    check_as_built(plain_dir, tmp_path, settings(name, plain_dir))


@pytest.mark.parametrize("model", ["qwen3", "llama, biases", "qwen", "decicoder"])
def test_other_architectures(tmp_path, model):
    plain = save_byte_tokenizer(MODELS[model](tmp_path / "plain"))
    (tmp_path / "texts").write_text(TEXTS)
    check_as_built(plain, tmp_path, {"quantization": "smoothquant", "calibration": tmp_path / "texts"})


def test_a_tied_head_is_written_beside_the_embedding(tmp_path):
    plain = save_byte_tokenizer(
        save_hugging_face(hugging_face_model("Qwen2ForCausalLM", seed=7, tie_word_embeddings=True, **SIZES), tmp_path)
    )
    for stored_as in ("compressed-tensors", "gptq"):
        out = tmp_path / stored_as
        quantize_checkpoint(plain, output_dir=out, group_size=32, head_quantization="int8", stored_as=stored_as)
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
        found = qwen_model.build_engine(out, output_dir=tmp_path / f"{stored_as} engine", max_batch_size=1)
        expected = qwen_model.build_engine(
            plain, output_dir=tmp_path / "expected", max_batch_size=1, quantization="int4", group_size=32
        )
        assert found.config.weight_formats == expected.config.weight_formats
        names = [path.name for path in (tmp_path / "expected" / "weights").iterdir()]
        for name in names:
            tensors = load_file(tmp_path / "expected" / "weights" / name)
            others = load_file(tmp_path / f"{stored_as} engine" / "weights" / name)
            assert all(torch.equal(tensor, others[key]) for key, tensor in tensors.items())


@pytest.mark.parametrize("plain_dir", ["float32"], indirect=True)
def test_commands(tmp_path, plain_dir, capsys, caplog):
    from qwen_model import build, quantize

    texts, out = str(plain_dir / "texts.txt"), str(tmp_path / "out")
    smoothquant = ["--quantization", "smoothquant", "--per-channel", "--alpha", "auto"]
    quantize.main(["--model-dir", str(plain_dir), "--output-dir", out, "--calibration", texts])
    assert "8 x int8, a scale per output, x per tensor" in capsys.readouterr().out
    assert not caplog.messages
    quantize.main(["--model-dir", str(plain_dir), "--output-dir", f"{out}2", *smoothquant, "--per-token"])
    assert "8 x int8, a scale per output, x per token" in capsys.readouterr().out
    assert "calibrated on the packaged model's held-out text" in caplog.text
    build.main(["--model-dir", str(plain_dir), "--plan", "--quantization", "fp8"])
    assert "8 x fp8, a scale per output, x per token" in capsys.readouterr().out
    for alpha in ("half", "1.5", "nan"):
        with pytest.raises(SystemExit):
            build.main(["--quantization", "smoothquant", "--alpha", alpha])
        assert "expected a number from 0 to 1, auto or none" in capsys.readouterr().err
