"""Quantized checkpoints are read as the numbers that another writing of their layouts packed."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_model import QwenModelError
from qwen_model.checkpoints.checkpoint import Checkpoint
from qwen_model.checkpoints.config import ModelConfig
from qwen_model.checkpoints.module_weights import WeightFormat
from qwen_model.checkpoints.quantization_config import read_quantization
from qwen_model.checkpoints.weights import network_modules
from tests.qwen_model.model_files import qwen_v1
from tests.qwen_model.quantized_files import Layout, awq_tensors, gptq_tensors, rounded, save_layout

FUSED = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.output": ("self_attn.o_proj",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}
LAYOUTS = {
    "gptq": Layout("gptq"),
    "gptq int8": Layout("gptq", bits=8, group_size=64),
    "gptq v2": Layout("gptq", version=2),
    "gptq v2 that says v1": Layout("gptq", version=2, named={"checkpoint_format": "gptq"}),
    "gptq v1 that says v2": Layout("gptq", named={"checkpoint_format": "gptq_v2"}),
    "gptq zero points": Layout("gptq", symmetric=False),
    "gptq v2 zero points": Layout("gptq", symmetric=False, version=2),
    "gptq int8 zero points": Layout("gptq", bits=8, symmetric=False),
    "gptq desc_act": Layout("gptq", desc_act=True),
    "gptq one group": Layout("gptq", group_size=-1),
    "gptq one group desc_act": Layout("gptq", group_size=-1, desc_act=True),
    "gptq old file": Layout("gptq", file="quantize_config.json", named={"quant_method": None}),
    "gptq dynamic": Layout("gptq", dynamic={"mlp.down_proj": (8, 64)}, ignored=("layers.1.mlp.down_proj",)),
    "gptq biases of zero": Layout("gptq", extra_biases=True),
    "awq": Layout("awq", symmetric=False, group_size=64),
    "awq one group": Layout("awq", symmetric=False, group_size=-1),
    "awq old file": Layout(
        "awq",
        symmetric=False,
        file="quant_config.json",
        named={"quant_method": None, "version": "GEMM", "bits": None, "w_bit": 4, "q_group_size": 32},
    ),
    "w4a16": Layout("compressed-tensors"),
    "w4a16 zero points": Layout("compressed-tensors", symmetric=False),
    "w4a16 actorder": Layout("compressed-tensors", desc_act=True),
    "w8a16": Layout("compressed-tensors", bits=8, group_size=-1),
    "w8a16 zero points": Layout("compressed-tensors", bits=8, group_size=-1, symmetric=False),
    "w4a16 ignored": Layout("compressed-tensors", ignored=("layers.0.self_attn.o_proj", "layers.1.mlp.down_proj")),
}


def opened(folder, framework="torch"):
    config = ModelConfig.from_model_dir(folder)
    checkpoint = Checkpoint(folder, framework)
    checkpoint.check(config)
    return checkpoint, config


@pytest.mark.parametrize("framework", ["torch", "numpy"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_gives_the_numbers_that_were_packed(tmp_path, layout, framework):
    folder, _, packed = save_layout(tmp_path, layout)
    checkpoint, config = opened(folder, framework)
    formats, modules = checkpoint.formats(config), network_modules(config, "float32")
    for index in range(config.num_layers):
        for fused, sources in FUSED.items():
            name = f"layers.{index}.{fused}"
            parts = [packed.get(f"model.layers.{index}.{source}") for source in sources]
            assert (name in formats) == (parts[0] is not None)
            if name not in formats:
                continue
            expected = np.concatenate([part.weight for part in parts])
            weight = checkpoint.read_quantized(modules[name].weight)
            np.testing.assert_array_equal(weight.dequantized(), expected)
            np.testing.assert_array_equal(np.asarray(checkpoint.read(modules[name].weight)), expected)
            permuted = layout.desc_act and layout.group_size > 0
            order = np.arange(expected.shape[1]) if not permuted else np.argsort(parts[0].group_of_input, kind="stable")
            np.testing.assert_array_equal(weight.codes, np.concatenate([part.codes for part in parts])[:, order])
            assert weight.format == formats[name]
            assert formats[name] == WeightFormat(
                f"int{parts[0].bits}",
                group_size(layout, parts[0]),
                layout.symmetric,
                layout=2,
                permuted=permuted,
                scale_dtype=str(layout.dtype).removeprefix("torch."),
            )


def group_size(layout, part):
    """0 where one group has all inputs."""
    size = layout.group_size if part.bits == layout.bits else 64
    return size if 0 < size < part.codes.shape[1] else 0


def test_the_words_that_the_formats_are_known_by(tmp_path):
    """Codes 0 to 7 along the packed axis; symmetric zero points of both versions."""
    eight = rounded(np.ones((8, 8), np.float32), 4, -1)
    eight.codes = np.tile(np.arange(8), (8, 1))
    assert {hex(int(word)) for word in gptq_tensors(eight)["qweight"].flatten()} == {hex(0x76543210)}
    assert {hex(int(word)) for word in gptq_tensors(eight)["qzeros"].flatten()} == {hex(0x77777777)}
    eight.codes = eight.codes.T
    assert {hex(int(word)) for word in awq_tensors(eight)["qweight"].flatten()} == {hex(0x75316420)}


@pytest.mark.parametrize("bits", [4, 8])
def test_qwen_v1(tmp_path, bits):
    """c_attn is q, k and v at once, and w2 is the gate."""
    model, config = qwen_v1(hidden_size=64, num_attention_heads=4, intermediate_size=384, num_hidden_layers=1)
    tensors, expected = {}, {}
    for name, tensor in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if not layer.endswith(("c_attn", "c_proj", "w1", "w2")):
            tensors[name] = tensor.half()
            continue
        q = rounded(tensor.numpy(), bits, 32)
        tensors |= {f"{layer}.{suffix}": each for suffix, each in gptq_tensors(q).items()}
        expected[layer.removeprefix("transformer.h.0.")] = q.weight
    quantization = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": False, "sym": True}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    checkpoint, read = opened(tmp_path)
    modules = network_modules(read, "float32")
    assert len(checkpoint.formats(read)) == 4
    for module, names in (
        ("attention.qkv", ["attn.c_attn"]),
        ("attention.output", ["attn.c_proj"]),
        ("mlp.gate_up", ["mlp.w2", "mlp.w1"]),
        ("mlp.down", ["mlp.c_proj"]),
    ):
        found = checkpoint.read_quantized(modules[f"layers.0.{module}"].weight).dequantized()
        np.testing.assert_array_equal(found, np.concatenate([expected[name] for name in names]))


def changed(folder, change):
    """Change the tensors of a checkpoint in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def set_first(name, value):
    def change(tensors):
        tensors[name].view(-1)[0] = value

    return change


QKV, DOWN = "model.layers.0.self_attn.", "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("method", ["gptq", "compressed-tensors"])
def test_scales_that_cannot_be(tmp_path, method, value):
    folder, _, _ = save_layout(tmp_path, Layout(method))
    scales = {"gptq": "scales", "compressed-tensors": "weight_scale"}[method]
    changed(folder, set_first(f"{DOWN}.{scales}", value))
    checkpoint, config = opened(folder)
    with pytest.raises(QwenModelError, match=r"model\.layers\.1\.mlp\.down_proj has scales"):
        checkpoint.read_quantized(network_modules(config, "float32")["layers.1.mlp.down"].weight)


def test_a_scale_of_0_for_a_group_of_zeros(tmp_path):
    """So weights are padded."""
    folder, _, _ = save_layout(tmp_path, Layout("compressed-tensors"))

    def pad(tensors):
        tensors[f"{DOWN}.weight_packed"][0, :4] = -2004318072  # 0x88888888, the code 8 of zero
        tensors[f"{DOWN}.weight_scale"][0, 0] = 0.0

    changed(folder, pad)
    checkpoint, config = opened(folder)
    weight = checkpoint.read_quantized(network_modules(config, "float32")["layers.1.mlp.down"].weight).dequantized()
    assert not weight[0, :32].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(f"{DOWN}.scales"),
            "down_proj is not a layer of gptq: it must have",
        ),
        (lambda t: t.pop(f"{DOWN}.qzeros"), r"quantized with gptq, but .*down_proj\.qzeros is missing"),
        (
            lambda t: t.update({f"{DOWN}.qweight": t[f"{DOWN}.qweight"][:-1].clone()}),
            r"down_proj\.qweight \[23, 64\] is not a weight of 64 outputs and 192 inputs in 4 bits",
        ),
        (
            lambda t: t.update({f"{DOWN}.scales": t[f"{DOWN}.scales"][:3].clone()}),
            "down_proj has 3 groups of scales for 192 inputs, which are not groups of 32 inputs",
        ),
        (
            lambda t: t.update({f"{DOWN}.qzeros": t[f"{DOWN}.qzeros"][:, :-1].clone()}),
            r"down_proj\.qzeros must be int32 \[6, 8\], not int32 \[6, 7\]",
        ),
        (lambda t: t.update({f"{DOWN}.qweight": t[f"{DOWN}.qweight"].float()}), "must be int32"),
        (lambda t: t.update({f"{DOWN}.bias": torch.ones(64)}), r"down_proj\.bias is not zero"),
        (lambda t: t.update({f"{DOWN}.weight": torch.ones(64, 192)}), r"not known to this architecture: .*qweight"),
        (lambda t: t.pop(f"{DOWN}.qweight"), r"missing: model\.layers\.1\.mlp\.down_proj\.weight"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, change, message):
    folder, _, _ = save_layout(tmp_path, Layout("gptq"))
    changed(folder, change)
    with pytest.raises(QwenModelError, match=message):
        opened(folder)


def test_layers_that_are_computed_as_one_must_be_quantized_alike(tmp_path):
    for name, layout, message in (
        ("bits", Layout("gptq", dynamic={"v_proj": (8, 32)}), r"q_proj and .*v_proj are quantized differently \(int4"),
        ("ignored", Layout("gptq", ignored=("k_proj",)), r"q_proj is quantized and .*k_proj is not"),
    ):
        checkpoint, config = opened(save_layout(tmp_path / name, layout)[0])
        with pytest.raises(QwenModelError, match=message):
            checkpoint.formats(config)
    folder, _, _ = save_layout(tmp_path / "order", Layout("gptq", desc_act=True))
    changed(folder, lambda tensors: tensors[f"{QKV}v_proj.g_idx"].copy_(tensors[f"{QKV}v_proj.g_idx"].flip(0)))
    checkpoint, config = opened(folder)
    with pytest.raises(QwenModelError, match=r"q_proj and .*v_proj .*in different orders \(g_idx\)"):
        checkpoint.formats(config)


def test_groups_of_unequal_sizes(tmp_path):
    folder, _, _ = save_layout(tmp_path, Layout("gptq"))
    changed(folder, set_first(f"{DOWN}.g_idx", 3))
    checkpoint, config = opened(folder)
    with pytest.raises(QwenModelError, match=r"down_proj\.g_idx is not supported: it must give each of 6 groups 32"):
        checkpoint.formats(config)


def test_a_configuration_without_quantized_layers(tmp_path):
    _, folder, _ = save_layout(tmp_path, Layout("gptq"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": Layout("gptq").configuration}))
    with pytest.raises(QwenModelError, match="has no layers that are quantized with gptq"):
        opened(folder)


W8A8 = {"input_activations": {"num_bits": 8}, "weights": {"num_bits": 8, "strategy": "channel"}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quant_method": "fbgemm_fp8"}, "with fbgemm_fp8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "with bitsandbytes"),
        ({"load_in_4bit": True}, "with an unnamed method"),
        ({"quant_method": "gptq", "bits": 3}, "with GPTQ of 3 bits"),
        ({"quant_method": "gptq"}, "with GPTQ of None bits"),
        ({"quant_method": "gptq", "bits": True}, "with GPTQ of True bits"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "with GPTQ in groups of 0"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "with GPTQ in the format 'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "with GPTQ in the format 'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "pack_dtype": "int8"}, "with GPTQ packed in 'int8'"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:x": {"bits": 2}}}, "with GPTQ of 2 bits"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": [1]}, "with the dynamic overrides"),
        ({"quant_method": "awq", "bits": 8}, "with AWQ of 8 bits"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "with AWQ of the version 'gemv'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv_fast"}, "with AWQ of the version 'gemv_fast'"),
        ({"quant_method": "awq", "bits": 4, "backend": "llm-awq"}, "with AWQ of the backend 'llm-awq'"),
        ({"quant_method": "compressed-tensors"}, "with compressed-tensors with the config_groups None"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": W8A8}},
            "that quantizes activations, too, in the format 'pack-quantized'",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "naive-quantized",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "strategy": "channel"}}},
            },
            "in the format 'naive-quantized'",
        ),
        ({**Layout("compressed-tensors").configuration, "transform_config": {"R1": {}}}, "with a transform_config"),
        ("awq", "with 'awq'"),
        (["x" * 999] * 999, r"^.{,1000}$"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_methods_that_are_not_read_are_named(tmp_path, values, message):
    with pytest.raises(QwenModelError, match=message) as error:
        read_quantization(tmp_path, {"quantization_config": values})
    assert "which is not read here" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
