"""Export the network of a checkpoint as an ONNX file."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.config import DTYPES, ModelConfig
from ..checkpoints.weights import num_parameters
from ..common.errors import QwenModelError
from ..common.extras import import_extra
from ..common.progress import Progress, no_progress
from ..interface.engine_config import KV_CACHE_DTYPES, Limits
from ..network.inputs import Profile, network_inputs, profile_shapes
from .arguments import check_choice, model_folder
from .build import balance_keys, cache_scale_warnings, limit_warnings
from .limits import engine_limits

if TYPE_CHECKING:
    from ..backends.onnx.export import WrittenModel

OPERATORS = ("plugins", "standard")
MODULES = ("onnx", "safetensors", "ml_dtypes")
"""What the export needs; `pip install "qwen-plugins[onnx]"` brings it."""


@dataclass(frozen=True)
class ExportSummary:
    """Describe the file that `export_onnx` wrote.

    limits: the sizes of the cache and of the profiles; None with standard operators, which have none.
    profiles: for TensorRT's builder, of decode steps and of prompts: the least, the typical and the largest shape of
        each dynamic input; empty with standard operators.
    """

    path: Path
    operators: str
    dtype: str
    model: ModelConfig
    limits: Limits | None
    num_parameters: int
    profiles: tuple[Profile, ...]
    written: WrittenModel
    seconds: float
    warnings: tuple[str, ...]


def export_onnx(
    model_dir: str | os.PathLike[str] | None = None,
    *,
    output: str | os.PathLike[str],
    operators: str = "plugins",
    dtype: str | None = None,
    max_batch_size: int | None = None,
    max_input_len: int | None = None,
    max_output_len: int | None = None,
    max_num_tokens: int | None = None,
    kv_cache_dtype: str = "auto",
    rotary_scaling: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> ExportSummary:
    """Write a Hugging Face checkpoint's network (None: that of the model in this package) as an ONNX file.

    output: the file, whose name ends in .onnx. Weights of more than 256 MiB go to a second file beside it, with .data
        added to the name. Files of an earlier export are replaced; any other file is an error.
    operators: "plugins", this project's TensorRT plug-ins as nodes, or "standard", ONNX's own operators alone.
    dtype: "float16", "bfloat16" or "float32"; None: the checkpoint's with plug-ins, "float32" with standard operators.
    max_batch_size, max_input_len, max_output_len, max_num_tokens, kv_cache_dtype: as in `build_engine`, with plug-ins
        only.
    rotary_scaling: replaces the checkpoint's `rope_scaling`, in the same form.
    progress: see `Progress`.

    Raises:
        QwenModelError: an argument is wrong, the checkpoint cannot be read or is not supported, or the file cannot be
            written. Nothing has changed then.
    """
    start = time.perf_counter()
    check_choice("operators", operators, OPERATORS)
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
    check_choice("kv_cache_dtype", kv_cache_dtype, KV_CACHE_DTYPES)
    sizes = (max_batch_size, max_input_len, max_output_len, max_num_tokens)
    if operators == "standard" and any(size is not None for size in sizes):
        raise QwenModelError(
            "standard operators take any sizes: give no max_batch_size, max_input_len, max_output_len, max_num_tokens"
        )
    if operators == "standard" and kv_cache_dtype != "auto":
        raise QwenModelError("standard operators keep the cache in the graph's type: give no kv_cache_dtype")
    for module in MODULES:
        import_extra(module, "the ONNX export", extra="onnx")
    from ..backends.onnx.export import write_model
    from ..backends.onnx.output_files import output_place

    source = model_folder(model_dir)
    place = output_place(output)
    model = ModelConfig.from_model_dir(source).with_rotary_scaling(rotary_scaling)
    limits = engine_limits(model, *sizes) if operators == "plugins" else None
    checkpoint = Checkpoint(source, "numpy")
    checkpoint.check(model)
    model = dataclasses.replace(model, dtype=model.dtype or checkpoint.dtype)
    chosen = dtype or (model.dtype if operators == "plugins" else "float32")
    warnings = [*_warnings(checkpoint, model, limits, chosen), *balance_keys(checkpoint, model, {}, kv_cache_dtype)]
    report = progress or no_progress
    written = write_model(place, model, limits, chosen, kv_cache_dtype, checkpoint.read, report)
    seconds = time.perf_counter() - start
    profiles = () if limits is None else profile_shapes(network_inputs(model, limits, chosen, kv_cache_dtype))
    return ExportSummary(
        place, operators, chosen, model, limits, num_parameters(model), profiles, written, seconds, tuple(warnings)
    )


def _warnings(checkpoint: Checkpoint, model: ModelConfig, limits: Limits | None, dtype: str) -> Iterator[str]:
    """Yield warnings about what the graph does not do as the checkpoint says; `limits` as in `ExportSummary`."""
    formats = list(checkpoint.formats(model).values())
    if formats:
        kept = "" if limits is None else "; engines of qwen-model build keep them quantized"
        inputs = ", and the inputs of layers are not quantized" if any(each.activation for each in formats) else ""
        yield (
            f"the checkpoint's weights are quantized ({formats[0].text}): the file has the numbers that they stand "
            f"for, in {dtype}{inputs}{kept}"
        )
    yield from cache_scale_warnings(checkpoint)
    if limits is not None:
        yield from limit_warnings(model, limits, None)
    elif model.full_attention_length:  # which standard operators do not limit
        yield (
            f"the model attends to sequences of more than {model.full_attention_length} tokens through a sliding "
            "window or chunks, which the graph does not: give it no longer ones"
        )
