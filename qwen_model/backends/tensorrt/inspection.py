"""Read the inputs, outputs and layers of a built engine, and time each layer."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .device import TensorRTDevice
from .package import Package

REPEATS = 9


@dataclass(frozen=True)
class TensorInfo:
    """Describe an input or output: its shape, -1 for dynamic dimensions, and an input's range in each profile."""

    name: str
    mode: str
    dtype: str
    shape: tuple[int, ...]
    profiles: tuple[tuple[tuple[int, ...], ...], ...]  # for each profile the min, opt and max shape


@dataclass(frozen=True)
class LayerInfo:
    """Name a layer of the built engine, its kind, and the milliseconds that it takes."""

    name: str
    kind: str
    milliseconds: float


def tensors(tensorrt: Package, engine: Any) -> list[TensorInfo]:
    """Return every input and output of the engine."""
    found = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        is_input = engine.get_tensor_mode(name) == tensorrt.trt.TensorIOMode.INPUT
        profiles = range(engine.num_optimization_profiles) if is_input else ()
        limits = tuple(
            tuple(tuple(shape) for shape in engine.get_tensor_profile_shape(name, profile)) for profile in profiles
        )
        dtype = str(engine.get_tensor_dtype(name)).rsplit(".", 1)[-1].lower()
        shape = tuple(engine.get_tensor_shape(name))
        found.append(TensorInfo(name, "input" if is_input else "output", dtype, shape, limits))
    return found


def layers(device: TensorRTDevice, prompts: Sequence[Sequence[int]]) -> dict[str, list[LayerInfo]]:
    """Time the layers of the "prefill" of these prompts and of one "decode" step after it, in execution order."""
    kinds = dict(plan_layers(device.tensorrt, device.engine))
    measured = device.measure_layers(prompts, REPEATS)
    return {
        phase: [LayerInfo(_plain_name(name), kinds.get(name, ""), ms) for name, ms in times.items()]
        for phase, times in measured.items()
    }


def plan_layers(tensorrt: Package, engine: Any) -> list[tuple[str, str]]:
    """Return name and kind of each layer of an engine, of any builder; "" where it does not say the kind."""
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(tensorrt.trt.LayerInformationFormat.JSON)
    # A layer is just its name where the builder kept no details, which those of this package do.
    layers = [{"Name": layer} if isinstance(layer, str) else layer for layer in json.loads(text)["Layers"]]
    return [(layer["Name"], _kind(layer)) for layer in layers if "Name" in layer]


def _kind(layer: dict[str, Any]) -> str:
    return str(layer.get("PluginType", layer.get("LayerType", "")))


def _plain_name(name: str) -> str:
    """Strip the suffix that TensorRT adds where there are several profiles."""
    return re.sub(r" \[profile \d+\]$", "", name)
