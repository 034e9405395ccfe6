"""Collect an ONNX graph node by node; the numbers of its weights can go to a file beside the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from qwen_plugins.registration import PLUGIN_NAMESPACE, PLUGIN_VERSIONS

PRODUCER = "qwen_model"
"""The model's producer_name, and the beginning of a file of weights: what may be replaced by another export."""
PLUGIN_DOMAIN = "qwen_plugins"
ALIGNMENT = 4096  # a page, so that each weight of a file can be mapped

Shape = Sequence[int | str]
_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}


@dataclass(frozen=True)
class Tensor:
    """Describe an input or an output; a dimension that is a name is dynamic."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def value_info(self) -> onnx.ValueInfoProto:
        """Return the description as ONNX has it."""
        return helper.make_tensor_value_info(self.name, _TYPES[self.dtype], self.shape)


class Graph:
    """Hold nodes, weights, inputs and outputs. A tensor is its name."""

    def __init__(self, opset: int, ir_version: int, weights_file: BinaryIO | None = None, location: str = ""):
        """Begin an empty graph.

        opset, ir_version: of the model.
        weights_file: gets the numbers of `weight`; None: the model holds them.
        location: the name that the file will have beside the model.
        """
        self._opset, self._ir_version = opset, ir_version
        self._file, self._location = weights_file, location
        if weights_file is not None:
            weights_file.write(f"{PRODUCER}: weights of an ONNX model\n".encode())
        self._nodes: list[onnx.NodeProto] = []
        self._node_names: set[str] = set()
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._renamed: dict[str, str] = {}
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def input(self, name: str, dtype: str, shape: Shape) -> str:
        """Add an input of the graph."""
        self.inputs.append(Tensor(name, dtype, tuple(shape)))
        return name

    def output(self, tensor: str, name: str, dtype: str, shape: Shape) -> None:
        """Make a tensor, which a node computes, an output of the graph, and rename it."""
        self.outputs.append(Tensor(name, dtype, tuple(shape)))
        self._renamed[tensor] = name

    def op(self, op_type: str, inputs: Sequence[str], scope: str, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node of an ONNX operator.

        inputs: tensors.
        scope: the beginning of the node's name.

        Returns:
            The output, or a list of several.
        """
        return self._node(op_type, inputs, self._free_name(f"{scope}/{op_type}"), outputs, attributes)

    def cast(self, tensor: str, dtype: str, scope: str) -> str:
        """Add a cast to a type."""
        return str(self.op("Cast", [tensor], scope, to=_TYPES[dtype]))

    def plugin(
        self,
        plugin: str,
        inputs: Sequence[str],
        name: str,
        fields: Mapping[str, int | float],
        outputs: int = 1,
        version: str | None = None,
    ) -> Any:
        """Add a node that TensorRT's ONNX parser makes a layer of the plug-in of.

        Args:
            plugin: its name in TensorRT's registry.
            inputs: tensors, in the plug-in's order.
            name: of the node, and so of the layer.
            fields: what the plug-in is created from.
            outputs: how many the plug-in has with these fields.
            version: of the plug-in; None: the newest.

        Returns:
            The output, or a list of several.
        """
        creator = {"plugin_version": version or PLUGIN_VERSIONS[plugin][-1], "plugin_namespace": PLUGIN_NAMESPACE}
        return self._node(plugin, inputs, name, outputs, {**creator, **fields}, PLUGIN_DOMAIN)

    def constant(self, array: npt.NDArray[Any], name: str) -> str:
        """Add a tensor that the model itself holds."""
        return self._initializer(self._free_name(name), array, None)

    def weight(self, name: str, array: npt.NDArray[Any]) -> str:
        """Add a weight; its numbers go to the file of weights, if there is one."""
        return self._initializer(name, array, self._file)

    def has_weight(self, name: str) -> bool:
        """Tell whether there is a weight of that name already."""
        return name in self._initializers

    def model(self, description: str) -> onnx.ModelProto:
        """Return the finished model."""
        for node in self._nodes:  # an Identity in place of the new name would be a copy in TensorRT
            node.input[:] = [self._renamed.get(tensor, tensor) for tensor in node.input]
            node.output[:] = [self._renamed.get(tensor, tensor) for tensor in node.output]
        inputs, outputs = ([tensor.value_info for tensor in tensors] for tensors in (self.inputs, self.outputs))
        graph = helper.make_graph(self._nodes, PRODUCER, inputs, outputs, initializer=list(self._initializers.values()))
        domains = {node.domain for node in self._nodes}
        opsets = [helper.make_opsetid("", self._opset), *(helper.make_opsetid(domain, 1) for domain in domains - {""})]
        return helper.make_model(
            graph, producer_name=PRODUCER, opset_imports=opsets, ir_version=self._ir_version, doc_string=description
        )

    def _node(
        self,
        op_type: str,
        inputs: Sequence[str],
        name: str,
        outputs: int,
        attributes: Mapping[str, Any],
        domain: str = "",
    ) -> Any:
        names = [name] if outputs == 1 else [f"{name}.{i}" for i in range(outputs)]
        self._nodes.append(helper.make_node(op_type, inputs, names, name=name, domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def _free_name(self, name: str) -> str:
        free, count = name, 1
        while free in self._node_names:
            count += 1
            free = f"{name}_{count}"
        self._node_names.add(free)
        return free

    def _initializer(self, name: str, array: npt.NDArray[Any], file: BinaryIO | None) -> str:
        tensor = TensorProto(name=name, data_type=_TYPES[array.dtype.name], dims=array.shape)
        numbers = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if file is None:
            tensor.raw_data = numbers.tobytes()
        else:
            file.write(bytes(-file.tell() % ALIGNMENT))
            where = {"location": self._location, "offset": str(file.tell()), "length": str(numbers.nbytes)}
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.extend(
                onnx.StringStringEntryProto(key=key, value=value) for key, value in where.items()
            )
            file.write(numbers.data)
        self._initializers[name] = tensor
        return name
