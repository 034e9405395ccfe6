"""Write the formats of an engine's quantized modules into its `config.json`, and read them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ..checkpoints.json_values import is_integer
from ..checkpoints.module_weights import Formats, ModuleWeights, WeightFormat
from ..common.errors import QwenModelError, shown

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qwen_plugins.quantized import PackedWeight
    from qwen_plugins.quantized import WeightFormat as KernelFormat


def kernel_format(weight_format: WeightFormat) -> KernelFormat:
    """Return the format as the GEMM kernels know it; of a weight that is not quantized, that it has the type of x."""
    from qwen_plugins import quantized

    if not weight_format.bits:
        return quantized.WeightFormat()
    if weight_format.activation is not None:
        return quantized.WeightFormat(
            weight_format.bits,
            weight_format.group_size,
            scale_dtype=weight_format.scale_dtype,
            activation=weight_format.activation,
            activation_scale=weight_format.activation_scale,
        )
    return quantized.WeightFormat(
        weight_format.bits, weight_format.group_size, not weight_format.symmetric, weight_format.scale_dtype
    )


def packed_weight(module: ModuleWeights[NDArray[Any]]) -> PackedWeight:
    """Return the weight of a quantized module, whose tensors are arrays in layout 2, as the kernels' functions take it.

    Its scales may be of any type of 16 bits: the format says what they are.
    """
    from qwen_plugins import quantized

    assert module.scales is not None  # quantized weights have scales
    out_features, in_features = module.shape
    return quantized.PackedWeight(
        module.weight, module.scales, module.zeros, kernel_format(module.format), out_features, in_features
    )


def dequantized(module: ModuleWeights[NDArray[Any]]) -> NDArray[Any]:
    """Return the numbers that a quantized module's weight stands for, float32 [out, in]."""
    from qwen_plugins import quantized

    from ..checkpoints.eight_bit_weight import EightBitWeight  # with NumPy, which `doctor` does without

    if module.format.activation is not None:
        assert module.scales is not None
        return EightBitWeight(module.format.kind, module.weight, module.scales).dequantized()
    weight = quantized.dequantize(packed_weight(module))
    if module.permutation is None:
        return weight
    natural = weight.copy()
    natural[:, module.permutation] = weight
    return natural


def formats_as_json(formats: Formats) -> list[dict[str, Any]]:
    """Return a list of formats, each with the `modules` that have it."""
    modules: dict[WeightFormat, list[str]] = {}
    for name, weight_format in formats.items():
        modules.setdefault(weight_format, []).append(name)
    return [{**dataclasses.asdict(each), "modules": names} for each, names in modules.items()]


def formats_from_json(values: Any) -> dict[str, WeightFormat]:
    """Return the formats by module, in the order of `formats_as_json`.

    Raises:
        QwenModelError: they are damaged, or none that this version reads.
    """
    found: dict[str, WeightFormat] = {}
    if not isinstance(values, list) or not all(isinstance(each, dict) for each in values):
        raise QwenModelError(f"weight_formats must be a list of objects, not {shown(values)}")
    for each in values:
        names = each.get("modules")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise QwenModelError(f"weight_formats must have lists of modules, not {shown(names)}")
        weight_format = _format({key: value for key, value in each.items() if key != "modules"})
        found.update((name, weight_format) for name in names)
    return found


def _format(values: dict[str, Any]) -> WeightFormat:
    try:
        found = WeightFormat(**values)
    except TypeError:
        raise _not_read(values) from None
    right = _with_quantized_x_is_right if found.activation is not None else _of_weights_alone_is_right
    if not (is_integer(found.group_size, least=0) and isinstance(found.kind, str) and right(found)):
        raise _not_read(values)
    return found


def _of_weights_alone_is_right(found: WeightFormat) -> bool:
    return (
        found.kind in ("int4", "int8")
        and found.group_size in (0, 32, 64, 128)
        and isinstance(found.symmetric, bool)
        and found.layout == 2
        and isinstance(found.permuted, bool)
        and found.scale_dtype in ("float16", "bfloat16")
        and found.activation_scale == ""
    )


def _with_quantized_x_is_right(found: WeightFormat) -> bool:
    return (
        found.kind in ("int8", "fp8")
        and found.activation == found.kind
        and found.group_size in ((0,) if found.kind == "int8" else (0, 128))
        and found.activation_scale in (("token",) if found.group_size else ("token", "tensor"))
        and found.symmetric is True
        and found.layout == 1
        and found.permuted is False
        and found.scale_dtype == "float32"
    )


def _not_read(values: dict[str, Any]) -> QwenModelError:
    return QwenModelError(f"weights in the format {shown(values)} are not read by this version of qwen_model")
