"""Say what quantization does to an engine: bits a weight, the memory of each part, and the error of each layer."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..checkpoints.config import ModelConfig
from ..checkpoints.module_weights import Formats, WeightFormat
from ..checkpoints.weights import network_modules, weight_groups
from ..interface.memory import spec_bytes

PARTS = {
    "embedding": r"embedding",
    "attention": r"layers\.\d+\.attention\.(qkv|output)",
    "MLP": r"layers\.\d+\.mlp\..*",
    "head": r"lm_head",
    "norms": r".*norm",
}
"""The modules of each part of a network, as regular expressions, in the order in which parts are shown."""

LARGE_ERRORS = {4: 0.16, 8: 0.05}
"""The relative errors of weights, by the bits of a code, above which a layer does not suit its format.

Those of normally distributed numbers are 9 to 14 % in 4 bits, and 1 % (int8) to 3 % (fp8) in 8.
"""
NAMED_LAYERS = 3


@dataclass(frozen=True)
class WeightSummary:
    """Describe the weights of an engine.

    formats: the text of each format, with the number of modules that have it; the engine's type first.
    bits: of a weight of the quantized modules, scales, zero points and padding included; 0.0: there are none.
    part_bytes: of each part of the network.
    relative_errors: of the modules that were quantized in the build, the worst first: the root of the mean squared
        error, relative to that of the weight.
    """

    formats: dict[str, int]
    bits: float
    part_bytes: dict[str, int]
    relative_errors: dict[str, float]


def weight_summary(
    model: ModelConfig, dtype: str, formats: Formats, relative_errors: Mapping[str, float]
) -> WeightSummary:
    """Describe the weights of an engine of type `dtype`, whose quantized modules have these formats."""
    counts: dict[str, int] = {}
    for name, module in network_modules(model, dtype, formats).items():
        if len(module.shape) == 2 and name != "embedding":
            counts[module.format.text] = counts.get(module.format.text, 0) + 1
    modules = [item for group in weight_groups(model, dtype, formats) for item in group.modules.items()]
    quantized = [module for _, module in modules if module.format.bits]
    numbers = sum(math.prod(module.shape) for module in quantized)
    size = sum(spec_bytes(spec) for module in quantized for spec in module.tensors if spec is not module.bias)
    parts = dict.fromkeys(PARTS, 0)
    for name, module in modules:
        part = next(part for part, pattern in PARTS.items() if re.fullmatch(pattern, name))
        parts[part] += sum(spec_bytes(spec) for spec in module.tensors)
    worst = dict(sorted(relative_errors.items(), key=lambda item: -item[1]))
    return WeightSummary(counts, 8 * size / numbers if numbers else 0.0, parts, worst)


def error_warnings(formats: Formats, relative_errors: Mapping[str, float]) -> Iterator[str]:
    """Yield a warning for each format in which layers lose more than is normal, with their names and what helps.

    The output projection, which has options of its own, has a warning of its own.
    """
    large: dict[tuple[WeightFormat, bool], dict[str, float]] = {}
    for name, error in sorted(relative_errors.items(), key=lambda item: -item[1]):
        if error > LARGE_ERRORS[formats[name].bits]:
            large.setdefault((formats[name], name == "lm_head"), {})[name] = error
    for (weight_format, is_head), errors in large.items():
        most, remedy = LARGE_ERRORS[weight_format.bits], _remedy(weight_format, is_head)
        named = [f"{name} ({error:.0%})" for name, error in errors.items()][:NAMED_LAYERS]
        more = f" and {len(errors) - len(named)} more layers" if len(errors) > len(named) else ""
        yield (
            f"{', '.join(named)}{more} lose more than {most:.0%} of their weights in {weight_format.text}: {remedy}; "
            "qwen-model perplexity --compare shows what it costs"
        )


def _remedy(weight_format: WeightFormat, is_head: bool) -> str:
    if is_head:
        return f"--head-quantization {'int8' if weight_format.bits == 4 else 'none'} has smaller errors"
    if weight_format.bits == 4:
        smaller = "" if weight_format.group_size == 32 else "--group-size 32 or "
        return f"{smaller}int8 has smaller errors"
    if weight_format.kind == "int8":
        rows = "" if weight_format.activation is None else "--per-channel, where it is not given, or "
        return f"a few numbers are much larger than those beside them, which {rows}fp8 keeps better"
    return "16 bits suit them better"
