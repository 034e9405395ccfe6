"""List the modules of a network with their weights, and the tensors of a checkpoint that each weight is made of.

A fused weight (query, key and value; gate and up) is the concatenation of the checkpoint's tensors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..common.errors import QwenModelError
from .architectures import ARCHITECTURES
from .config import ModelConfig
from .module_weights import NOT_QUANTIZED, Formats, ModuleWeights, WeightFormat
from .tensor_files import Shape

PADDING, BLOCK = (64, 128), (16, 128)
"""Layout 2: rows and columns are padded to multiples of these, and stored in blocks of these sizes."""
CODE_DTYPES = {"int8": "int8", "fp8": "uint8"}
"""The types of codes in layout 1, by the kind of the weight: those of e4m3 are bytes."""


@dataclass(frozen=True)
class Section:
    """Describe a range of a tensor's rows or columns that tensor parallelism divides on its own, such as those of q.

    count, unit: what it consists of, such as heads, each of which one device has whole.
    repeated: if there are more devices than units, several have the same one, as key-value heads in Megatron and vLLM.
    """

    size: int
    count: int
    unit: str
    repeated: bool = False

    def part(self, rank: int, num_ranks: int) -> slice | None:
        """Return the part of one of `num_ranks` devices; None: they cannot have equal parts."""
        if self.repeated and num_ranks % self.count == 0:
            rank, num_ranks = rank * self.count // num_ranks, self.count
        if self.count % num_ranks != 0:
            return None
        length = self.size // num_ranks
        return slice(rank * length, (rank + 1) * length)


@dataclass(frozen=True)
class Source:
    """Name one tensor of the checkpoint, and the sections that it is divided into one after the other.

    Without sections every device has all of it.
    """

    name: str
    shape: Shape
    sections: tuple[Section, ...] = ()


@dataclass(frozen=True)
class WeightSpec:
    """Describe one tensor of a module of the network.

    sources: its tensors in a checkpoint that is not quantized; none for what only a quantized weight has.
    dtype: in an engine. A floating-point weight may have another floating-point type in the checkpoint.
    axis: that the sources are concatenated along, and divided along among devices.
    packed_shape: its shape in an engine, where that is not the sources'.
    """

    name: str
    sources: tuple[Source, ...]
    dtype: str
    axis: int = 0
    packed_shape: Shape | None = None

    @property
    def shape(self) -> Shape:
        """Return the shape of the network's weight in an engine."""
        if self.packed_shape is not None:
            return self.packed_shape
        shape = list(self.sources[0].shape)
        shape[self.axis] = sum(source.shape[self.axis] for source in self.sources)
        return tuple(shape)

    def parts(self, rank: int = 0, num_ranks: int = 1) -> Iterator[tuple[Source, slice]]:
        """Yield the ranges of the sources along `axis` whose concatenation is the part of one of `num_ranks` devices.

        Raises:
            QwenModelError: there is no such rank, or the devices cannot have equal parts.
        """
        if not 0 <= rank < num_ranks:
            raise QwenModelError(f"rank must be 0 to num_ranks - 1, not {rank} of {num_ranks}")
        for source in self.sources:
            if not source.sections or num_ranks == 1:
                yield source, slice(0, source.shape[self.axis])
                continue
            start = 0
            for section in source.sections:
                part = section.part(rank, num_ranks)
                if part is None:
                    raise QwenModelError(
                        f"{self.name} has {section.count} {section.unit}, which {num_ranks} devices cannot share evenly"
                    )
                yield source, slice(start + part.start, start + part.stop)
                start += section.size


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


def weight_groups(config: ModelConfig, dtype: str, formats: Formats = NOT_QUANTIZED) -> list[WeightGroup]:
    """List the weights of the network of `config` in the order in which it uses them, for an engine of type `dtype`.

    A tied head has none of its own, unless it is quantized: then the embedding stays as it is.
    """
    names = ARCHITECTURES[config.architecture].weights
    tokens = (Section(config.vocab_size, config.vocab_size, "tokens"),)
    embedding = _column_parallel("embedding", [(names.embedding, tokens)], config.hidden_size, dtype)
    groups = [WeightGroup("embedding", embedding)]
    groups += [
        WeightGroup(f"layer_{layer:03d}", layer_modules(config, layer, dtype)) for layer in range(config.num_layers)
    ]
    output = _norm("final_norm", names.final_norm, config.hidden_size, dtype)
    if not config.tied_embedding or "lm_head" in formats:
        head = names.embedding if config.tied_embedding else names.lm_head
        output |= _column_parallel("lm_head", [(head, tokens)], config.hidden_size, dtype)
    groups.append(WeightGroup("output", output))
    return [WeightGroup(group.name, _in_formats(group.modules, formats)) for group in groups]


def num_parameters(config: ModelConfig) -> int:
    """Return how many numbers the model's weights have, before any is quantized."""
    return sum(math.prod(spec.shape) for group in weight_groups(config, "float32") for spec in group.specs)


def network_modules(config: ModelConfig, dtype: str, formats: Formats = NOT_QUANTIZED) -> Modules:
    """Return every module that the network of `config` calls; a tied head has the embedding's weights."""
    groups = weight_groups(config, dtype, formats)
    modules = {name: module for group in groups for name, module in group.modules.items()}
    modules.setdefault("lm_head", modules["embedding"])
    return modules


def layer_modules(config: ModelConfig, layer: int, dtype: str) -> Modules:
    """Return the modules of one layer, in the order in which the network uses them."""
    names = ARCHITECTURES[config.architecture].weights
    source = names.layer.format(layer=layer)
    prefix = f"layers.{layer}"
    hidden = config.hidden_size
    q = Section(config.num_heads * config.head_size, config.num_heads, "query heads")
    kv = Section(config.num_kv_heads * config.head_size, config.num_kv_heads, "key-value heads", repeated=True)
    inner = Section(config.intermediate_size, config.intermediate_size, "MLP channels")

    modules = _norm(f"{prefix}.input_norm", f"{source}.{names.input_norm}", hidden, dtype)
    sections = [(q,), (kv,), (kv,)] if len(names.qkv) == 3 else [(q, kv, kv)]
    qkv = [(f"{source}.{name}", rows) for name, rows in zip(names.qkv, sections, strict=True)]
    modules |= _column_parallel(f"{prefix}.attention.qkv", qkv, hidden, dtype, config.qkv_bias)
    if config.qk_norm:
        modules |= _norm(f"{prefix}.attention.q_norm", f"{source}.{names.q_norm}", config.head_size, dtype)
        modules |= _norm(f"{prefix}.attention.k_norm", f"{source}.{names.k_norm}", config.head_size, dtype)
    output = f"{source}.{names.attention_output}"
    modules |= _row_parallel(f"{prefix}.attention.output", output, hidden, q, dtype, config.output_bias)
    modules |= _norm(f"{prefix}.post_attention_norm", f"{source}.{names.post_attention_norm}", hidden, dtype)
    gate_up = [(f"{source}.{name}", (inner,)) for name in (names.gate, names.up)]
    modules |= _column_parallel(f"{prefix}.mlp.gate_up", gate_up, hidden, dtype, config.mlp_bias)
    modules |= _row_parallel(f"{prefix}.mlp.down", f"{source}.{names.down}", hidden, inner, dtype, config.mlp_bias)
    return modules


def _norm(name: str, source: str, size: int, dtype: str) -> Modules:
    weight = WeightSpec(f"{name}.weight", (Source(f"{source}.weight", (size,)),), dtype)
    return {name: ModuleWeights(weight, WeightFormat(dtype), shape=weight.shape)}


def _column_parallel(
    name: str, sources: Sequence[tuple[str, tuple[Section, ...]]], columns: int, dtype: str, bias: bool = False
) -> Modules:
    """Describe a linear layer, or the embedding, whose rows are divided among devices."""
    rows = [(source, sum(section.size for section in sections), sections) for source, sections in sources]
    weights = tuple(Source(f"{source}.weight", (size, columns), sections) for source, size, sections in rows)
    biases = tuple(Source(f"{source}.bias", (size,), sections) for source, size, sections in rows)
    weight = WeightSpec(f"{name}.weight", weights, dtype)
    added = WeightSpec(f"{name}.bias", biases, dtype) if bias else None
    return {name: ModuleWeights(weight, WeightFormat(dtype), added, shape=weight.shape)}


def _row_parallel(name: str, source: str, rows: int, columns: Section, dtype: str, bias: bool) -> Modules:
    """Describe a linear layer whose inputs are divided; partial results are summed, the bias is added once."""
    weights = (Source(f"{source}.weight", (rows, columns.size), (columns,)),)
    weight = WeightSpec(f"{name}.weight", weights, dtype, axis=1)
    added = WeightSpec(f"{name}.bias", (Source(f"{source}.bias", (rows,)),), dtype) if bias else None
    return {name: ModuleWeights(weight, WeightFormat(dtype), added, shape=weight.shape)}


def _in_formats(modules: Modules, formats: Formats) -> Modules:
    return {name: _quantized(name, each, formats[name]) if name in formats else each for name, each in modules.items()}


def _quantized(name: str, module: ModuleWeights[WeightSpec], weight_format: WeightFormat) -> ModuleWeights[WeightSpec]:
    """Describe the tensors of a linear layer whose weight is quantized: see `qwen_plugins.quantized`."""
    if weight_format.activation is not None:
        return _with_quantized_x(name, module, weight_format)
    rows, columns = (-(-size // multiple) * multiple for size, multiple in zip(module.shape, PADDING, strict=True))
    groups = columns // weight_format.group_size if weight_format.group_size else 1
    blocks = columns // BLOCK[1], rows // BLOCK[0], math.prod(BLOCK) * weight_format.bits // 32

    return dataclasses.replace(
        module,
        weight=dataclasses.replace(module.weight, dtype="int32", packed_shape=blocks),
        format=weight_format,
        scales=_extra(name, "scales", (groups, rows), weight_format.scale_dtype),
        zeros=None if weight_format.symmetric else _extra(name, "zeros", (groups, rows), "uint8"),
        permutation=_extra(name, "permutation", module.shape[1:], "int32") if weight_format.permuted else None,
    )


def _with_quantized_x(
    name: str, module: ModuleWeights[WeightSpec], weight_format: WeightFormat
) -> ModuleWeights[WeightSpec]:
    """Describe the tensors of a linear layer whose x is quantized, too: codes as they are, and scales in float32."""
    rows, columns = module.shape
    size = weight_format.group_size
    scales = (-(-rows // size), -(-columns // size)) if size else (rows, 1)
    static = weight_format.activation_scale == "tensor"
    return dataclasses.replace(
        module,
        weight=dataclasses.replace(module.weight, dtype=CODE_DTYPES[weight_format.kind]),
        format=weight_format,
        scales=_extra(name, "scales", scales, weight_format.scale_dtype),
        input_scale=_extra(name, "input_scale", (1,), weight_format.scale_dtype) if static else None,
    )


def _extra(name: str, field: str, shape: Shape, dtype: str) -> WeightSpec:
    return WeightSpec(f"{name}.{field}", (), dtype, packed_shape=shape)


def too_large(name: str, dtype: str, largest: float) -> str:
    """Return the error for a weight that is finite in the checkpoint and not in the engine's type."""
    wider = {"float16": ": use --dtype bfloat16 or float32", "bfloat16": ": use --dtype float32"}.get(dtype, "")
    return f"{name} has numbers up to {largest:.3g}, which {dtype} cannot hold{wider}"
