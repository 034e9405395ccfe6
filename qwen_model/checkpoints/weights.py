"""List the weights of a network, and the tensors of a checkpoint that each is made of.

A fused weight (query, key and value; gate and up) is the concatenation of the checkpoint's tensors along their rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from .architectures import ARCHITECTURES
from .config import ModelConfig
from .tensor_files import Shape


@dataclass(frozen=True)
class Source:
    """Name one tensor of the checkpoint."""

    name: str
    shape: Shape


@dataclass(frozen=True)
class WeightSpec:
    """Describe one weight of the network.

    Tensor parallelism over n devices cuts it into n equal parts along `split_axis` (None: every device has all of
    it). Each of the `sections` (rows of q, k and v; of gate and up) is cut separately, and a device has the
    concatenation of its parts.
    """

    name: str
    sources: tuple[Source, ...]
    split_axis: int | None = None
    sections: tuple[int, ...] = ()

    @property
    def shape(self) -> Shape:
        """Return the shape of the network's weight."""
        first = self.sources[0].shape
        return (sum(source.shape[0] for source in self.sources), *first[1:])


@dataclass(frozen=True)
class WeightGroup:
    """Hold weights that are read and stored together: the embedding, one layer, or what comes after the layers."""

    name: str
    specs: tuple[WeightSpec, ...]


def weight_groups(config: ModelConfig) -> list[WeightGroup]:
    """List every weight of the network of `config`, in the order in which the network uses them."""
    names = ARCHITECTURES[config.architecture].weights
    embedding = Source(f"{names.embedding}.weight", (config.vocab_size, config.hidden_size))
    groups = [WeightGroup("embedding", (WeightSpec("embedding.weight", (embedding,), split_axis=0),))]
    groups += [
        WeightGroup(f"layer_{layer:03d}", tuple(layer_specs(config, layer))) for layer in range(config.num_layers)
    ]
    output = [_norm("final_norm", names.final_norm, config.hidden_size)]
    if not config.tied_embedding:
        head = Source(f"{names.lm_head}.weight", (config.vocab_size, config.hidden_size))
        output.append(WeightSpec("lm_head.weight", (head,), split_axis=0))
    groups.append(WeightGroup("output", tuple(output)))
    return groups


def layer_specs(config: ModelConfig, layer: int) -> list[WeightSpec]:
    """List the weights of one layer, in the order in which the network uses them."""
    names = ARCHITECTURES[config.architecture].weights
    source_prefix = names.layer.format(layer=layer)
    prefix = f"layers.{layer}"
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    qkv_rows = (q_rows, kv_rows, kv_rows)

    specs = [_norm(f"{prefix}.input_norm", f"{source_prefix}.{names.input_norm}", hidden)]
    source_rows = qkv_rows if len(names.qkv) == 3 else (sum(qkv_rows),)
    qkv_sources = [(f"{source_prefix}.{name}", rows) for name, rows in zip(names.qkv, source_rows, strict=True)]
    specs += _column_parallel(f"{prefix}.attention.qkv", qkv_sources, hidden, config.qkv_bias, qkv_rows)
    if config.qk_norm:
        specs.append(_norm(f"{prefix}.attention.q_norm", f"{source_prefix}.{names.q_norm}", config.head_size))
        specs.append(_norm(f"{prefix}.attention.k_norm", f"{source_prefix}.{names.k_norm}", config.head_size))
    output = f"{source_prefix}.{names.attention_output}"
    specs += _row_parallel(f"{prefix}.attention.output", output, (hidden, q_rows), config.output_bias)
    specs.append(_norm(f"{prefix}.post_attention_norm", f"{source_prefix}.{names.post_attention_norm}", hidden))
    gate_up = [(f"{source_prefix}.{names.gate}", inner), (f"{source_prefix}.{names.up}", inner)]
    specs += _column_parallel(f"{prefix}.mlp.gate_up", gate_up, hidden, config.mlp_bias, (inner, inner))
    specs += _row_parallel(f"{prefix}.mlp.down", f"{source_prefix}.{names.down}", (hidden, inner), config.mlp_bias)
    return specs


def _norm(name: str, source: str, size: int) -> WeightSpec:
    return WeightSpec(f"{name}.weight", (Source(f"{source}.weight", (size,)),))


def _column_parallel(
    name: str, sources: list[tuple[str, int]], columns: int, bias: bool, sections: Shape
) -> list[WeightSpec]:
    """Describe a projection whose outputs are divided among devices."""
    weights = tuple(Source(f"{source}.weight", (rows, columns)) for source, rows in sources)
    specs = [WeightSpec(f"{name}.weight", weights, 0, sections)]
    if bias:
        specs.append(
            WeightSpec(f"{name}.bias", tuple(Source(f"{s}.bias", (rows,)) for s, rows in sources), 0, sections)
        )
    return specs


def _row_parallel(name: str, source: str, shape: Shape, bias: bool) -> list[WeightSpec]:
    """Describe a projection whose inputs are divided; partial results are summed, the bias is added once."""
    specs = [WeightSpec(f"{name}.weight", (Source(f"{source}.weight", shape),), 1)]
    if bias:
        specs.append(WeightSpec(f"{name}.bias", (Source(f"{source}.bias", shape[:1]),)))
    return specs


def too_large(name: str, dtype: str, largest: float) -> str:
    """Return the error for a weight that is finite in the checkpoint and not in the engine's type."""
    wider = {"float16": ": use --dtype bfloat16 or float32", "bfloat16": ": use --dtype float32"}.get(dtype, "")
    return f"{name} has numbers up to {largest:.3g}, which {dtype} cannot hold{wider}"
