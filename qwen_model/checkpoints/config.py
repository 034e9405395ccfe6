"""Read and check the `config.json` of a Hugging Face checkpoint, as a `ModelConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import QwenModelError, shown
from ..common.files import is_file, read_json_object
from .architectures import ARCHITECTURES, Architecture, find_architecture
from .json_values import JsonValues, is_integer, is_number
from .other_formats import reject_other_formats
from .quantization_config import read_quantization
from .rotary_config import RotaryConfig, check_rotary, check_scaling_keys, read_rotary, scaled_rotary

DTYPES = ("float16", "bfloat16", "float32")
LARGEST_NUM_LAYERS = 10_000


@dataclass(frozen=True)
class ModelConfig:
    """Describe a decoder, except its weights. Sizes are in elements."""

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
    logn_length: int = 0  # Qwen v1: beyond this position q is scaled by log(position) / log(logn_length); 0: never
    full_attention_length: int = 0  # beyond it layers attend to a window or chunks, which is not supported; 0: never
    dtype: str = ""  # of the checkpoint; "": config.json does not say

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Make a configuration from what `dataclasses.asdict` gives.

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
        """Read and check `config.json` of a Hugging Face checkpoint.

        Raises:
            QwenModelError: the folder is not such a checkpoint, or the model is not supported.
        """
        model_dir = Path(model_dir)
        reject_other_formats(model_dir)
        path = model_dir / "config.json"
        if not is_file(path):
            raise QwenModelError(f"{model_dir} is not a Hugging Face checkpoint: it has no config.json")
        values = read_json_object(path)
        read_quantization(model_dir, values)  # what is not read is an error, before weights are looked for
        return read_config(values)

    def with_rotary_scaling(self, scaling: Mapping[str, Any] | None) -> ModelConfig:
        """Return the same model with another rotary scaling, given as the `rope_scaling` of a `config.json`.

        scaling: None: the model's own.

        Raises:
            QwenModelError: the scaling is not valid, or not supported.
        """
        if scaling is None:
            return self
        rotary = dataclasses.replace(
            RotaryConfig(dim=self.rotary.dim, base=self.rotary.base),
            original_max_positions=self.rotary.original_max_positions,
        )
        if not isinstance(scaling, Mapping):
            raise QwenModelError(
                f"the rotary scaling must be an object like that of rope_scaling, not {shown(scaling)}"
            )
        values = JsonValues(scaling, "rotary scaling")
        check_scaling_keys(values)
        config = dataclasses.replace(self, rotary=scaled_rotary(rotary, values, self.max_positions))
        _check(config)
        return config


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    """Make a `ModelConfig` from the contents of a `config.json`.

    Raises:
        QwenModelError: a setting is missing, not valid or not supported.
    """
    architecture = find_architecture(values)
    _reject_unsupported(values)
    config = _with_current_names(JsonValues(values), architecture)
    keys = architecture.keys
    hidden_size = config.integer(keys.hidden_size)
    num_heads = config.integer(keys.num_heads)
    head_size = _read_head_size(config, architecture, hidden_size, num_heads)
    max_positions = config.integer(keys.max_positions)
    model = ModelConfig(
        architecture=architecture.name,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_read_intermediate_size(config, architecture),
        num_layers=config.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=config.integer(keys.num_kv_heads, num_heads) if keys.num_kv_heads else num_heads,
        head_size=head_size,
        max_positions=max_positions,
        norm_eps=config.number(keys.norm_eps, 1e-6),
        rotary=read_rotary(config, architecture, head_size, max_positions),
        qkv_bias=_switch(config, architecture.qkv_bias),
        output_bias=_switch(config, architecture.output_bias),
        mlp_bias=_switch(config, architecture.mlp_bias),
        qk_norm=architecture.qk_norm,
        tied_embedding=config.boolean("tie_word_embeddings"),
        logn_length=max_positions if architecture.qwen_v1_rotary and config.boolean("use_logn_attn") else 0,
        full_attention_length=_full_attention_length(config, architecture),
        dtype=_read_dtype(config),
    )
    _check(model)
    return model


def _switch(config: JsonValues, switch: bool | str) -> bool:
    return config.boolean(switch) if isinstance(switch, str) else switch


def _read_head_size(config: JsonValues, architecture: Architecture, hidden_size: int, num_heads: int) -> int:
    if config.has(architecture.keys.head_size):
        return config.integer(architecture.keys.head_size)
    if architecture.default_head_size:
        return architecture.default_head_size
    if hidden_size % num_heads:
        raise QwenModelError(
            f"config.json: hidden_size {hidden_size} is not a multiple of the {num_heads} attention heads"
        )
    return hidden_size // num_heads


def _read_intermediate_size(config: JsonValues, architecture: Architecture) -> int:
    size, divisor = config.integer("intermediate_size"), architecture.intermediate_divisor
    if size % divisor:
        raise QwenModelError(f"config.json: intermediate_size {size} is not a multiple of {divisor}")
    return size // divisor


def _read_dtype(config: JsonValues) -> str:
    """Read the type of the weights, also with a prefix (torch.bfloat16); "" if the configuration does not say."""
    key = "dtype" if config.has("dtype") else "torch_dtype"
    dtype = config.values.get(key)
    if dtype is None:
        return ""
    name = dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
    if name not in DTYPES:
        raise QwenModelError(f"config.json: {key} {shown(dtype)} is not supported (only {', '.join(DTYPES)})")
    return str(name)


def _with_current_names(config: JsonValues, architecture: Architecture) -> JsonValues:
    """Add the current name of each setting that has the name of an earlier version."""
    values = dict(config.values)
    for older, current in architecture.older_keys.items():
        if values.get(older) is None:
            continue
        if values.get(current) is None:
            values[current] = values[older]
        elif values[current] != values[older]:
            raise QwenModelError(
                f"config.json: {older} {shown(values[older])} and {current} {shown(values[current])} differ, but both "
                "are names of one setting"
            )
    return JsonValues(values)


def _reject_unsupported(values: Mapping[str, Any]) -> None:
    """Refuse settings that would change the result and that the network does not have."""
    activation = values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise QwenModelError(f"config.json: hidden_act {shown(activation)} is not supported (only 'silu')")
    if values.get("num_key_value_heads_per_layer"):
        raise QwenModelError(
            "config.json: num_key_value_heads_per_layer is not supported: every layer must have as many"
        )
    if values.get("scale_attn_weights") is False:
        raise QwenModelError("config.json: scale_attn_weights false is not supported")
    if values.get("no_bias") is False:
        raise QwenModelError("config.json: no_bias false is not supported")


def _full_attention_length(config: JsonValues, architecture: Architecture) -> int:
    """Return the tokens up to which attention is full: the shorter of sliding window and chunk; 0: always."""
    lengths = [_sliding_window(config, architecture), _chunk_length(config)]
    return min((length for length in lengths if length), default=0)


def _sliding_window(config: JsonValues, architecture: Architecture) -> int:
    """Return the length of the sliding window in tokens, as transformers reads it; 0: no layer has one.

    Qwen2 and Qwen3 have a switch, and `layer_types` or `max_window_layers` say which layers have a window. The other
    architectures ignore `sliding_window`.
    """
    switched_on = architecture.window_switch and config.boolean("use_sliding_window")
    window = config.integer("sliding_window", 4096) if switched_on and _gives_window(config) else 0
    kinds = config.values.get("layer_types")
    if kinds is None:
        full_layers = config.integer("max_window_layers", 28, least=0) if window else 0
        return window if full_layers < config.integer("num_hidden_layers") else 0
    if not isinstance(kinds, list):
        raise QwenModelError(f"config.json: layer_types must be a list, not {shown(kinds)}")
    for kind in kinds:
        if kind not in ("full_attention", "attention") and not (window and kind == "sliding_attention"):
            raise QwenModelError(f"config.json: layer_types: {shown(kind)} is not supported (only 'full_attention')")
    return window if "sliding_attention" in kinds else 0


def _gives_window(config: JsonValues) -> bool:
    """Tell whether there may be a window: an explicit null means that there is none, as in transformers."""
    return "sliding_window" not in config.values or config.has("sliding_window")


def _chunk_length(config: JsonValues) -> int:
    """Return the tokens up to which dual chunk attention (Qwen2.5-1M) is full attention; 0: the model has none."""
    if not config.values.get("dual_chunk_attention_config"):
        return 0
    chunks = config.nested("dual_chunk_attention_config")
    chunk = chunks.integer("chunk_size", 8192)
    scaled_from = chunks.integer("original_max_position_embeddings", 0, least=0)
    return min(chunk, scaled_from or chunk)


def _check_types(config: ModelConfig | RotaryConfig) -> None:
    """Check the types of all fields; integers must be at least 1, or 0 if that is the default."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type == "int":
            right = is_integer(value, least=0 if field.default == 0 else 1)
        elif field.type == "float":
            right = is_number(value)
        else:
            right = isinstance(value, {"bool": bool, "str": str, "RotaryConfig": RotaryConfig}[str(field.type)])
        if not right:
            raise QwenModelError(f"{field.name} must be of type {field.type}, not {shown(value)}")


def _check(config: ModelConfig) -> None:
    if config.num_layers > LARGEST_NUM_LAYERS:
        raise QwenModelError(f"config.json: {config.num_layers} layers are more than the {LARGEST_NUM_LAYERS} possible")
    if config.num_heads % config.num_kv_heads:
        raise QwenModelError(
            f"config.json: {config.num_heads} attention heads are not a multiple of "
            f"the {config.num_kv_heads} key-value heads"
        )
    check_rotary(config.rotary, config.head_size)
