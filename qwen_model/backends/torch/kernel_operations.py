"""Implement the decoder's operations with our CUDA kernels. None synchronises; all can be captured in CUDA graphs.

They call `qwen_plugins.launch` and not the functions on tensors, whose checks take several times as long as a launch:
the operands are made here and need none. In the prefill of short prompts the GPU waits for the launches.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from qwen_plugins import launch
from qwen_plugins.attention import HEAD_SIZES, AttentionInputs, decode_attention_workspace

from ...checkpoints.config import ModelConfig
from .operations import Batch, TorchOperations


def supported(config: ModelConfig) -> bool:
    """Tell whether there are kernels for this model's head size."""
    return config.head_size in HEAD_SIZES


class KernelOperations(TorchOperations):
    """Compute every operation with our kernels. All tensors are contiguous and of one type."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], cache: Tensor, disabled: Collection[str] = ()):
        """See `TorchOperations`."""
        super().__init__(config, weights, cache, disabled)
        self._disabled = frozenset(disabled)
        self._dtype = launch.DataType.__members__[str(cache.dtype).removeprefix("torch.")]
        any_table = torch.empty(1, config.rotary.dim, device=cache.device)
        inputs = AttentionInputs(num_heads=config.num_heads, kv_cache=cache[0], rotary_table=any_table)
        self._workspace = decode_attention_workspace(inputs)
        # What all launches of a layer have in common, by the names of its weights.
        self._linear_layers: dict[tuple[str, str | None, bool], launch.LinearLayer] = {}
        self._norm_layers: dict[str, launch.RmsNormLayer] = {}
        self._heads: dict[tuple[str | None, str | None], launch.AttentionHeads] = {}  # of the current batch
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
        launch.gather_rows(
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
        if "gemm" in self._disabled:
            return super().linear(x, weight, bias)
        return self._gemm(x, weight, bias, swiglu=False)

    def linear_swiglu(self, x: Tensor, weight: str, bias: str | None = None) -> Tensor:
        """See `qwen_model.network.decoder.Operations`."""
        if "gemm" in self._disabled:
            return super().linear_swiglu(x, weight, bias)
        return self._gemm(x, weight, bias, swiglu=True)

    def _gemm(self, x: Tensor, weight: str, bias: str | None, swiglu: bool) -> Tensor:
        layer = self._linear_layers.get((weight, bias, swiglu))
        if layer is None:
            layer = self._linear_layers[weight, bias, swiglu] = self._linear_layer(weight, bias, swiglu)
        rows, in_features = x.shape
        y = x.new_empty(rows, layer.columns)
        workspace_bytes = layer.workspace_bytes(rows)
        workspace = x.new_empty(workspace_bytes, dtype=torch.uint8) if workspace_bytes else None
        launch.gemm(
            layer,
            x=x.data_ptr(),
            x_row_stride=in_features,
            y=y.data_ptr(),
            rows=rows,
            workspace=0 if workspace is None else workspace.data_ptr(),
            stream=self._stream,
        )
        return y

    def _linear_layer(self, weight: str, bias: str | None, swiglu: bool) -> launch.LinearLayer:
        out_features, in_features = self.weights[weight].shape
        return launch.LinearLayer(
            weight=self._weight_address(weight),
            bias=self._weight_address(bias),
            in_features=in_features,
            out_features=out_features,
            activation=launch.Activation.swiglu if swiglu else launch.Activation.none,
            dtype=self._dtype,
            constant_weight=True,
        )

    def rms_norm(self, x: Tensor, weight: str, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `qwen_model.network.decoder.Operations`."""
        if "rms_norm" in self._disabled:
            return super().rms_norm(x, weight, residual)
        layer = self._norm_layers.get(weight)
        if layer is None:
            layer = self._norm_layers[weight] = self._norm_layer(weight)
        y = torch.empty_like(x)
        h = x if residual is None else torch.empty_like(x)
        launch.rms_norm(
            layer,
            x=x.data_ptr(),
            residual=0 if residual is None else residual.data_ptr(),
            residual_out=0 if residual is None else h.data_ptr(),
            y=y.data_ptr(),
            rows=len(x),
            stream=self._stream,
        )
        return y, h

    def _norm_layer(self, weight: str) -> launch.RmsNormLayer:
        return launch.RmsNormLayer(
            weight=self._weight_address(weight),
            hidden_size=len(self.weights[weight]),
            dtype=self._dtype,
            weight_dtype=self._dtype,
            eps=self.config.norm_eps,
            unit_offset=False,
        )

    def gpt_attention(self, qkv: Tensor, layer: int, q_norm: str | None, k_norm: str | None) -> Tensor:
        """See `qwen_model.network.decoder.Operations`."""
        batch, config = self.batch, self.config
        if "rotary" in self._disabled:
            q, k, v = self.split_heads(qkv)
            qkv = torch.cat([*self.norm_and_rotate(q, k, q_norm, k_norm), v], dim=1).flatten(1)
            q_norm = k_norm = None
        tokens, columns = qkv.shape
        context = qkv.new_empty(tokens, config.num_heads * config.head_size)
        heads = self._heads.get((q_norm, k_norm))
        if heads is None:
            heads = self._heads[q_norm, k_norm] = self._attention_heads(q_norm, k_norm)
        if batch.decoding:
            launch.decode_attention(
                heads=heads,
                cache=self.cache[layer].data_ptr(),
                max_positions=self.cache.shape[4],
                qkv=qkv.data_ptr(),
                qkv_row_stride=columns,
                context=context.data_ptr(),
                past_lengths=batch.device_past_lengths.data_ptr(),
                sequences=len(batch.lengths),
                softmax_scale=config.head_size**-0.5,
                workspace=self._workspace.partial_results.data_ptr(),
                semaphores=self._workspace.semaphores.data_ptr(),
                stream=self._stream,
            )
        else:
            launch.prefill_attention(
                heads=heads,
                cache=self.cache[layer].data_ptr(),
                max_positions=self.cache.shape[4],
                qkv=qkv.data_ptr(),
                qkv_row_stride=columns,
                context=context.data_ptr(),
                cu_seqlens=batch.cu_seqlens.data_ptr(),
                past_lengths=0,
                sequences=len(batch.lengths),
                tokens=tokens,
                softmax_scale=config.head_size**-0.5,
                stream=self._stream,
            )
        return context

    def _attention_heads(self, q_norm: str | None, k_norm: str | None) -> launch.AttentionHeads:
        """Describe the heads and the rotary embedding of the current batch."""
        config, batch = self.config, self.batch
        rotate = "rotary" not in self._disabled
        scale = batch.query_scale if rotate else None
        return launch.AttentionHeads(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_size=config.head_size,
            rotary_dim=batch.rotary_table.shape[1] if rotate else 0,
            dtype=self._dtype,
            rotary_table=batch.rotary_table.data_ptr() if rotate else 0,
            rotary_offsets=batch.rotary_offsets.data_ptr(),
            rotary_style=launch.RotaryStyle.neox,
            query_scale=0 if scale is None else scale.data_ptr(),
            q_norm_weight=self._weight_address(q_norm),
            k_norm_weight=self._weight_address(k_norm),
            norm_eps=config.norm_eps,
        )

    def _weight_address(self, name: str | None) -> int:
        return 0 if name is None else self.weights[name].data_ptr()
