"""What an engine's `config.json` says: the model, the limits, the back end, and what was switched on."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.config import DTYPES, ModelConfig
from ..common.errors import QwenModelError

FORMAT = "qwen_model.engine"
FORMAT_VERSION = 1
BACKENDS = ("torch", "tensorrt")


@dataclass(frozen=True)
class Limits:
    """What memory is set aside for."""

    max_batch_size: int = 8  # sequences at a time; a beam is a sequence
    max_input_len: int = 1024  # tokens of a prompt
    max_output_len: int = 512  # tokens generated for a prompt

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise QwenModelError(f"{name} must be a positive integer, not {value!r}")

    @property
    def max_positions(self) -> int:
        """Tokens of a sequence in the cache."""
        return self.max_input_len + self.max_output_len


@dataclass(frozen=True)
class EngineConfig:
    """Everything about an engine but its weights."""

    backend: str
    dtype: str
    rmsnorm_plugin: bool
    limits: Limits
    model: ModelConfig
    end_token_ids: tuple[int, ...]  # generation stops at any of them
    num_parameters: int
    versions: dict[str, str]

    def write(self, engine_dir: Path) -> None:
        """Write `config.json` into the engine's folder."""
        values = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        (engine_dir / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, engine_dir: Path) -> EngineConfig:
        """Read and check the `config.json` of an engine folder."""
        values = read_engine_json(engine_dir)
        if values is None:
            if engine_dir.is_dir() and any(engine_dir.iterdir()):
                raise QwenModelError(
                    f"{engine_dir} is not an engine, or its config.json is damaged; build one in another folder, or "
                    "remove this one first"
                )
            raise QwenModelError(
                f"{engine_dir} is not an engine; make one with python -m qwen_model.build --model-dir CHECKPOINT "
                f"--output-dir {shlex.quote(str(engine_dir))}"
            )
        version = values.pop("format_version", None)
        values.pop("format")
        if version != FORMAT_VERSION:
            raise QwenModelError(
                f"{engine_dir} is an engine of format {version}, this version of qwen_model reads format "
                f"{FORMAT_VERSION}: build it again from its checkpoint"
            )
        if values.get("backend") not in BACKENDS:
            raise QwenModelError(
                f"{engine_dir} was built for the back end {values.get('backend')!r}, this version of qwen_model has: "
                f"{', '.join(BACKENDS)}"
            )
        try:
            return cls._from_dict(values)
        except (KeyError, TypeError, QwenModelError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else error
            raise QwenModelError(f"{engine_dir}/config.json is damaged ({what}): build the engine again") from error

    @classmethod
    def _from_dict(cls, values: Mapping[str, Any]) -> EngineConfig:
        nested = {
            "limits": Limits(**values["limits"]),
            "model": ModelConfig.from_dict(values["model"]),
            "end_token_ids": tuple(values["end_token_ids"]),
        }
        config = cls(**{**values, **nested})
        if config.dtype not in DTYPES:
            raise QwenModelError(f"dtype must be one of {', '.join(DTYPES)}, not {config.dtype!r}")
        if not isinstance(config.rmsnorm_plugin, bool):
            raise QwenModelError(f"rmsnorm_plugin must be true or false, not {config.rmsnorm_plugin!r}")
        return config

    def build_command(self, engine_dir: Path) -> str:
        """What makes such an engine again, but for the checkpoint's folder and a rotary scaling."""
        limits = self.limits
        words = ["python", "-m", "qwen_model.build", "--backend", self.backend, "--model-dir", "CHECKPOINT"]
        words += ["--dtype", self.dtype, "--max-batch-size", str(limits.max_batch_size)]
        words += ["--max-input-len", str(limits.max_input_len), "--max-output-len", str(limits.max_output_len)]
        words += ["--rmsnorm-plugin"] if self.rmsnorm_plugin else []
        return shlex.join([*words, "--output-dir", str(engine_dir)])


def read_engine_json(engine_dir: Path) -> dict[str, Any] | None:
    """The contents of `config.json` if the folder is an engine, of whatever version; else None."""
    try:
        values = json.loads((Path(engine_dir) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) and values.get("format") == FORMAT else None
