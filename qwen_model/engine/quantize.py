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

from ..checkpoints.architectures import ARCHITECTURES
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.config import ModelConfig
from ..checkpoints.module_weights import Formats
from ..checkpoints.other_formats import WEIGHT_FILES
from ..checkpoints.tensor_files import all_finite
from ..checkpoints.weights import WeightSpec, too_large, weight_groups
from ..common.errors import QwenModelError
from ..common.extras import import_extra
from ..common.files import read_json_object
from ..common.progress import Progress, no_progress
from ..interface.memory import weight_bytes
from ..quantization.activation_aware import CalibratedWeights
from ..quantization.eight_bit import round_to_eight_bits
from ..quantization.formats import head_formats, own_formats
from ..quantization.options import QuantizationOptions, quantization_options
from ..quantization.published import FORMATS, eight_bit_tensors, layer_tensors, quantization_config
from ..quantization.search import round_weight
from ..quantization.summary import WeightSummary, error_warnings, weight_summary
from .arguments import check_choice, model_folder
from .calibration import calibrated_weights, calibration_warnings
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
    warnings: tuple[str, ...]


def quantize_checkpoint(
    model_dir: str | os.PathLike[str] | None = None,
    *,
    output_dir: str | os.PathLike[str],
    stored_as: str = "compressed-tensors",
    quantization: str | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    head_quantization: str | None = None,
    activation_aware: bool = False,
    per_token: bool = False,
    per_channel: bool = False,
    alpha: float | str | None = None,
    calibration: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> QuantizeSummary:
    """Quantize the linear layers of a Hugging Face checkpoint (None: the model in this package) into another folder.

    Embedding, norms and biases stay as they are, except that what calibration divides inputs by is folded into them.

    output_dir: a new or an empty folder.
    stored_as: "compressed-tensors", or for "int8" and "int4" also "gptq".
    quantization: "int8" or "int4": of weights; "smoothquant" or "fp8": of the inputs of layers, too. None: "int4", or
        "smoothquant" if an option of it is given, or texts to calibrate on without `activation_aware`.
    head_quantization: of the output projection: "int8" or "int4"; "none" or None: it stays as it is. A tied one is
        written beside the embedding.
    The others are as in `build_engine`; progress: see `Progress`.

    Raises:
        QwenModelError: an argument is wrong, the checkpoint cannot be read, is not supported or is quantized already,
            or `output_dir` cannot be written. Nothing has changed then.
    """
    start = time.perf_counter()
    check_choice("format", stored_as, FORMATS)
    if quantization is None:
        calibrated_inputs = per_token or per_channel or alpha is not None or calibration is not None
        quantization = "smoothquant" if calibrated_inputs and not activation_aware else "int4"
    options = quantization_options(
        quantization,
        group_size=group_size,
        symmetric=symmetric,
        head=head_quantization or "none",
        per_token=per_token,
        per_channel=per_channel,
        alpha=alpha,
        activation_aware=activation_aware,
        calibration=calibration,
    )
    configuration = quantization_config(stored_as, options)
    for module in ("torch", "safetensors"):
        import_extra(module, "writing a quantized checkpoint", extra="torch")
    source = model_folder(model_dir)
    place = new_folder_place(output_dir)
    model = ModelConfig.from_model_dir(source)
    checkpoint = Checkpoint(source, "torch")
    if checkpoint.quantization is not None:
        raise QwenModelError(f"{source} is quantized already, with {checkpoint.quantization.method}")
    checkpoint.check(model)
    report = progress or no_progress
    formats = own_formats(options, model, checkpoint.dtype)
    calibrated = calibrated_weights(checkpoint, model, formats, options, activation_aware, calibration, report)
    writer = _Writer(checkpoint, model, stored_as, options, formats, calibrated, report)
    with new_folder_written_whole(place) as folder:
        writer.write(folder)
        _copy_other_files(source, folder)
        config = {**read_json_object(source / "config.json"), "quantization_config": configuration}
        if options.head is not None:
            config["tie_word_embeddings"] = False
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    summary = weight_summary(model, checkpoint.dtype, formats, writer.relative_errors)
    seconds = time.perf_counter() - start
    warnings = (
        *calibration_warnings(options, activation_aware, calibration),
        *error_warnings(formats, writer.relative_errors),
    )
    return QuantizeSummary(place, model, stored_as, writer.bytes_written, summary, seconds, warnings)


class _Writer:
    """Quantize a checkpoint layer by layer, and write the tensors in shards."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: ModelConfig,
        stored_as: str,
        options: QuantizationOptions,
        formats: Formats,
        calibrated: CalibratedWeights | None,
        report: Progress,
    ):
        self._checkpoint = checkpoint
        self._model = model
        self._stored_as = stored_as
        self._options = options
        self._formats = formats
        self._calibrated = calibrated
        self._report = report
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
        head = head_formats(self._options.head, self._checkpoint.dtype)
        for group in weight_groups(self._model, self._checkpoint.dtype, head):
            for name, module in group.modules.items():
                for spec in (spec for spec in module.tensors if spec.sources):
                    if name in self._formats and spec is module.weight:
                        yield from self._quantized(name, spec)
                    else:
                        for source, tensor in self._parts(spec):
                            yield source, _as_dtype(tensor, self._checkpoint.dtype_of(source), source), tensor.nbytes

    def _parts(self, spec: WeightSpec) -> Iterator[tuple[str, Tensor]]:
        """Yield the checkpoint's tensors that a weight is made of, with the scales of inputs folded in, by name."""
        if self._calibrated is None:
            for source in spec.sources:
                yield source.name, self._checkpoint.tensor(source.name)
            return
        rows = [source.shape[spec.axis] for source in spec.sources]
        for source, part in zip(spec.sources, self._calibrated(spec).split(rows, spec.axis), strict=True):
            yield source.name, part

    def _quantized(self, name: str, spec: WeightSpec) -> Iterator[tuple[str, Tensor, int]]:
        error = total = 0.0
        for source, part in self._parts(spec):
            layer = source.removesuffix("weight") if name != "lm_head" else f"{_head(self._model)}."
            squares = float(part.float().square().sum())
            tensors, relative_error = self._rounded(name, part)
            error, total = error + relative_error**2 * squares, total + squares
            source_bytes = part.nbytes
            for suffix, tensor in tensors.items():
                yield f"{layer}{suffix}", tensor, source_bytes
                source_bytes = 0
        self.relative_errors[name] = (error / total) ** 0.5 if total else 0.0

    def _rounded(self, name: str, part: Tensor) -> tuple[dict[str, Tensor], float]:
        """Return the tensors of a layer, by the last part of their names, and its relative error."""
        import torch

        weight_format, calibrated = self._formats[name], self._calibrated
        if weight_format.activation is None:
            rounded = round_weight(part, weight_format, None if calibrated is None else calibrated.importance.get(name))
            arrays, error = layer_tensors(self._stored_as, rounded.weight), rounded.relative_error
            scale_dtype = weight_format.scale_dtype
        else:
            per_channel, scale_dtype = self._options.per_channel, self._checkpoint.dtype
            shared = () if per_channel else (len(part),)
            static = None if calibrated is None else calibrated.static.get(name)
            weight, error = round_to_eight_bits(part, weight_format.kind, shared, static, scale_dtype)
            arrays = eight_bit_tensors(weight, per_channel)
        tensors = {suffix: torch.from_numpy(array) for suffix, array in arrays.items()}
        for suffix in tensors:
            if "scale" in suffix:
                tensors[suffix] = tensors[suffix].to(getattr(torch, scale_dtype))
        if weight_format.kind == "fp8":
            tensors["weight"] = tensors["weight"].view(torch.float8_e4m3fn)
        return tensors, error

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


def _head(model: ModelConfig) -> str:
    return ARCHITECTURES[model.architecture].weights.lm_head


def _as_dtype(tensor: Tensor, dtype: str, name: str) -> Tensor:
    """Return a tensor of its own in the checkpoint's type, which folding may have left.

    Raises:
        QwenModelError: a number is too large for it.
    """
    import torch

    converted = tensor.to(getattr(torch, dtype), copy=True)
    if not all_finite(converted):
        raise QwenModelError(too_large(name, dtype, float(tensor.abs().max())))
    return converted.contiguous()


def _copy_other_files(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files, the settings and the code of a model, and its licence."""
    for path in sorted(source.iterdir()):
        wanted = path.suffix in COPIED or path.name.startswith(("LICENSE", "NOTICE"))
        if wanted and path.is_file() and path.name not in NOT_COPIED:
            shutil.copyfile(path, folder / path.name)
