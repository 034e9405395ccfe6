"""Read how a checkpoint says that it is quantized: `quantization_config` of `config.json`, or an older file beside it.

Which layers are quantized, with how many bits and in groups of how many, the tensors show (see quantized_layers.py);
what is read here says what the tensors mean, and is compared with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import QwenModelError, shown
from ..common.files import is_file, read_json_object
from .module_weights import BLOCK_SIZE

BITS = (4, 8)
SOURCE = "give the checkpoint that it was made from, in 16 bits"


@dataclass(frozen=True)
class EightBitScheme:
    """Describe linear layers that compute in 8 bits.

    kind: "int8" or "fp8".
    weights: what has a scale of its own: the "tensor", each "channel" (output), or each "block" of 128 by 128.
    static: whether a layer has one scale of its inputs, rather than one for each token at run time.
    """

    kind: str
    weights: str
    static: bool

    @property
    def text(self) -> str:
        """Return the scheme as errors have it."""
        return f"{self.kind}, a scale for each {self.weights}, inputs {'static' if self.static else 'per token'}"


@dataclass(frozen=True)
class PublishedQuantization:
    """Describe the quantization of a checkpoint.

    method: "gptq", "awq", "compressed-tensors", "fp8" or "modelopt".
    where: the file that says so.
    bits: what layers with packed weights may have.
    group_sizes: what these may have, in inputs; 0: one group of all inputs.
    zeros_less_one: GPTQ's first format: a stored zero point is one less than the zero point.
    eight_bit: the schemes that layers which compute in 8 bits may have.
    """

    method: str
    where: str
    bits: frozenset[int] = frozenset()
    group_sizes: frozenset[int] = frozenset()
    zeros_less_one: bool = False
    eight_bit: frozenset[EightBitScheme] = frozenset()


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
    if _of_the_cache_alone(found):
        return None
    return _Reader(model_dir, where, found).read()


def _of_the_cache_alone(values: Mapping[str, Any]) -> bool:
    """Tell whether only the key-value cache is quantized, with scales that are not used (see `has_cache_scales`)."""
    if values.get("quant_method") == "modelopt":
        return values.get("quant_algo", "") is None and bool(values.get("kv_cache_quant_algo"))
    groups = values.get("config_groups")
    if not values.get("kv_cache_scheme") or not isinstance(groups, Mapping):
        return False
    return all(
        isinstance(group, Mapping) and not group.get("weights") and not group.get("input_activations")
        for group in groups.values()
    )


def _from_older_file(name: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the content of a file of older tools in today's terms."""
    if name == "hf_quant_config.json":
        inner = values.get("quantization")
        return {**(inner if isinstance(inner, Mapping) else {}), "quant_method": "modelopt"}
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
        if method == "fp8":
            return self._fp8()
        if method == "modelopt":
            return self._modelopt()
        bits = f", {values['bits']} bits" if isinstance(values.get("bits"), int) else ""
        raise self._refused((method if isinstance(method, str) else shown(method)) + bits)

    def _refused(self, what: str) -> QwenModelError:
        return QwenModelError(
            f"{self._model_dir} is quantized with {what} ({self._where}), which is not read here (only GPTQ and "
            "compressed-tensors of 4 and 8 bits, AWQ of 4, and int8 and fp8 weights with inputs of the same kind, of "
            f"compressed-tensors, quant_method fp8 and ModelOpt): {SOURCE}"
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
        self._check_patterns("dynamic", [pattern.removeprefix("-:").removeprefix("+:") for pattern in dynamic])
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
        self._check_names("ignore", values.get("ignore"))
        packed, eight_bit = set(), set()
        for group in groups.values():
            self._check_names("targets", group.get("targets"))
            stored_as = group.get("format") or values.get("format")
            if stored_as == "pack-quantized":
                packed.add(self._packed_scheme(group))
            else:
                eight_bit.add(self._eight_bit_scheme(group, stored_as))
        return PublishedQuantization(
            name,
            self._where,
            frozenset(bits for bits, _ in packed),
            frozenset(size for _, size in packed),
            eight_bit=frozenset(eight_bit),
        )

    def _check_names(self, key: str, names: Any) -> None:
        """Check a list of names of layers, or of patterns of them; which layers are quantized, the tensors show."""
        names = [] if names is None else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self._damaged(f"{key} must be a list of names of layers, not {shown(names)}")
        self._check_patterns(key, [name.removeprefix("re:") for name in names if name.startswith("re:")])

    def _check_patterns(self, key: str, patterns: Iterable[str]) -> None:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise self._damaged(
                    f"{shown(pattern)} of {key} is not a regular expression: {shown(str(error))}"
                ) from None

    def _damaged(self, what: str) -> QwenModelError:
        return QwenModelError(f"{self._model_dir}: the quantization in {self._where} is damaged: {what}")

    def _packed_scheme(self, group: Mapping[str, Any]) -> tuple[int, int]:
        """Return bits and group size of one of compressed-tensors' config_groups, whose weights are packed."""
        name, weights = "compressed-tensors", group.get("weights")
        if group.get("input_activations") or group.get("output_activations"):
            raise self._refused(f"{name} that quantizes activations, too, in the format 'pack-quantized'")
        if not isinstance(weights, Mapping):
            raise self._refused(f"{name} with the weights {shown(weights)}")
        if weights.get("type", "int") != "int" or weights.get("dynamic"):
            raise self._refused(f"{name} of the type {shown(weights.get('type'))}")
        bits = self._bits({"bits": weights.get("num_bits")}, name)
        strategy = weights.get("strategy") or ("group" if weights.get("group_size") else None)
        if strategy == "channel":
            return bits, 0
        if strategy != "group":
            raise self._refused(f"{name} with the strategy {shown(strategy)}")
        return bits, self._group_size(weights, name)

    def _eight_bit_scheme(self, group: Mapping[str, Any], stored_as: Any) -> EightBitScheme:
        """Return the scheme of one of compressed-tensors' config_groups, whose weights are codes of 8 bits."""
        name, weights, inputs = "compressed-tensors", group.get("weights"), group.get("input_activations")
        if stored_as not in ("int-quantized", "float-quantized", "naive-quantized"):
            raise self._refused(f"{name} in the format {shown(stored_as)}")
        if not isinstance(weights, Mapping) or not isinstance(inputs, Mapping) or group.get("output_activations"):
            what = "of weights alone" if isinstance(weights, Mapping) else f"with the weights {shown(weights)}"
            what = "that quantizes outputs" if group.get("output_activations") else what
            raise self._refused(f"{name} {what} in the format {shown(stored_as)}")
        kinds = [_eight_bit_kind(each) for each in (weights, inputs)]
        if kinds[0] is None or kinds[0] != kinds[1]:
            bits = " and ".join(f"{shown(each.get('num_bits'))} bits" for each in (weights, inputs))
            raise self._refused(f"{name} of {bits} of weights and inputs in the format {shown(stored_as)}")
        if weights.get("symmetric") is False or inputs.get("symmetric") is False:
            raise self._refused(f"{name} with zero points in the format {shown(stored_as)}")
        strategy = weights.get("strategy")
        if weights.get("dynamic") or strategy not in ("tensor", "channel", "block"):
            raise self._refused(f"{name} with the strategy {shown(strategy)} of weights")
        if strategy == "block":
            self._check_blocks(name, kinds[0], weights.get("block_structure"))
        static = not inputs.get("dynamic")
        if inputs.get("strategy") not in (("tensor",) if static else ("tensor", "token", "group")):
            how = "static" if static else "dynamic"
            raise self._refused(f"{name} with the strategy {shown(inputs.get('strategy'))} of {how} inputs")
        return EightBitScheme(kinds[0], strategy, static)

    def _check_blocks(self, name: str, kind: str, blocks: Any) -> None:
        size = f"{BLOCK_SIZE}x{BLOCK_SIZE}"
        if kind != "fp8" or blocks not in ([BLOCK_SIZE, BLOCK_SIZE], (BLOCK_SIZE, BLOCK_SIZE), size):
            raise self._refused(f"{name} in {kind} blocks of {shown(blocks)} (read are fp8 blocks of {size})")

    def _fp8(self) -> PublishedQuantization:
        """Read `quant_method: fp8`: of AutoFP8, or of Qwen's and DeepSeek's own blocks, and of transformers."""
        values, name = self._values, "fp8"
        if values.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
            raise self._refused(f"{name} of the fmt {shown(values['fmt'])}")
        activations = values.get("activation_scheme", "dynamic")
        if activations not in ("static", "dynamic"):
            raise self._refused(f"{name} with the activation_scheme {shown(activations)}")
        static, blocks = activations == "static", values.get("weight_block_size")
        if blocks is None:
            kinds = [EightBitScheme("fp8", weights, static) for weights in ("tensor", "channel")]
        else:
            self._check_blocks(name, "fp8", blocks)
            kinds = [EightBitScheme("fp8", "block", static)]
        return PublishedQuantization(name, self._where, eight_bit=frozenset(kinds))

    def _modelopt(self) -> PublishedQuantization:
        algorithm = self._values.get("quant_algo")
        scheme = _MODELOPT.get(algorithm) if isinstance(algorithm, str) else None
        if scheme is None:
            raise self._refused(f"ModelOpt {algorithm if isinstance(algorithm, str) else shown(algorithm)}")
        return PublishedQuantization("modelopt", self._where, eight_bit=frozenset([scheme]))


def _eight_bit_kind(arguments: Mapping[str, Any]) -> str | None:
    """Return the kind of numbers that compressed-tensors' arguments of weights or inputs say; None: none of 8 bits."""
    found = (arguments.get("num_bits"), arguments.get("type", "int"))
    return "int8" if found == (8, "int") else "fp8" if found == (8, "float") else None


_MODELOPT = {
    "FP8": EightBitScheme("fp8", "tensor", static=True),
    "FP8_PER_CHANNEL_PER_TOKEN": EightBitScheme("fp8", "channel", static=False),
    "FP8_PB_WO": EightBitScheme("fp8", "block", static=False),
}
"""The schemes of ModelOpt's `quant_algo`."""
