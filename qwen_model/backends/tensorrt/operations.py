"""Implement the decoder's operations as layers of a TensorRT network: the plug-ins of this project, and gathers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import tensorrt as trt

from qwen_plugins import tensorrt as layers

from ...checkpoints.config import ModelConfig
from ...checkpoints.module_weights import ModuleWeights
from ...checkpoints.weights import Modules, WeightSpec
from ...common.errors import QwenModelError
from ...interface.back_end import ReadWeight
from ...interface.engine_config import KernelChoices
from ...interface.weight_formats import packed_weight
from ...tuning.linear_layers import quantizes_for, quantizing_reader
from .compat import set_type


@dataclass(frozen=True)
class QuantizedTensor:
    """Hold a quantized x.

    codes: `ITensor`, int32 [tokens, size / 4], into which only plug-ins look.
    scales: `ITensor`, float32 [tokens, 1]; or an array of one scale for all tokens.
    """

    codes: Any
    scales: Any


class TensorRTOperations:
    """Implement `Operations`: each adds layers, named after their modules, and returns an `ITensor`.

    An output is a `QuantizedTensor` where the linear layers that read it take that.
    """

    def __init__(
        self,
        network: Any,
        config: ModelConfig,
        dtype: Any,
        inputs: Mapping[str, Any],
        modules: Modules,
        read_weight: ReadWeight,
        disabled: Collection[str] = (),
        gemm_kernels: Mapping[str, KernelChoices] | None = None,
        kv_cache_dtype: str = "auto",
        max_tokens: int = 0,
    ):
        """Take the network's inputs, by the names of network/inputs.py.

        dtype: `tensorrt.DataType` of weights, activations and cache.
        modules: what weights each module has.
        read_weight: reads a weight, of any floating-point type; called once for each use.
        disabled: of `PLUGINS`, those whose operations TensorRT's own layers compute ("rotary": NativeRotaryOperations).
        gemm_kernels: those of the linear layers, by module; rules choose the others.
        kv_cache_dtype: see `EngineConfig`.
        max_tokens: the most tokens of a step, which NativeRotaryOperations counts.
        """
        self._network = network
        self._config = config
        self._dtype = dtype
        self._inputs = inputs
        self._modules = modules
        self._read = read_weight
        self._disabled = frozenset(disabled)
        self._gemm_kernels = gemm_kernels or {}
        self._kv_cache_dtype = kv_cache_dtype
        self._max_tokens = max_tokens
        self.present_key_values: list[Any] = []

    def embedding(self, input_ids: Any, module: str) -> Any:
        """See `qwen_model.network.decoder.Operations`."""
        weight = self._read(self._modules[module].weight)
        table = layers.constant(self._network, weight, self._dtype, f"{module}.weight table")
        return self._gather(table, input_ids, module)

    def linear(
        self, x: Any, module: str, activation: str | None = None, into: tuple[str, ...] = (), reduce: bool = False
    ) -> Any:
        """See `qwen_model.network.decoder.Operations`."""
        # A tied embedding becomes two constants: TensorRT 8.6 reports a wrong type for one that the embedding and this
        # GEMM share.
        weights = self._modules[module].map(self._read)
        if isinstance(x, QuantizedTensor):
            return self._scaled_linear(x, module, weights, activation, into)
        y = layers.gemm(
            self._network,
            x,
            packed_weight(weights) if weights.format.bits else weights.weight,
            weights.bias,
            activation=activation,
            dtype=self._dtype,
            plugin="gemm" not in self._disabled,
            kernels=self._gemm_kernels.get(module, ()),
            permutation=weights.permutation,
            name=module,
        )
        return self._quantized_for(into, y, module)

    def _scaled_linear(
        self,
        x: QuantizedTensor,
        module: str,
        weights: ModuleWeights[Any],
        activation: str | None,
        into: tuple[str, ...],
    ) -> Any:
        assert weights.scales is not None  # quantized weights have scales
        reader = quantizing_reader(self._modules, into)
        scale = None
        if reader is not None and reader.input_scale is not None and quantizes_for(self._modules[module], reader):
            scale = self._read(reader.input_scale)
        y = layers.scaled_gemm(
            self._network,
            x.codes,
            weights.weight,
            x.scales,
            weights.scales,
            weights.bias,
            dtype=self._dtype,
            activation=activation,
            y_scale=scale,
            kernels=self._gemm_kernels.get(module, ()),
            name=module,
        )
        return self._quantized_for(into, y, module) if scale is None else QuantizedTensor(y, scale)

    def _quantized_for(self, into: tuple[str, ...], x: Any, name: str) -> Any:
        """Quantize x, the result called `name`, for the linear layers that read it, if they take it so."""
        reader = quantizing_reader(self._modules, into)
        if reader is None:
            return x
        scale = None if reader.input_scale is None else self._read(reader.input_scale)
        name = f"{name}.quantize"
        found = layers.quantize(self._network, x, reader.format.kind, scale, dtype=self._dtype, name=name)
        return QuantizedTensor(*found) if scale is None else QuantizedTensor(found, scale)

    def norm(self, x: Any, module: str, residual: Any = None, into: tuple[str, ...] = ()) -> tuple[Any, Any]:
        """See `qwen_model.network.decoder.Operations`."""
        reader = quantizing_reader(self._modules, into)
        if reader is not None:
            return self._quantized_norm(x, module, residual, reader)
        found = layers.rms_norm(
            self._network,
            x,
            self._read(self._modules[module].weight),
            self._config.norm_eps,
            residual,
            dtype=self._dtype,
            plugin="rms_norm" not in self._disabled,
            name=module,
        )
        return (found, x) if residual is None else found

    def _quantized_norm(
        self, x: Any, module: str, residual: Any, reader: ModuleWeights[WeightSpec]
    ) -> tuple[QuantizedTensor, Any]:
        scale = None if reader.input_scale is None else self._read(reader.input_scale)
        found = layers.rms_norm_quant(
            self._network,
            x,
            self._read(self._modules[module].weight),
            self._config.norm_eps,
            quant_dtype=reader.format.kind,
            scale=scale,
            residual=residual,
            dtype=self._dtype,
            name=module,
        )
        codes, *rest = found if isinstance(found, tuple) else (found,)
        scales = rest.pop(0) if scale is None else scale
        return QuantizedTensor(codes, scales), x if residual is None else rest[0]

    def attention(self, qkv: Any, layer: int, into: tuple[str, ...] = ()) -> Any:
        """See `qwen_model.network.decoder.Operations`."""
        return self._attend(qkv, layer, self._head_norms(layer), into)

    def _head_norms(self, layer: int) -> dict[str, str]:
        """Return the norms of the heads of q and k, if the layer has them, by `gpt_attention`'s names."""
        names = {kind: f"layers.{layer}.attention.{kind}" for kind in ("q_norm", "k_norm")}
        return {f"{kind}_weight": module for kind, module in names.items() if module in self._modules}

    def _attend(self, qkv: Any, layer: int, head_norms: Mapping[str, str], into: tuple[str, ...]) -> Any:
        config, inputs, name = self._config, self._inputs, f"layers.{layer}.attention"
        reader, quantized = quantizing_reader(self._modules, into), {}
        if reader is not None and reader.input_scale is not None:
            quantized = {"context_dtype": reader.format.kind, "context_scale": self._read(reader.input_scale)}
        try:
            context, present = layers.gpt_attention(
                self._network,
                qkv,
                inputs[f"past_key_value_{layer}"],
                inputs["cu_seqlens"],
                inputs["past_lengths"],
                inputs["rotary_offsets"],
                inputs["rotary_table"],
                inputs["semaphores"],
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_size=config.head_size,
                rotary_embedding_dim=config.rotary.dim,
                query_scale=inputs.get("query_scale"),
                **{name: self._read(self._modules[module].weight) for name, module in head_norms.items()},
                norm_eps=config.norm_eps,
                pages=inputs["pages"],
                kv_cache_dtype=self._kv_cache_dtype,
                **quantized,
                dtype=self._dtype,
                name=name,
            )
        except ValueError as error:  # there is no kernel for the head size
            raise QwenModelError(
                f"the attention plug-in cannot run this model: {error}; use the torch back end"
            ) from error
        self.present_key_values.append(present)
        if quantized:
            return QuantizedTensor(context, quantized["context_scale"])
        return self._quantized_for(into, context, name)

    def last_token(self, x: Any, residual: Any) -> tuple[Any, Any]:
        """Gather the rows that the input `last_token_ids` names; see `Operations`."""
        rows = self._inputs["last_token_ids"]
        last_residual = self._gather(residual, rows, "last_token.residual")
        if not isinstance(x, QuantizedTensor):
            return self._gather(x, rows, "last_token"), last_residual
        codes, scales = self._gather(x.codes, rows, "last_token", trt.int32), x.scales
        if isinstance(scales, trt.ITensor):
            scales = self._gather(scales, rows, "last_token.scales", trt.float32)
        return QuantizedTensor(codes, scales), last_residual

    def _gather(self, table: Any, rows: Any, name: str, dtype: Any = None) -> Any:
        layer = self._network.add_gather(table, rows, 0)
        layer.name = name
        if dtype == trt.int32:  # which TensorRT leaves alone
            return layer.get_output(0)
        return set_type(layer, self._dtype if dtype is None else dtype, self._network)
