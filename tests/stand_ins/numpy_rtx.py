"""The module tensorrt_rtx in NumPy: the interfaces of TensorRT 11, built on any machine, from ONNX alone."""

from __future__ import annotations

import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import onnx

from tests.stand_ins import numpy_cuda, numpy_tensorrt
from tests.stand_ins.numpy_tensorrt import DataType, INetworkDefinition, ITensor, Weights

VERSION = "1.7.1.116"
TYPES = {onnx.TensorProto.FLOAT: DataType.FLOAT, onnx.TensorProto.FLOAT16: DataType.HALF} | {
    onnx.TensorProto.BFLOAT16: DataType.BF16,
    onnx.TensorProto.INT32: DataType.INT32,
}


class OnnxParser:
    def __init__(self, network: INetworkDefinition, log: Any) -> None:
        self.network, self.log = network, log

    def parse_from_file(self, path: str) -> bool:
        """Add the graph's nodes as layers; those that are not a Gather must be plug-ins."""
        graph = onnx.load(path).graph
        tensors: dict[str, ITensor] = {}
        for given in graph.input:
            shape = [-1 if size.dim_param else size.dim_value for size in given.type.tensor_type.shape.dim]
            kind = TYPES[given.type.tensor_type.elem_type]
            tensors[given.name] = self.network.add_input(given.name, kind, tuple(shape))
        for weight in graph.initializer:
            array = onnx.numpy_helper.to_array(weight, base_dir=str(Path(path).parent))
            layer = self.network.add_constant(array.shape, Weights(array))
            layer.name, tensors[weight.name] = f"{weight.name} constant", layer.get_output(0)
        for node in graph.node:
            self._add(node, tensors)
        for output in graph.output:
            tensors[output.name].name = output.name
            self.network.mark_output(tensors[output.name])
        return True

    def _add(self, node: onnx.NodeProto, tensors: dict[str, ITensor]) -> None:
        inputs = [tensors[name] for name in node.input]
        fields = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        if node.op_type == "Gather":
            layer = self.network.add_gather(*inputs, fields["axis"])
        else:
            assert (node.domain, fields.pop("plugin_namespace")) == ("qwen_plugins", b"qwen_plugins")
            version = fields.pop("plugin_version").decode()
            plugin = types.SimpleNamespace(name=node.op_type, version=version, fields=fields, phase="build")
            layer = self.network.add_plugin_v3(inputs, [], plugin)
        layer.name = node.name
        tensors.update(zip(node.output, layer.outputs, strict=True))


class BuilderConfig:
    """Has none of the settings of TensorRT's that the back end uses: timing cache, tactic sources, flags."""

    def __init__(self) -> None:
        self.profiles: list[Any] = []
        self.profiling_verbosity = ""
        self.num_compute_capabilities = 0
        self.compute_capabilities: dict[int, str] = {}

    add_optimization_profile = numpy_tensorrt.BuilderConfig.add_optimization_profile

    def set_compute_capability(self, capability: str, index: int) -> bool:
        assert index < self.num_compute_capabilities
        self.compute_capabilities[index] = capability
        return True


class Builder(numpy_tensorrt.Builder):
    def create_builder_config(self) -> Any:
        return BuilderConfig()

    def build_serialized_network_to_stream(self, network: INetworkDefinition, config: Any, writer: Any) -> bool:
        assert len(config.compute_capabilities) == config.num_compute_capabilities > 0
        plan = self.build_serialized_network(network, config)
        if plan is None:
            return False
        parts = memoryview(b"vtrt"), memoryview(plan)
        return all(writer.write(part) == len(part) for part in parts)


class RuntimeCache:
    """Hold compiled kernels: here, the number of contexts that were made with it."""

    START = b"kernels of "

    def __init__(self) -> None:
        self.kernels = 0

    def serialize(self) -> bytes:
        return self.START + str(self.kernels).encode()

    def deserialize(self, content: bytes) -> bool:
        if content.startswith(self.START):
            self.kernels = int(content.removeprefix(self.START))
        return content.startswith(self.START)


class RuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy = "lazy"
    strategy = "static"
    cache: RuntimeCache | None = None

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy


class Engine(numpy_tensorrt.Engine):
    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, config: RuntimeConfig) -> Any:
        assert (config.strategy, config.dynamic_shapes_kernel_specialization_strategy) == ("user managed", "none")
        config.cache.kernels += 1
        return numpy_tensorrt.Context(self)


class Runtime(numpy_tensorrt.Runtime):
    def deserialize_cuda_engine(self, plan: Any) -> Engine | None:
        content = bytes(memoryview(plan))
        if not content.startswith(b"vtrt"):
            self.log.log(1, "Serialization assertion header.magicTag == kEXPECTED_MAGIC_TAG failed")
            return None
        found = super().deserialize_cuda_engine(content[4:])
        if found is None:
            return None
        properties = numpy_cuda.runtime.cudaGetDeviceProperties(0)[1]
        if f"SM{properties.major}{properties.minor}" not in found.config.compute_capabilities.values():
            self.log.log(1, "Target GPU SM is not supported")
            return None
        return Engine(found.network, found.config)


def make_module() -> types.ModuleType:
    """Make the module ``tensorrt_rtx``, with the plug-ins registered."""
    module = numpy_tensorrt.make_module("11.4.0")
    for name in ("BuilderFlag", "PluginField", "PluginFieldCollection", "TensorFormat"):  # the back end needs none
        delattr(module, name)
    capabilities = ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121")
    module.__dict__.update(
        __name__="tensorrt_rtx",
        __spec__=ModuleSpec("tensorrt_rtx", None),
        __version__=VERSION,
        Builder=Builder,
        Runtime=Runtime,
        OnnxParser=OnnxParser,
        IStreamWriter=type("IStreamWriter", (), {}),
        ComputeCapability=types.SimpleNamespace(**{name: name for name in capabilities}),
        DynamicShapesKernelSpecializationStrategy=types.SimpleNamespace(NONE="none", LAZY="lazy"),
    )
    return module
