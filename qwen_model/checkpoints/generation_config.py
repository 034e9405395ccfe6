"""Read ``generation_config.json``: the end tokens, and the sampling options that the checkpoint's authors chose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import QwenModelError, shown
from ..common.files import is_file, read_json_object
from .json_values import is_integer

GENERATION_CONFIG = "generation_config.json"
SAMPLING_NAMES = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": (),
    "begin_suppress_tokens": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "frequency_penalty": (0,),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "presence_penalty": (0,),
    "sequence_bias": (),
    "stop_strings": (),
    "suppress_tokens": (),
    "top_h": (),
    "typical_p": (1,),
}
"""Settings that change the tokens and are not supported, with their values that change nothing."""


@dataclass(frozen=True)
class GenerationConfig:
    """Hold the part of a ``generation_config.json`` that an engine keeps.

    Attributes:
        end_token_ids: generation stops at any of them.
        sampling: the values of those ``SAMPLING_NAMES`` that the file has, unchecked.
        left_out: names of settings that would change the tokens and are not supported.
    """

    end_token_ids: tuple[int, ...]
    sampling: Mapping[str, Any]
    left_out: tuple[str, ...]

    @classmethod
    def from_model_dir(cls, model_dir: Path, vocab_size: int) -> GenerationConfig:
        """Read a checkpoint's ``generation_config.json``, which may be missing or without end tokens.

        The end tokens are then those of ``config.json``.

        Raises:
            QwenModelError: a file is not JSON, or an end token is not in the vocabulary.
        """
        path = model_dir / GENERATION_CONFIG
        values = read_json_object(path) if is_file(path) else {}
        given = {name: value for name, value in values.items() if value is not None and value != []}
        ends = _end_token_ids(path, given.get("eos_token_id"), vocab_size)
        if not ends and is_file(model_dir / "config.json"):
            path = model_dir / "config.json"
            ends = _end_token_ids(path, read_json_object(path).get("eos_token_id"), vocab_size)
        sampling = {name: given[name] for name in SAMPLING_NAMES if name in given}
        left_out = [name for name, neutral in NEUTRAL_VALUES.items() if name in given and given[name] not in neutral]
        return cls(ends, sampling, tuple(left_out))


def _end_token_ids(path: Path, given: Any, vocab_size: int) -> tuple[int, ...]:
    ids = [] if given is None else given if isinstance(given, list) else [given]
    for token in ids:
        if not is_integer(token, least=0) or token >= vocab_size:
            raise QwenModelError(
                f"{path}: eos_token_id must be one or several token ids from 0 to {vocab_size - 1}, not {shown(given)}"
            )
    return tuple(dict.fromkeys(ids))
