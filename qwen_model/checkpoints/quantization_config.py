"""Read how a checkpoint says that it is quantized: `quantization_config` of `config.json`, or an older file beside it.

Which layers are quantized, with how many bits and in groups of how many, the tensors show (see quantized_layers.py);
what is read here says what the tensors mean, and is compared with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.errors import QwenModelError, shown
from ..common.files import is_file, read_json_object

BITS = (4, 8)
SOURCE = "give the checkpoint that it was made from, in 16 bits"


@dataclass(frozen=True)
class PublishedQuantization:
    """Describe the quantization of a checkpoint.

    method: "gptq", "awq" or "compressed-tensors".
    where: the file that says so.
    bits: what the layers may have.
    group_sizes: what the layers may have, in inputs; 0: one group of all inputs. Empty: any.
    zeros_less_one: GPTQ's first format: a stored zero point is one less than the zero point.
    """

    method: str
    where: str
    bits: frozenset[int]
    group_sizes: frozenset[int] = field(default_factory=frozenset)
    zeros_less_one: bool = False


def read_quantization(model_dir: Path, config: Mapping[str, Any]) -> PublishedQuantization | None:
    """Read the quantization of the checkpoint in `model_dir` with this `config.json`; None: it has none.

    Raises:
        QwenModelError: it is of a kind that is not read, which the error names.
    """
    found = config.get("quantization_config") or config.get("compression_config")
    where = "config.json"
    for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json"):
        if not found and is_file(model_dir / name):
            found, where = _from_older_file(name, read_json_object(model_dir / name)), name
    if not found:
        return None
    if not isinstance(found, Mapping):
        raise QwenModelError(
            f"{model_dir} is quantized with {shown(found)} ({where}), which is not read here: {SOURCE}"
        )
    return _Reader(model_dir, where, found).read()


def _from_older_file(name: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the content of a file of older tools in today's terms."""
    if name == "hf_quant_config.json":
        inner = values.get("quantization")
        algorithm = inner.get("quant_algo") if isinstance(inner, Mapping) else None
        return {"quant_method": "ModelOpt" + (f" {shown(algorithm)}" if algorithm else "")}
    if name == "quantize_config.json":
        return {"quant_method": "gptq", **values}
    older = {"w_bit": "bits", "q_group_size": "group_size"}
    return {"quant_method": "awq", **{older.get(key, key): value for key, value in values.items()}}


class _Reader:
    """Read one description; every method raises QwenModelError for what is not supported."""

    def __init__(self, model_dir: Path, where: str, values: Mapping[str, Any]):
        self._model_dir = model_dir
        self._where = where
        self._values = values

    def read(self) -> PublishedQuantization:
        values = self._values
        method = values.get("quant_method") or values.get("quant_algo") or "an unnamed method"
        if method == "gptq":
            return self._gptq()
        if method == "awq":
            return self._awq()
        if method == "compressed-tensors":
            return self._compressed_tensors()
        bits = f", {values['bits']} bits" if isinstance(values.get("bits"), int) else ""
        raise self._refused((method if isinstance(method, str) else shown(method)) + bits)

    def _refused(self, what: str) -> QwenModelError:
        return QwenModelError(
            f"{self._model_dir} is quantized with {what} ({self._where}), which is not read here (only GPTQ and "
            f"compressed-tensors of 4 and 8 bits, and AWQ of 4, of weights alone): {SOURCE}"
        )

    def _bits(self, values: Mapping[str, Any], method: str, possible: tuple[int, ...] = BITS) -> int:
        bits = values.get("bits")
        if bits not in possible or isinstance(bits, bool):
            raise self._refused(f"{method} of {shown(bits)} bits")
        return int(bits)

    def _group_size(self, values: Mapping[str, Any], method: str) -> int:
        """Read a group's size in inputs; 0: one group of all inputs."""
        size = values.get("group_size", -1)
        if size in (None, -1) or size is False:
            return 0
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise self._refused(f"{method} in groups of {shown(size)}")
        return size

    def _gptq(self) -> PublishedQuantization:
        values, name = self._values, "GPTQ"
        stored_as = values.get("checkpoint_format") or values.get("format") or "gptq"
        if values.get("is_marlin_format") is True:
            stored_as = "marlin"
        if stored_as not in ("gptq", "gptq_v2"):
            raise self._refused(f"GPTQ in the format {shown(stored_as)}")
        if values.get("pack_dtype", "int32") != "int32":
            raise self._refused(f"GPTQ packed in {shown(values['pack_dtype'])}")
        variants = [values, *self._overrides(values)]
        return PublishedQuantization(
            "gptq",
            self._where,
            frozenset(self._bits(variant, name) for variant in variants),
            frozenset(self._group_size(variant, name) for variant in variants),
            zeros_less_one=stored_as == "gptq",
        )

    def _overrides(self, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return what GPTQModel's `dynamic` gives the layers whose names match, in place of the rest."""
        dynamic = values.get("dynamic") or {}
        if not isinstance(dynamic, Mapping):
            raise self._refused(f"GPTQ with the dynamic overrides {shown(dynamic)}")
        chosen = [override for pattern, override in dynamic.items() if not pattern.startswith("-:")]
        if not all(isinstance(override, Mapping) for override in chosen):
            raise self._refused(f"GPTQ with the dynamic overrides {shown(dynamic)}")
        return [{**values, **override} for override in chosen]

    def _awq(self) -> PublishedQuantization:
        values = self._values
        version = values.get("version") or values.get("checkpoint_format") or values.get("format") or "gemm"
        if not isinstance(version, str) or version.lower() != "gemm":
            raise self._refused(f"AWQ of the version {shown(version)}")
        if values.get("backend", "autoawq") != "autoawq":
            raise self._refused(f"AWQ of the backend {shown(values['backend'])}")
        bits = self._bits(values, "AWQ", possible=(4,))
        return PublishedQuantization(
            "awq", self._where, frozenset([bits]), frozenset([self._group_size(values, "AWQ")])
        )

    def _compressed_tensors(self) -> PublishedQuantization:
        values, name = self._values, "compressed-tensors"
        groups = values.get("config_groups")
        if not isinstance(groups, Mapping) or not groups or not all(isinstance(g, Mapping) for g in groups.values()):
            raise self._refused(f"{name} with the config_groups {shown(groups)}")
        for key in ("sparsity_config", "transform_config"):
            extra = values.get(key)
            if extra and not (isinstance(extra, Mapping) and extra.get("format") == "dense"):
                raise self._refused(f"{name} with a {key}")
        schemes = [self._scheme(group, group.get("format") or values.get("format")) for group in groups.values()]
        bits, group_sizes = zip(*schemes, strict=True)
        return PublishedQuantization(name, self._where, frozenset(bits), frozenset(group_sizes))

    def _scheme(self, group: Mapping[str, Any], stored_as: Any) -> tuple[int, int]:
        """Return bits and group size of one of compressed-tensors' config_groups."""
        name, weights = "compressed-tensors", group.get("weights")
        if group.get("input_activations") or group.get("output_activations"):
            raise self._refused(f"{name} that quantizes activations, too, in the format {shown(stored_as)}")
        if stored_as != "pack-quantized" or not isinstance(weights, Mapping):
            raise self._refused(f"{name} in the format {shown(stored_as)}")
        if weights.get("type", "int") != "int" or weights.get("dynamic"):
            raise self._refused(f"{name} of the type {shown(weights.get('type'))}")
        bits = self._bits({"bits": weights.get("num_bits")}, name)
        strategy = weights.get("strategy") or ("group" if weights.get("group_size") else None)
        if strategy == "channel":
            return bits, 0
        if strategy != "group":
            raise self._refused(f"{name} with the strategy {shown(strategy)}")
        return bits, self._group_size(weights, name)
