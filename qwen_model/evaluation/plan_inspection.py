"""Show what is in a plan of TensorRT or TensorRT-RTX, whoever built it: profiles, inputs, outputs and layers."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import QwenModelError
from ..common.extras import import_extra
from ..engine.back_ends import back_end
from .inspection import table

if TYPE_CHECKING:
    from ..backends.tensorrt.inspection import TensorInfo

RTX_MAGIC = b"vtrt"
"""How a plan of TensorRT-RTX begins."""


@dataclass(frozen=True)
class PlanLayer:
    """Name a layer and its kind, "" if the builder did not keep it."""

    name: str
    kind: str


@dataclass(frozen=True)
class PlanInspection:
    """Hold what `qwen-model inspect FILE.plan` prints."""

    plan: str
    plan_bytes: int
    loaded_by: str
    gpu: str
    activation_bytes: int
    num_profiles: int
    tensors: list[TensorInfo]
    layers: list[PlanLayer]


def inspect_plan(path: Path, device: str | None = None) -> PlanInspection:
    """Load a plan, without running it, and return what is in it.

    Raises:
        QwenModelError: it is no plan that the installed TensorRT loads on this GPU.
    """
    try:
        with path.open("rb") as file:
            is_rtx = file.read(len(RTX_MAGIC)) == RTX_MAGIC
    except OSError as error:
        raise QwenModelError(f"{path} cannot be read: {error.strerror}") from error
    name = "tensorrt-rtx" if is_rtx else "tensorrt"
    back_end(name)  # its errors say what is not installed
    import_extra("cuda.bindings", "loading a plan", extra=name)
    return _inspect(path, name.replace("-", "_"), device)


def _inspect(path: Path, package_name: str, device: str | None) -> PlanInspection:
    from ..backends.tensorrt import cuda_runtime, inspection, loading
    from ..backends.tensorrt.package import activation_bytes, package

    tensorrt = package(package_name)
    with cuda_runtime.on_device(loading.device_index(device, "TensorRT loads a plan on an NVIDIA GPU only")):
        tensorrt.register_own_plugins()
        engine, said = loading.deserialized(tensorrt, path)
        if engine is None:
            raise QwenModelError(f"{tensorrt.title} {tensorrt.version} does not load {path}. It says:\n{said}")
        return PlanInspection(
            str(path),
            path.stat().st_size,
            f"{tensorrt.title} {tensorrt.version}",
            cuda_runtime.device_name_and_capability()[0],
            activation_bytes(engine),
            engine.num_optimization_profiles,
            inspection.tensors(tensorrt, engine),
            [PlanLayer(name, kind) for name, kind in inspection.plan_layers(tensorrt, engine)],
        )


def text(found: PlanInspection, every_layer: bool = False) -> str:
    """Format the inspection as tables; layers whose names differ only in numbers are one row unless `every_layer`."""
    mib = 2.0**20
    lines = [
        f"plan       {found.plan}: {found.plan_bytes / mib:,.1f} MiB",
        f"loaded by  {found.loaded_by} on {found.gpu}",
        f"memory     {found.activation_bytes / mib:,.1f} MiB of activations for each context",
        "",
        "inputs and outputs",
        *table([[tensor.name, tensor.mode, tensor.dtype, str(list(tensor.shape))] for tensor in found.tensors]),
    ]
    for index in range(found.num_profiles):
        rows = [[tensor.name, *map(_shape, tensor.profiles[index])] for tensor in found.tensors if _varies(tensor)]
        lines += ["", f"profile {index}: smallest, usual and largest shapes", *table(rows)] if rows else []
    lines += ["", f"{len(found.layers)} layers"]
    return "\n".join([*lines, *table(_layer_rows(found.layers, every_layer))])


def _varies(tensor: TensorInfo) -> bool:
    return any(least != most for least, _, most in tensor.profiles)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _layer_rows(layers: list[PlanLayer], every_layer: bool) -> list[list[Any]]:
    if every_layer:
        return [[layer.name, layer.kind] for layer in layers]
    counts = Counter((re.sub(r"\d+", "*", layer.name), layer.kind) for layer in layers)
    return [[f"{count:4} x", name, kind] for (name, kind), count in counts.items()]
