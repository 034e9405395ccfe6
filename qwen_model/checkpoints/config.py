"""What a model is: `ModelConfig`, read from the `config.json` of a Hugging Face checkpoint and checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import QwenModelError
from ..common.files import read_json_object
from .architectures import ARCHITECTURES, Architecture, find_architecture

DTYPES = ("float16", "bfloat16", "float32")
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
"""The kinds of rotary scaling, and what a `rope_scaling` says of each."""


@dataclass(frozen=True)
class RotaryConfig:
    """Rotary embedding in the NeoX style: dimension i is rotated together with dimension i + dim / 2.

    `scaling` is one of `ROTARY_SCALINGS`: "qwen_dynamic" is the dynamic NTK of Qwen v1, the others are those that
    transformers calls "default", "linear", "dynamic", "llama3" and "yarn".
    """

    dim: int  # the first `dim` elements of each head are rotated
    base: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    original_max_positions: int = 0  # the length the model was trained for
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the range of dimensions between the two betas to whole numbers
    attention_factor: float = 1.0  # yarn: multiplies cos and sin


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a decoder but its weights. Sizes are in elements."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_positions: int
    norm_eps: float
    rotary: RotaryConfig
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k, before the rotary embedding
    tied_embedding: bool = False  # the output projection is the embedding table
    logn_length: int = 0  # Qwen v1: from this position on q grows with the logarithm of its position; 0: never
    dtype: str = "float16"  # of the checkpoint

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `dataclasses.asdict`.

        Raises:
            KeyError, TypeError, QwenModelError: something is missing, not known, or of the wrong type or size.
        """
        config = cls(**{**values, "rotary": RotaryConfig(**values["rotary"])})
        _check_types(config)
        _check_types(config.rotary)
        if config.architecture not in ARCHITECTURES:
            raise QwenModelError(f"architecture must be one of {', '.join(ARCHITECTURES)}, not {config.architecture!r}")
        _check(config)
        return config

    @classmethod
    def from_model_dir(cls, model_dir: Path) -> ModelConfig:
        """Read and check `config.json` of a Hugging Face checkpoint."""
        path = Path(model_dir) / "config.json"
        if not path.is_file():
            raise QwenModelError(f"{model_dir} is not a Hugging Face checkpoint: it has no config.json")
        return read_config(read_json_object(path))

    def with_rotary_scaling(self, scaling: Mapping[str, Any]) -> ModelConfig:
        """The same model with another rotary scaling, given as the `rope_scaling` of a `config.json`."""
        rotary = dataclasses.replace(
            RotaryConfig(dim=self.rotary.dim, base=self.rotary.base),
            original_max_positions=self.rotary.original_max_positions,
        )
        if not isinstance(scaling, Mapping):
            raise QwenModelError(f"the rotary scaling must be an object like that of rope_scaling, not {scaling!r}")
        reader = _Reader(scaling, "rotary scaling")
        _check_scaling_keys(reader)
        config = dataclasses.replace(self, rotary=_apply_scaling(rotary, reader))
        _check(config)
        return config


class _Reader:
    """Typed reading of one JSON object; every error names the key, what was given and what was expected."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json"):
        self.values = values
        self.where = where

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise QwenModelError(f"{self.where} has no {key!r}")
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise QwenModelError(f"{self.where}: {key} must be a positive integer, not {value!r}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise QwenModelError(f"{self.where}: {key} must be a positive number, not {value!r}")
        return float(value)

    def boolean(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise QwenModelError(f"{self.where}: {key} must be true or false, not {value!r}")
        return value


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    """A `ModelConfig` from the contents of a `config.json`."""
    architecture = find_architecture(values)
    _reject_unsupported(values)
    keys = architecture.keys
    reader = _Reader(values)
    hidden_size = reader.integer(keys.hidden_size)
    num_heads = reader.integer(keys.num_heads)
    head_size = _read_head_size(reader, architecture, hidden_size, num_heads)
    num_kv_heads = reader.integer(keys.num_kv_heads, num_heads) if keys.num_kv_heads else num_heads
    max_positions = reader.integer(keys.max_positions)
    config = ModelConfig(
        architecture=architecture.name,
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=reader.integer("intermediate_size") // architecture.intermediate_divisor,
        num_layers=reader.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        max_positions=max_positions,
        norm_eps=reader.number(keys.norm_eps, 1e-6),
        rotary=_read_rotary(reader, architecture, head_size, max_positions),
        qkv_bias=_switch(reader, architecture.qkv_bias),
        output_bias=_switch(reader, architecture.output_bias),
        mlp_bias=_switch(reader, architecture.mlp_bias),
        qk_norm=architecture.qk_norm,
        tied_embedding=reader.boolean("tie_word_embeddings"),
        logn_length=max_positions if architecture.qwen_v1_rotary and reader.boolean("use_logn_attn") else 0,
        dtype=_read_dtype(values),
    )
    _check(config)
    return config


def _switch(reader: _Reader, switch: bool | str) -> bool:
    return reader.boolean(switch) if isinstance(switch, str) else switch


def _read_head_size(reader: _Reader, architecture: Architecture, hidden_size: int, num_heads: int) -> int:
    if reader.values.get(architecture.keys.head_size) is not None:
        return reader.integer(architecture.keys.head_size)
    if architecture.default_head_size:
        return architecture.default_head_size
    if hidden_size % num_heads:
        raise QwenModelError(
            f"config.json: hidden_size {hidden_size} is not a multiple of the {num_heads} attention heads"
        )
    return hidden_size // num_heads


def _read_dtype(values: Mapping[str, Any]) -> str:
    key = "dtype" if values.get("dtype") else "torch_dtype"
    dtype = values.get(key)
    if dtype is None:
        return "bfloat16" if values.get("bf16") else "float16"  # bf16: Qwen v1
    if dtype not in DTYPES:
        raise QwenModelError(f"config.json: {key} {dtype!r} is not supported (only {', '.join(DTYPES)})")
    return dtype


def _reject_unsupported(values: Mapping[str, Any]) -> None:
    """Settings that would change the result and that the network does not have."""
    activation = values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise QwenModelError(f"config.json: hidden_act {activation!r} is not supported (only 'silu')")
    _reject_sliding_window(values)
    quantization = values.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else quantization
        raise QwenModelError(
            f"config.json: quantized checkpoints are not supported (quantization_config: quant_method {method!r})"
        )
    if values.get("num_key_value_heads_per_layer"):
        raise QwenModelError("config.json: num_key_value_heads_per_layer is not supported: every layer must be alike")
    if values.get("scale_attn_weights") is False:
        raise QwenModelError("config.json: scale_attn_weights false is not supported")
    if values.get("no_bias") is False:
        raise QwenModelError("config.json: no_bias false is not supported")


def _reject_sliding_window(values: Mapping[str, Any]) -> None:
    """Qwen2 and Qwen3 have a switch for it, and a `sliding_window` that means nothing while that is off."""
    if values.get("use_sliding_window"):
        raise QwenModelError("config.json: sliding-window attention (use_sliding_window) is not supported")
    window = values.get("sliding_window")
    if window is not None and "use_sliding_window" not in values:
        raise QwenModelError(f"config.json: sliding-window attention (sliding_window {window!r}) is not supported")
    layer_types = values.get("layer_types")
    if layer_types is None:
        return
    if not isinstance(layer_types, list):
        raise QwenModelError(f"config.json: layer_types must be a list, not {layer_types!r}")
    for kind in layer_types:
        if kind != "full_attention":
            raise QwenModelError(f"config.json: layer_types: {kind!r} is not supported (only 'full_attention')")


def _read_rotary(reader: _Reader, architecture: Architecture, head_size: int, max_positions: int) -> RotaryConfig:
    values = reader.values
    # transformers 5 keeps all of it in rope_parameters; before, rope_theta stood alone and rope_scaling beside it.
    key = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
    parameters = values.get(key) or {}
    if values.get("rope_scaling") not in (None, {}, parameters):
        raise QwenModelError("config.json has rope_parameters and another rope_scaling: keep one of them")
    if not isinstance(parameters, Mapping):
        raise QwenModelError(f"config.json: {key} must be an object, not {parameters!r}")
    scaling = _Reader(parameters, f"config.json: {key}")
    base = scaling.number("rope_theta", reader.number(architecture.keys.rotary_base, 10000.0))
    fraction = scaling.number("partial_rotary_factor", reader.number(architecture.keys.rotary_fraction, 1.0))
    rotary = RotaryConfig(dim=int(head_size * fraction), base=base, original_max_positions=max_positions)
    if architecture.qwen_v1_rotary and reader.boolean("use_dynamic_ntk"):
        return dataclasses.replace(rotary, scaling="qwen_dynamic")
    return _apply_scaling(rotary, scaling)


def _apply_scaling(rotary: RotaryConfig, reader: _Reader) -> RotaryConfig:
    """`rotary` with the scaling that a `rope_scaling` or `rope_parameters` object asks for."""
    kind = _scaling_kind(reader)
    if kind == "none":
        return rotary
    rotary = dataclasses.replace(rotary, scaling=kind)
    if kind == "qwen_dynamic":
        return rotary
    if reader.values.get("factor") is None:
        raise QwenModelError(f"{reader.where}: {kind!r} needs a factor")
    rotary = dataclasses.replace(rotary, factor=reader.number("factor", 1.0))
    if kind in ("llama3", "yarn"):
        trained = reader.integer("original_max_position_embeddings", rotary.original_max_positions)
        rotary = dataclasses.replace(rotary, original_max_positions=trained)
    if kind == "llama3":
        return dataclasses.replace(
            rotary,
            low_freq_factor=reader.number("low_freq_factor", 1.0),
            high_freq_factor=reader.number("high_freq_factor", 4.0),
        )
    if kind == "yarn":
        return dataclasses.replace(
            rotary,
            beta_fast=reader.number("beta_fast", 32.0),
            beta_slow=reader.number("beta_slow", 1.0),
            truncate=reader.boolean("truncate", True),
            attention_factor=_yarn_attention_factor(rotary.factor, reader),
        )
    return rotary


def _check_scaling_keys(reader: _Reader) -> None:
    """Nothing that this kind of scaling does not read: what a user gives is not silently left out."""
    kind = _scaling_kind(reader)
    known = {"rope_type", "type", *ROTARY_SCALINGS[kind]}
    if unknown := sorted(set(reader.values) - known):
        raise QwenModelError(f"{reader.where}: {kind!r} has no {', '.join(map(repr, unknown))}")


def _scaling_kind(reader: _Reader) -> str:
    """One of `ROTARY_SCALINGS`. Without a type there may be nothing that only a scaling needs."""
    kind = reader.values.get("rope_type") or reader.values.get("type")
    if kind is None:
        unused = [
            key for key in reader.values if key not in ("rope_type", "type", "rope_theta", "partial_rotary_factor")
        ]
        if unused:
            raise QwenModelError(f"{reader.where} has {', '.join(map(repr, unused))} but no 'rope_type'")
    if kind in ("default", None):
        return "none"
    if kind not in ROTARY_SCALINGS:
        raise QwenModelError(
            f"{reader.where}: rope_type {kind!r} is not supported (supported: {', '.join(ROTARY_SCALINGS)})"
        )
    return kind


def _yarn_attention_factor(factor: float, reader: _Reader) -> float:
    """Peng et al., "YaRN" (2023), section 3.4, with the two mscales of DeepSeek, as transformers reads them."""
    if reader.values.get("attention_factor") is not None:
        return reader.number("attention_factor", 1.0)

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if reader.values.get("mscale") and reader.values.get("mscale_all_dim"):
        return mscale(reader.number("mscale", 1.0)) / mscale(reader.number("mscale_all_dim", 1.0))
    return mscale(1.0)


def _check_types(config: ModelConfig | RotaryConfig) -> None:
    """Every number and text is one; sizes are at least 1, or 0 where that is the default."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type == "int":
            least = 0 if field.default == 0 else 1
            right = isinstance(value, int) and not isinstance(value, bool) and value >= least
        elif field.type == "float":
            right = isinstance(value, (int, float)) and not isinstance(value, bool)
        else:
            right = isinstance(value, {"bool": bool, "str": str, "RotaryConfig": RotaryConfig}[str(field.type)])
        if not right:
            raise QwenModelError(f"{field.name} must be of type {field.type}, not {value!r}")


def _check(config: ModelConfig) -> None:
    if config.num_heads % config.num_kv_heads:
        raise QwenModelError(
            f"config.json: {config.num_heads} attention heads are not a multiple of "
            f"the {config.num_kv_heads} key-value heads"
        )
    rotary_dim = config.rotary.dim
    if not 0 < rotary_dim <= config.head_size or rotary_dim % 2:
        raise QwenModelError(
            f"the rotary embedding must cover an even number of the {config.head_size} elements of a head, "
            f"not {rotary_dim}"
        )
    rotary = config.rotary
    if rotary.scaling in ("dynamic", "qwen_dynamic") and rotary_dim < 4:
        raise QwenModelError(f"rotary scaling {rotary.scaling!r} needs heads of at least 4 elements, not {rotary_dim}")
    if rotary.scaling == "yarn" and rotary.base <= 1:
        raise QwenModelError(f"rotary scaling 'yarn' needs a rope_theta above 1, not {rotary.base}")
    if rotary.scaling == "llama3" and rotary.low_freq_factor >= rotary.high_freq_factor:
        raise QwenModelError(
            f"rotary scaling 'llama3' needs a low_freq_factor below the high_freq_factor, "
            f"not {rotary.low_freq_factor} and {rotary.high_freq_factor}"
        )
