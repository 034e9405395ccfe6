"""Find a checkpoint's tensors, compare them with what the network needs, and read one weight at a time.

A quantized weight is read as its codes and scales, or as the numbers that they stand for.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..common.errors import QwenModelError, shown
from ..common.files import is_file, read_json_object
from .architectures import ARCHITECTURES
from .config import ModelConfig
from .eight_bit_layers import EightBitLayer, find_eight_bit_layer, fused_eight_bit_format
from .eight_bit_weight import EightBitWeight
from .eight_bit_weight import joined as joined_eight_bit
from .module_weights import WeightFormat
from .other_formats import WEIGHT_FILES, reject_quantized_tensors
from .quantization_config import PublishedQuantization, read_quantization
from .quantized_layers import QuantizedLayer, find_layer, fused_format
from .quantized_weight import QuantizedWeight, joined
from .tensor_files import (
    WEIGHT_DTYPES,
    Framework,
    Shape,
    StoredTensor,
    Weight,
    all_finite,
    as_framework,
    as_numpy,
    open_tensors,
)
from .weights import WeightSpec, layer_modules, weight_groups


class Checkpoint:
    """Hold the tensors of a Hugging Face checkpoint folder: their shapes at once, their values when asked for.

    It reads `model.safetensors` or its shards, else `pytorch_model.bin` or its shards, which needs PyTorch.
    """

    def __init__(self, model_dir: Path, framework: Framework = "torch"):
        """Find the files and read the names and shapes of their tensors, which are read as arrays of `framework`.

        Raises:
            QwenModelError: files are missing or damaged, or the checkpoint is quantized in a way that is not read.
        """
        self.model_dir = Path(model_dir)
        self.framework = framework
        config = self.model_dir / "config.json"
        self.quantization = read_quantization(self.model_dir, read_json_object(config) if is_file(config) else {})
        self._tensors = _find_tensors(self.model_dir, framework)
        self._layers: dict[str, QuantizedLayer | EightBitLayer] = {}  # the quantized ones, by name; `check` finds them
        self._row_factors: dict[str, npt.NDArray[np.float32]] = {}

    @property
    def dtype(self) -> str:
        """Return the type of most of the numbers; "float32" for float64."""
        counts: Counter[str] = Counter()
        for tensor in self._tensors.values():
            counts[tensor.dtype] += prod(tensor.shape)
        dtypes = [dtype for dtype, _ in counts.most_common() if dtype in WEIGHT_DTYPES]
        return dtypes[0].replace("float64", "float32") if dtypes else "float32"

    def dtype_of(self, name: str) -> str:
        """Return the type of one tensor of the checkpoint, as PyTorch names it."""
        return self._tensors[name].dtype

    def tensor(self, name: str, part: tuple[slice, ...] = ()) -> Weight:
        """Read one tensor of the checkpoint, or a part of it, in its own type, memory-mapped if possible.

        Raises:
            QwenModelError: it holds NaN or infinities.
        """
        tensor = self._tensors[name].read(part)
        if not all_finite(tensor):
            raise QwenModelError(f"{self.model_dir}: {name} has numbers that are not finite")
        return tensor

    def check(self, config: ModelConfig, num_ranks: int = 1) -> None:
        """Compare names, shapes and types of the tensors with what the network needs, on each of `num_ranks` devices.

        Raises:
            QwenModelError: tensors are missing, unknown, or of a wrong shape or type, or cannot be divided evenly; it
                names them.
        """
        names = ARCHITECTURES[config.architecture].weights
        embedding, head = f"{names.embedding}.weight", f"{names.lm_head}.weight"
        if config.tied_embedding and embedding not in self._tensors and head in self._tensors:
            self._tensors[embedding] = self._tensors[head]  # only the head of the tied pair was saved
        if self.quantization is None:
            reject_quantized_tensors(self.model_dir, self._tensors)
        self._check_last_layer(config)
        specs = (spec for group in weight_groups(config, self.dtype) for spec in group.specs)
        sources = (source for spec in specs for source, _ in spec.parts(0, num_ranks))
        expected = {source.name: source.shape for source in sources}
        self._find_quantized_layers(expected)
        of_layers = {f"{layer.name}.{suffix}" for layer in self._layers.values() for suffix in layer.tensors}
        of_layers |= self._zero_biases(expected)
        expected = {name: shape for name, shape in expected.items() if _layer(name) not in self._layers}
        known = {*expected, *of_layers, *([head] if config.tied_embedding else [])}
        known |= {name for name in self._tensors if _is_cache_scale(name) or _is_derived(name)}
        self._check_tensors(expected, [name for name in self._tensors if name not in known])
        if config.tied_embedding and head in self._tensors:
            self._check_tied(embedding, head)

    def _find_quantized_layers(self, expected: Mapping[str, Shape]) -> None:
        """Find the layers whose weight is quantized, among these tensors of a checkpoint that is not."""
        if self.quantization is None:
            return
        try:
            for name, shape in expected.items():
                layer = self._find_quantized_layer(name, shape, self.quantization) if len(shape) == 2 else None
                if layer is not None:
                    self._layers[layer.name] = layer
        except QwenModelError as error:
            raise QwenModelError(f"{self.model_dir}: {error}") from error
        if not self._layers:
            raise QwenModelError(
                f"{self.model_dir} has no layers that are quantized with {self.quantization.method}, as "
                f"{self.quantization.where} says"
            )

    def _find_quantized_layer(
        self, name: str, shape: Shape, quantization: PublishedQuantization
    ) -> QuantizedLayer | EightBitLayer | None:
        if name in self._tensors:
            return find_eight_bit_layer(_layer(name), shape, quantization, self._tensors)
        return find_layer(_layer(name), shape, quantization, self._tensors)

    @property
    def has_cache_scales(self) -> bool:
        """Tell whether there are static scales of a key-value cache, which are not used."""
        return any(_is_cache_scale(name) for name in self._tensors)

    def _zero_biases(self, expected: Mapping[str, Shape]) -> set[str]:
        """Return the biases of quantized layers that the architecture does not have; raise if one is not zero."""
        names = {f"{name}.bias" for name in self._layers}
        extra = {name for name in names if name in self._tensors and name not in expected}
        for name in extra:
            if as_numpy(self.tensor(name)).any():
                raise QwenModelError(f"{self.model_dir}: {name} is not zero, and this architecture has no such bias")
        return extra

    def formats(self, config: ModelConfig) -> dict[str, WeightFormat]:
        """Return the formats of the quantized modules of the network, by name, after `check`.

        Raises:
            QwenModelError: layers that the network computes as one are quantized differently.
        """
        found: dict[str, WeightFormat] = {}
        if not self._layers:
            return found
        for group in weight_groups(config, self.dtype):
            for name, module in group.modules.items():
                names = [_layer(source.name) for source in module.weight.sources]
                layers = [self._layers[layer] for layer in names if layer in self._layers]
                if layers and len(layers) < len(names):
                    plain = next(layer for layer in names if layer not in self._layers)
                    raise QwenModelError(
                        f"{self.model_dir}: {layers[0].name} is quantized and {plain} is not, which is not supported: "
                        "they are computed as one layer"
                    )
                if layers:
                    found[name] = self._read_format(layers)
        return found

    def _read_format(self, layers: list[QuantizedLayer | EightBitLayer]) -> WeightFormat:
        eight_bit = [layer for layer in layers if isinstance(layer, EightBitLayer)]
        packed = [layer for layer in layers if isinstance(layer, QuantizedLayer)]
        try:
            if eight_bit and packed:
                raise QwenModelError(
                    f"{packed[0].name} has packed weights and {eight_bit[0].name} has not, which is not supported: "
                    "they are computed as one layer"
                )
            return fused_eight_bit_format(eight_bit) if eight_bit else fused_format(packed)
        except QwenModelError as error:
            raise QwenModelError(f"{self.model_dir}: {error}") from error

    def is_quantized(self, spec: WeightSpec) -> bool:
        """Tell whether the checkpoint has this weight quantized, after `check`."""
        return _layer(spec.sources[0].name) in self._layers

    def read_quantized(self, spec: WeightSpec) -> QuantizedWeight | EightBitWeight:
        """Read a weight whose module `formats` names, as its codes and scales.

        Raises:
            QwenModelError: scales are not finite, or 0 where they must not be.
        """
        parts = [self._read_layer(_layer(source.name)) for source in spec.sources]
        eight_bit = [part for part in parts if isinstance(part, EightBitWeight)]
        weight: QuantizedWeight | EightBitWeight
        if eight_bit:
            weight = joined_eight_bit(eight_bit, spec.name)
        else:
            weight = joined([part for part in parts if isinstance(part, QuantizedWeight)])
        factors = self._row_factors.get(_module(spec))
        if factors is None:
            return weight
        return dataclasses.replace(weight, scales=weight.scales.astype(np.float32) * factors[:, None])

    def _read_layer(self, name: str) -> QuantizedWeight | EightBitWeight:
        try:
            return self._layers[name].read()
        except QwenModelError as error:
            raise QwenModelError(f"{self.model_dir}: {error}") from error

    def _check_last_layer(self, config: ModelConfig) -> None:
        """Check that the last layer exists, before a wrong number of layers makes a list of that length."""
        first, *_ = layer_modules(config, config.num_layers - 1, self.dtype).values()
        name = first.weight.sources[0].name
        if name not in self._tensors:
            raise QwenModelError(
                f"{self.model_dir} does not fit its config.json, which says {config.num_layers} layers: {name} is "
                "missing"
            )

    def _check_tensors(self, expected: Mapping[str, Shape], extra: list[str]) -> None:
        found = {name: self._tensors[name] for name in expected if name in self._tensors}
        problems = [
            *_described("missing", [name for name in expected if name not in found]),
            *_described("not known to this architecture", [_printable(name) for name in extra]),
            *_described(
                "of the wrong shape",
                [
                    f"{name} {shown(list(tensor.shape))}, expected {list(expected[name])}"
                    for name, tensor in found.items()
                    if tensor.shape != expected[name]
                ],
            ),
            *_described(
                "of a type that is not floating-point of 16, 32 or 64 bits",
                [f"{name} {tensor.dtype}" for name, tensor in found.items() if tensor.dtype not in WEIGHT_DTYPES],
            ),
        ]
        if problems:
            raise QwenModelError(f"{self.model_dir} does not fit its config.json: " + "; ".join(problems))

    def _check_tied(self, embedding: str, head: str) -> None:
        """Refuse a head that differs from the embedding although `tie_word_embeddings` is true."""
        found, expected = self._tensors[head], self._tensors[embedding]
        if found is expected:
            return
        comparable = found.shape == expected.shape and found.dtype in WEIGHT_DTYPES
        if not comparable or not bool((self.tensor(head) == self.tensor(embedding)).all()):
            raise QwenModelError(
                f"{self.model_dir}: config.json says tie_word_embeddings, but {head} differs from {embedding}: set it "
                f"to false, or remove {head}"
            )

    def scale_rows(self, factors: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Multiply the rows of weight and bias of these modules, by name, with factors [out] whenever they are read."""
        self._row_factors = dict(factors)

    def has_scaled_rows(self, spec: WeightSpec) -> bool:
        """Tell whether `scale_rows` names the module of this weight."""
        return _module(spec) in self._row_factors

    def read(self, spec: WeightSpec, rank: int = 0, num_ranks: int = 1) -> Weight:
        """Read a weight of the network, or the part of it that one of `num_ranks` devices has.

        It has the checkpoint's type, or float32 if it is quantized there or `scale_rows` names it. Of files that can be
        memory-mapped only the part is read.

        Raises:
            QwenModelError: there is no such rank, the devices cannot have equal parts, or numbers are not finite.
        """
        weight = self._read(spec, rank, num_ranks)
        factors = self._row_factors.get(_module(spec))
        if factors is None:
            return weight
        assert num_ranks == 1  # factors are those of all rows
        array = as_numpy(weight).astype(np.float32)
        return as_framework(array * (factors if array.ndim == 1 else factors[:, None]), self.framework)

    def _read(self, spec: WeightSpec, rank: int, num_ranks: int) -> Weight:
        before = (slice(None),) * spec.axis
        parts = [
            self._part(source.name, () if num_ranks == 1 else (*before, part))
            for source, part in list(spec.parts(rank, num_ranks))  # all of them before the first is read
        ]
        if len(parts) == 1:
            return parts[0]
        if self.framework == "torch":
            import torch

            return torch.cat(parts, spec.axis)
        return np.concatenate(parts, spec.axis)

    def _part(self, name: str, part: tuple[slice, ...]) -> Weight:
        """Read a tensor of a checkpoint that is not quantized, or the numbers that its codes stand for."""
        layer = _layer(name)
        if layer not in self._layers or not name.endswith(".weight"):
            return self.tensor(name, part)
        return as_framework(self._read_layer(layer).dequantized()[part or ...], self.framework)


def _module(spec: WeightSpec) -> str:
    return spec.name.rpartition(".")[0]


def _find_tensors(model_dir: Path, framework: Framework) -> dict[str, StoredTensor]:
    for name in WEIGHT_FILES:  # one file before an index, which may be left over from an earlier download
        path = model_dir / name
        if is_file(path):
            return _open_shards(path, framework) if path.suffix == ".json" else open_tensors(path, framework)
    raise QwenModelError(
        f"{model_dir} is not a Hugging Face checkpoint: it has neither model.safetensors nor pytorch_model.bin, "
        "nor an index of shards (model.safetensors.index.json)"
    )


def _open_shards(index: Path, framework: Framework) -> dict[str, StoredTensor]:
    """Take each tensor from the file that the index names, whatever else the files hold."""
    tensors: dict[str, StoredTensor] = {}
    for file, names in _names_by_file(index).items():
        held = open_tensors(index.parent / file, framework)
        lost = [_printable(name) for name in names if name not in held]
        if lost:
            raise QwenModelError(f"{index} says that {file} has " + _listed(lost) + ", which it does not have")
        tensors.update((name, held[name]) for name in names)
    return tensors


def _names_by_file(index: Path) -> dict[str, list[str]]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise QwenModelError(f"{index} is not an index of shards: its weight_map must give the file of each tensor")
    names: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        names.setdefault(file, []).append(name)
    outside = [file for file in names if Path(file).is_absolute() or ".." in Path(file).parts]
    if outside:
        raise QwenModelError(f"{index} names a shard outside of its folder: {shown(outside[0])}")
    missing = [_printable(file) for file in names if not is_file(index.parent / file)]
    if missing:
        raise QwenModelError(f"{index} names shards that do not exist: {_listed(missing)}")
    return names


def _described(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    return [f"{len(names)} tensor{'s' * (len(names) > 1)} {what}: {_listed(names)}"]


def _listed(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _printable(name: str) -> str:
    """Return a name from a file in a form that is safe to print in one line."""
    return name if name.isprintable() and len(name) <= 200 else shown(name)


def _layer(name: str) -> str:
    """Return the layer of a weight; "" for another tensor."""
    return name.removesuffix(".weight") if name.endswith(".weight") else ""


def _is_cache_scale(name: str) -> bool:
    """Tell whether a tensor is a static scale of the key-value cache, or of attention's own products."""
    return ".self_attn." in name and name.endswith(_CACHE_SCALES)


_CACHE_SCALES = (".k_scale", ".v_scale", ".q_scale", ".prob_scale", "k_proj.output_scale", "v_proj.output_scale")


def _is_derived(name: str) -> bool:
    """Tell whether a tensor is a buffer of old checkpoints that follows from the configuration."""
    return name.endswith((".rotary_emb.inv_freq", ".masked_bias", ".attn.bias"))
