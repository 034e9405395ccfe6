"""Write the network of a checkpoint as an ONNX model, one weight at a time."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from ...checkpoints.config import ModelConfig
from ...checkpoints.module_weights import NOT_QUANTIZED, Formats
from ...checkpoints.weights import network_modules
from ...common.progress import Progress
from ...interface.back_end import ReadWeight
from ...interface.engine_config import Limits
from ...interface.memory import weight_bytes
from ...interface.numpy_weights import reporting_reader
from . import plugin_operations, standard_operations
from .graph import Graph, Tensor
from .output_files import weights_path, written_whole

LARGEST_MODEL = 256 << 20
"""The most bytes of weights that the model itself holds; more go to a file beside it. Protobuf's limit is 2 GiB."""


@dataclass(frozen=True)
class WrittenModel:
    """Describe the model that `write_model` wrote."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    num_nodes: int
    opset: int
    weights_file: Path | None
    num_bytes: int


def write_model(
    place: Path,
    config: ModelConfig,
    limits: Limits | None,
    dtype: str,
    kv_cache_dtype: str,
    read_weight: ReadWeight,
    progress: Progress,
    formats: Formats = NOT_QUANTIZED,
) -> WrittenModel:
    """Write the model, and the file of its weights where they are large.

    place: from `output_place`.
    limits: the sizes of the plug-ins' cache and profiles; None: the network is written in standard operators.
    kv_cache_dtype: of the plug-ins' cache, see `EngineConfig`.
    read_weight: reads a weight as a NumPy array of any floating-point type, or of its own if it is quantized.
    formats: of the quantized modules, with the plug-ins alone.

    Raises:
        QwenModelError: the plug-ins cannot run the model, a weight does not fit into its type, or the files cannot be
            written. Nothing has changed then.
    """
    num_bytes = weight_bytes(config, dtype, formats)
    read = reporting_reader(read_weight, num_bytes, progress)
    modules = network_modules(config, dtype, formats)
    external = num_bytes > LARGEST_MODEL
    with written_whole(place) as path:
        with weights_path(path).open("xb") if external else nullcontext() as file:
            versions = standard_operations.VERSIONS if limits is None else plugin_operations.VERSIONS
            graph = Graph(*versions, file, weights_path(place).name)
            if limits is None:
                standard_operations.define(graph, config, dtype, modules, read)
            else:
                plugin_operations.define(graph, config, limits, dtype, kv_cache_dtype, modules, read)
        model = graph.model(f"{config.architecture}, {dtype}")
        path.write_bytes(model.SerializeToString())
    weights = weights_path(place) if external else None
    written = [place, *([weights] if weights else [])]
    return WrittenModel(
        tuple(graph.inputs),
        tuple(graph.outputs),
        len(model.graph.node),
        model.opset_import[0].version,
        weights,
        sum(path.stat().st_size for path in written),
    )
