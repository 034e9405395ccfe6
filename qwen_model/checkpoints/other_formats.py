"""Recognise models that are not Hugging Face checkpoints, to say what they are and what to give."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ..common.errors import QwenModelError, shown
from ..common.files import is_file, is_folder

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The files of a Hugging Face checkpoint's weights, in the order in which they are looked for."""

_SOURCE = "give the folder of the Hugging Face checkpoint that it was made from"
_OTHER_FORMATS = (
    ("weights/embedding.safetensors", "an engine of qwen_model", _SOURCE),
    ("model.plan", "an engine of qwen_model", _SOURCE),
    ("*.gguf", "a GGUF model", _SOURCE),
    ("rank*.safetensors", "a checkpoint converted for TensorRT-LLM", _SOURCE),
    ("*.engine", "a TensorRT-LLM engine", _SOURCE),
    ("config.ini", "a checkpoint converted for FasterTransformer", _SOURCE),
    ("model.*.bin", "a checkpoint converted for FasterTransformer", _SOURCE),
    ("*/config.ini", "a checkpoint converted for FasterTransformer", _SOURCE),
    ("adapter_config.json", "a LoRA adapter", "merge it into its model (PEFT's merge_and_unload) and save that"),
    ("consolidated.*", "a checkpoint in Meta's or Mistral's own form", "give its Hugging Face form"),
    (
        "snapshots/*/config.json",
        "a cache of the Hugging Face Hub",
        "give the folder in snapshots/ that holds this file",
    ),
    ("tf_model.h5", "a TensorFlow checkpoint", "give its PyTorch form, as safetensors"),
    ("flax_model.msgpack", "a Flax checkpoint", "give its PyTorch form, as safetensors"),
    ("*.onnx", "an ONNX model", _SOURCE),
)
"""Patterns of files that a format has, its name, and what to give instead; used if there are no `WEIGHT_FILES`."""

_QUANTIZED_TENSORS = {
    "qweight": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
    "weight_scale_inv": "block-scaled FP8",
    "weight_scale": "compressed-tensors or ModelOpt",
    "SCB": "bitsandbytes",
    "absmax": "bitsandbytes",
}
"""The last parts of names of tensors that only quantized checkpoints have, and the formats."""


def check_model_dir(path: Path) -> None:
    """Raise QwenModelError if there is no folder of that name, saying what was given if that can be seen."""
    if is_folder(path):
        return
    if is_file(path):
        if path.suffix.lower() == ".gguf":
            raise QwenModelError(f"{path} is a GGUF file, which is not read here: {_SOURCE}")
        raise QwenModelError(f"{path} is a file: give the folder of a Hugging Face checkpoint that holds it")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not is_folder(path.parent):
        raise QwenModelError(
            f"{path} is not a folder here. If it is a name on the Hugging Face Hub, download it first: hf download "
            f"{path} --local-dir FOLDER"
        )
    raise QwenModelError(f"{path} is not a folder; --model-dir takes the folder of a Hugging Face checkpoint")


def reject_other_formats(model_dir: Path) -> None:
    """Raise QwenModelError if the folder holds a model in a format that is known and not supported."""
    if any(is_file(model_dir / name) for name in WEIGHT_FILES):
        return
    for pattern, name, instead in _OTHER_FORMATS:
        found = next(model_dir.glob(pattern), None)
        if found is not None:
            raise QwenModelError(f"{model_dir} is {name} ({found.name}), which is not read here: {instead}")


def reject_quantized_tensors(model_dir: Path, names: Iterable[str]) -> None:
    """Raise QwenModelError if there are tensors that only a quantized checkpoint has."""
    for name in names:
        method = _QUANTIZED_TENSORS.get(name.rpartition(".")[2])
        if method is not None:
            raise QwenModelError(
                f"{model_dir} is quantized with {method} (it has {shown(name)}), but no quantization_config of its "
                "config.json, nor a quantize_config.json, says how: take these files from where it was made"
            )
