"""Which weights a network has, where they come from in a checkpoint, and how they are read.

A fused weight (query, key and value; gate and up) is the concatenation of the checkpoint's along their rows. Nothing
here is larger in memory than one layer: checkpoints are mapped, and read one weight at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..common.errors import QwenModelError
from ..common.files import read_json_object
from .architectures import ARCHITECTURES
from .config import ModelConfig

Shape = tuple[int, ...]
Framework = Literal["torch", "numpy"]
Weight = Any  # a torch.Tensor or a NumPy array, whose bfloat16 is that of ml_dtypes


@dataclass(frozen=True)
class Source:
    """One tensor of the checkpoint."""

    name: str
    shape: Shape


@dataclass(frozen=True)
class WeightSpec:
    """One weight of the network.

    Tensor parallelism over n devices cuts it into n equal parts along `split_axis` (None: every device has all of
    it). Each of the `sections` (rows of q, of k, of v; of gate, of up) is cut for itself, and each device has the
    concatenation of its parts.
    """

    name: str
    sources: tuple[Source, ...]
    split_axis: int | None = None
    sections: tuple[int, ...] = ()

    @property
    def shape(self) -> Shape:
        """Of the network's weight."""
        first = self.sources[0].shape
        return (sum(source.shape[0] for source in self.sources), *first[1:])


@dataclass(frozen=True)
class WeightGroup:
    """Weights that are read and stored together: the embedding, one layer, or what comes after the layers."""

    name: str
    specs: tuple[WeightSpec, ...]


def weight_groups(config: ModelConfig) -> list[WeightGroup]:
    """Every weight of the network of `config`, in the order in which the network uses them."""
    names = ARCHITECTURES[config.architecture].weights
    embedding = Source(f"{names.embedding}.weight", (config.vocab_size, config.hidden_size))
    groups = [WeightGroup("embedding", (WeightSpec("embedding.weight", (embedding,), split_axis=0),))]
    groups += [
        WeightGroup(f"layer_{layer:03d}", tuple(_layer_specs(config, layer))) for layer in range(config.num_layers)
    ]
    output = [_norm("final_norm", names.final_norm, config.hidden_size)]
    if not config.tied_embedding:
        head = Source(f"{names.lm_head}.weight", (config.vocab_size, config.hidden_size))
        output.append(WeightSpec("lm_head.weight", (head,), split_axis=0))
    groups.append(WeightGroup("output", tuple(output)))
    return groups


def _layer_specs(config: ModelConfig, layer: int) -> list[WeightSpec]:
    names = ARCHITECTURES[config.architecture].weights
    there = names.layer.format(layer=layer)
    here = f"layers.{layer}"
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    qkv_rows = (q_rows, kv_rows, kv_rows)

    specs = [_norm(f"{here}.input_norm", f"{there}.{names.input_norm}", hidden)]
    source_rows = qkv_rows if len(names.qkv) == 3 else (sum(qkv_rows),)
    qkv_sources = [(f"{there}.{name}", rows) for name, rows in zip(names.qkv, source_rows, strict=True)]
    specs += _row_parallel(f"{here}.attention.qkv", qkv_sources, hidden, config.qkv_bias, qkv_rows)
    if config.qk_norm:
        specs.append(_norm(f"{here}.attention.q_norm", f"{there}.{names.q_norm}", config.head_size))
        specs.append(_norm(f"{here}.attention.k_norm", f"{there}.{names.k_norm}", config.head_size))
    output = f"{there}.{names.attention_output}"
    specs += _column_parallel(f"{here}.attention.output", output, (hidden, q_rows), config.output_bias)
    specs.append(_norm(f"{here}.post_attention_norm", f"{there}.{names.post_attention_norm}", hidden))
    gate_up = [(f"{there}.{names.gate}", inner), (f"{there}.{names.up}", inner)]
    specs += _row_parallel(f"{here}.mlp.gate_up", gate_up, hidden, config.mlp_bias, (inner, inner))
    specs += _column_parallel(f"{here}.mlp.down", f"{there}.{names.down}", (hidden, inner), config.mlp_bias)
    return specs


def _norm(name: str, source: str, size: int) -> WeightSpec:
    return WeightSpec(f"{name}.weight", (Source(f"{source}.weight", (size,)),))


def _row_parallel(
    name: str, sources: list[tuple[str, int]], columns: int, bias: bool, sections: Shape
) -> list[WeightSpec]:
    """A projection whose outputs are shared out among devices."""
    weights = tuple(Source(f"{source}.weight", (rows, columns)) for source, rows in sources)
    specs = [WeightSpec(f"{name}.weight", weights, 0, sections)]
    if bias:
        specs.append(
            WeightSpec(f"{name}.bias", tuple(Source(f"{s}.bias", (rows,)) for s, rows in sources), 0, sections)
        )
    return specs


def _column_parallel(name: str, source: str, shape: Shape, bias: bool) -> list[WeightSpec]:
    """A projection whose inputs are shared out among devices; the partial results are summed, the bias added once."""
    specs = [WeightSpec(f"{name}.weight", (Source(f"{source}.weight", shape),), 1)]
    if bias:
        specs.append(WeightSpec(f"{name}.bias", (Source(f"{source}.bias", shape[:1]),)))
    return specs


class Checkpoint:
    """The tensors of a Hugging Face checkpoint folder: their shapes at once, their values when asked for.

    Reads `model.safetensors` or its shards, else `pytorch_model.bin` or its shards (with PyTorch's safe loader, which
    runs no code from the file; not without PyTorch).
    """

    def __init__(self, model_dir: Path, framework: Framework = "torch"):
        """Find the files and read the names and shapes of their tensors; `framework` says what tensors are given as."""
        self.model_dir = Path(model_dir)
        self.framework = framework
        self.shapes: dict[str, Shape] = {}
        self._readers: dict[str, Callable[[str], Weight]] = {}
        for path in _checkpoint_files(self.model_dir):
            try:
                if path.suffix == ".safetensors":
                    shapes, reader = _open_safetensors(path, framework)
                elif framework == "torch":
                    shapes, reader = _open_bin(path)
                else:
                    raise QwenModelError(
                        f"{path} can only be read with PyTorch: use the torch back end, or save the checkpoint as "
                        "safetensors (save_pretrained does)"
                    )
            except QwenModelError:
                raise
            except Exception as error:
                raise QwenModelError(f"{path} cannot be read: {error}") from error
            self.shapes.update(shapes)
            self._readers.update(dict.fromkeys(shapes, reader))

    def tensor(self, name: str) -> Weight:
        """One tensor of the checkpoint, in its own type; mapped where that is possible."""
        return self._readers[name](name)

    def check(self, groups: Iterable[WeightGroup], tied_embedding: bool = False) -> None:
        """Compare names and shapes with what the network needs; the error names each tensor that is wrong."""
        expected = {source.name: source.shape for group in groups for spec in group.specs for source in spec.sources}
        problems = _described("missing", [name for name in expected if name not in self.shapes])
        extra = [name for name in self.shapes if name not in expected and not _is_derived(name, tied_embedding)]
        problems += _described("not known to this architecture", extra)
        problems += _described(
            "of the wrong shape",
            [
                f"{name} {list(self.shapes[name])}, expected {list(shape)}"
                for name, shape in expected.items()
                if name in self.shapes and self.shapes[name] != shape
            ],
        )
        if problems:
            raise QwenModelError(f"{self.model_dir} does not fit its config.json: " + "; ".join(problems))
        if tied_embedding and "lm_head.weight" in self.shapes:
            self._check_tied(groups)

    def _check_tied(self, groups: Iterable[WeightGroup]) -> None:
        """A head of its own beside `tie_word_embeddings` is an error: which of both is meant is not known."""
        specs = (spec for group in groups for spec in group.specs)
        embedding = next(spec for spec in specs if spec.name == "embedding.weight").sources[0].name
        head, table = self.tensor("lm_head.weight"), self.tensor(embedding)
        if head.shape != table.shape or not bool((head == table).all()):
            raise QwenModelError(
                f"{self.model_dir}: config.json says tie_word_embeddings, and lm_head.weight is not {embedding}: set "
                "it to false, or take lm_head.weight out"
            )

    def read(self, spec: WeightSpec) -> Weight:
        """The weight of the network, in the checkpoint's own type."""
        parts = [self.tensor(source.name) for source in spec.sources]
        if len(parts) == 1:
            return parts[0]
        if self.framework == "torch":
            import torch

            return torch.cat(parts)
        return np.concatenate(parts)


def too_large(name: str, dtype: str, largest: float) -> str:
    """What is said of a weight that is not finite in the engine's type."""
    if not math.isfinite(largest):
        return f"{name} has numbers that are not finite"
    return f"{name} has numbers up to {largest:.3g}, which {dtype} cannot hold: use --dtype bfloat16 or float32"


def _described(what: str, names: list[str], shown: int = 8) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return [f"{len(names)} tensor{'s' * (len(names) > 1)} {what}: {', '.join(names[:shown])}{more}"]


def _is_derived(name: str, tied_embedding: bool) -> bool:
    """Buffers that old checkpoints carry and that follow from the configuration."""
    return name.endswith((".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")) or (
        tied_embedding and name == "lm_head.weight"
    )


def _checkpoint_files(model_dir: Path) -> list[Path]:
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (model_dir / single).is_file():  # before an index, which may be left of what was there earlier
            return [model_dir / single]
        index = model_dir / f"{single}.index.json"
        if index.is_file():
            return _shards(index)
    raise QwenModelError(
        f"{model_dir} is not a Hugging Face checkpoint: it has neither model.safetensors nor pytorch_model.bin, "
        "nor an index of shards (model.safetensors.index.json)"
    )


def _shards(index: Path) -> list[Path]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise QwenModelError(f"{index} is not an index of shards: its weight_map must give the file of each tensor")
    paths = [index.parent / name for name in sorted(set(weight_map.values()))]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise QwenModelError(f"{index} names shards that are not there: {', '.join(missing)}")
    return paths


def _open_safetensors(path: Path, framework: Framework) -> tuple[dict[str, Shape], Callable[[str], Weight]]:
    from safetensors import safe_open

    if framework == "numpy":
        import ml_dtypes  # noqa: F401  # it is what tells NumPy, and so safetensors, of bfloat16

    file = safe_open(str(path), framework="pt" if framework == "torch" else "numpy")  # maps it; closed with the reader
    names = file.keys()  # not a dict: it has no __iter__
    return {name: tuple(file.get_slice(name).get_shape()) for name in names}, file.get_tensor


def _open_bin(path: Path) -> tuple[dict[str, Shape], Callable[[str], Weight]]:
    import torch

    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # files of before PyTorch 1.6 cannot be mapped
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors.__getitem__
