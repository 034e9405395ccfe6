"""Layers that compute in 8 bits are read as the numbers that compressed-tensors and PyTorch's casts made of them."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_model import QwenModelError
from qwen_model.checkpoints.checkpoint import Checkpoint
from qwen_model.checkpoints.config import ModelConfig
from qwen_model.checkpoints.eight_bit_weight import eight_bit_format
from qwen_model.checkpoints.quantization_config import read_quantization
from qwen_model.checkpoints.weights import network_modules
from qwen_model.quantization.formats import chosen_formats
from tests.qwen_model.eight_bit_files import (
    FP8_METHODS,
    INPUT_SCALES,
    change_tensors,
    compressed_tensors_files,
    fp8_files,
)
from tests.qwen_model.quantized_files import Layout, save_layout

PROJECTIONS = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.output": ("self_attn.o_proj",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}
PRESETS = {
    "W8A8": eight_bit_format("int8", "token"),
    "W8A8 static": eight_bit_format("int8", "tensor"),
    "FP8": eight_bit_format("fp8", "tensor"),
    "FP8_DYNAMIC": eight_bit_format("fp8", "token"),
    "FP8_BLOCK": eight_bit_format("fp8", "token", 128),
}
DOWN, DOWN_ARGUMENT = "model.layers.1.mlp.down_proj", "model__layers__1__mlp__down_proj"


def opened(folder, framework="torch"):
    config = ModelConfig.from_model_dir(folder)
    checkpoint = Checkpoint(folder, framework)
    checkpoint.check(config)
    return checkpoint, config


def check_layers(folder, framework, expected, weight_format, input_scales):
    """Compare every layer with numbers [out, in] by the name of the checkpoint's layer, and with its format."""
    checkpoint, config = opened(folder, framework)
    formats, modules = checkpoint.formats(config), network_modules(config, "float32")
    assert len(formats) == 4 * config.num_layers
    for index in range(config.num_layers):
        for fused, sources in PROJECTIONS.items():
            name = f"layers.{index}.{fused}"
            numbers = torch.cat([expected[f"model.layers.{index}.{source}"] for source in sources]).numpy()
            weight = checkpoint.read_quantized(modules[name].weight)
            assert weight.format == formats[name] == weight_format
            np.testing.assert_array_equal(weight.dequantized(), numbers)
            np.testing.assert_array_equal(np.asarray(checkpoint.read(modules[name].weight)), numbers)
            scales = [INPUT_SCALES[source.rpartition(".")[2]] for source in sources]
            largest = pytest.approx(max(scales), rel=2**-8)
            assert weight.input_scale == (largest if weight_format.activation_scale == "tensor" else None)
            assert weight.codes.dtype == (np.int8 if weight_format.kind == "int8" else np.uint8)


@pytest.mark.parametrize("framework", ["torch", "numpy"])
@pytest.mark.parametrize("preset", PRESETS)
def test_files_of_compressed_tensors(tmp_path, preset, framework):
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    name, _, static = preset.partition(" ")
    folder = compressed_tensors_files(tmp_path / "files", name, static=bool(static))
    tensors = load_file(folder / "model.safetensors")
    expected = {}
    for scale_name in [name for name in tensors if name.endswith(".weight_scale")]:
        layer = scale_name.removesuffix(".weight_scale")
        scale = tensors[scale_name].float()
        expected[layer] = forward.dequantize(tensors[f"{layer}.weight"], scale, dtype=torch.float32)
    check_layers(folder, framework, expected, PRESETS[preset], INPUT_SCALES)


@pytest.mark.parametrize("framework", ["torch", "numpy"])
@pytest.mark.parametrize(
    ("method", "old_file"),
    [*((method, False) for method in FP8_METHODS), *((method, True) for method in FP8_METHODS if "modelopt" in method)],
)
def test_files_of_other_methods(tmp_path, method, old_file, framework):
    folder, expected = fp8_files(tmp_path / "files", method, old_file)
    static = method in ("autofp8 static", "modelopt FP8")
    in_blocks = method in ("block", "modelopt FP8_PB_WO")
    weight_format = eight_bit_format("fp8", "tensor" if static else "token", 128 if in_blocks else 0)
    check_layers(folder, framework, expected, weight_format, INPUT_SCALES)
    assert opened(folder)[0].has_cache_scales == old_file


def test_each_part_of_a_fused_layer_keeps_its_scale(tmp_path):
    """q, k and v have a scale each, which are repeated and not made one."""
    folder, _ = fp8_files(tmp_path / "files", "autofp8 dynamic")
    checkpoint, config = opened(folder)
    tensors = load_file(folder / "model.safetensors")
    weight = checkpoint.read_quantized(network_modules(config, "float32")["layers.0.attention.qkv"].weight)
    parts = [tensors[f"model.layers.0.self_attn.{name}_proj.weight_scale"].item() for name in "qkv"]
    np.testing.assert_array_equal(weight.scales[:, 0], np.repeat(np.float32(parts), [256, 128, 128]))
    codes = torch.cat([tensors[f"model.layers.0.self_attn.{name}_proj.weight"].view(torch.uint8) for name in "qkv"])
    np.testing.assert_array_equal(weight.codes, codes.numpy())


def test_zero_points_of_zeros_are_read_and_others_are_not(tmp_path):
    folder, _ = fp8_files(tmp_path / "files", "autofp8 static")
    change_tensors(folder, **{f"{DOWN_ARGUMENT}__weight_zero_point": torch.zeros(1, dtype=torch.int8)})
    checkpoint, config = opened(folder)
    spec = network_modules(config, "float32")["layers.1.mlp.down"].weight
    checkpoint.read_quantized(spec)
    change_tensors(folder, **{f"{DOWN_ARGUMENT}__weight_zero_point": torch.ones(1, dtype=torch.int8)})
    with pytest.raises(QwenModelError, match=r"down_proj\.weight_zero_point is not 0"):
        opened(folder)[0].read_quantized(spec)


@pytest.mark.parametrize("suffix", ["weight_scale", "input_scale"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_scales_that_cannot_be(tmp_path, suffix, value):
    folder, _ = fp8_files(tmp_path / "files", "autofp8 static")
    change_tensors(folder, **{f"{DOWN_ARGUMENT}__{suffix}": torch.tensor(value)})
    checkpoint, config = opened(folder)
    with pytest.raises(QwenModelError, match=r"model\.layers\.1\.mlp\.down_proj has scales that are not finite, or"):
        checkpoint.read_quantized(network_modules(config, "float32")["layers.1.mlp.down"].weight)


@pytest.mark.parametrize(
    ("suffix", "tensor", "message"),
    [
        ("weight_scale", None, r"down_proj\.weight is float8_e4m3fn, but .*down_proj\.weight_scale is missing"),
        ("input_scale", None, r"down_proj does not fit config\.json, which says: .*static.*and no input_scale"),
        (
            "weight_scale",
            torch.ones(2),
            r"down_proj does not fit config\.json, .*weight_scale \[2\] and an input_scale",
        ),
        ("weight_scale", torch.ones(1, dtype=torch.int32), r"down_proj\.weight_scale must be float16 or"),
        ("input_scale", torch.ones(2), r"down_proj\.input_scale must be one number, not \[2\]"),
        ("weight", torch.ones(256, 383).to(torch.float8_e4m3fn), r"weight must be \[256, 384\], not \[256, 383\]"),
        ("weight", torch.ones(256, 384, dtype=torch.int8), r"down_proj does not fit .*It has int8 weights"),
        ("weight", torch.ones(256, 384).to(torch.float8_e5m2), "not floating-point of 16, 32 or 64 bits: .*down_proj"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, suffix, tensor, message):
    folder, _ = fp8_files(tmp_path / "files", "autofp8 static")
    change_tensors(folder, **{f"{DOWN_ARGUMENT}__{suffix}": tensor})
    if message.startswith("not floating"):
        change_tensors(folder, **{f"{DOWN_ARGUMENT}__{name}": None for name in ("weight_scale", "input_scale")})
    with pytest.raises(QwenModelError, match=message) as error:
        opened(folder)
    assert len(str(error.value).splitlines()) == 1


def test_codes_of_nan(tmp_path):
    folder, _ = fp8_files(tmp_path / "files", "block")
    codes = load_file(folder / "model.safetensors")[f"{DOWN}.weight"].view(torch.uint8)
    codes[3, 5] = 0xFF
    change_tensors(folder, **{f"{DOWN_ARGUMENT}__weight": codes.view(torch.float8_e4m3fn)})
    checkpoint, config = opened(folder)
    with pytest.raises(QwenModelError, match="down_proj has numbers that are not finite"):
        checkpoint.read_quantized(network_modules(config, "float32")["layers.1.mlp.down"].weight)


def test_layers_that_are_computed_as_one_must_be_quantized_alike(tmp_path):
    folder, _ = fp8_files(tmp_path / "alike", "autofp8 dynamic")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj"
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.bfloat16)
    del tensors[f"{name}.weight_scale"]
    save_file(tensors, folder / "model.safetensors")
    checkpoint, config = opened(folder)
    with pytest.raises(QwenModelError, match=r"q_proj is quantized and .*k_proj is not"):
        checkpoint.formats(config)


def test_blocks_that_would_belong_to_two_layers(tmp_path, monkeypatch):
    """q has 192 outputs: its second block is half a block, and k would follow in the middle of it."""
    monkeypatch.setitem(fp8_files.__globals__["SIZES"], "hidden_size", 192)
    folder, expected = fp8_files(tmp_path / "files", "block")
    checkpoint, config = opened(folder)
    with pytest.raises(QwenModelError, match=r"q_proj has 192 outputs, which are no whole blocks of 128.*one layer"):
        checkpoint.formats(config)
    assert chosen_formats(checkpoint, config, "float16", "none") == {}
    numbers = checkpoint.read(network_modules(config, "float32")["layers.0.attention.qkv"].weight)
    parts = [expected[f"model.layers.0.self_attn.{name}_proj"] for name in "qkv"]
    np.testing.assert_array_equal(numbers.numpy(), torch.cat(parts).numpy())


WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
INPUTS = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}


def scheme(weights=(), inputs=(), **others):
    group = {"weights": {**WEIGHTS, **dict(weights)}, "input_activations": {**INPUTS, **dict(inputs)}, **others}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quant_method": "fp8", "fmt": "e5m2"}, "with fp8 of the fmt 'e5m2'"),
        ({"quant_method": "fp8", "activation_scheme": "x"}, "with fp8 with the activation_scheme 'x'"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, r"with fp8 in fp8 blocks of \[64, 64\]"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "with ModelOpt NVFP4"),
        ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, "with ModelOpt W4A16_AWQ"),
        ({"quant_method": "modelopt"}, "with ModelOpt None"),
        (scheme(output_activations=INPUTS), "that quantizes outputs in the format 'float-quantized'"),
        (scheme(input_activations=None), "of weights alone in the format 'float-quantized'"),
        (
            {**scheme(), "config_groups": {"group_0": {"weights": None, "input_activations": INPUTS}}},
            "with the weights None in the format",
        ),
        (scheme(inputs={"type": "int"}), "of 8 bits and 8 bits of weights and inputs"),
        (scheme(weights={"num_bits": 4}), "of 4 bits and 8 bits of weights and inputs"),
        (scheme(inputs={"symmetric": False}), "with zero points in the format"),
        (scheme(weights={"strategy": "group"}), "with the strategy 'group' of weights"),
        (scheme(weights={"strategy": "block", "block_structure": [64, 128]}), r"in fp8 blocks of \[64, 128\]"),
        (scheme(inputs={"strategy": "token", "dynamic": False}), "with the strategy 'token' of static inputs"),
        (scheme(inputs={"strategy": "channel"}), "with the strategy 'channel' of dynamic inputs"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_schemes_that_are_not_read_are_named(tmp_path, values, message):
    with pytest.raises(QwenModelError, match=message) as error:
        read_quantization(tmp_path, {"quantization_config": values})
    assert "which is not read here" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**scheme(), "ignore": ["lm_head", "re:.*("]}, r"'\.\*\(' of ignore is not a regular expression"),
        ({**scheme(), "ignore": "lm_head"}, "ignore must be a list of names of layers, not 'lm_head'"),
        (scheme(targets=["re:[a"]), r"'\[a' of targets is not a regular expression"),
        (scheme(targets="Linear"), "targets must be a list of names of layers, not 'Linear'"),
        ({**scheme(), "ignore": [1]}, r"ignore must be a list of names of layers, not \[1\]"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:[": {}}}, r"'\[' of dynamic is not a regular expression"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:*": {"bits": 8}}}, r"'\*' of dynamic is not a regular"),
    ],
)
def test_patterns_that_are_damaged(tmp_path, values, message):
    with pytest.raises(QwenModelError, match=message) as error:
        read_quantization(tmp_path, {"quantization_config": values})
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("shape", [(64, 191), (192, 64), (64, -192)])
def test_a_weight_shape_that_does_not_fit(tmp_path, shape):
    folder, _, _ = save_layout(tmp_path, Layout("compressed-tensors"))
    change_tensors(folder, **{f"{DOWN_ARGUMENT}__weight_shape": torch.tensor(shape)})
    checkpoint, config = opened(folder)
    with pytest.raises(QwenModelError, match=r"down_proj\.weight_shape must be \[64, 192\]"):
        checkpoint.formats(config)


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("value", [-1, 7, 100])
def test_an_order_of_inputs_of_one_number(tmp_path, group_size, value):
    """GPTQ's g_idx names the group of every input; only compressed-tensors fills it with -1 where there is none."""
    folder, _, _ = save_layout(tmp_path, Layout("gptq", group_size=group_size))
    order = torch.full((192,), value, dtype=torch.int32)
    change_tensors(folder, **{f"{DOWN_ARGUMENT}__g_idx": order})
    checkpoint, config = opened(folder)
    with pytest.raises(QwenModelError, match=r"down_proj\.g_idx is not supported: it must give each of"):
        checkpoint.formats(config)


def test_a_configuration_that_names_no_layer(tmp_path):
    """The weights are all in 16 bits, whatever config.json says."""
    _, folder, _ = save_layout(tmp_path, Layout("gptq"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": scheme()}))
    with pytest.raises(QwenModelError, match="has no layers that are quantized with compressed-tensors"):
        opened(folder)
