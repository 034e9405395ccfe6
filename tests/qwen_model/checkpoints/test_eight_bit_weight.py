"""Weights of layers whose x is quantized, too: their numbers, formats and tensors in an engine."""

import dataclasses

import numpy as np
import pytest
import torch

from qwen_model import QwenModelError
from qwen_model.checkpoints.config import ModelConfig
from qwen_model.checkpoints.eight_bit_weight import (
    EightBitWeight,
    e4m3_codes,
    e4m3_numbers,
    eight_bit_format,
    joined,
)
from qwen_model.checkpoints.module_weights import WeightFormat
from qwen_model.checkpoints.weights import network_modules
from qwen_model.interface.memory import weight_bytes
from qwen_model.interface.weight_formats import formats_as_json, formats_from_json
from qwen_model.packaged_model import packaged_model_dir

FORMATS = {
    "int8, a scale per output, x per token": eight_bit_format("int8", "token"),
    "int8, a scale per output, x per tensor": eight_bit_format("int8", "tensor"),
    "fp8, a scale per output, x per token": eight_bit_format("fp8", "token"),
    "fp8, a scale per output, x per tensor": eight_bit_format("fp8", "tensor"),
    "fp8, blocks of 128 x 128, x per token": eight_bit_format("fp8", "token", 128),
}


def random_codes(kind, shape, seed=0):
    codes = np.random.default_rng(seed).integers(-127, 128, shape, dtype=np.int8)
    return codes if kind == "int8" else codes.view(np.uint8) & 0xBF  # no NaN


def test_e4m3_is_what_pytorch_has():
    codes = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(e4m3_numbers(), codes.view(torch.float8_e4m3fn).float().numpy())
    rng = np.random.default_rng(0)
    numbers = (rng.standard_normal(10000) * 2.0 ** rng.integers(-14, 12, 10000)).astype(np.float32)
    finite = e4m3_numbers()[np.isfinite(e4m3_numbers())]
    between = (np.sort(finite)[1:] + np.sort(finite)[:-1]) / 2
    numbers = np.concatenate([numbers, finite, between, np.float32([-0.0, 1e30, -1e30])])
    expected = torch.from_numpy(numbers).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    np.testing.assert_array_equal(e4m3_codes(numbers), expected.numpy())


@pytest.mark.parametrize("text", FORMATS)
def test_formats_have_a_text_and_are_kept_by_engines(text):
    weight_format = FORMATS[text]
    assert weight_format.text == text
    written = formats_as_json({"layers.0.mlp.down": weight_format})
    assert formats_from_json(written) == {"layers.0.mlp.down": weight_format}


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "fp8", "activation": "int8"},
        {"kind": "int4", "activation": "int4"},
        {"group_size": 64},
        {"activation_scale": ""},
        {"activation_scale": "row"},
        {"layout": 2},
        {"scale_dtype": "float16"},
        {"symmetric": False},
        {"permuted": True},
        {"activation": None},
        {"group_size": 128, "activation_scale": "tensor"},
        {"kind": ["fp8"]},
    ],
)
def test_other_formats_are_not_read(change):
    (written,) = formats_as_json({"layers.0.mlp.down": FORMATS["fp8, a scale per output, x per token"]})
    with pytest.raises(QwenModelError, match="are not read by this version"):
        formats_from_json([{**written, **change}])


def test_weights_of_int8_alone_have_no_scale_of_x():
    written = formats_as_json({"lm_head": WeightFormat("int8", layout=2, scale_dtype="float16")})
    with pytest.raises(QwenModelError, match="are not read by this version"):
        formats_from_json([{**written[0], "activation_scale": "token"}])


@pytest.mark.parametrize("text", FORMATS)
def test_an_engines_tensors_are_those_of_the_weight(text):
    weight_format = FORMATS[text]
    config = ModelConfig.from_model_dir(packaged_model_dir())
    names = [name for name, module in network_modules(config, "float16").items() if name.startswith("layers.0.mlp.")]
    formats = dict.fromkeys(names, weight_format)
    modules = network_modules(config, "float16", formats)
    saved = 0
    for name in names:
        rows, columns = modules[name].shape
        blocks = (-(-rows // 128), -(-columns // 128)) if weight_format.group_size else (rows, 1)
        input_scale = 0.5 if weight_format.activation_scale == "tensor" else None
        weight = EightBitWeight(
            weight_format.kind,
            random_codes(weight_format.kind, (rows, columns)),
            np.ones(blocks, np.float32),
            input_scale,
        )
        assert weight.format == weight_format
        specs = {spec.name.rpartition(".")[2]: spec for spec in modules[name].tensors}
        specs.pop("bias", None)
        found = {field: (array.shape, array.dtype.name) for field, array in weight.tensors.items()}
        assert found == {field: (spec.shape, spec.dtype) for field, spec in specs.items()}
        saved += rows * columns - sum(array.nbytes for field, array in weight.tensors.items() if field != "weight")
    assert weight_bytes(config, "float16") - weight_bytes(config, "float16", formats) == saved


def test_numbers_of_blocks_whose_last_ones_are_partial():
    rng = np.random.default_rng(1)
    codes = random_codes("fp8", (200, 300))
    scales = rng.random((2, 3), np.float32)
    expected = np.empty((200, 300), np.float32)
    for row in range(200):
        for column in range(300):
            expected[row, column] = e4m3_numbers()[codes[row, column]] * scales[row // 128, column // 128]
    np.testing.assert_array_equal(EightBitWeight("fp8", codes, scales).dequantized(), expected)


def test_fused_layers_keep_their_scales_and_share_the_largest_of_x():
    parts = [
        EightBitWeight("int8", random_codes("int8", (rows, 64), rows), np.full((rows, 1), scale, np.float32), scale)
        for rows, scale in ((32, 0.25), (16, 0.75), (16, 0.5))
    ]
    whole = joined(parts, "layers.0.attention.qkv")
    assert whole.input_scale == 0.75
    np.testing.assert_array_equal(whole.dequantized(), np.concatenate([part.dequantized() for part in parts]))


def test_blocks_that_two_layers_would_share_are_refused():
    parts = [EightBitWeight("fp8", random_codes("fp8", (200, 128)), np.ones((2, 1), np.float32))] * 2
    with pytest.raises(QwenModelError, match=r"qkv is computed as one layer of 200, 200 outputs"):
        joined(parts, "layers.0.attention.qkv")
    whole = joined(
        [dataclasses.replace(parts[0], codes=parts[0].codes[:128], scales=parts[0].scales[:1]), parts[1]], ""
    )
    assert whole.format.group_size == 128


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0])
def test_scales_must_be_finite_and_not_below_0(scale):
    codes = random_codes("int8", (2, 4))
    with pytest.raises(QwenModelError, match=r"down has scales that are not finite, or below 0"):
        EightBitWeight("int8", codes, np.float32([[1.0], [scale]])).check("down")
    with pytest.raises(QwenModelError, match=r"down has scales that are not finite, or below 0"):
        EightBitWeight("int8", codes, np.ones((2, 1), np.float32), scale).check("down")


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_scales_of_0_are_those_of_zeros(kind):
    codes = random_codes(kind, (200, 256))
    codes[3] = 0
    if kind == "fp8":
        codes[3, ::2] = 0x80  # -0
    scales = np.ones((200, 1), np.float32)
    scales[3] = 0
    EightBitWeight(kind, codes, scales).check("down")
    codes[3, 5] = 1
    with pytest.raises(QwenModelError, match="down has scales of 0 for numbers that are not 0"):
        EightBitWeight(kind, codes, scales).check("down")
    if kind == "fp8":
        with pytest.raises(QwenModelError, match="down has scales of 0 for numbers that are not 0"):
            EightBitWeight(kind, codes, np.float32([[1, 1], [1, 0]])).check("down")


def test_codes_must_be_numbers():
    codes = random_codes("fp8", (2, 4))
    codes[1, 1] = 0xFF
    with pytest.raises(QwenModelError, match="down has numbers that are not finite"):
        EightBitWeight("fp8", codes, np.ones((2, 1), np.float32)).check("down")
    with pytest.raises(QwenModelError, match="down has an input_scale of 0"):
        EightBitWeight("int8", codes.view(np.int8), np.ones((2, 1), np.float32), 0.0).check("down")
