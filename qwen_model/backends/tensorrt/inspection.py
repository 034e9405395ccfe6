"""What is in a plan, and how long each of its layers takes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorrt as trt

from .executor import TensorRTExecutor

REPEATS = 9


@dataclass(frozen=True)
class TensorInfo:
    """An input or output: its shape with -1 for what changes, and of inputs its limits in each profile."""

    name: str
    mode: str
    dtype: str
    shape: tuple[int, ...]
    profiles: tuple[tuple[tuple[int, ...], ...], ...]  # of each profile the smallest, the usual and the largest


@dataclass(frozen=True)
class LayerInfo:
    """A layer of the built engine, and its milliseconds in one run."""

    name: str
    kind: str
    milliseconds: float


def tensors(engine: Any) -> list[TensorInfo]:
    """Every input and output."""
    found = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        profiles = range(engine.num_optimization_profiles) if is_input else ()
        limits = tuple(
            tuple(tuple(shape) for shape in engine.get_tensor_profile_shape(name, profile)) for profile in profiles
        )
        dtype = str(engine.get_tensor_dtype(name)).rsplit(".", 1)[-1].lower()
        shape = tuple(engine.get_tensor_shape(name))
        found.append(TensorInfo(name, "input" if is_input else "output", dtype, shape, limits))
    return found


def layers(executor: TensorRTExecutor, prompts: Sequence[Sequence[int]]) -> dict[str, list[LayerInfo]]:
    """The layers of "prefill" of these prompts, and of one step of "decode" after it, in their order."""
    kinds = _kinds(executor.engine)
    measured = executor.measure_layers(prompts, REPEATS)
    return {
        phase: [LayerInfo(_plain_name(name), kinds.get(name, ""), ms) for name, ms in times.items()]
        for phase, times in measured.items()
    }


def _kinds(engine: Any) -> dict[str, str]:
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    layers = json.loads(text)["Layers"]
    # Without details, which every engine of ours has, a layer is its name alone.
    return {layer["Name"]: layer.get("PluginType", layer.get("LayerType", "")) for layer in layers if "Name" in layer}


def _plain_name(name: str) -> str:
    """Without what TensorRT adds where there are several profiles."""
    return re.sub(r" \[profile \d+\]$", "", name)
