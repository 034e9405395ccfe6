"""Models in other forms than a 16-bit Hugging Face checkpoint are refused by name, before anything is read of them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import qwen_model
from qwen_model import QwenModelError
from tests.qwen_model.model_files import DIMENSIONS

CONFIG = {"architectures": ["Qwen2ForCausalLM"], **DIMENSIONS}


def build(model_dir, tmp_path):
    return qwen_model.build_engine(model_dir, output_dir=tmp_path / "engine")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["qwen2.5-7b-q4_k_m.gguf"], "is a GGUF model"),
        (["config.json", "rank0.safetensors", "rank1.safetensors"], "converted for TensorRT-LLM"),
        (["config.json", "rank0.engine"], "a TensorRT-LLM engine"),
        (
            ["config.ini", "model.wte.bin", "model.layers.0.input_layernorm.weight.bin"],
            "converted for FasterTransformer",
        ),
        (["model.layers.0.attention.dense.weight.0.bin"], "converted for FasterTransformer"),
        (["1-gpu/config.ini"], "converted for FasterTransformer"),
        (["adapter_config.json", "adapter_model.safetensors"], "is a LoRA adapter.*merge_and_unload"),
        (["params.json", "consolidated.00.pth"], "in Meta's or Mistral's own form"),
        (["config.json", "tf_model.h5"], "is a TensorFlow checkpoint"),
        (["config.json", "flax_model.msgpack"], "is a Flax checkpoint"),
        (["model.onnx"], "is an ONNX model"),
        (["snapshots/0123abc/config.json"], "is a cache of the Hugging Face Hub.*folder in snapshots/"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_forms_that_are_known_by_a_file(tmp_path, files, message):
    for name in files:
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_text("{}")
    with pytest.raises(QwenModelError, match=message) as error:
        build(tmp_path / "model", tmp_path)
    assert "which is not read here" in str(error.value)


def test_files_beside_a_checkpoint_are_let_be(model_dir, tmp_path):
    for path in model_dir.iterdir():
        (tmp_path / path.name).symlink_to(path)
    for name in ("model-q4_k_m.gguf", "consolidated.safetensors", "tf_model.h5", "model.onnx"):
        (tmp_path / name).write_text("")
    assert qwen_model.build_engine(tmp_path, output_dir=tmp_path.parent / "engine").weight_bytes > 0


def test_an_engine_in_place_of_a_checkpoint(engine_dir, tmp_path):
    with pytest.raises(QwenModelError, match=r"is an engine of qwen_model .* that it was made from"):
        build(engine_dir, tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": {"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}}, "with fp8 of the fmt"),
        ({"config.json": {"compression_config": {"quant_method": "sparse"}}}, "quantized with sparse"),
        ({"quantize_config.json": {"bits": 2, "group_size": 128, "desc_act": False}}, "with GPTQ of 2 bits"),
        ({"quant_config.json": {"w_bit": 3, "q_group_size": 128, "zero_point": True}}, "with AWQ of 3 bits"),
        ({"hf_quant_config.json": {"quantization": {"quant_algo": "NVFP4"}}}, "quantized with ModelOpt NVFP4"),
        ({"hf_quant_config.json": {"quantization": None}}, "quantized with ModelOpt"),
    ],
    ids=str,
)
def test_quantized_checkpoints_that_are_not_read_are_named(tmp_path, files, message):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps({**CONFIG, **values} if name == "config.json" else values))
    with pytest.raises(QwenModelError, match=message) as error:
        build(tmp_path, tmp_path)
    assert "which is not read here" in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qweight", "GPTQ or AWQ"),
        ("weight_packed", "compressed-tensors"),
        ("weight_scale_inv", "block-scaled FP8"),
        ("weight_scale", "compressed-tensors or ModelOpt"),
        ("SCB", "bitsandbytes"),
    ],
)
def test_tensors_that_only_quantized_checkpoints_have(model_dir, tmp_path, name, message):
    """Where no configuration says so."""
    (tmp_path / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    tensors = load_file(model_dir / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors[f"model.layers.0.mlp.up_proj.{name}"] = torch.zeros(4, dtype=torch.int32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(QwenModelError, match=rf"quantized with {message} \(it has .*mlp\.up_proj\.{name}.*says how"):
        build(tmp_path, tmp_path)


def test_what_is_no_folder(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for given, message in (
        ("Qwen/Qwen2.5-7B", r"name on the Hugging Face Hub.*hf download Qwen/Qwen2\.5-7B --local-dir"),
        (tmp_path / "nothing", "nothing is not a folder; --model-dir takes"),
        (tmp_path / "model.gguf", r"model\.gguf is a GGUF file"),
        (model_dir / "model.safetensors", r"model\.safetensors is a file: give the folder"),
        (tmp_path / ("x" * 300), "cannot be read: File name too long"),
        ("zero\0byte", "cannot be read: embedded null byte"),
    ):
        with pytest.raises(QwenModelError, match=message):
            build(given, tmp_path)
