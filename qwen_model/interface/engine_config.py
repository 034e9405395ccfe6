"""Read and write an engine's `config.json`: model, limits, format of the weights, back end and disabled plug-ins."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoints.config import DTYPES, ModelConfig
from ..checkpoints.json_values import is_integer
from ..checkpoints.module_weights import WeightFormat
from ..common.errors import QwenModelError, shown
from ..common.files import check_readable, is_file, is_folder, read_json_object
from .sampling import SamplingDefaults
from .weight_formats import Formats, formats_as_json, formats_from_json

FORMAT = "qwen_model.engine"
FORMAT_VERSION = 2
"""Increased whenever this package can no longer run engines that were built before."""
BACKENDS = ("torch", "tensorrt", "tensorrt-rtx")
RTX_COMPUTE_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0", "12.1")
"""The compute capabilities of GPUs that both TensorRT-RTX and our kernels know."""
AMPERE_PLUS = ("8.0+",)
"""Stands in `EngineConfig.compute_capabilities` for every GPU of compute capability 8.0 or later."""
PLUGINS = ("rms_norm", "gemm", "rotary")
"""The plug-ins that can be disabled, to compare with the back end's own operations.

rms_norm: RMSNorm. gemm: the linear layers. rotary: the rotary embedding inside attention; it is applied before instead.
"""

CODES_PER_WORD = 4
"""Codes of 8 bits in a number of 32, as which TensorRT has them."""
KV_CACHE_DTYPES = ("auto", "int8", "fp8")
"""How the cache keeps a number: auto: in the engine's type; else in 8 bits, with a scale for each token and head."""

KernelChoices = tuple[tuple[int, str], ...]
"""GEMM kernels by the number of rows: up to so many rows, the kernel of that name. Rules choose for more rows."""
GemmKernels = Mapping[str, KernelChoices]
"""The chosen kernels of linear layers, by the text of their shape."""


@dataclass(frozen=True)
class Limits:
    """Hold the sizes that memory is allocated for.

    Raises:
        QwenModelError: one is not a positive integer.
    """

    max_batch_size: int = 256  # sequences at a time; a beam is a sequence
    max_input_len: int = 1024  # tokens of a prompt
    max_output_len: int = 512  # tokens generated for a prompt
    max_num_tokens: int = 8192  # tokens of prompts, or parts of them, that are computed in one step

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise QwenModelError(f"{name} must be a positive integer, not {value!r}")

    @property
    def max_positions(self) -> int:
        """Return the longest sequence in the cache, in tokens."""
        return self.max_input_len + self.max_output_len

    @property
    def step_tokens(self) -> int:
        """Return the most tokens of a step: those of prompts, or one of each sequence."""
        return max(self.max_num_tokens, self.max_batch_size)


@dataclass(frozen=True)
class EngineConfig:
    """Describe an engine, except its weights."""

    backend: str
    dtype: str
    limits: Limits
    model: ModelConfig
    end_token_ids: tuple[int, ...]  # generation stops at any of them
    num_parameters: int
    versions: dict[str, str]
    disabled_plugins: tuple[str, ...] = ()  # of PLUGINS
    sampling_defaults: SamplingDefaults = field(default_factory=SamplingDefaults)  # of requests that give no options
    gemm_kernels: GemmKernels = field(default_factory=dict)  # that the engine was built with; {}: chosen when it runs
    compute_capabilities: tuple[str, ...] = ()  # of the GPUs that a plan is for; (): it is for the GPU in `versions`
    kv_cache_dtype: str = "auto"  # of KV_CACHE_DTYPES
    weight_formats: Formats = field(default_factory=dict)  # of the quantized modules; the others have `weight_format`
    quantization_options: tuple[str, ...] = ()  # of the build, as words of its command

    def __post_init__(self) -> None:
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise QwenModelError(
                f"kv_cache_dtype must be one of {', '.join(KV_CACHE_DTYPES)}, not {shown(self.kv_cache_dtype)}"
            )
        unknown = [name for name in self.disabled_plugins if name not in PLUGINS]
        if unknown:
            raise QwenModelError(f"plug-ins to disable must be of {', '.join(PLUGINS)}, not {unknown[0]!r}")

    @property
    def weight_format(self) -> WeightFormat:
        """Return the format of the weights that are not quantized."""
        return WeightFormat(self.dtype)

    def write(self, engine_dir: Path) -> None:
        """Write `config.json` into the engine's folder."""
        values = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        values["weight_format"] = dataclasses.asdict(self.weight_format)
        values["weight_formats"] = formats_as_json(self.weight_formats)
        (engine_dir / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, engine_dir: Path) -> EngineConfig:
        """Read and check the `config.json` of an engine folder.

        Raises:
            QwenModelError: the folder is not an engine, or one of another format; or the file is damaged.
        """
        values = read_engine_json(engine_dir)
        if values is None:
            if is_folder(engine_dir) and any(engine_dir.iterdir()):
                raise QwenModelError(
                    f"{engine_dir} is not an engine, or its config.json is damaged; build one in another folder, or "
                    "remove this one first"
                )
            raise QwenModelError(
                f"{engine_dir} is not an engine; make one with qwen-model build --model-dir CHECKPOINT "
                f"--output-dir {shlex.quote(str(engine_dir))}"
            )
        version = values.pop("format_version", None)
        values.pop("format")
        if version != FORMAT_VERSION:
            raise QwenModelError(
                f"{engine_dir} is an engine of format {version}, this version of qwen_model reads format "
                f"{FORMAT_VERSION}: build it again from its checkpoint{_rebuild_hint(values, engine_dir)}"
            )
        if values.get("backend") not in BACKENDS:
            raise QwenModelError(
                f"{engine_dir} was built for the back end {values.get('backend')!r}, this version of qwen_model has: "
                f"{', '.join(BACKENDS)}"
            )
        weight_format = values.pop("weight_format", None)
        try:
            config = cls._from_dict(values)
        except (KeyError, TypeError, QwenModelError) as error:
            # A TypeError repeats an unknown key, which may have any characters.
            what = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).splitlines())
            raise QwenModelError(f"{engine_dir}/config.json is damaged ({what}): build the engine again") from error
        readable = dataclasses.asdict(config.weight_format)
        if isinstance(weight_format, dict):
            weight_format = {**readable, **weight_format}  # fields that later versions added have their defaults
        if weight_format not in (None, readable):  # None: built before formats were recorded, when there was one layout
            raise QwenModelError(
                f"{engine_dir} has weights in the format {shown(weight_format)}, this version of qwen_model reads "
                f"{shown(readable)}: build it again from its checkpoint, with the same options "
                f"({config.build_command(engine_dir)})"
            )
        return config

    @classmethod
    def _from_dict(cls, values: Mapping[str, Any]) -> EngineConfig:
        nested = {
            "limits": Limits(**values["limits"]),
            "model": ModelConfig.from_dict(values["model"]),
            "end_token_ids": tuple(values["end_token_ids"]),
            "disabled_plugins": tuple(values["disabled_plugins"]),
            "sampling_defaults": SamplingDefaults(**values["sampling_defaults"]),
            "gemm_kernels": _gemm_kernels(values.get("gemm_kernels", {})),
            "compute_capabilities": tuple(values.get("compute_capabilities", ())),
            "quantization_options": tuple(map(str, values.get("quantization_options", ()))),
            "weight_formats": formats_from_json(values.get("weight_formats", [])),
        }
        config = cls(**{**values, **nested})
        if config.dtype not in DTYPES:
            raise QwenModelError(f"dtype must be one of {', '.join(DTYPES)}, not {config.dtype!r}")
        if not all(is_integer(token, least=0) for token in config.end_token_ids):
            raise QwenModelError(f"end_token_ids must be token ids, not {shown(config.end_token_ids)}")
        if not all(isinstance(each, str) for each in config.compute_capabilities):
            raise QwenModelError(f"compute_capabilities must be texts, not {shown(config.compute_capabilities)}")
        if not isinstance(config.num_parameters, int) or not isinstance(config.versions, dict):
            raise QwenModelError("num_parameters must be a number and versions an object")
        return config

    def build_command(self, engine_dir: Path) -> str:
        """Return the command that builds such an engine, with a placeholder for the checkpoint's folder."""
        options = ["--disable-plugin", *self.disabled_plugins] if self.disabled_plugins else []
        if self.compute_capabilities == AMPERE_PLUS:
            options += ["--hardware-compatible"]
        elif self.compute_capabilities:
            options += ["--compute-capability", *self.compute_capabilities]
        if self.kv_cache_dtype != "auto":
            options += ["--kv-cache-dtype", self.kv_cache_dtype]
        options += self.quantization_options
        return _build_command(self.backend, self.dtype, self.limits, options, engine_dir)


def check_quantized_x(config: EngineConfig) -> None:
    """Raise QwenModelError unless TensorRT's plug-ins compute the linear layers of an engine whose x is quantized.

    They see codes as numbers of 32 bits, and there are no layers of TensorRT to put in their place.
    """
    from ..checkpoints.weights import network_modules  # brings NumPy, which `build --help` needs not

    modules = network_modules(config.model, config.dtype)
    for name, each in config.weight_formats.items():
        if each.activation is None:
            continue
        disabled = [plugin for plugin in ("rms_norm", "gemm") if plugin in config.disabled_plugins]
        if disabled:
            raise QwenModelError(
                f"the plug-ins {' and '.join(disabled)} cannot be disabled in an engine of {config.backend} whose "
                f"linear layers quantize what they read ({each.text}): use the torch back end"
            )
        if modules[name].shape[1] % CODES_PER_WORD:
            raise QwenModelError(
                f"{name} has {modules[name].shape[1]} inputs, and plug-ins take multiples of {CODES_PER_WORD} where "
                "they are quantized: use the torch back end"
            )


def _gemm_kernels(values: Any) -> GemmKernels:
    if not isinstance(values, dict):
        raise QwenModelError(f"gemm_kernels must be an object, not {shown(values)}")
    return {shape: _kernel_choices(choices) for shape, choices in values.items()}


def _kernel_choices(values: Any) -> KernelChoices:
    try:
        choices = tuple((rows, name) for rows, name in values)
    except (TypeError, ValueError):
        choices = ()
    if not choices or not all(is_integer(rows, least=1) and isinstance(name, str) for rows, name in choices):
        raise QwenModelError(f"gemm_kernels must be pairs of rows and a kernel's name, not {shown(values)}")
    return choices


def _build_command(backend: str, dtype: str, limits: Limits, options: list[str], engine_dir: Path) -> str:
    words = ["qwen-model", "build", "--backend", backend, "--model-dir", "CHECKPOINT", "--dtype", dtype]
    for name, value in dataclasses.asdict(limits).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join([*words, *options, "--output-dir", str(engine_dir)])


def _rebuild_hint(values: Mapping[str, Any], engine_dir: Path) -> str:
    """Return an error's end with the command that rebuilds an engine of another format; "" if it is not known."""
    try:
        limits = Limits(**values["limits"])
        # In format 1 the RMSNorm kernel was off by default, and no other could be disabled.
        disabled = values.get("disabled_plugins", () if values.get("rmsnorm_plugin") else ("rms_norm",))
        disable = ["--disable-plugin", *disabled] if disabled else []
        command = _build_command(values["backend"], values["dtype"], limits, disable, engine_dir)
    except (KeyError, TypeError, QwenModelError):
        return ""
    return f", with the same options ({command})"


def read_engine_json(engine_dir: Path) -> dict[str, Any] | None:
    """Return the content of `config.json` if the folder is an engine of any version, else None.

    Raises:
        QwenModelError: the file exists and cannot be read.
    """
    path = Path(engine_dir) / "config.json"
    if not is_file(path):
        return None
    check_readable(path)
    try:
        values = read_json_object(path)
    except QwenModelError:  # not a JSON object
        return None
    return values if values.get("format") == FORMAT else None
