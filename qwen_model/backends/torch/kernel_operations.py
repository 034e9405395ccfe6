"""Implement the decoder's operations with our CUDA kernels. None synchronises; all can be captured in CUDA graphs.

They call `qwen_plugins.launch` and not the functions on tensors, whose checks take several times as long as a launch:
the operands are made here and need none. In the prefill of short prompts the GPU waits for the launches.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from qwen_plugins import launch, quantized
from qwen_plugins.attention import HEAD_SIZES, AttentionInputs, decode_attention_workspace

from ...checkpoints.config import ModelConfig
from ...checkpoints.module_weights import ModuleWeights, WeightFormat
from ...interface.engine_config import KernelChoices
from .operations import Batch, TorchOperations


def supported(config: ModelConfig) -> bool:
    """Tell whether there are kernels for this model's head size."""
    return config.head_size in HEAD_SIZES


class KernelOperations(TorchOperations):
    """Compute every operation with our kernels. All tensors are contiguous and of one type."""

    def __init__(
        self,
        config: ModelConfig,
        modules: Mapping[str, ModuleWeights[Tensor]],
        cache: Tensor,
        disabled: Collection[str] = (),
        gemm_kernels: Mapping[str, KernelChoices] | None = None,
    ):
        """See `TorchOperations`.

        gemm_kernels: those of the linear layers, by module; rules choose the others.
        """
        super().__init__(config, modules, cache, disabled)
        self._disabled = frozenset(disabled)
        self._dtype = launch.DataType.__members__[str(cache.dtype).removeprefix("torch.")]
        any_table = torch.empty(1, config.rotary.dim, device=cache.device)
        inputs = AttentionInputs(num_heads=config.num_heads, kv_cache=cache[0], rotary_table=any_table)
        self._workspace = decode_attention_workspace(inputs)
        self._gemm_kernels = gemm_kernels or {}
        # What all launches of a module have in common, by its name.
        self._linear_layers: dict[str, launch.LinearLayer] = {}
        self._norm_layers: dict[str, launch.RmsNormLayer] = {}
        rotate = "rotary" not in self._disabled  # else `attention` applies the norms, too
        norms = [self.head_norms(layer) if rotate else (None, None) for layer in range(config.num_layers)]
        self._head_norms = [(_address(q_norm), _address(k_norm)) for q_norm, k_norm in norms]
        self._heads: dict[tuple[int, int], launch.AttentionHeads] = {}  # of the current batch, by their norms
        self._stream = 0

    def begin(self, batch: Batch) -> None:
        """See `TorchOperations`."""
        super().begin(batch)
        self._heads.clear()
        self._stream = torch.cuda.current_stream(self.cache.device).cuda_stream

    def embedding(self, input_ids: Tensor, module: str) -> Tensor:
        """See `qwen_model.network.decoder.Operations`."""
        return self._gather_rows(self.modules[module].weight, input_ids)

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

    def linear(
        self,
        x: Tensor,
        module: str,
        activation: str | None = None,
        into: tuple[str, ...] = (),
        reduce: bool = False,
    ) -> Tensor:
        """See `qwen_model.network.decoder.Operations`."""
        if "gemm" in self._disabled:
            return super().linear(x, module, activation)
        layer = self._linear_layers.get(module)
        if layer is None:
            layer = self._linear_layers[module] = self._linear_layer(module, activation)
        permutation = self.modules[module].permutation
        if permutation is not None:
            x = x.index_select(1, permutation)
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

    def _linear_layer(self, module: str, activation: str | None) -> launch.LinearLayer:
        weights = self.modules[module]
        out_features, in_features = weights.shape
        return launch.LinearLayer(
            weight=_address(weights.weight),
            weight_format=_launch_format(weights.format),
            scales=_address(weights.scales),
            zeros=_address(weights.zeros),
            bias=_address(weights.bias),
            in_features=in_features,
            out_features=out_features,
            activation=launch.Activation.none if activation is None else launch.Activation.swiglu,
            dtype=self._dtype,
            constant_weight=True,
            kernels=self._gemm_kernels.get(module, ()),
        )

    def norm(
        self, x: Tensor, module: str, residual: Tensor | None = None, into: tuple[str, ...] = ()
    ) -> tuple[Tensor, Tensor]:
        """See `qwen_model.network.decoder.Operations`."""
        if "rms_norm" in self._disabled:
            return super().norm(x, module, residual)
        layer = self._norm_layers.get(module)
        if layer is None:
            layer = self._norm_layers[module] = self._norm_layer(self.modules[module].weight)
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

    def _norm_layer(self, weight: Tensor) -> launch.RmsNormLayer:
        return launch.RmsNormLayer(
            weight=_address(weight),
            hidden_size=len(weight),
            dtype=self._dtype,
            weight_dtype=self._dtype,
            eps=self.config.norm_eps,
            unit_offset=False,
        )

    def attention(self, qkv: Tensor, layer: int, into: tuple[str, ...] = ()) -> Tensor:
        """See `qwen_model.network.decoder.Operations`."""
        batch, config = self.batch, self.config
        if "rotary" in self._disabled:
            q, k, v = self.split_heads(qkv)
            qkv = torch.cat([*self.norm_and_rotate(q, k, layer), v], dim=1).flatten(1)
        tokens, columns = qkv.shape
        context = qkv.new_empty(tokens, config.num_heads * config.head_size)
        norms = self._head_norms[layer]
        heads = self._heads.get(norms)
        if heads is None:
            heads = self._heads[norms] = self._attention_heads(*norms)
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

    def _attention_heads(self, q_norm: int, k_norm: int) -> launch.AttentionHeads:
        """Describe heads with norms at these addresses, and the rotary embedding of the current batch."""
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
            q_norm_weight=q_norm,
            k_norm_weight=k_norm,
            norm_eps=config.norm_eps,
        )


def _launch_format(weight_format: WeightFormat) -> launch.WeightFormat:
    if not weight_format.bits:
        return launch.WeightFormat()
    return quantized.WeightFormat(
        weight_format.bits, weight_format.group_size, not weight_format.symmetric, weight_format.scale_dtype
    ).for_launch()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
