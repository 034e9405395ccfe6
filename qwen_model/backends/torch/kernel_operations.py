"""The operations of the network by our CUDA kernels. They wait for nothing, and can be captured in a CUDA graph.

The launchers are called directly, not through the functions of qwen_plugins: their operands are made here, checking
them again takes several times as long as launching, and before a short prompt's first token the GPU would wait for it.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from qwen_plugins import _core
from qwen_plugins._arguments import address, type_number
from qwen_plugins._numbers import ACTIVATIONS, HEAD_SIZES, ROTARY_STYLES
from qwen_plugins.attention import AttentionInputs, decode_attention_workspace

from ...checkpoints.config import ModelConfig
from .operations import Batch, TorchOperations


def supported(config: ModelConfig) -> bool:
    """Whether there are kernels for this model's head size."""
    return config.head_size in HEAD_SIZES


class KernelOperations(TorchOperations):
    """For a GPU. Everything it is given and makes is contiguous and of one type."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], cache: Tensor, disabled: Collection[str] = ()):
        """See `TorchOperations`."""
        super().__init__(config, weights, cache, disabled)
        self._disabled = frozenset(disabled)
        self._dtype = type_number(cache.dtype)
        any_table = torch.empty(1, config.rotary.dim, device=cache.device)
        inputs = AttentionInputs(num_heads=config.num_heads, kv_cache=cache[0], rotary_table=any_table)
        self._workspace = decode_attention_workspace(inputs)
        self._heads: dict[tuple[str | None, str | None], _core.AttentionHeads] = {}
        self._stream = 0

    def begin(self, batch: Batch) -> None:
        """See `TorchOperations`."""
        super().begin(batch)
        self._heads.clear()
        self._stream = torch.cuda.current_stream(self.cache.device).cuda_stream

    def embedding(self, input_ids: Tensor, weight: str) -> Tensor:
        """See `qwen_model.network.decoder.Operations`."""
        return self._gather_rows(self.weights[weight], input_ids)

    def last_token(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """See `qwen_model.network.decoder.Operations`."""
        if self.batch.decoding:
            return x, residual
        rows = self.batch.cu_seqlens[1:] - 1
        return self._gather_rows(x, rows), self._gather_rows(residual, rows)

    def _gather_rows(self, table: Tensor, ids: Tensor) -> Tensor:
        y = table.new_empty(len(ids), table.shape[1])
        _core.gather_rows(
            table=table.data_ptr(),
            ids=ids.data_ptr(),
            y=y.data_ptr(),
            table_rows=len(table),
            row_size=table.shape[1],
            rows=len(ids),
            dtype=self._dtype,
            stream=self._stream,
        )
        return y

    def linear(self, x: Tensor, weight: str, bias: str | None = None) -> Tensor:
        """See `qwen_model.network.decoder.Operations`."""
        return super().linear(x, weight, bias) if "gemm" in self._disabled else self._gemm(x, weight, bias, None)

    def linear_swiglu(self, x: Tensor, weight: str, bias: str | None = None) -> Tensor:
        """See `qwen_model.network.decoder.Operations`."""
        if "gemm" in self._disabled:
            return super().linear_swiglu(x, weight, bias)
        return self._gemm(x, weight, bias, "swiglu")

    def _gemm(self, x: Tensor, weight: str, bias: str | None, activation: str | None) -> Tensor:
        rows, in_features = x.shape
        matrix = self.weights[weight]
        out_features = matrix.shape[0]
        y = x.new_empty(rows, out_features // 2 if activation == "swiglu" else out_features)
        number = ACTIVATIONS[activation]
        size = _core.gemm_workspace_bytes(rows, in_features, out_features, number, self._dtype)
        workspace = x.new_empty(size, dtype=torch.uint8) if size else None
        _core.gemm(
            x.data_ptr(),
            in_features,
            matrix.data_ptr(),
            self._weight_address(bias),
            y.data_ptr(),
            rows,
            in_features,
            out_features,
            number,
            self._dtype,
            True,  # weights are constant
            address(workspace),
            size,
            self._stream,
        )
        return y

    def rms_norm(self, x: Tensor, weight: str, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `qwen_model.network.decoder.Operations`."""
        if "rms_norm" in self._disabled:
            return super().rms_norm(x, weight, residual)
        rows, hidden_size = x.shape
        strides = (0, hidden_size)
        y = torch.empty_like(x)
        h = x if residual is None else torch.empty_like(x)
        operands = _core.RmsNormOperands(
            x.data_ptr(),
            strides,
            address(residual),
            strides,
            0 if residual is None else h.data_ptr(),
            strides,
            self._weight_address(weight),
            (rows, rows),
            hidden_size,
            self._dtype,
            self._dtype,
            self.config.norm_eps,
            False,
        )
        _core.rms_norm(operands, y.data_ptr(), strides, False, self._stream)
        return y, h

    def gpt_attention(self, qkv: Tensor, layer: int, q_norm: str | None, k_norm: str | None) -> Tensor:
        """See `qwen_model.network.decoder.Operations`."""
        batch, config = self.batch, self.config
        rotate = "rotary" not in self._disabled
        if not rotate:
            q, k, v = self.split_heads(qkv)
            qkv = torch.cat([*self.norm_and_rotate(q, k, q_norm, k_norm), v], dim=1).flatten(1)
            q_norm = k_norm = None
        context = qkv.new_empty(len(qkv), config.num_heads * config.head_size)
        operands = {
            "heads": self._attention_heads(q_norm, k_norm, rotate),
            "cache": self.cache[layer].data_ptr(),
            "max_positions": self.cache.shape[4],
            "qkv": qkv.data_ptr(),
            "qkv_row_stride": qkv.shape[1],
            "context": context.data_ptr(),
            "sequences": len(batch.lengths),
            "softmax_scale": config.head_size**-0.5,
            "stream": self._stream,
        }
        if batch.decoding:
            _core.decode_attention(
                past_lengths=batch.device_past_lengths.data_ptr(),
                workspace=self._workspace.partial_results.data_ptr(),
                semaphores=self._workspace.semaphores.data_ptr(),
                **operands,
            )
        else:
            _core.prefill_attention(past_lengths=0, cu_seqlens=batch.cu_seqlens.data_ptr(), tokens=len(qkv), **operands)
        return context

    def _attention_heads(self, q_norm: str | None, k_norm: str | None, rotate: bool) -> _core.AttentionHeads:
        """What all layers have in common; those with weights of their own to normalise q and k have one each."""
        if (q_norm, k_norm) not in self._heads:
            config, batch = self.config, self.batch
            self._heads[q_norm, k_norm] = _core.AttentionHeads(
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_size=config.head_size,
                rotary_dim=batch.rotary_table.shape[1] if rotate else 0,
                dtype=self._dtype,
                rotary_table=batch.rotary_table.data_ptr() if rotate else 0,
                rotary_offsets=batch.rotary_offsets.data_ptr(),
                rotary_style=ROTARY_STYLES["neox"],
                query_scale=address(batch.query_scale if rotate else None),
                q_norm_weight=self._weight_address(q_norm),
                k_norm_weight=self._weight_address(k_norm),
                norm_eps=config.norm_eps,
            )
        return self._heads[q_norm, k_norm]

    def _weight_address(self, name: str | None) -> int:
        return 0 if name is None else self.weights[name].data_ptr()
