"""Networks whose linear layers have quantized x and weights, written plainly: transformers' models with other layers.

The layers quantize x in float64 as the issue's formulas say, and multiply the numbers that codes stand for. Engines of
the same codes are written without any of the quantization of `qwen_model`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qwen_model
from qwen_model.backends.torch import back_end
from qwen_model.checkpoints.checkpoint import Checkpoint
from qwen_model.checkpoints.module_weights import WeightFormat
from qwen_model.checkpoints.weights import network_modules
from qwen_model.common.progress import no_progress
from qwen_model.interface.engine_config import EngineConfig

LARGEST = {"int8": 127.0, "fp8": 448.0}
FUSED = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.output": ("self_attn.o_proj",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}


@dataclass(frozen=True)
class Scheme:
    """How x and weights are quantized; blocks: of 128 x 128 numbers, in place of a scale for each output."""

    kind: str
    static: bool = False
    blocks: bool = False

    @property
    def format(self) -> WeightFormat:
        return WeightFormat(
            self.kind,
            group_size=128 if self.blocks else 0,
            activation=self.kind,
            scale_dtype="float32",
            activation_scale="tensor" if self.static else "token",
        )

    def codes(self, numbers: Tensor) -> Tensor:
        """Numbers of `kind` nearest to these, which scales have been divided out of."""
        if self.kind == "int8":
            return numbers.round().clamp(-128, 127)
        return numbers.clamp(-448, 448).to(torch.float8_e4m3fn).to(numbers.dtype)


SCHEMES = {
    "int8 per token": Scheme("int8"),
    "int8 static": Scheme("int8", static=True),
    "fp8 per token": Scheme("fp8"),
    "fp8 static": Scheme("fp8", static=True),
    "fp8 in blocks": Scheme("fp8", blocks=True),
}


class EightBitLinear(nn.Module):
    """A linear layer of which `codes`, float64, and scales are the weight."""

    def __init__(self, linear: nn.Linear, scheme: Scheme):
        super().__init__()
        self.scheme, self.bias = scheme, linear.bias
        w = linear.weight.detach().double()
        rows, columns = w.shape
        if scheme.blocks:
            padded = nn.functional.pad(w, (0, -columns % 128, 0, -rows % 128))
            largest = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).abs().amax((1, 3))
            self.scales = (largest / LARGEST[scheme.kind]).float()
            by_number = self.scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        else:
            self.scales = by_number = (w.abs().amax(1, keepdim=True) / LARGEST[scheme.kind]).float()
        self.codes = scheme.codes(w / by_number)
        self.w = self.codes * by_number
        self.input_scale: Tensor | None = None
        self.largest_input = 0.0
        self.exact = False  # x is left as it is, and its largest magnitude is kept

    def forward(self, x: Tensor) -> Tensor:
        wide = x.double()
        if self.exact:
            self.largest_input = max(self.largest_input, float(wide.abs().max()))
        else:
            scale = self.input_scale
            if scale is None:
                scale = (wide.abs().amax(-1, keepdim=True) / LARGEST[self.scheme.kind]).float()
            wide = self.scheme.codes(wide / scale) * scale
        y = wide @ self.w.T
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def stored_codes(self) -> Tensor:
        if self.scheme.kind == "int8":
            return self.codes.to(torch.int8)
        return self.codes.to(torch.float8_e4m3fn).view(torch.uint8)


def quantize_layers(model: Any, scheme: Scheme, prompt: list[int]) -> None:
    """Replace the linear layers of each decoder layer; static scales of x are those of the prompt."""
    for layer in model.model.layers:
        for names in FUSED.values():
            for name in names:
                owner, _, child = name.rpartition(".")
                linear = getattr(layer.get_submodule(owner), child)
                setattr(layer.get_submodule(owner), child, EightBitLinear(linear, scheme))
    if not scheme.static:
        return
    layers = [module for module in model.modules() if isinstance(module, EightBitLinear)]
    set_exact(model, True)
    with torch.no_grad():
        model(torch.tensor([prompt]))
    for layer in layers:
        layer.input_scale = torch.tensor([layer.largest_input / LARGEST[scheme.kind]])
    set_exact(model, False)


def published_network(architecture: str, folder: Path) -> Any:
    """Return transformers' model of a checkpoint whose layers compute in 8 bits, with the codes and scales of its file.

    Layers that are computed as one have one scale of x: the largest.
    """
    values = json.loads((folder / "config.json").read_text())
    values.pop("quantization_config")
    tensors = load_file(folder / "model.safetensors")
    model = getattr(transformers, architecture)(transformers.AutoConfig.for_model(**values)).float().eval()
    plain = {name: each.float() for name, each in tensors.items() if each.element_size() > 1 and "scale" not in name}
    model.load_state_dict(plain, strict=False)
    for index, layer in enumerate(model.model.layers):
        for names in FUSED.values():
            parts = [
                _published_layer(layer.get_submodule(name), f"model.layers.{index}.{name}", tensors) for name in names
            ]
            scales = [part.input_scale for part in parts if part.input_scale is not None]
            for name, part in zip(names, parts, strict=True):
                part.input_scale = torch.stack(scales).amax(0) if scales else None
                owner, _, child = name.rpartition(".")
                setattr(layer.get_submodule(owner), child, part)
    return model


def _published_layer(linear: nn.Linear, name: str, tensors: Mapping[str, Tensor]) -> EightBitLinear:
    codes = tensors[f"{name}.weight"]
    scales = tensors.get(f"{name}.weight_scale", tensors.get(f"{name}.weight_scale_inv")).float()
    rows, columns = codes.shape
    layer = EightBitLinear(linear, Scheme("int8" if codes.dtype == torch.int8 else "fp8"))
    blocks = (-(-rows // 128), -(-columns // 128))
    if scales.numel() == blocks[0] * blocks[1] and scales.numel() > 1:
        scales = scales.view(blocks).repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    else:
        scales = scales.reshape(-1, 1)
    layer.w = codes.double() * scales
    if f"{name}.input_scale" in tensors:
        layer.input_scale = tensors[f"{name}.input_scale"].float().reshape(1)
    return layer


def set_exact(model: Any, exact: bool) -> None:
    """Whether x of all layers is left as it is."""
    for module in model.modules():
        if isinstance(module, EightBitLinear):
            module.exact = exact


def write_engine(model: Any, scheme: Scheme, checkpoint_dir: Path, folder: Path, **options: Any) -> Path:
    """Write an engine of a model that `quantize_layers` has changed; the checkpoint is that of the model before."""
    qwen_model.build_engine(checkpoint_dir, output_dir=folder, **options)
    shutil.rmtree(folder / "weights")
    config = EngineConfig.read(folder)
    modules = [f"layers.{layer}.{name}" for layer in range(config.model.num_layers) for name in FUSED]
    config = dataclasses.replace(config, weight_formats=dict.fromkeys(modules, scheme.format))
    config.write(folder)
    tensors = engine_tensors(model)
    checkpoint = Checkpoint(checkpoint_dir, "torch")
    checkpoint.check(config.model)
    expected = {spec.name for name in modules for spec in network_modules_of(config)[name].tensors}
    assert tensors.keys() == {name for name in expected if not name.endswith(".bias")}

    def read(spec: Any) -> Tensor:
        found = tensors.get(spec.name)
        return checkpoint.read(spec) if found is None else found

    back_end.write_engine(folder, config, read, no_progress)
    return folder


def save_checkpoint(model: Any, scheme: Scheme, checkpoint_dir: Path, folder: Path) -> Path:
    """Write a checkpoint of a model that `quantize_layers` has changed, in the form of its scheme's publishers."""
    tensors = load_file(checkpoint_dir / "model.safetensors")
    for name, module in model.named_modules():
        if isinstance(module, EightBitLinear):
            codes = module.stored_codes()
            tensors[f"{name}.weight"] = codes if scheme.kind == "int8" else codes.view(torch.float8_e4m3fn)
            tensors[f"{name}.weight_scale{'_inv' if scheme.blocks else ''}"] = module.scales
            if module.input_scale is not None:
                tensors[f"{name}.input_scale"] = module.input_scale
    of_x = {"strategy": "tensor" if scheme.static else "token", "dynamic": not scheme.static}
    number = {"num_bits": 8, "type": "int" if scheme.kind == "int8" else "float", "symmetric": True}
    both = {"weights": {**number, "strategy": "channel"}, "input_activations": {**number, **of_x}}
    quantization: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if scheme.kind == "int8" else "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], **both}},
        "ignore": ["lm_head"],
    }
    if scheme.blocks:
        quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    folder.mkdir()
    values = json.loads((checkpoint_dir / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "quantization_config": quantization}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def network_modules_of(config: EngineConfig) -> Any:
    return network_modules(config.model, config.dtype, config.weight_formats)


def engine_tensors(model: Any) -> dict[str, Tensor]:
    """The tensors of quantized modules, by the names that engines give them."""
    found = {}
    for index, layer in enumerate(model.model.layers):
        for fused, names in FUSED.items():
            parts = [layer.get_submodule(name) for name in names]
            name = f"layers.{index}.{fused}"
            found[f"{name}.weight"] = torch.cat([part.stored_codes() for part in parts])
            found[f"{name}.scales"] = torch.cat([part.scales for part in parts])
            if parts[0].input_scale is not None:
                found[f"{name}.input_scale"] = torch.stack([part.input_scale for part in parts]).amax(0)
    return found


def distance(found: Tensor, expected: Tensor) -> float:
    """The root of the mean squared difference."""
    return float((found.double() - expected.double()).square().mean().sqrt())
