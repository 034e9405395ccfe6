"""Implement the decoder's operations as layers of a TensorRT network: the plug-ins of this project, and gathers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from qwen_plugins import tensorrt as layers

from ...checkpoints.config import ModelConfig
from ...checkpoints.weights import Modules
from ...common.errors import QwenModelError
from ...interface.back_end import ReadWeight
from ...interface.engine_config import KernelChoices
from ...interface.weight_formats import packed_weight
from .compat import set_type


class TensorRTOperations:
    """Implement `Operations`: each adds layers, named after their modules, and returns an `ITensor`."""

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
        return layers.gemm(
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

    def norm(self, x: Any, module: str, residual: Any = None, into: tuple[str, ...] = ()) -> tuple[Any, Any]:
        """See `qwen_model.network.decoder.Operations`."""
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

    def attention(self, qkv: Any, layer: int, into: tuple[str, ...] = ()) -> Any:
        """See `qwen_model.network.decoder.Operations`."""
        return self._attend(qkv, layer, self._head_norms(layer))

    def _head_norms(self, layer: int) -> dict[str, str]:
        """Return the norms of the heads of q and k, if the layer has them, by `gpt_attention`'s names."""
        names = {kind: f"layers.{layer}.attention.{kind}" for kind in ("q_norm", "k_norm")}
        return {f"{kind}_weight": module for kind, module in names.items() if module in self._modules}

    def _attend(self, qkv: Any, layer: int, head_norms: Mapping[str, str]) -> Any:
        config, inputs = self._config, self._inputs
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
                dtype=self._dtype,
                name=f"layers.{layer}.attention",
            )
        except ValueError as error:  # there is no kernel for the head size
            raise QwenModelError(
                f"the attention plug-in cannot run this model: {error}; use the torch back end"
            ) from error
        self.present_key_values.append(present)
        return context

    def last_token(self, x: Any, residual: Any) -> tuple[Any, Any]:
        """Gather the rows that the input `last_token_ids` names; see `Operations`."""
        rows = self._inputs["last_token_ids"]
        return self._gather(x, rows, "last_token"), self._gather(residual, rows, "last_token.residual")

    def _gather(self, table: Any, rows: Any, name: str) -> Any:
        layer = self._network.add_gather(table, rows, 0)
        layer.name = name
        return set_type(layer, self._dtype, self._network)
