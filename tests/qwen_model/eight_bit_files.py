"""Checkpoints whose layers compute in 8 bits, made by compressed-tensors and by PyTorch's casts: nothing of qwen_model.

compressed-tensors, which llm-compressor writes with, makes its own formats; the others are as their makers describe.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from tests.qwen_model.model_files import hugging_face_model

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 320,
}
INPUT_SCALES = {
    "q_proj": 0.05,
    "k_proj": 0.04,
    "v_proj": 0.03,
    "o_proj": 0.02,
    "gate_proj": 0.04,
    "up_proj": 0.06,
    "down_proj": 0.01,
}
E4M3 = torch.float8_e4m3fn
FP8_METHODS: dict[str, dict[str, Any]] = {
    "block": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    },
    "autofp8 static": {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
    "autofp8 dynamic": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "modelopt FP8": {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
    "modelopt FP8_PER_CHANNEL_PER_TOKEN": {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
    "modelopt FP8_PB_WO": {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"},
}
"""`quantization_config` of every method besides compressed-tensors."""


def compressed_tensors_files(folder: Path, preset: str, static: bool = False) -> Path:
    """Write a Qwen2 checkpoint of one of compressed-tensors' presets; static: with a scale of the inputs instead."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStrategy,
        apply_quantization_config,
        preset_name_to_scheme,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    model = hugging_face_model("Qwen2ForCausalLM", seed=3, **SIZES).to(torch.bfloat16)
    scheme = preset_name_to_scheme(preset, ["Linear"])
    if static:
        scheme.input_activations.dynamic, scheme.input_activations.strategy = False, QuantizationStrategy.TENSOR
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    for name, module in model.named_modules():
        if hasattr(module, "weight_scale"):
            blocks = in_parts(module.weight.data.float(), QuantizationStrategy(scheme.weights.strategy).value)
            scales, _ = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), scheme.weights)
            module.weight_scale.data.copy_(scales.reshape(module.weight_scale.shape))
        if hasattr(module, "input_scale"):
            module.input_scale.data.fill_(INPUT_SCALES[name.rpartition(".")[2]])
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return folder


def in_parts(weight: torch.Tensor, part: str) -> torch.Tensor:
    """View a weight as [rows, outputs of a part, columns, inputs of a part]; part: "tensor", "channel" or "block"."""
    out, inputs = weight.shape
    if part == "block":
        weight = F.pad(weight, (0, -inputs % 128, 0, -out % 128))
        return weight.view(-(-out // 128), 128, -(-inputs // 128), 128)
    return weight.view(*((1, out) if part == "tensor" else (out, 1)), 1, inputs)


def fp8_layer(method: str, name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the tensors of a layer, by the last part of their names, and the numbers that they stand for."""
    part = "block" if method in ("block", "modelopt FP8_PB_WO") else "tensor"
    part = "channel" if "PER_CHANNEL" in method else part
    blocks = in_parts(weight, part)
    scales = blocks.abs().amax((1, 3), keepdim=True) / 448
    codes = (blocks / scales).to(E4M3)

    def whole(values: torch.Tensor) -> torch.Tensor:
        rows, columns = values.shape[0] * values.shape[1], values.shape[2] * values.shape[3]
        return values.reshape(rows, columns)[: weight.shape[0], : weight.shape[1]].contiguous()

    if method == "modelopt FP8_PB_WO":
        found = {"weight_scale": scales}
    elif method == "block":
        found = {"weight_scale_inv": scales.squeeze(3).squeeze(1)}
    else:
        found = {"weight_scale": scales.reshape(-1) if part == "channel" else scales.reshape(())}
    if method in ("autofp8 static", "modelopt FP8"):
        found["input_scale"] = torch.tensor(INPUT_SCALES[name.rpartition(".")[2]])
    return {"weight": whole(codes.view(torch.uint8)).view(E4M3), **found}, whole(codes.float() * scales)


def fp8_files(folder: Path, method: str, old_file: bool = False) -> tuple[Path, dict[str, torch.Tensor]]:
    """Write a Qwen2 checkpoint of one of `FP8_METHODS`; return it, and the numbers of its quantized layers.

    old_file: what ModelOpt says is in hf_quant_config.json, where it was first; there are scales of a cache, too.
    """
    model = hugging_face_model("Qwen2ForCausalLM", seed=4, **SIZES).to(torch.bfloat16)
    tensors, expected = {}, {}
    for name, tensor in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        own, expected[layer] = fp8_layer(method, layer, tensor.float())
        tensors |= {f"{layer}.{suffix}": each for suffix, each in own.items()}
        if old_file and layer.endswith(("k_proj", "v_proj")):
            tensors[f"{layer}.{layer[-6]}_scale"] = torch.tensor(0.5)
    folder.mkdir(parents=True)
    config = {**model.config.to_dict(), "architectures": ["Qwen2ForCausalLM"], "dtype": "bfloat16"}
    quantization = FP8_METHODS[method]
    if old_file:
        inner = {"quant_algo": quantization["quant_algo"], "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
        values = {"producer": {"name": "modelopt", "version": "0.33.0"}, "quantization": inner}
        (folder / "hf_quant_config.json").write_text(json.dumps(values))
    else:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config, default=str))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder, expected


def change_tensors(folder: Path, **changed: Any) -> None:
    """Replace tensors of a checkpoint, by names whose dots are written as two underscores; None removes one."""
    tensors = load_file(folder / "model.safetensors")
    for key, value in changed.items():
        name = key.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors")
