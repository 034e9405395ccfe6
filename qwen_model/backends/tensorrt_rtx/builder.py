"""Build a plan with TensorRT-RTX: its ONNX parser takes our plug-ins, which its Python network does not.

The weights go one by one to a file that the builder maps, so that they are in memory once: in the plan.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

from ...common.errors import QwenModelError
from ...common.log import Stopwatch
from ...common.progress import Progress
from ...interface.back_end import ReadWeight
from ...interface.engine_config import EngineConfig
from ...network.inputs import network_inputs
from ..onnx.export import write_model
from ..tensorrt.package import PLAN, Package
from ..tensorrt.profiles import add_profiles

LOG = logging.getLogger(__name__)


def write_plan(rtx: Package, folder: Path, config: EngineConfig, read_weight: ReadWeight, progress: Progress) -> None:
    """Write the plan to `folder`, where the network as an ONNX model is as well meanwhile.

    Raises:
        QwenModelError: TensorRT-RTX builds no plan.
        OSError: `folder` cannot be written.
    """
    watch = Stopwatch(LOG)
    with tempfile.TemporaryDirectory(prefix=".onnx.", dir=folder) as work:
        model = Path(work, "model.onnx")
        sizes = config.limits, config.dtype, config.kv_cache_dtype
        write_model(model, config.model, *sizes, read_weight, progress, config.weight_formats)
        watch.lap("weights read, and the ONNX model written")
        progress(rtx.title, 0, 0)
        _build(rtx, model, folder / PLAN, config, progress)
        watch.lap("plan built and written", (folder / PLAN).stat().st_size)


def _build(rtx: Package, model: Path, plan: Path, config: EngineConfig, progress: Progress) -> None:
    rtx.log.take()
    builder = rtx.trt.Builder(rtx.log)
    network = builder.create_network(0)
    parser = rtx.trt.OnnxParser(network, rtx.log)
    if not parser.parse_from_file(str(model)):
        raise _failed(rtx)
    rtx.log.take()  # it warns of every optional field of a plug-in that is not given
    builder_config = builder.create_builder_config()
    builder_config.profiling_verbosity = rtx.trt.ProfilingVerbosity.DETAILED
    inputs = network_inputs(config.model, config.limits, config.dtype, config.kv_cache_dtype)
    _set_compute_capabilities(rtx, builder_config, config.compute_capabilities)
    add_profiles(builder, builder_config, inputs)
    with plan.open("wb") as file:
        writer = _new_writer(rtx, file, progress)
        built = builder.build_serialized_network_to_stream(network, builder_config, writer)
    if writer.error is not None:
        raise writer.error
    if not built:
        raise _failed(rtx)


def _failed(rtx: Package) -> QwenModelError:
    return QwenModelError(f"{rtx.title} built no engine. It says:\n{rtx.log.take()}")


def _set_compute_capabilities(rtx: Package, builder_config: Any, capabilities: tuple[str, ...]) -> None:
    builder_config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        known = getattr(rtx.trt.ComputeCapability, f"SM{capability.replace('.', '')}")
        builder_config.set_compute_capability(known, index)


def _new_writer(rtx: Package, file: BinaryIO, progress: Progress) -> Any:
    """Return an `IStreamWriter` that writes to the file; its `error` is the OSError of a write, or None."""

    class PlanWriter(rtx.trt.IStreamWriter):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self._file = file
            self.error: OSError | None = None
            self._written = 0

        def write(self, data: Any) -> int:
            """Write a part of the plan, and return the bytes written: fewer than given end the build."""
            try:
                count = self._file.write(data)
            except OSError as error:
                self.error = error
                return 0
            self._written += count
            progress("plan", self._written, 0)
            return count

    return PlanWriter()
