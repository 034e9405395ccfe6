"""The operations that our CUDA kernels take over: attention's own work, and SwiGLU. They synchronise nothing."""

from __future__ import annotations

from torch import Tensor

from qwen_plugins._sampling import gather_rows
from qwen_plugins.decoder import (
    HEAD_SIZES,
    AttentionInputs,
    DecodeAttentionWorkspace,
    decode_attention,
    decode_attention_workspace,
    prefill_attention,
    swiglu,
)

from ..config import ModelConfig
from .torch_operations import TorchOperations


def supported(config: ModelConfig) -> bool:
    """Whether there are kernels for this model's head size."""
    return config.head_size in HEAD_SIZES


class KernelOperations(TorchOperations):
    """For a GPU. The matrix products are PyTorch's."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], cache: Tensor, rmsnorm_plugin: bool):
        """See `TorchOperations`."""
        super().__init__(config, weights, cache, rmsnorm_plugin)
        self._workspace: DecodeAttentionWorkspace | None = None

    def embedding(self, input_ids: Tensor, weight: str) -> Tensor:
        """See `qwen_model.network.Operations`."""
        return gather_rows(self.weights[weight], input_ids)

    def last_token(self, x: Tensor) -> Tensor:
        """See `qwen_model.network.Operations`."""
        return x if self.batch.decoding else gather_rows(x, self.batch.cu_seqlens[1:] - 1)

    def linear_swiglu(self, x: Tensor, weight: str, bias: str | None = None) -> Tensor:
        """See `qwen_model.network.Operations`."""
        return swiglu(self.linear(x, weight, bias))

    def gpt_attention(self, qkv: Tensor, layer: int, q_norm: str | None, k_norm: str | None) -> Tensor:
        """See `qwen_model.network.Operations`."""
        batch = self.batch
        inputs = AttentionInputs(
            num_heads=self.config.num_heads,
            kv_cache=self.cache[layer],
            rotary_table=batch.rotary_table,
            rotary_offsets=batch.rotary_offsets,
            query_scale=batch.query_scale,
            q_norm=None if q_norm is None else self.weights[q_norm],
            k_norm=None if k_norm is None else self.weights[k_norm],
            norm_eps=self.config.norm_eps,
        )
        if batch.decoding:
            if self._workspace is None:
                self._workspace = decode_attention_workspace(inputs)
            return decode_attention(qkv, inputs, batch.device_past_lengths, self._workspace)
        return prefill_attention(qkv, inputs, batch.cu_seqlens)
