"""List the modules of a network with their weights, and the tensors of a checkpoint that each weight is made of.

A fused weight (query, key and value; gate and up) is the concatenation of the checkpoint's tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from .architectures import ARCHITECTURES
from .config import ModelConfig
from .module_weights import ModuleWeights, WeightFormat
from .tensor_files import Shape


@dataclass(frozen=True)
class Source:
    """Name one tensor of the checkpoint."""

    name: str
    shape: Shape


@dataclass(frozen=True)
class WeightSpec:
    """Describe one tensor of a module of the network.

    dtype: in an engine. A floating-point weight may have another floating-point type in the checkpoint.
    axis: that the sources are concatenated along.

    Tensor parallelism over n devices cuts it into n equal parts along `split_axis` (None: every device has all of
    it). Each of the `sections` (rows of q, k and v; of gate and up) is cut separately, and a device has the
    concatenation of its parts.
    """

    name: str
    sources: tuple[Source, ...]
    dtype: str
    axis: int = 0
    split_axis: int | None = None
    sections: tuple[int, ...] = ()

    @property
    def shape(self) -> Shape:
        """Return the shape of the network's weight."""
        shape = list(self.sources[0].shape)
        shape[self.axis] = sum(source.shape[self.axis] for source in self.sources)
        return tuple(shape)


Modules = dict[str, ModuleWeights[WeightSpec]]
"""Modules by name; a tensor's name is the module's and its field's, such as "layers.0.attention.qkv.bias"."""


@dataclass(frozen=True)
class WeightGroup:
    """Hold modules that are read and stored together: the embedding, one layer, or what comes after the layers."""

    name: str
    modules: Modules

    @property
    def specs(self) -> list[WeightSpec]:
        """Return the modules' tensors."""
        return [spec for module in self.modules.values() for spec in module.tensors]


def weight_groups(config: ModelConfig, dtype: str) -> list[WeightGroup]:
    """List the weights of the network of `config` in the order in which it uses them, for an engine of type `dtype`.

    A tied head has none of its own.
    """
    names = ARCHITECTURES[config.architecture].weights
    table = (config.vocab_size, config.hidden_size)
    groups = [WeightGroup("embedding", _column_parallel("embedding", [(names.embedding, table[0])], table[1], dtype))]
    groups += [
        WeightGroup(f"layer_{layer:03d}", layer_modules(config, layer, dtype)) for layer in range(config.num_layers)
    ]
    output = _norm("final_norm", names.final_norm, config.hidden_size, dtype)
    if not config.tied_embedding:
        output |= _column_parallel("lm_head", [(names.lm_head, table[0])], table[1], dtype)
    groups.append(WeightGroup("output", output))
    return groups


def network_modules(config: ModelConfig, dtype: str) -> Modules:
    """Return every module that the network of `config` calls; a tied head has the embedding's weights."""
    modules = {name: module for group in weight_groups(config, dtype) for name, module in group.modules.items()}
    modules.setdefault("lm_head", modules["embedding"])
    return modules


def layer_modules(config: ModelConfig, layer: int, dtype: str) -> Modules:
    """Return the modules of one layer, in the order in which the network uses them."""
    names = ARCHITECTURES[config.architecture].weights
    source = names.layer.format(layer=layer)
    prefix = f"layers.{layer}"
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    qkv_rows = (q_rows, kv_rows, kv_rows)

    modules = _norm(f"{prefix}.input_norm", f"{source}.{names.input_norm}", hidden, dtype)
    source_rows = qkv_rows if len(names.qkv) == 3 else (sum(qkv_rows),)
    qkv_sources = [(f"{source}.{name}", rows) for name, rows in zip(names.qkv, source_rows, strict=True)]
    modules |= _column_parallel(
        f"{prefix}.attention.qkv", qkv_sources, hidden, dtype, bias=config.qkv_bias, sections=qkv_rows
    )
    if config.qk_norm:
        modules |= _norm(f"{prefix}.attention.q_norm", f"{source}.{names.q_norm}", config.head_size, dtype)
        modules |= _norm(f"{prefix}.attention.k_norm", f"{source}.{names.k_norm}", config.head_size, dtype)
    output = f"{source}.{names.attention_output}"
    modules |= _row_parallel(f"{prefix}.attention.output", output, (hidden, q_rows), dtype, bias=config.output_bias)
    modules |= _norm(f"{prefix}.post_attention_norm", f"{source}.{names.post_attention_norm}", hidden, dtype)
    gate_up = [(f"{source}.{names.gate}", inner), (f"{source}.{names.up}", inner)]
    modules |= _column_parallel(
        f"{prefix}.mlp.gate_up", gate_up, hidden, dtype, bias=config.mlp_bias, sections=(inner, inner)
    )
    modules |= _row_parallel(
        f"{prefix}.mlp.down", f"{source}.{names.down}", (hidden, inner), dtype, bias=config.mlp_bias
    )
    return modules


def _norm(name: str, source: str, size: int, dtype: str) -> Modules:
    weight = WeightSpec(f"{name}.weight", (Source(f"{source}.weight", (size,)),), dtype)
    return {name: ModuleWeights(weight, WeightFormat(dtype))}


def _column_parallel(
    name: str,
    sources: list[tuple[str, int]],
    columns: int,
    dtype: str,
    bias: bool = False,
    sections: tuple[int, ...] = (),
) -> Modules:
    """Describe a linear layer, or the embedding, whose rows are divided among devices."""
    weights = tuple(Source(f"{source}.weight", (rows, columns)) for source, rows in sources)
    biases = tuple(Source(f"{source}.bias", (rows,)) for source, rows in sources)
    weight = WeightSpec(f"{name}.weight", weights, dtype, split_axis=0, sections=sections)
    added = WeightSpec(f"{name}.bias", biases, dtype, split_axis=0, sections=sections) if bias else None
    return {name: ModuleWeights(weight, WeightFormat(dtype), added)}


def _row_parallel(name: str, source: str, shape: Shape, dtype: str, bias: bool) -> Modules:
    """Describe a linear layer whose inputs are divided; partial results are summed, the bias is added once."""
    weight = WeightSpec(f"{name}.weight", (Source(f"{source}.weight", shape),), dtype, split_axis=1)
    added = WeightSpec(f"{name}.bias", (Source(f"{source}.bias", shape[:1]),), dtype) if bias else None
    return {name: ModuleWeights(weight, WeightFormat(dtype), added)}


def too_large(name: str, dtype: str, largest: float) -> str:
    """Return the error for a weight that is finite in the checkpoint and not in the engine's type."""
    wider = {"float16": ": use --dtype bfloat16 or float32", "bfloat16": ": use --dtype float32"}.get(dtype, "")
    return f"{name} has numbers up to {largest:.3g}, which {dtype} cannot hold{wider}"
