"""Implement the decoder's operations as layers of a TensorRT network: the plug-ins of this project, and gathers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy.typing as npt

from qwen_plugins import tensorrt as layers

from ...checkpoints.config import ModelConfig
from ...common.errors import QwenModelError
from .compat import set_type

ReadWeight = Callable[[str], npt.NDArray[Any]]


class TensorRTOperations:
    """Implement `Operations`: each adds layers, named after their weights, and returns an `ITensor`."""

    def __init__(
        self,
        network: Any,
        config: ModelConfig,
        dtype: Any,
        inputs: Mapping[str, Any],
        read_weight: ReadWeight,
        disabled: Collection[str] = (),
    ):
        """Take the network's inputs, by the names of `network_inputs` in back_end.py.

        dtype: `tensorrt.DataType` of weights, activations and cache.
        read_weight: reads a weight by its name, of any floating-point type; called once for each use.
        disabled: of `PLUGINS`, those whose operations TensorRT's own layers compute ("rotary": NativeRotaryOperations).
        """
        self._network = network
        self._config = config
        self._dtype = dtype
        self._inputs = inputs
        self._read = read_weight
        self._disabled = frozenset(disabled)
        self.present_key_values: list[Any] = []

    def embedding(self, input_ids: Any, weight: str) -> Any:
        """See `qwen_model.network.decoder.Operations`."""
        table = layers.constant(self._network, self._read(weight), self._dtype, f"{weight} table")
        return self._gather(table, input_ids, weight)

    def linear(self, x: Any, weight: str, bias: str | None = None) -> Any:
        """See `qwen_model.network.decoder.Operations`."""
        return self._gemm(x, weight, bias)

    def linear_swiglu(self, x: Any, weight: str, bias: str | None = None) -> Any:
        """See `qwen_model.network.decoder.Operations`."""
        return self._gemm(x, weight, bias, activation="swiglu")

    def rms_norm(self, x: Any, weight: str, residual: Any = None) -> tuple[Any, Any]:
        """See `qwen_model.network.decoder.Operations`."""
        found = layers.rms_norm(
            self._network,
            x,
            self._read(weight),
            self._config.norm_eps,
            residual,
            dtype=self._dtype,
            plugin="rms_norm" not in self._disabled,
            name=_layer_name(weight),
        )
        return (found, x) if residual is None else found

    def gpt_attention(self, qkv: Any, layer: int, q_norm: str | None, k_norm: str | None) -> Any:
        """See `qwen_model.network.decoder.Operations`."""
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
                q_norm_weight=None if q_norm is None else self._read(q_norm),
                k_norm_weight=None if k_norm is None else self._read(k_norm),
                norm_eps=config.norm_eps,
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

    def _gemm(self, x: Any, weight: str, bias: str | None, activation: str | None = None) -> Any:
        # A tied embedding becomes two constants: TensorRT 8.6 reports a wrong type for one that the embedding and this
        # GEMM share.
        name = "lm_head" if weight == "embedding.weight" else _layer_name(weight)
        return layers.gemm(
            self._network,
            x,
            self._read(weight),
            None if bias is None else self._read(bias),
            activation=activation,
            dtype=self._dtype,
            plugin="gemm" not in self._disabled,
            name=name,
        )

    def _gather(self, table: Any, rows: Any, name: str) -> Any:
        layer = self._network.add_gather(table, rows, 0)
        layer.name = _layer_name(name)
        return set_type(layer, self._dtype, self._network)


def _layer_name(weight: str) -> str:
    return weight.removesuffix(".weight")
