"""Define the network with this project's plug-ins as nodes, for TensorRT's ONNX parser.

Inputs and outputs are those of the TensorRT back end (see network/inputs.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qwen_plugins._numbers import ACTIVATIONS, CODE_TYPES, HEAD_SIZES, KV_CACHE_TYPES, SCALE_TYPES

from ...checkpoints.config import ModelConfig
from ...checkpoints.module_weights import ModuleWeights
from ...checkpoints.weights import Modules, WeightSpec
from ...common.errors import QwenModelError
from ...interface.back_end import ReadWeight
from ...interface.engine_config import Limits
from ...interface.memory import PAGE_SIZE
from ...network.decoder import decoder
from ...network.inputs import network_inputs
from ...tuning.linear_layers import quantizes_for, quantizing_reader
from .graph import Graph

VERSIONS = 17, 8  # ONNX's opset and IR: the only ONNX operator is Gather: parsers since TensorRT 8.6 read this
GEMM = "QwenGemm"
"""The second name of the plug-in Gemm: some parsers take a node Gemm of any domain for ONNX's operator."""
_TYPE_IDS = {"float32": 0, "float16": 1, "bfloat16": 7}  # nvinfer1::DataType
_ROPE_GPT_NEOX = 2  # csrc/plugins/gpt_attention/README.md


@dataclass(frozen=True)
class QuantizedTensor:
    """Hold a quantized x.

    codes: int32 [tokens, size / 4], into which only plug-ins look.
    scales: float32 [tokens, 1]; static: [1], one for all tokens.
    """

    codes: str
    scales: str
    static: bool


Activations = str | QuantizedTensor


class PluginOperations:
    """Implement `Operations`: each adds the node of a plug-in, named after its module, or a Gather.

    An output is a `QuantizedTensor` where the linear layers that read it take that.

    Nodes have the fields that have defaults, too: TensorRT's parser warns of each that is missing.
    """

    def __init__(
        self,
        graph: Graph,
        config: ModelConfig,
        dtype: str,
        inputs: Mapping[str, str],
        modules: Modules,
        read_weight: ReadWeight,
        kv_cache_dtype: str,
    ):
        """Take the network's inputs by the names of network/inputs.py.

        read_weight: reads a weight as a NumPy array of its type in the graph; called once for each.
        kv_cache_dtype: see `EngineConfig`.

        Raises:
            QwenModelError: the plug-in has no kernel for the model's head size.
        """
        if config.head_size not in HEAD_SIZES:
            raise QwenModelError(
                f"the attention plug-in has heads of {', '.join(map(str, HEAD_SIZES))} elements, and this model has "
                f"{config.head_size}: use --operators standard"
            )
        self._graph = graph
        self._config = config
        self._type_id = _TYPE_IDS[dtype]
        self._inputs = inputs
        self._modules = modules
        self._read = read_weight
        self._kv_cache_type = KV_CACHE_TYPES[kv_cache_dtype]
        self.present_key_values: list[str] = []

    def embedding(self, input_ids: Activations, module: str) -> Activations:
        """See `qwen_model.network.decoder.Operations`."""
        assert isinstance(input_ids, str)
        return self._gather(self._weight(self._modules[module].weight), input_ids, module)

    def linear(
        self,
        x: Activations,
        module: str,
        activation: str | None = None,
        into: tuple[str, ...] = (),
        reduce: bool = False,
    ) -> Activations:
        """See `qwen_model.network.decoder.Operations`."""
        fields = {
            "type_id": self._type_id,
            "bias": int(self._modules[module].bias is not None),
            "activation": ACTIVATIONS[activation],
            "constant_weight": 1,
        }
        if isinstance(x, QuantizedTensor):
            return self._scaled_linear(x, module, fields, into)
        if self._modules[module].format.bits:
            return self._quantized_for(into, self._quantized_linear(x, module, fields), module)
        weights = self._modules[module].map(self._weight)
        y = str(self._graph.plugin(GEMM, [x, *weights.tensors], module, fields, version="1"))
        return self._quantized_for(into, y, module)

    def _scaled_linear(
        self, x: QuantizedTensor, module: str, fields: dict[str, int], into: tuple[str, ...]
    ) -> Activations:
        weights, reader = self._modules[module], quantizing_reader(self._modules, into)
        assert weights.scales is not None  # quantized weights have scales
        y_scale = None
        if reader is not None and quantizes_for(weights, reader):
            y_scale = reader.input_scale
        scales = self._read(weights.scales)  # a vector, or of blocks
        scales = self._graph.weight(weights.scales.name, scales if weights.format.group_size else scales.reshape(-1))
        inputs = [x.codes, self._words(weights.weight), scales, x.scales]
        inputs += [self._weight(spec) for spec in (y_scale, weights.bias) if spec is not None]
        out_features, in_features = weights.shape
        fields |= {
            "x_type_id": CODE_TYPES[weights.format.kind],
            "in_features": in_features,
            "out_features": out_features,
            "group_size": weights.format.group_size,
            "has_per_token_scaling": int(not x.static),
            "quantize_output": int(y_scale is not None),
        }
        y = str(self._graph.plugin(GEMM, inputs, module, fields, version="3"))
        return self._quantized_for(into, y, module) if y_scale is None else self._static(y, y_scale)

    def _quantized_for(self, into: tuple[str, ...], x: str, name: str) -> Activations:
        """Quantize x, the result called `name`, for the linear layers that read it, if they take it so."""
        reader = quantizing_reader(self._modules, into)
        if reader is None:
            return x
        name = f"{name}.quantize"
        fields = {"type_id": self._type_id, "out_type_id": CODE_TYPES[reader.format.kind], "int32_output": 1}
        if reader.input_scale is None:
            codes, scales = self._graph.plugin("QuantizePerToken", [x], name, fields, outputs=2)
            return QuantizedTensor(codes, scales, static=False)
        inputs = [x, self._weight(reader.input_scale)]
        return self._static(str(self._graph.plugin("QuantizeTensor", inputs, name, fields)), reader.input_scale)

    def _static(self, codes: str, scale: WeightSpec) -> QuantizedTensor:
        return QuantizedTensor(codes, self._weight(scale), static=True)

    def _quantized_linear(self, x: str, module: str, fields: dict[str, int]) -> str:
        weights = self._modules[module]
        if weights.permutation is not None:
            columns = self._weight(weights.permutation)
            x = str(self._graph.op("Gather", [x, columns], f"{module}.permutation", axis=1))
        specs = (weights.weight, weights.scales, weights.zeros)
        inputs = [self._words(spec) for spec in specs if spec is not None]
        inputs += [] if weights.bias is None else [self._weight(weights.bias)]
        out_features, in_features = weights.shape
        fields |= {
            "in_features": in_features,
            "out_features": out_features,
            "weight_bits": weights.format.bits,
            "group_size": weights.format.group_size,
            "zeros": int(weights.zeros is not None),
            "scale_type_id": SCALE_TYPES[weights.format.scale_dtype],
        }
        return str(self._graph.plugin(GEMM, [x, *inputs], module, fields, version="2"))

    def norm(
        self, x: Activations, module: str, residual: Activations | None = None, into: tuple[str, ...] = ()
    ) -> tuple[Activations, Activations]:
        """See `qwen_model.network.decoder.Operations`."""
        assert isinstance(x, str)
        assert not isinstance(residual, QuantizedTensor)
        fields = {
            "type_id": self._type_id,
            "weight_type_id": self._type_id,
            "eps": self._config.norm_eps,
            "residual": int(residual is not None),
            "unit_offset": 0,
        }
        inputs = [x, self._weight(self._modules[module].weight), *([] if residual is None else [residual])]
        reader = quantizing_reader(self._modules, into)
        if reader is not None:
            codes, rest = self._quantized_norm(inputs, module, fields, reader)
            return codes, x if residual is None else rest
        fields["round_before_weight"] = 0
        if residual is None:
            return str(self._graph.plugin("RmsNorm", inputs, module, fields)), x
        y, h = self._graph.plugin("RmsNorm", inputs, module, fields, outputs=2)
        return y, h

    def _quantized_norm(
        self, inputs: list[str], module: str, fields: dict[str, int | float], reader: ModuleWeights[WeightSpec]
    ) -> tuple[QuantizedTensor, str]:
        """Return codes, and the last output: with a residual the sum."""
        fields |= {
            "dyn_act_scaling": int(reader.input_scale is None),
            "out_type_id": CODE_TYPES[reader.format.kind],
            "smoothing": 0,
            "smoothing_type_id": _TYPE_IDS["float32"],
            "int32_output": 1,
        }
        static = reader.input_scale is not None
        if reader.input_scale is not None:
            inputs = [*inputs, self._weight(reader.input_scale)]
        count = 1 + int(not static) + int(fields["residual"])
        found = self._graph.plugin("RmsNormQuantization", inputs, module, fields, outputs=count)
        outputs = [found] if count == 1 else found
        scales = outputs[1] if reader.input_scale is None else self._weight(reader.input_scale)
        return QuantizedTensor(outputs[0], scales, static), outputs[-1]

    def attention(self, qkv: Activations, layer: int, into: tuple[str, ...] = ()) -> Activations:
        """See `qwen_model.network.decoder.Operations`."""
        assert isinstance(qkv, str)
        config, name = self._config, f"layers.{layer}.attention"
        names = [
            f"past_key_value_{layer}",
            "cu_seqlens",
            "past_lengths",
            "pages",
            "rotary_offsets",
            "rotary_table",
            "semaphores",
        ]
        inputs = [qkv, *(self._inputs[name] for name in names)]
        if "query_scale" in self._inputs:
            inputs.append(self._inputs["query_scale"])
        norms = [self._modules[f"{name}.{kind}"] for kind in ("q_norm", "k_norm") if f"{name}.{kind}" in self._modules]
        inputs += [self._weight(norm.weight) for norm in norms]
        reader = quantizing_reader(self._modules, into)
        scale = None if reader is None else reader.input_scale
        inputs += [] if scale is None else [self._weight(scale)]
        fields = {
            "type_id": self._type_id,
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "head_size": config.head_size,
            "rotary_embedding_dim": config.rotary.dim,
            "position_embedding_type": _ROPE_GPT_NEOX,
            "q_scaling": 1.0,
            "query_scale": int("query_scale" in self._inputs),
            "qk_norm": int(bool(norms)),
            "norm_eps": config.norm_eps,
            "tokens_per_block": PAGE_SIZE,
            "kv_cache_type": self._kv_cache_type,
            "context_type": 0 if reader is None or scale is None else KV_CACHE_TYPES[reader.format.kind],
        }
        context, present = self._graph.plugin("GptAttention", inputs, name, fields, outputs=2)
        self.present_key_values.append(present)
        return self._quantized_for(into, str(context), name) if scale is None else self._static(context, scale)

    def last_token(self, x: Activations, residual: Activations) -> tuple[Activations, Activations]:
        """Gather the rows that the input `last_token_ids` names; see `Operations`."""
        assert isinstance(residual, str)
        rows = self._inputs["last_token_ids"]
        last_residual = self._gather(residual, rows, "last_token.residual")
        if isinstance(x, str):
            return self._gather(x, rows, "last_token"), last_residual
        codes, scales = self._gather(x.codes, rows, "last_token"), x.scales
        if not x.static:
            scales = self._gather(scales, rows, "last_token.scales")
        return QuantizedTensor(codes, scales, x.static), last_residual

    def _weight(self, spec: WeightSpec) -> str:
        """Return a weight's tensor; a tied head shares that of the embedding."""
        return spec.name if self._graph.has_weight(spec.name) else self._graph.weight(spec.name, self._read(spec))

    def _words(self, spec: WeightSpec) -> str:
        """Return a quantized weight's tensor as int32, which TensorRT leaves as it is; four codes in each number."""
        return self._graph.weight(spec.name, np.ascontiguousarray(self._read(spec)).view(np.int32))

    def _gather(self, table: str, rows: str, name: str) -> str:
        return str(self._graph.op("Gather", [table, rows], name, axis=0))


def define(
    graph: Graph,
    config: ModelConfig,
    limits: Limits,
    dtype: str,
    kv_cache_dtype: str,
    modules: Modules,
    read_weight: ReadWeight,
) -> None:
    """Add the network, with its inputs and outputs, to the graph."""
    described = network_inputs(config, limits, dtype, kv_cache_dtype)
    inputs = {}
    for name, given in described.items():
        inputs[name] = graph.input(name, given.dtype, _named_shape(name, given.shape))
    ops = PluginOperations(graph, config, dtype, inputs, modules, read_weight, kv_cache_dtype)
    logits = decoder(ops, config, inputs["input_ids"])
    assert isinstance(logits, str)
    graph.output(logits, "logits", dtype, [_dimension("last_token_ids"), config.vocab_size])
    for layer, present in enumerate(ops.present_key_values):
        past = f"past_key_value_{layer}"
        given = described[past]
        graph.output(present, f"present_key_value_{layer}", given.dtype, _named_shape(past, given.shape))


def _named_shape(name: str, shape: Sequence[int]) -> list[int | str]:
    return [_dimension(name) if extent < 0 else extent for extent in shape]


def _dimension(name: str) -> str:
    """Return the name of an input's dynamic dimension."""
    if name.startswith("past_key_value"):
        return "num_pages"
    return {
        "input_ids": "tokens",
        "cu_seqlens": "sequences + 1",
        "last_token_ids": "logit_rows",
        "rotary_table": "rotary_rows",
        "query_scale": "rotary_rows",
    }.get(name, "sequences")
