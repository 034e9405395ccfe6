"""Choose the formats of an engine's quantized modules: as a checkpoint has them, or as the user asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.config import ModelConfig
from ..checkpoints.eight_bit_weight import eight_bit_format
from ..checkpoints.module_weights import WeightFormat
from ..checkpoints.weights import weight_groups
from ..common.errors import QwenModelError
from .options import (
    EIGHT_BIT_KINDS,
    GROUP_SIZES,
    HEADS,
    MODES,
    QUANTIZATIONS,
    QuantizationOptions,
    check_mixture,
    quantization_options,
)


def chosen_formats(
    checkpoint: Checkpoint,
    model: ModelConfig,
    dtype: str,
    quantization: str = "auto",
    group_size: int | None = None,
    symmetric: bool | None = None,
    head: str | None = None,
    **options: Any,
) -> dict[str, WeightFormat]:
    """Return the formats of the quantized modules of an engine of type `dtype`, by name; {}: there are none.

    quantization: of `MODES`. With "none" the engine of a quantized checkpoint has the numbers that its codes stand for.
    head: what the output projection is quantized to, of `HEADS`; None: "int8" where weights alone are quantized here,
        else as in the checkpoint.
    group_size, symmetric, options: see `quantization_options`.

    Raises:
        QwenModelError: a value is none of these, or not for this checkpoint.
    """
    if quantization not in MODES:
        raise QwenModelError(f"quantization must be one of {', '.join(MODES)}, not {quantization!r}")
    if head not in (None, *HEADS):
        raise QwenModelError(f"head_quantization must be one of {', '.join(HEADS)}, not {head!r}")
    if quantization in QUANTIZATIONS:
        chosen = quantization_options(quantization, group_size=group_size, symmetric=symmetric, head=head, **options)
        if checkpoint.quantization is not None:
            raise QwenModelError(
                f"{checkpoint.model_dir} is quantized already, with {checkpoint.quantization.method} "
                f"({checkpoint.quantization.where}): leave out quantization (--quantization), or give the checkpoint "
                "that it was made from"
            )
        return own_formats(chosen, model, dtype)
    check_mixture(quantization, group_size=group_size, symmetric=symmetric, **options)
    published = checkpoint.formats(model) if quantization == "auto" or head not in (None, "none") else {}
    found = {} if quantization == "none" else engine_formats(published)
    if head is not None and "lm_head" in published:
        text = published["lm_head"].text
        raise QwenModelError(
            f"the head is quantized already ({text}): leave out head_quantization (--head-quantization)"
        )
    if head in (None, "none"):
        return found
    return {**found, "lm_head": own_formats(QuantizationOptions("int8", head=head), model, dtype)["lm_head"]}


def engine_formats(formats: Mapping[str, WeightFormat]) -> dict[str, WeightFormat]:
    """Return the formats that modules have in an engine, whose groups are of at most 128 inputs, or of all.

    Raises:
        QwenModelError: the kernels have no groups of a module's size; it names the module.
    """
    found = {}
    for name, weight_format in formats.items():
        if weight_format.activation is not None:
            found[name] = weight_format
            continue
        size = weight_format.group_size
        if size not in (0, 32, 64) and size % 128:
            raise QwenModelError(
                f"{name} is quantized in groups of {size} inputs, which is not supported (only 32, 64, multiples of "
                "128, and all inputs)"
            )
        found[name] = dataclasses.replace(weight_format, group_size=min(size, 128))
    return found


def own_formats(options: QuantizationOptions, model: ModelConfig, dtype: str) -> dict[str, WeightFormat]:
    """Return the formats of the quantized modules of `model`, for an engine of type `dtype`.

    Raises:
        QwenModelError: groups do not divide the inputs of a layer.
    """
    found = {}
    for group in weight_groups(model, dtype, head_formats(options.head, dtype)):
        for name, module in group.modules.items():
            kind = options.head if name == "lm_head" else options.kind
            if len(module.shape) == 2 and name != "embedding" and kind is not None:
                found[name] = _format(name, kind, options, module.shape[1], dtype)
    return found


def _format(name: str, kind: str, options: QuantizationOptions, in_features: int, dtype: str) -> WeightFormat:
    if kind in EIGHT_BIT_KINDS:
        codes = {"smoothquant": "int8", "fp8": "fp8"}[kind]
        return eight_bit_format(codes, "token" if options.per_token else "tensor")
    scale_dtype = scale_dtype_of(dtype)
    if kind == "int8":
        return WeightFormat(kind, layout=2, scale_dtype=scale_dtype)
    size = 0 if options.group_size in (-1, in_features) else options.group_size
    if size and in_features % size:
        fitting = [str(each) for each in GROUP_SIZES if each == -1 or in_features % each == 0]
        raise QwenModelError(
            f"{name} has {in_features} inputs, which are no groups of {size}: give a group_size (--group-size) of "
            f"{' or '.join(fitting)}"
        )
    return WeightFormat(kind, size, options.symmetric, layout=2, scale_dtype=scale_dtype)


def head_formats(head: str | None, dtype: str) -> dict[str, WeightFormat]:
    """Return the format of a quantized output projection alone, with a scale for each output; {}: it has none."""
    return {} if head is None else {"lm_head": WeightFormat(head, layout=2, scale_dtype=scale_dtype_of(dtype))}


def scale_dtype_of(dtype: str) -> str:
    """Return the type of scales that are made here: bfloat16 for bfloat16, for the same range, else float16."""
    return "bfloat16" if dtype == "bfloat16" else "float16"
