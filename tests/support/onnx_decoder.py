"""Write a checkpoint's network as an ONNX model with plug-ins."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from qwen_model.checkpoints.checkpoint import Checkpoint
from qwen_model.checkpoints.config import ModelConfig
from qwen_model.checkpoints.module_weights import ModuleWeights
from qwen_model.checkpoints.weights import network_modules
from qwen_model.network.decoder import decoder
from qwen_model.network.rotary import rotary_table
from tests.support.onnx_models import TENSORRT_TYPES, Value, constant, model, plugin_node

Arrays = ModuleWeights[np.ndarray]
MAX_BATCH, MAX_INPUT, MAX_POSITIONS = 4, 32, 64


class OnnxOperations:
    """Implements the operations of `qwen_model.network.decoder`: each adds nodes and returns a tensor's name."""

    def __init__(self, config: ModelConfig, onnx_type: int, modules: Mapping[str, Arrays], inputs: list[str]):
        self.config = config
        self.type = onnx_type
        self.modules = modules
        self.inputs = inputs
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def embedding(self, input_ids: str, module: str) -> str:
        return self._gather(self._constants(module)[0], input_ids, module)

    def norm(self, x: str, module: str, residual: str | None = None, into: Any = ()) -> tuple[str, str]:
        inputs = [x, *self._constants(module), *([] if residual is None else [residual])]
        fields = {"eps": self.config.norm_eps, "residual": int(residual is not None)}
        y, *h = self._plugin("RmsNorm", module, inputs, 1 + (residual is not None), fields)
        return y, h[0] if h else x

    def linear(self, x: str, module: str, activation: str | None = None, into: Any = (), reduce: bool = False) -> str:
        parameters = self._constants(module)
        fields = {"bias": len(parameters) - 1, "activation": int(activation == "swiglu"), "constant_weight": 1}
        return self._plugin("Gemm", module, [x, *parameters], 1, fields)[0]

    def attention(self, qkv: str, layer: int, into: Any = ()) -> str:
        config, name = self.config, f"layers.{layer}.attention"
        lengths = ["cu_seqlens", "past_lengths", "rotary_offsets", "rotary_table", "semaphores"]
        scale = ["query_scale"] if "query_scale" in self.inputs else []
        norms = [f"{name}.{part}_norm" for part in "qk" if f"{name}.{part}_norm" in self.modules]
        fields = {
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "head_size": config.head_size,
            "rotary_embedding_dim": config.rotary.dim,
            "position_embedding_type": 2,
            "query_scale": len(scale),
            "qk_norm": int(bool(norms)),
            "norm_eps": config.norm_eps,
        }
        weights = [weight for norm in norms for weight in self._constants(norm)]
        inputs = [qkv, f"past_key_value_{layer}", *lengths, *scale, *weights]
        self._add("GptAttention", name, inputs, [name, f"present_key_value_{layer}"], fields)
        return name

    def last_token(self, x: str, residual: str) -> tuple[str, str]:
        return self._gather(x, "last_token_ids", "last_x"), self._gather(residual, "last_token_ids", "last_residual")

    def _plugin(self, plugin: str, name: str, inputs: list[str], outputs: int, fields: dict[str, Any]) -> list[str]:
        names = [f"{name}.output_{i}" for i in range(outputs)]
        self._add(plugin, name, inputs, names, fields)
        return names

    def _add(self, plugin: str, name: str, inputs: list[str], outputs: list[str], fields: dict[str, Any]) -> None:
        self.nodes.append(plugin_node(plugin, name, inputs, outputs, {"type_id": TENSORRT_TYPES[self.type]} | fields))

    def _gather(self, table: str, rows: str, name: str) -> str:
        self.nodes.append(helper.make_node("Gather", [table, rows], [name], name=name, axis=0))
        return name

    def _constants(self, module: str) -> list[str]:
        """The weight of a module, and its bias if it has one."""
        tensors = self.modules[module].tensors
        names = [f"{module}.{name}" for name in ("weight", "bias")][: len(tensors)]
        self.constants += [constant(name, array, self.type) for name, array in zip(names, tensors, strict=True)]
        return names


def decoder_inputs(config: ModelConfig, onnx_type: int) -> dict[str, Value]:
    """Return the network's inputs, as those of the TensorRT back end."""
    integers = {name: Value(TensorProto.INT32, [None]) for name in ("input_ids", "cu_seqlens", "past_lengths")}
    integers |= {name: Value(TensorProto.INT32, [None]) for name in ("rotary_offsets", "last_token_ids")}
    inputs = integers | {"semaphores": Value(TensorProto.INT32, [MAX_BATCH, config.num_heads])}
    table = rotary_table(config, MAX_POSITIONS)
    inputs["rotary_table"] = Value(TensorProto.FLOAT, [None, config.rotary.dim])
    if table.query_scale is not None:
        inputs["query_scale"] = Value(TensorProto.FLOAT, [None])
    cache = Value(onnx_type, [MAX_BATCH, 2, config.num_kv_heads, MAX_POSITIONS, config.head_size])
    return inputs | {f"past_key_value_{layer}": cache for layer in range(config.num_layers)}


def decoder_profiles(config: ModelConfig, inputs: Mapping[str, Value]) -> list[dict[str, Any]]:
    """Return a profile for decode steps and one for prompts."""
    rows = len(rotary_table(config, MAX_POSITIONS).values)

    def ranges(tokens: int) -> dict[str, tuple[int, int, int]]:
        sizes = {"input_ids": (1, tokens // MAX_BATCH, tokens), "cu_seqlens": (2, 2, MAX_BATCH + 1)}
        return sizes | dict.fromkeys(("rotary_table", "query_scale"), (rows, rows, rows))

    return [
        {
            name: tuple((size, *value.shape[1:]) for size in ranges(tokens).get(name, (1, 1, MAX_BATCH)))
            for name, value in inputs.items()
            if None in value.shape
        }
        for tokens in (MAX_BATCH, MAX_BATCH * MAX_INPUT)
    ]


def decoder_model(model_dir: Path, onnx_type: int = TensorProto.FLOAT16) -> tuple[bytes, ModelConfig]:
    """Return a checkpoint's network as a serialised ONNX model, and its configuration."""
    config = ModelConfig.from_model_dir(model_dir)
    checkpoint = Checkpoint(model_dir, "numpy")
    modules = {name: module.map(checkpoint.read) for name, module in network_modules(config, "float32").items()}
    inputs = decoder_inputs(config, onnx_type)
    ops = OnnxOperations(config, onnx_type, modules, list(inputs))
    logits = decoder(ops, config, "input_ids")
    outputs = {logits: Value(onnx_type, [None, config.vocab_size])}
    for layer in range(config.num_layers):
        outputs[f"present_key_value_{layer}"] = inputs[f"past_key_value_{layer}"]
    return model(ops.nodes, inputs, outputs, ops.constants), config
