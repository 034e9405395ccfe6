"""Quantized checkpoints in every published layout, packed by loops that follow the layouts' definitions word by word.

Nothing of qwen_model is used, so that its readers are compared with another writing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.qwen_model.model_files import hugging_face_model

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 320,
}
AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)  # of a word's nibbles, from the low one on


@dataclass
class Codes:
    """A weight, [out, in], as codes and, for each group of inputs, scales and zero points; `groups` of each input."""

    bits: int
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    group_of_input: np.ndarray

    @property
    def weight(self) -> np.ndarray:
        scales, zeros = (x[:, self.group_of_input].astype(np.float32) for x in (self.scales, self.zeros))
        return scales * (self.codes.astype(np.float32) - zeros)


def rounded(
    weight: np.ndarray, bits: int, group_size: int, symmetric: bool = True, seed: int | None = None, dtype: Any = None
) -> Codes:
    """Round a weight to codes. seed: of a random order of inputs, as that of GPTQ's desc_act; None: their own."""
    out, inputs = weight.shape
    size = inputs if group_size == -1 else group_size
    group_of_input = np.arange(inputs) // size
    if seed is not None:
        group_of_input = np.random.default_rng(seed).permutation(group_of_input)
    groups = group_of_input.max() + 1
    scales, zeros = np.zeros((out, groups), np.float32), np.zeros((out, groups), np.int64)
    top = 2**bits - 1
    for group in range(groups):
        part = weight[:, group_of_input == group]
        if symmetric:
            scales[:, group], zeros[:, group] = np.abs(part).max(1) / (2 ** (bits - 1) - 1), 2 ** (bits - 1)
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scales[:, group] = (high - low) / top
            zeros[:, group] = np.clip(np.rint(-low / scales[:, group]), 0, top)
    scales = torch.from_numpy(scales).to(dtype or torch.float16).float().numpy()
    codes = np.clip(np.rint(weight / scales[:, group_of_input]) + zeros[:, group_of_input], 0, top).astype(np.int64)
    return Codes(bits, codes, scales, zeros, group_of_input)


def _words(values: list[np.ndarray], bits: int) -> np.ndarray:
    """Words of 32 bits whose fields, from the low one on, are the arrays of `values`."""
    word = np.zeros(values[0].shape, np.uint32)
    for place, value in enumerate(values):
        word |= value.astype(np.uint32) << np.uint32(bits * place)
    return word.view(np.int32)


def gptq_tensors(q: Codes, version: int = 1, g_idx: bool = True, dtype: Any = torch.float16) -> dict[str, torch.Tensor]:
    per_word = 32 // q.bits
    k_by_n, zeros = q.codes.T, q.zeros.T  # [in, out], [groups, out]
    stored = (zeros - 1) % 2**q.bits if version == 1 else zeros
    tensors = {
        "qweight": _words([k_by_n[place::per_word] for place in range(per_word)], q.bits),
        "qzeros": _words([stored[:, place::per_word] for place in range(per_word)], q.bits),
    }
    found = {name: torch.from_numpy(np.ascontiguousarray(words)) for name, words in tensors.items()}
    found["scales"] = torch.from_numpy(q.scales.T.copy()).to(dtype)
    if g_idx:
        found["g_idx"] = torch.from_numpy(q.group_of_input.astype(np.int32))
    return found


def awq_tensors(q: Codes) -> dict[str, torch.Tensor]:
    found = {
        name: torch.from_numpy(np.ascontiguousarray(_words([values[:, n::8] for n in AWQ_OUTPUTS], 4)))
        for name, values in (("qweight", q.codes.T), ("qzeros", q.zeros.T))
    }
    return {**found, "scales": torch.from_numpy(q.scales.T.copy()).half()}


def compressed_tensors(q: Codes, symmetric: bool, dtype: Any = torch.bfloat16) -> dict[str, torch.Tensor]:
    per_word = 32 // q.bits
    codes = np.pad(q.codes, ((0, 0), (0, -q.codes.shape[1] % per_word)))
    found = {
        "weight_packed": torch.from_numpy(
            np.ascontiguousarray(_words([codes[:, place::per_word] for place in range(per_word)], q.bits))
        ),
        "weight_scale": torch.from_numpy(q.scales).to(dtype),
        "weight_shape": torch.tensor(q.codes.shape),
    }
    if not symmetric:
        zeros = np.pad(q.zeros, ((0, -len(q.zeros) % per_word), (0, 0)))
        words = _words([zeros[place::per_word] for place in range(per_word)], q.bits)
        found["weight_zero_point"] = torch.from_numpy(np.ascontiguousarray(words))
    if not (q.group_of_input == np.sort(q.group_of_input)).all():
        found["weight_g_idx"] = torch.from_numpy(q.group_of_input.astype(np.int32))
    return found


@dataclass
class Layout:
    """A published layout and its options; `dynamic`, of GPTQ: bits and group size of layers, by the end of a name."""

    method: str
    bits: int = 4
    group_size: int = 32
    symmetric: bool = True
    version: int = 1
    desc_act: bool = False
    named: dict[str, Any] | None = None  # what the configuration says in place of the truth; None: nothing
    file: str = "config.json"
    dynamic: dict[str, tuple[int, int]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()  # ends of names of layers that stay as they are
    extra_biases: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.method == "compressed-tensors" else torch.float16

    def tensors(self, name: str, weight: np.ndarray) -> tuple[Codes, dict[str, torch.Tensor]]:
        bits, group_size = next(
            (each for end, each in self.dynamic.items() if name.endswith(end)), (self.bits, self.group_size)
        )
        seed = None
        if self.desc_act:  # layers of the same inputs have the same order
            seed = 1 if name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")) else 2
        q = rounded(weight, bits, group_size, self.symmetric, seed, self.dtype)
        if self.method == "gptq":
            return q, gptq_tensors(q, self.version)
        return q, awq_tensors(q) if self.method == "awq" else compressed_tensors(q, self.symmetric)

    @property
    def configuration(self) -> dict[str, Any]:
        sizes = {"bits": self.bits, "group_size": self.group_size}
        if self.method == "awq":
            values = {**sizes, "quant_method": "awq", "zero_point": True, "version": "gemm"}
        elif self.method == "gptq":
            values = {**sizes, "quant_method": "gptq", "desc_act": self.desc_act, "sym": self.symmetric}
            values |= {"checkpoint_format": "gptq_v2"} if self.version == 2 else {}
            dynamic = {rf"+:.*{end}$": {"bits": b, "group_size": g} for end, (b, g) in self.dynamic.items()}
            dynamic |= {rf"-:.*{end}$": {} for end in self.ignored}
            values |= {"dynamic": dynamic} if dynamic else {}
        else:
            strategy = {"strategy": "channel"} if self.group_size == -1 else {"strategy": "group"}
            weights = {
                "num_bits": self.bits,
                "type": "int",
                "symmetric": self.symmetric,
                "group_size": self.group_size if self.group_size > 0 else None,
                "dynamic": False,
                "actorder": "group" if self.desc_act else None,
                **strategy,
            }
            values = {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "quantization_status": "compressed",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
                "ignore": ["lm_head", *(f"re:.*{end}$" for end in self.ignored)],
            }
        return {key: value for key, value in {**values, **(self.named or {})}.items() if value is not None}


def save_layout(folder: Path, layout: Layout, seed: int = 5, **changes: Any) -> tuple[Path, Path, dict[str, Codes]]:
    """Write a quantized Qwen2 checkpoint, and a plain one of the numbers that it stands for, float32.

    Returns both folders and the quantized layers.
    """
    model = hugging_face_model("Qwen2ForCausalLM", seed=seed, **{**SIZES, **changes})
    tensors, plain, codes = {}, {}, {}
    for name, tensor in model.state_dict().items():
        value = tensor.to(layout.dtype)
        layer = name.removesuffix(".weight")
        if not name.endswith("_proj.weight") or layer.endswith(layout.ignored or ("\0",)):
            tensors[name], plain[name] = value, value.float()
            continue
        codes[layer], packed = layout.tensors(layer, value.float().numpy())
        tensors |= {f"{layer}.{suffix}": each for suffix, each in packed.items()}
        plain[name] = torch.from_numpy(codes[layer].weight)
        if layout.extra_biases and f"{layer}.bias" not in model.state_dict():
            tensors[f"{layer}.bias"] = torch.zeros(len(value), dtype=layout.dtype)
    config = {**model.config.to_dict(), "architectures": ["Qwen2ForCausalLM"], "dtype": str(layout.dtype)}
    config.pop("torch_dtype", None)
    quantized, dequantized = folder / "quantized", folder / "dequantized"
    for place, contents in ((quantized, tensors), (dequantized, plain)):
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(config, default=str))
        save_file({name: tensor.contiguous() for name, tensor in contents.items()}, place / "model.safetensors")
    if layout.file == "config.json":
        config["quantization_config"] = layout.configuration
        (quantized / "config.json").write_text(json.dumps(config, default=str))
    else:
        (quantized / layout.file).write_text(json.dumps(layout.configuration))
    return quantized, dequantized, codes
