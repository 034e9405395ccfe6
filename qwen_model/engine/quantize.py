"""Write a quantized checkpoint, which this package, transformers and vLLM load."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.config import ModelConfig
from ..checkpoints.other_formats import WEIGHT_FILES
from ..checkpoints.weights import ModuleWeights, WeightSpec, weight_groups
from ..common.errors import QwenModelError
from ..common.extras import import_extra
from ..common.files import read_json_object
from ..common.progress import Progress, no_progress
from ..interface.memory import weight_bytes
from ..quantization.formats import own_formats
from ..quantization.options import DEFAULT_GROUP_SIZE, QuantizationOptions
from ..quantization.published import FORMATS, layer_tensors, quantization_config
from ..quantization.search import round_weight
from ..quantization.summary import WeightSummary, weight_summary
from .build import check_choice, model_folder
from .output_folder import new_folder_place, new_folder_written_whole

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 4 << 30
COPIED = (".json", ".txt", ".jinja", ".tiktoken", ".model", ".py")
"""Endings of the files that are copied: tokenizer, generation's settings, code of the model."""
NOT_COPIED = ("config.json", "quantize_config.json", "quant_config.json", *WEIGHT_FILES)


@dataclass(frozen=True)
class QuantizeSummary:
    """Describe the checkpoint that `quantize_checkpoint` wrote."""

    output_dir: Path
    model: ModelConfig
    stored_as: str
    weight_bytes: int
    weights: WeightSummary
    seconds: float


def quantize_checkpoint(
    model_dir: str | os.PathLike[str] | None = None,
    *,
    output_dir: str | os.PathLike[str],
    stored_as: str = "compressed-tensors",
    quantization: str = "int4",
    group_size: int | None = None,
    symmetric: bool | None = None,
    progress: Progress | None = None,
) -> QuantizeSummary:
    """Quantize the linear layers of a Hugging Face checkpoint (None: the model in this package) into another folder.

    Embedding, output projection, norms and biases stay as they are.

    output_dir: a new or an empty folder.
    stored_as: "compressed-tensors" or "gptq".
    quantization: "int4" or "int8".
    group_size, symmetric: of int4, see `build_engine`.
    progress: see `Progress`.

    Raises:
        QwenModelError: an argument is wrong, the checkpoint cannot be read, is not supported or is quantized already,
            or `output_dir` cannot be written. Nothing has changed then.
    """
    start = time.perf_counter()
    check_choice("format", stored_as, FORMATS)
    if quantization == "int8" and (group_size, symmetric) != (None, None):
        raise QwenModelError("group_size (--group-size) and symmetric (--asymmetric) are for quantization int4")
    size = DEFAULT_GROUP_SIZE if group_size is None else group_size
    options = QuantizationOptions(quantization, size, symmetric is not False, head=None)
    for module in ("torch", "safetensors"):
        import_extra(module, "writing a quantized checkpoint", extra="torch")
    source = model_folder(model_dir)
    place = new_folder_place(output_dir)
    model = ModelConfig.from_model_dir(source)
    checkpoint = Checkpoint(source, "torch")
    if checkpoint.quantization is not None:
        raise QwenModelError(f"{source} is quantized already, with {checkpoint.quantization.method}")
    checkpoint.check(model)
    writer = _Writer(checkpoint, model, stored_as, options, progress or no_progress)
    with new_folder_written_whole(place) as folder:
        writer.write(folder)
        _copy_other_files(source, folder)
        config = {**read_json_object(source / "config.json"), "quantization_config": writer.configuration}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    summary = weight_summary(model, checkpoint.dtype, writer.formats, writer.relative_errors)
    return QuantizeSummary(place, model, stored_as, writer.bytes_written, summary, time.perf_counter() - start)


class _Writer:
    """Quantize a checkpoint layer by layer, and write the tensors in shards."""

    def __init__(
        self, checkpoint: Checkpoint, model: ModelConfig, stored_as: str, options: QuantizationOptions, report: Progress
    ):
        self._checkpoint = checkpoint
        self._model = model
        self._stored_as = stored_as
        self._report = report
        self.formats = own_formats(options, model, checkpoint.dtype)
        self.configuration = quantization_config(stored_as, options)
        self.relative_errors: dict[str, float] = {}
        self.bytes_written = 0
        self._files: dict[str, list[str]] = {}  # the tensors of each shard, by its first name

    def write(self, folder: Path) -> None:
        """Write the shards, or one file if they fit it, and the index."""
        shard: dict[str, Tensor] = {}
        read, total = 0, weight_bytes(self._model, self._checkpoint.dtype)
        for name, tensor, source_bytes in self._tensors():
            if shard and sum(each.nbytes for each in shard.values()) + tensor.nbytes > SHARD_BYTES:
                self._save(folder, shard)
                shard = {}
            shard[name] = tensor
            read += source_bytes
            self._report("layers", read, total)
        self._save(folder, shard)
        self._name_files(folder)

    def _tensors(self) -> Iterator[tuple[str, Tensor, int]]:
        """Yield names and tensors of the new checkpoint, and the bytes of the old one that each took."""
        for group in weight_groups(self._model, self._checkpoint.dtype):
            for name, module in group.modules.items():
                for spec in module.tensors:
                    if name in self.formats and spec is module.weight:
                        yield from self._quantized(name, module)
                    else:
                        for source in spec.sources:
                            tensor = self._checkpoint.tensor(source.name)
                            yield source.name, tensor.clone(), tensor.nbytes

    def _quantized(self, name: str, module: ModuleWeights[WeightSpec]) -> Iterator[tuple[str, Tensor, int]]:
        import torch

        error = total = 0.0
        for source in module.weight.sources:
            weight = self._checkpoint.tensor(source.name)
            rounded = round_weight(weight, self.formats[name])
            error, total = error + rounded.squared_error, total + rounded.squared_sum
            source_bytes = weight.nbytes
            for suffix, array in layer_tensors(self._stored_as, rounded.weight).items():
                tensor = torch.from_numpy(array)
                if "scale" in suffix:
                    tensor = tensor.to(getattr(torch, self.formats[name].scale_dtype))
                yield f"{source.name.removesuffix('weight')}{suffix}", tensor, source_bytes
                source_bytes = 0
        self.relative_errors[name] = (error / total) ** 0.5 if total else 0.0

    def _save(self, folder: Path, shard: dict[str, Tensor]) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        name = f"shard-{len(self._files) + 1:05d}"
        try:
            save_file(shard, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk is one of these
            raise OSError(str(error)) from error
        self.bytes_written += sum(tensor.nbytes for tensor in shard.values())
        self._files[name] = list(shard)

    def _name_files(self, folder: Path) -> None:
        """Give the files the names that loaders look for, once their number is known."""
        count = len(self._files)
        if count == 1:
            (folder / next(iter(self._files))).rename(folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for index, (shard, names) in enumerate(self._files.items(), start=1):
            file = f"model-{index:05d}-of-{count:05d}.safetensors"
            (folder / shard).rename(folder / file)
            weight_map |= dict.fromkeys(names, file)
        index_file: dict[str, Any] = {"metadata": {"total_size": self.bytes_written}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=2) + "\n", encoding="utf-8")


def _copy_other_files(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files, the settings and the code of a model, and its licence."""
    for path in sorted(source.iterdir()):
        wanted = path.suffix in COPIED or path.name.startswith(("LICENSE", "NOTICE"))
        if wanted and path.is_file() and path.name not in NOT_COPIED:
            shutil.copyfile(path, folder / path.name)
