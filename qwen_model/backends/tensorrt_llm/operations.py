"""Implement the decoder's operations over `tensorrt_llm.functional`, with RMSNorm as plug-ins of this project."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from tensorrt_llm import functional
from tensorrt_llm._utils import np_bfloat16

from qwen_plugins import tensorrt_llm as plugins

from ...checkpoints.config import ModelConfig
from ...checkpoints.weights import Modules, WeightSpec
from ...common.errors import QwenModelError
from ...interface.back_end import ReadWeight
from ...network.rotary import inverse_frequencies, rotary_table

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
SCALINGS = ("none", "linear", "llama3")
"""The rotary scalings whose table is one for all prompts, and that scale neither cosines nor q."""


class TensorRTLLMOperations:
    """Implement `Operations`: each adds layers to the network of `tensorrt_llm.net_guard` and returns a `Tensor`.

    The network has packed inputs (TensorRT-LLM's `remove_input_padding`), attention is its plug-in GPTAttention, and a
    linear layer is its `matmul`.
    """

    def __init__(
        self,
        config: ModelConfig,
        modules: Modules,
        read_weight: ReadWeight,
        *,
        last_token_ids: Any,
        kv_cache_params: Any,
        attention_params: Any,
        max_seq_len: int,
    ):
        """Take what `PretrainedModel.prepare_inputs` of TensorRT-LLM returns under these names.

        modules: what weights each module has, and in which type.
        read_weight: reads a weight, of any floating-point type, as a NumPy array; called once for each use.
        last_token_ids: int32 [sequences], the number of rows up to and with each sequence's last.
        max_seq_len: the most tokens of a sequence, the prompt's and those generated.

        Raises:
            QwenModelError: GPTAttention cannot compute this model's attention for sequences of that length.
        """
        self._config = config
        self._modules = modules
        self._read_weight = read_weight
        self._last_token_ids = last_token_ids
        self._kv_cache_params = kv_cache_params
        # What gpt_attention takes depends on the version; its parameters are called as the inputs are.
        self._parameters = inspect.signature(functional.gpt_attention).parameters
        inputs = {**vars(attention_params), **vars(kv_cache_params)}
        self._inputs = {name: value for name, value in inputs.items() if name in self._parameters}
        self._rotary = self._rotary_arguments(max_seq_len)
        self.present_key_values: list[Any] = []
        """The cache of each layer, to be marked as an output; None where the cache is paged."""

    def embedding(self, input_ids: Any, module: str) -> Any:
        """See `qwen_model.network.decoder.Operations`."""
        return functional.embedding(input_ids, self._weight(module))

    def norm(self, x: Any, module: str, residual: Any = None, into: tuple[str, ...] = ()) -> tuple[Any, Any]:
        """See `qwen_model.network.decoder.Operations`."""
        weight = self._weight(module)
        found = plugins.rms_norm(x, weight, self._config.norm_eps, residual, dtype=weight.dtype, name=module)
        return (found, x) if residual is None else found

    def linear(
        self, x: Any, module: str, activation: str | None = None, into: tuple[str, ...] = (), reduce: bool = False
    ) -> Any:
        """See `qwen_model.network.decoder.Operations`."""
        y = functional.matmul(x, self._weight(module), transb=True)
        if (bias := self._modules[module].bias) is not None:
            y = y + self._constant(bias)
        if activation is None:
            return y
        gate, up = functional.chunk(y, 2, dim=1)
        return functional.silu(gate) * up

    def attention(self, qkv: Any, layer: int, into: tuple[str, ...] = ()) -> Any:
        """See `qwen_model.network.decoder.Operations`."""
        config = self._config
        pasts = self._kv_cache_params.past_key_value  # None where the cache is paged
        context, present = functional.gpt_attention(
            **{
                **self._inputs,
                **self._rotary,
                "qkv": self._with_head_norms(qkv, f"layers.{layer}.attention") if config.qk_norm else qkv,
                "past_key_value": None if pasts is None else pasts[layer],
                "layer_idx": layer,
                "num_heads": config.num_heads,
                "num_kv_heads": config.num_kv_heads,
                "hidden_size_per_head": config.head_size,
                "q_scaling": 1.0,
            }
        )
        self.present_key_values.append(present)
        return context

    def last_token(self, x: Any, residual: Any) -> tuple[Any, Any]:
        """See `qwen_model.network.decoder.Operations`."""
        rows = self._last_token_ids
        return tuple(functional.gather_last_token_logits(tensor, rows, True) for tensor in (x, residual))

    def _with_head_norms(self, qkv: Any, attention: str) -> Any:
        """Apply RMSNorm to each head of q and k, [tokens, (heads + 2 · kv_heads) · head_size]."""
        config = self._config
        sizes = [heads * config.head_size for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
        q, k, v = functional.split(qkv, sizes, dim=1)
        normed = []
        for tensor, size, norm in ((q, sizes[0], "q_norm"), (k, sizes[1], "k_norm")):
            heads, _ = self.norm(tensor.view([-1, config.head_size]), f"{attention}.{norm}")
            normed.append(heads.view([-1, size]))
        return functional.concat([*normed, v], dim=1)

    def _rotary_arguments(self, max_seq_len: int) -> Mapping[str, Any]:
        """Return the arguments of `gpt_attention` for the rotary embedding, which the plug-in applies."""
        config, rotary = self._config, self._config.rotary
        if 0 < config.full_attention_length < max_seq_len:
            raise QwenModelError(
                f"the model attends to sequences of more than {config.full_attention_length} tokens through a sliding "
                f"window or chunks, which is not supported: max_seq_len {max_seq_len} is too large"
            )
        table = rotary_table(config, max_seq_len)
        scaling = rotary.scaling
        if scaling in ("dynamic", "qwen_dynamic") and max_seq_len <= rotary.original_max_positions:
            scaling = "none"  # up to the trained length
        if scaling not in SCALINGS or table.query_scale is not None:
            kind = "logn" if table.query_scale is not None else repr(scaling)
            raise QwenModelError(
                f"TensorRT-LLM's GPTAttention cannot apply {kind} to the rotary embedding or q as this model does with "
                f"sequences of {max_seq_len} tokens: use the torch or the tensorrt back end, or a smaller max_seq_len"
            )
        if scaling == "llama3" and "rotary_inv_freq" not in self._parameters:
            raise QwenModelError("rotary scaling 'llama3' needs TensorRT-LLM 0.12 or later")

        pairs = table.values.reshape(max_seq_len, 2, -1).swapaxes(1, 2)  # [positions, dim / 2, (cos, sin)]
        tables = {"rotary_inv_freq": inverse_frequencies(rotary), "rotary_cos_sin": pairs.reshape(1, -1)}
        return {
            "position_embedding_type": functional.PositionEmbeddingType.rope_gpt_neox,
            "rotary_embedding_dim": rotary.dim,
            "rotary_embedding_base": rotary.base,
            "rotary_embedding_scale_type": functional.RotaryScalingType[scaling],
            "rotary_embedding_scale": rotary.factor if scaling == "linear" else 1.0,
            "rotary_embedding_max_positions": max_seq_len,
            **{
                name: functional.constant(np.ascontiguousarray(values, np.float32))
                for name, values in tables.items()
                if name in self._parameters
            },
        }

    def _weight(self, module: str) -> Any:
        return self._constant(self._modules[module].weight)

    def _constant(self, spec: WeightSpec) -> Any:
        array = np.ascontiguousarray(self._read_weight(spec), DTYPES[spec.dtype])
        # NumPy has no bfloat16: TensorRT-LLM knows it by a type of its own.
        return functional.constant(array.view(np_bfloat16) if spec.dtype == "bfloat16" else array)
