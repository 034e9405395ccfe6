"""Quantized checkpoints that are written here are read by this package and by transformers, with the same numbers."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import qwen_model
from qwen_model import QwenModelError, quantize_checkpoint
from qwen_model.checkpoints.checkpoint import Checkpoint
from qwen_model.checkpoints.config import ModelConfig
from qwen_model.checkpoints.weights import weight_groups
from qwen_model.engine import quantize as engine_quantize
from qwen_model.interface.engine_config import EngineConfig
from tests.qwen_model.conftest import save_byte_tokenizer
from tests.qwen_model.model_files import hugging_face_model, random_prompt, save_hugging_face
from tests.qwen_model.quantized_files import SIZES

OPTIONS = {
    "int4": {"group_size": 32},
    "int4 zero points": {"group_size": 64, "symmetric": False},
    "int4 one group": {"group_size": -1},
    "int8": {"quantization": "int8"},
}


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def plain_dir(request, tmp_path_factory):
    model = hugging_face_model("Qwen2ForCausalLM", seed=7, **SIZES).to(getattr(torch, request.param))
    folder = save_hugging_face(model, tmp_path_factory.mktemp("plain"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 301}))
    return save_byte_tokenizer(folder)


def opened(folder):
    config = ModelConfig.from_model_dir(folder)
    checkpoint = Checkpoint(folder)
    checkpoint.check(config)
    return checkpoint, config


@pytest.mark.parametrize("stored_as", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_as_an_engine_quantized_in_the_same_way(tmp_path, plain_dir, stored_as, options):
    """Every packed tensor of the engine is the same; the head is as the checkpoint has it."""
    summary = quantize_checkpoint(plain_dir, output_dir=tmp_path / "new" / "out", stored_as=stored_as, **options)
    assert summary.output_dir == tmp_path / "new" / "out"
    build = {"max_batch_size": 1, "dtype": "float32"}
    engine = qwen_model.build_engine(
        plain_dir,
        output_dir=tmp_path / "expected",
        head_quantization="none",
        **{"quantization": "int4", **options},
        **build,
    )
    found = qwen_model.build_engine(summary.output_dir, output_dir=tmp_path / "engine", **build)
    scale_dtype = ModelConfig.from_model_dir(plain_dir).dtype
    expected = {
        name: dataclasses.replace(each, scale_dtype=scale_dtype) for name, each in engine.config.weight_formats.items()
    }
    assert found.config.weight_formats == expected
    assert found.config.end_token_ids == engine.config.end_token_ids
    if scale_dtype == "float16":  # the type of scales of a float32 engine, too
        for path in sorted((tmp_path / "expected" / "weights").iterdir()):
            tensors, others = load_file(path), load_file(tmp_path / "engine" / "weights" / path.name)
            assert tensors.keys() == others.keys()
            assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    assert (summary.output_dir / "tokenizer.json").is_file()


def test_shards(tmp_path, plain_dir, monkeypatch):
    one = quantize_checkpoint(plain_dir, output_dir=tmp_path / "one", group_size=32)
    monkeypatch.setattr(engine_quantize, "SHARD_BYTES", one.weight_bytes // 3)
    quantize_checkpoint(plain_dir, output_dir=tmp_path / "several", group_size=32)
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "several").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == one.weight_bytes
    for (checkpoint, config), (other, _) in [(opened(tmp_path / "one"), opened(tmp_path / "several"))]:
        for spec in (spec for group in weight_groups(config, "float32") for spec in group.specs):
            assert torch.equal(checkpoint.read(spec), other.read(spec))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_transformers_generates_the_same_tokens(tmp_path, plain_dir, options):
    pytest.importorskip("compressed_tensors")
    quantize_checkpoint(plain_dir, output_dir=tmp_path / "out", **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    qwen_model.build_engine(
        tmp_path / "out", output_dir=tmp_path / "engine", dtype="float32", max_batch_size=1, max_input_len=60
    )
    config = dataclasses.replace(EngineConfig.read(tmp_path / "engine"), end_token_ids=())
    config.write(tmp_path / "engine")
    session = qwen_model.load_engine(tmp_path / "engine", device="cpu")
    prompt = random_prompt(40, seed=3)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0].float().numpy()
        tokens = model.generate(
            torch.tensor([prompt]), max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    np.testing.assert_allclose(session.logits(prompt), expected, atol=2e-4, rtol=1e-4)
    assert session.generate(prompt, max_new_tokens=32).outputs[0].output_ids == tokens[0, 40:].tolist()


def test_compressed_tensors_unpacks_the_same_codes(tmp_path, plain_dir):
    """The library's own unpacking of each layer, with zero points."""
    packing = pytest.importorskip("compressed_tensors.compressors")
    quantize_checkpoint(plain_dir, output_dir=tmp_path / "out", group_size=64, symmetric=False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    checkpoint, config = opened(tmp_path / "out")
    for group in weight_groups(config, "float32"):
        for name in checkpoint.formats(config):
            if name not in group.modules:
                continue
            weight = checkpoint.read_quantized(group.modules[name].weight)
            rows = 0
            for source in group.modules[name].weight.sources:
                prefix = source.name.removesuffix("weight")
                codes = packing.unpack_from_int32(tensors[f"{prefix}weight_packed"], 4, torch.Size(source.shape))
                part = slice(rows, rows + source.shape[0])
                np.testing.assert_array_equal(codes.numpy().astype(int) + 8, weight.codes[part])
                groups = (source.shape[0], weight.scales.shape[1])
                zeros = packing.unpack_from_int32(
                    tensors[f"{prefix}weight_zero_point"], 4, torch.Size(groups), packed_dim=0
                )
                np.testing.assert_array_equal(zeros.numpy().astype(int) + 8, weight.zeros[part])
                rows = part.stop


def test_wrong_arguments_change_nothing(tmp_path, plain_dir):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    (tmp_path / "file").write_text("")
    done = quantize_checkpoint(plain_dir, output_dir=tmp_path / "done", group_size=32).output_dir
    for arguments, message in (
        ({"output_dir": tmp_path / "full"}, "full already exists and is not empty"),
        ({"output_dir": tmp_path / "file"}, "file already exists and is not a folder"),
        ({"output_dir": tmp_path / "file" / "out"}, "is a file, not a folder"),
        ({"output_dir": plain_dir}, "already exists and is not empty"),
        ({"stored_as": "awq"}, "format must be one of compressed-tensors, gptq, not 'awq'"),
        ({"quantization": "int3"}, "quantization must be one of int8, int4, smoothquant, fp8, not 'int3'"),
        ({"quantization": "fp8", "stored_as": "gptq"}, "fp8 is written as compressed-tensors, not as gptq"),
        (
            {"quantization": "int4", "per_token": True},
            r"per_token \(--per-token\) is for quantization smoothquant",
        ),
        ({"quantization": "fp8", "alpha": 0.5}, r"alpha \(--alpha\) is for quantization smoothquant, not 'fp8'"),
        ({"quantization": "smoothquant", "alpha": 2.0}, "alpha must be 0 to 1, auto or none, not 2.0"),
        ({"quantization": "smoothquant", "activation_aware": True}, "is for quantization int8 or int4, not 'smooth"),
        ({"quantization": "int4", "calibration": "texts"}, r"calibration \(--calibration\) is for activation_aware"),
        ({"quantization": "smoothquant", "calibration": "nothing"}, "nothing cannot be read"),
        ({"quantization": "int8", "group_size": 32}, "group_size .* is for quantization int4, not 'int8'"),
        ({"group_size": 128}, "inputs, which are no groups of 128"),
        ({"model_dir": done}, "done is quantized already, with compressed-tensors"),
    ):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(QwenModelError, match=message):
            quantize_checkpoint(**{"model_dir": plain_dir, "output_dir": tmp_path / "out", **arguments})
        assert sorted(tmp_path.rglob("*")) == before


def test_an_interruption_leaves_nothing(tmp_path, plain_dir):
    def interrupt(phase, done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(plain_dir, output_dir=tmp_path / "new" / "out", group_size=32, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled(tmp_path, plain_dir):
    (tmp_path / "out").mkdir()
    quantize_checkpoint(plain_dir, output_dir=tmp_path / "out", group_size=32)
    assert (tmp_path / "out" / "config.json").is_file()
