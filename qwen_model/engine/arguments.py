"""Check the arguments of `build_engine` and of what else reads a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.other_formats import check_model_dir
from ..common.errors import QwenModelError
from ..interface.engine_config import AMPERE_PLUS, PLUGINS, RTX_COMPUTE_CAPABILITIES


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise QwenModelError if an argument is not one of its choices."""
    if value not in choices:
        raise QwenModelError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def model_folder(model_dir: str | os.PathLike[str] | None) -> Path:
    """Return a checkpoint's folder, checked; None: that of the model in this package."""
    if model_dir is None:
        from ..packaged_model import packaged_model_dir

        return packaged_model_dir()
    path = Path(model_dir)
    check_model_dir(path)
    return path


def chosen_capabilities(backend: str, hardware_compatible: bool, chosen: Collection[str] | None) -> tuple[str, ...]:
    """Return `EngineConfig.compute_capabilities`; those chosen in their order in `RTX_COMPUTE_CAPABILITIES`."""
    if hardware_compatible and backend != "tensorrt":
        raise QwenModelError(
            f"hardware_compatible (--hardware-compatible) is for the tensorrt back end, not for {backend}"
        )
    if backend != "tensorrt-rtx":
        if chosen is not None:
            raise QwenModelError(
                f"compute_capabilities (--compute-capability) is for the tensorrt-rtx back end, not for {backend}"
            )
        return AMPERE_PLUS if hardware_compatible else ()
    if isinstance(chosen, str):
        raise QwenModelError(f"compute_capabilities must be a collection of texts, not the text {chosen!r}")
    for capability in chosen or ():
        check_choice("a compute capability", capability, RTX_COMPUTE_CAPABILITIES)
    return tuple(each for each in RTX_COMPUTE_CAPABILITIES if not chosen or each in chosen)


def check_timing_cache(timing_cache: str | os.PathLike[str] | None, backend: str) -> None:
    """Raise QwenModelError if there is a timing cache, and the back end has no use for it."""
    if timing_cache is not None and backend != "tensorrt":
        raise QwenModelError(f"timing_cache (--timing-cache) is for the tensorrt back end, not for {backend}")


def disabled_names(names: Collection[str], rmsnorm_plugin: bool | None, backend: str) -> tuple[str, ...]:
    """Return the disabled plug-ins in the order of `PLUGINS`; unknown or contradictory ones raise QwenModelError."""
    if isinstance(names, str):
        raise QwenModelError(f"disable_plugins must be a collection of names, not the text {names!r}")
    for name in names:
        check_choice("a plug-in to disable", name, PLUGINS)
    if rmsnorm_plugin not in (None, True, False):
        raise QwenModelError(f"rmsnorm_plugin must be True, False or None, not {rmsnorm_plugin!r}")
    if rmsnorm_plugin and "rms_norm" in names:
        raise QwenModelError("rmsnorm_plugin (--rmsnorm-plugin) contradicts --disable-plugin rms_norm")
    wanted = {*names, *(["rms_norm"] if rmsnorm_plugin is False else [])}
    if wanted and backend == "tensorrt-rtx":
        raise QwenModelError("plug-ins cannot be disabled in the tensorrt-rtx back end: use torch or tensorrt")
    return tuple(name for name in PLUGINS if name in wanted)


def quantization_words(quantization: str, head_quantization: str | None, asked: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the words of a build command that ask for the same quantization."""
    words = [] if quantization == "auto" else ["--quantization", quantization]
    given = {**asked, "asymmetric": asked["symmetric"] is False, "head_quantization": head_quantization}
    for name in (
        "group_size",
        "asymmetric",
        "head_quantization",
        "activation_aware",
        "per_token",
        "per_channel",
        "alpha",
        "calibration",
    ):
        value, option = given[name], f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value is not None and value is not False:  # 0 is an alpha
            words += [option, str(value)]
    return tuple(words)
