"""Emit ONNX models whose nodes are plug-ins, for TensorRT's parser."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto, helper

from tests.support.plugin_fields import name_and_version

DOMAIN = "qwen_plugins"
# nvinfer1::DataType, which plug-ins use in fields, of each type of ONNX.
TENSORRT_TYPES = {
    TensorProto.FLOAT: 0,
    TensorProto.FLOAT16: 1,
    TensorProto.INT8: 2,
    TensorProto.INT32: 3,
    TensorProto.BOOL: 4,
    TensorProto.UINT8: 5,
    TensorProto.FLOAT8E4M3FN: 6,
    TensorProto.BFLOAT16: 7,
    TensorProto.INT64: 8,
}
ONNX_TYPES = {number: onnx_type for onnx_type, number in TENSORRT_TYPES.items()}


@dataclass(frozen=True)
class Value:
    """A Value is an input or an output of a model: its type, of ONNX, and its shape, with None for dynamic."""

    type: int
    shape: Sequence[int | None]


def plugin_node(
    plugin: str,
    name: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    fields: Mapping[str, int | float],
    version: str | None = None,
) -> Any:
    """Return a node that a parser of TensorRT takes for a plug-in, of that version; None: of the one in its key."""
    plugin_name, of_key = name_and_version(plugin)
    identity = {"plugin_version": version or of_key, "plugin_namespace": "qwen_plugins"}
    return helper.make_node(plugin_name, inputs, outputs, name=name, domain=DOMAIN, **identity, **fields)


def model(
    nodes: Sequence[Any],
    inputs: Mapping[str, Value],
    outputs: Mapping[str, Value],
) -> bytes:
    """Return a serialised model."""
    values = [[_value_info(*item) for item in given.items()] for given in (inputs, outputs)]
    graph = helper.make_graph(nodes, "test", *values)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    return onnx.ModelProto.SerializeToString(helper.make_model(graph, opset_imports=opsets))


def _value_info(name: str, value: Value) -> Any:
    # A dynamic dimension has a name of its own: TensorRT takes dimensions of one name for equal.
    shape = [f"{name}.{i}" if extent is None else extent for i, extent in enumerate(value.shape)]
    return helper.make_tensor_value_info(name, value.type, shape)
