"""Read the settings of the rotary embedding from a `config.json`, as transformers reads them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from ..common.errors import QwenModelError, shown
from .architectures import Architecture
from .json_values import JsonValues

ROTARY_SCALINGS: dict[str, tuple[str, ...]] = {
    "none": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate"),
        *("attention_factor", "mscale", "mscale_all_dim"),
    ),
    "qwen_dynamic": (),
}
"""The kinds of rotary scaling, and the keys that a `rope_scaling` of each kind may have."""


@dataclass(frozen=True)
class RotaryConfig:
    """Describe a rotary embedding in the NeoX style: dimension i is rotated together with dimension i + dim / 2.

    `scaling` is one of `ROTARY_SCALINGS`: "qwen_dynamic" is the dynamic NTK of Qwen v1, the others are those that
    transformers calls "default", "linear", "dynamic", "llama3" and "yarn".
    """

    dim: int  # the first `dim` elements of each head are rotated; even
    base: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    original_max_positions: int = 0  # the length the model was trained for
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the range of dimensions between the two betas to integers
    attention_factor: float = 1.0  # yarn: multiplies cos and sin


def read_rotary(config: JsonValues, architecture: Architecture, head_size: int, max_positions: int) -> RotaryConfig:
    """Read the rotary embedding that a `config.json` describes."""
    # transformers 5 has all settings in rope_parameters; older files have rope_theta and rope_scaling.
    key = "rope_parameters" if config.values.get("rope_parameters") else "rope_scaling"
    scaling = config.nested(key)
    if config.values.get("rope_scaling") not in (None, {}, scaling.values):
        raise QwenModelError("config.json has rope_parameters and another rope_scaling: keep one of them")
    keys = architecture.keys
    base = scaling.number("rope_theta", config.number(keys.rotary_base, 10000.0))
    fraction = config.number(keys.rotary_fraction, 1.0) if keys.rotary_fraction else 1.0
    rotary = RotaryConfig(dim=int(head_size * fraction), base=base, original_max_positions=max_positions)
    if architecture.qwen_v1_rotary and config.boolean("use_dynamic_ntk"):
        return dataclasses.replace(rotary, scaling="qwen_dynamic")
    scaled = scaled_rotary(rotary, scaling, max_positions, original_positions=_original_positions(config))
    if not keys.rotary_fraction:
        _check_whole_heads(config, scaling, scaled.scaling)
    return scaled


def _original_positions(config: JsonValues) -> int | None:
    """Read `original_max_position_embeddings` of the top level, which transformers prefers to that in rope_scaling."""
    key = "original_max_position_embeddings"
    return config.integer(key) if config.has(key) else None


def _check_whole_heads(config: JsonValues, scaling: JsonValues, kind: str) -> None:
    """Refuse a rotary embedding of a part of each head, which transformers cannot run for these architectures.

    Without a scaling transformers ignores `partial_rotary_factor`; with one its tables are too narrow for its layers.
    """
    fraction = scaling.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    if kind != "none" and fraction != 1.0:
        raise QwenModelError(
            f"config.json: partial_rotary_factor {fraction:g} with rotary scaling {kind!r} is not supported for this "
            "architecture"
        )


def scaled_rotary(
    rotary: RotaryConfig, scaling: JsonValues, max_positions: int, original_positions: int | None = None
) -> RotaryConfig:
    """Add to `rotary` the scaling that a `rope_scaling` or `rope_parameters` object asks for.

    original_positions: if given, takes precedence over `original_max_position_embeddings` of that object.
    """
    kind = _scaling_kind(scaling)
    if kind == "none":
        return rotary
    rotary = dataclasses.replace(rotary, scaling=kind)
    if kind == "qwen_dynamic":
        return rotary
    if kind in ("llama3", "yarn"):
        trained = scaling.integer("original_max_position_embeddings", rotary.original_max_positions)
        rotary = dataclasses.replace(rotary, original_max_positions=original_positions or trained)
    rotary = dataclasses.replace(rotary, factor=_factor(kind, scaling, max_positions, rotary.original_max_positions))
    if kind == "llama3":
        return dataclasses.replace(
            rotary,
            low_freq_factor=scaling.number("low_freq_factor", 1.0),
            high_freq_factor=scaling.number("high_freq_factor", 4.0),
        )
    if kind == "yarn":
        return dataclasses.replace(
            rotary,
            beta_fast=scaling.number("beta_fast", 32.0),
            beta_slow=scaling.number("beta_slow", 1.0),
            truncate=scaling.boolean("truncate", True),
            attention_factor=_yarn_attention_factor(rotary.factor, scaling),
        )
    return rotary


def _factor(kind: str, scaling: JsonValues, max_positions: int, original_positions: int) -> float:
    if kind == "yarn" and "factor" in scaling.values and not scaling.has("factor"):
        return max_positions / original_positions
    if not scaling.has("factor"):
        raise QwenModelError(f"{scaling.where}: {kind!r} needs a factor")
    return scaling.number("factor", 1.0)


def check_scaling_keys(scaling: JsonValues) -> None:
    """Refuse keys that this kind of scaling does not have, so that nothing that a user gives is ignored."""
    kind = _scaling_kind(scaling)
    known = {"rope_type", "type", *ROTARY_SCALINGS[kind]}
    if unknown := sorted(set(scaling.values) - known):
        raise QwenModelError(f"{scaling.where}: {kind!r} has no {', '.join(map(shown, unknown))}")


def _scaling_kind(scaling: JsonValues) -> str:
    """Return one of `ROTARY_SCALINGS`; an object without a type must not have keys of a scaling."""
    kind = scaling.values.get("rope_type") or scaling.values.get("type")
    if kind is None:
        unused = [
            key for key in scaling.values if key not in ("rope_type", "type", "rope_theta", "partial_rotary_factor")
        ]
        if unused:
            raise QwenModelError(f"{scaling.where} has {', '.join(map(shown, unused))} but no 'rope_type'")
    if kind in ("default", None):
        return "none"
    if not isinstance(kind, str) or kind not in ROTARY_SCALINGS:
        raise QwenModelError(
            f"{scaling.where}: rope_type {shown(kind)} is not supported (supported: {', '.join(ROTARY_SCALINGS)})"
        )
    return kind


def _yarn_attention_factor(factor: float, scaling: JsonValues) -> float:
    """Return the factor of cos and sin: Peng et al., "YaRN" (2023), section 3.4, with the two mscales of DeepSeek."""
    if scaling.has("attention_factor"):
        return scaling.number("attention_factor", 1.0)

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.values.get("mscale") and scaling.values.get("mscale_all_dim"):
        return mscale(scaling.number("mscale", 1.0)) / mscale(scaling.number("mscale_all_dim", 1.0))
    return mscale(1.0)


def check_rotary(rotary: RotaryConfig, head_size: int) -> None:
    """Raise QwenModelError for settings that give no rotary embedding for heads of this size."""
    if not 0 < rotary.dim <= head_size or rotary.dim % 2:
        raise QwenModelError(
            f"the rotary embedding must cover an even number of the {head_size} elements of a head, not {rotary.dim}"
        )
    if rotary.scaling not in ROTARY_SCALINGS:
        raise QwenModelError(f"rotary scaling must be one of {', '.join(ROTARY_SCALINGS)}, not {rotary.scaling!r}")
    if rotary.scaling != "none" and rotary.original_max_positions < 1:
        raise QwenModelError(f"rotary scaling {rotary.scaling!r} needs the length that the model was trained for")
    if rotary.scaling in ("dynamic", "qwen_dynamic") and rotary.dim < 4:
        raise QwenModelError(f"rotary scaling {rotary.scaling!r} needs heads of at least 4 elements, not {rotary.dim}")
    if rotary.scaling == "yarn" and rotary.base <= 1:
        raise QwenModelError(f"rotary scaling 'yarn' needs a rope_theta above 1, not {rotary.base}")
    if rotary.scaling == "llama3" and rotary.low_freq_factor >= rotary.high_freq_factor:
        raise QwenModelError(
            f"rotary scaling 'llama3' needs a low_freq_factor below the high_freq_factor, "
            f"not {rotary.low_freq_factor} and {rotary.high_freq_factor}"
        )
