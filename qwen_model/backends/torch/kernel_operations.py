"""Implement the decoder's operations with our CUDA kernels. None synchronises; all can be captured in CUDA graphs.

They call `qwen_plugins.launch` and not the functions on tensors, whose checks take several times as long as a launch:
the operands are made here and need none. In the prefill of short prompts the GPU waits for the launches.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from qwen_plugins import launch
from qwen_plugins.attention import HEAD_SIZES

from ...checkpoints.config import ModelConfig
from ...checkpoints.module_weights import ModuleWeights
from ...interface.engine_config import KernelChoices
from ...interface.memory import PAGE_SIZE
from ...interface.weight_formats import kernel_format
from ...tuning.linear_layers import quantizes_for
from . import fixed_kernels
from .eight_bit import Activations, QuantizedTensor
from .operations import Step, TorchOperations
from .paged_cache import CODE_TYPES, PagedCache

COPIED_WORDS = 64
"""Numbers of 4 bytes that a block of `copy_from_host` copies."""
CACHE_TYPES = {"auto": "same", "int8": "int8", "fp8": "float8_e4m3fn"}
CODE_NAMES = {"int8": "int8", "fp8": "float8_e4m3fn"}
"""The types of codes of x in `launch.DataType`."""


def supported(config: ModelConfig) -> bool:
    """Tell whether there are kernels for this model's head size."""
    return config.head_size in HEAD_SIZES


class KernelOperations(TorchOperations):
    """Compute every operation with our kernels. All tensors are contiguous and of one type."""

    def __init__(
        self,
        config: ModelConfig,
        modules: Mapping[str, ModuleWeights[Tensor]],
        cache: PagedCache,
        disabled: Collection[str] = (),
        gemm_kernels: Mapping[str, KernelChoices] | None = None,
        *,
        max_sequences: int,
        deterministic: bool = False,
    ):
        """See `TorchOperations`.

        gemm_kernels: those of the linear layers, by module; rules choose the others.
        max_sequences: the most of a decode step.
        deterministic: a row's results have the same bits, however many rows are computed with it. `gemm_kernels` are
            not used then.
        """
        super().__init__(config, modules, cache, disabled)
        self._disabled = frozenset(disabled)
        data_types = launch.DataType.__members__  # a new dict each time
        self._dtype = data_types[str(cache.dtype).removeprefix("torch.")]
        self._float32 = data_types["float32"]
        self._code_types = {kind: data_types[name] for kind, name in CODE_NAMES.items()}
        self._cache_dtype = launch.CacheDataType.__members__[CACHE_TYPES[cache.kind]]
        self._gemm_kernels = gemm_kernels or {}
        self._deterministic = deterministic
        # What all launches of a module have in common, by its name.
        self._linear_layers: dict[str, launch.LinearLayer] = {}
        self._norm_layers: dict[str, launch.RmsNormLayer] = {}
        rotate = "rotary" not in self._disabled  # else `attention` applies the norms, too
        norms = [self.head_norms(layer) if rotate else (None, None) for layer in range(config.num_layers)]
        self._head_norms = [(_address(q_norm), _address(k_norm)) for q_norm, k_norm in norms]
        # Of the current step, by their norms and their first sequence.
        self._heads: dict[tuple[int, int, int], launch.AttentionHeads] = {}
        self._stream = 0
        self._allocate_workspace(max_sequences)

    def begin(self, step: Step) -> None:
        """See `TorchOperations`."""
        super().begin(step)
        self._heads.clear()
        self._stream = torch.cuda.current_stream(self.cache.data.device).cuda_stream

    def token_ids(self, table: Tensor, rows: Tensor) -> Tensor:
        """See `TorchOperations`."""
        y = torch.empty_like(rows)
        _gather_words(table, rows, y, 1, self._stream)
        return y

    def embedding(self, input_ids: Activations, module: str) -> Activations:
        """See `qwen_model.network.decoder.Operations`."""
        assert isinstance(input_ids, Tensor)
        return self._gather_rows(self.modules[module].weight, input_ids)

    def last_token(self, x: Activations, residual: Activations) -> tuple[Activations, Activations]:
        """See `qwen_model.network.decoder.Operations`."""
        assert isinstance(residual, Tensor)
        if self.step.decoding:
            return x, residual
        rows = self.step.logit_rows
        if not isinstance(x, QuantizedTensor):
            return self._gather_rows(x, rows), self._gather_rows(residual, rows)
        scales = self._gather_rows(x.scales, rows) if x.per_token else x.scales
        return QuantizedTensor(self._gather_rows(x.codes, rows), scales), self._gather_rows(residual, rows)

    def quantized_for(self, into: tuple[str, ...], x: Tensor) -> Activations:
        """See `TorchOperations`."""
        reader = self.reader(into)
        if reader is None:
            return x
        y = self._codes_for(reader, x)
        launch.quantize(
            x=x.data_ptr(),
            x_row_stride=x.shape[1],
            q=y.codes.data_ptr(),
            rows=x.shape[0],
            columns=x.shape[1],
            dtype=self._dtype if x.dtype == self.cache.dtype else self._float32,  # PyTorch's products are of float32
            quant_dtype=self._code_types[reader.format.kind],
            static_scale=_address(reader.input_scale),
            scales=y.scales.data_ptr() if y.per_token else 0,
            stream=self._stream,
        )
        return y

    def _codes_for(self, reader: ModuleWeights[Tensor], x: Tensor, columns: int | None = None) -> QuantizedTensor:
        """Return memory for the x of a module: as many tokens as x has, and columns; None: as many as x has."""
        rows = x.shape[0]
        codes = x.new_empty(rows, x.shape[1] if columns is None else columns, dtype=CODE_TYPES[reader.format.kind])
        scales = x.new_empty(rows, 1, dtype=torch.float32) if reader.input_scale is None else reader.input_scale
        return QuantizedTensor(codes, scales)

    def _gather_rows(self, table: Tensor, ids: Tensor) -> Tensor:
        y = table.new_empty(len(ids), table.shape[1])
        launch.gather_rows(
            table=table.data_ptr(),
            ids=ids.data_ptr(),
            y=y.data_ptr(),
            table_rows=len(table),
            row_size=table.shape[1],
            rows=len(ids),
            dtype=launch.DataType.__members__[str(table.dtype).removeprefix("torch.")],
            stream=self._stream,
        )
        return y

    def linear(
        self,
        x: Activations,
        module: str,
        activation: str | None = None,
        into: tuple[str, ...] = (),
        reduce: bool = False,
    ) -> Activations:
        """See `qwen_model.network.decoder.Operations`."""
        if "gemm" in self._disabled:
            return super().linear(x, module, activation, into)
        reader = self._quantizing_reader(module, into)
        layer = self._linear_layers.get(module)
        if layer is None:
            layer = self._linear_layers[module] = self._linear_layer(module, activation, reader)
        x, x_scales = (x.codes, x.scales) if isinstance(x, QuantizedTensor) else (x, None)
        permutation = self.modules[module].permutation
        if permutation is not None:
            x = x.index_select(1, permutation)
        if reader is not None:
            y = self._codes_for(reader, x, layer.columns)
            self._multiply(layer, x, x_scales, y.codes, module)
            return y
        result = x.new_empty(x.shape[0], layer.columns, dtype=self.cache.dtype)
        self._multiply(layer, x, x_scales, result, module)
        return self.quantized_for(into, result)

    def _quantizing_reader(self, module: str, into: tuple[str, ...]) -> ModuleWeights[Tensor] | None:
        """Return the module that reads a linear layer's output, if the GEMM can write it quantized."""
        reader = self.reader(into)
        return reader if reader is not None and quantizes_for(self.modules[module], reader) else None

    def _multiply(self, layer: launch.LinearLayer, x: Tensor, x_scales: Tensor | None, y: Tensor, module: str) -> None:
        if not self._deterministic:
            self._launch_gemm(layer, x, x_scales, y)
            return
        most_rows, _ = self._fixed_kernels(module)[-1]
        for start in range(0, len(x), most_rows):
            part = slice(start, start + most_rows)
            scales = x_scales[part] if x_scales is not None and x_scales.dim() == 2 else x_scales
            self._launch_gemm(layer, x[part], scales, y[part])

    def _launch_gemm(self, layer: launch.LinearLayer, x: Tensor, x_scales: Tensor | None, y: Tensor) -> None:
        rows, in_features = x.shape
        workspace_bytes = layer.workspace_bytes(rows)
        workspace = x.new_empty(workspace_bytes, dtype=torch.uint8) if workspace_bytes else None
        launch.gemm(
            layer,
            x=x.data_ptr(),
            x_row_stride=in_features,
            x_scales=_address(x_scales),
            y=y.data_ptr(),
            rows=rows,
            workspace=0 if workspace is None else workspace.data_ptr(),
            stream=self._stream,
        )

    def _fixed_kernels(self, module: str) -> KernelChoices:
        """Return the kernels of a linear layer with which results do not depend on the number of rows."""
        weights = self.modules[module]
        out_features, in_features = weights.shape
        gpu = torch.cuda.get_device_properties(self.cache.data.device)
        activation = weights.format.activation or ""
        is_packed = weights.format.bits > 0 and not activation
        aligned = in_features % (16 if activation else 8) == 0
        tiled = gpu.major == 9 and launch.has_hopper_kernels() and not is_packed and aligned
        swiglu = module.endswith(".gate_up")
        if not tiled or self.cache.dtype == torch.float32 or (swiglu and out_features % 16):
            return fixed_kernels.PLAIN
        return fixed_kernels.tiled_kernels(out_features, swiglu, gpu.multi_processor_count, activation)

    def _linear_layer(
        self, module: str, activation: str | None, reader: ModuleWeights[Tensor] | None
    ) -> launch.LinearLayer:
        """Describe a linear layer's launches. reader: of its output, if that is to be quantized for it."""
        weights = self.modules[module]
        out_features, in_features = weights.shape
        return launch.LinearLayer(
            weight=_address(weights.weight),
            weight_format=kernel_format(weights.format).for_launch(),
            scales=_address(weights.scales),
            zeros=_address(weights.zeros),
            bias=_address(weights.bias),
            input_scale=_address(weights.input_scale),
            output_scale=0 if reader is None else _address(reader.input_scale),
            in_features=in_features,
            out_features=out_features,
            activation=launch.Activation.none if activation is None else launch.Activation.swiglu,
            dtype=self._dtype,
            constant_weight=True,
            kernels=self._fixed_kernels(module) if self._deterministic else self._gemm_kernels.get(module, ()),
        )

    def norm(
        self, x: Activations, module: str, residual: Activations | None = None, into: tuple[str, ...] = ()
    ) -> tuple[Activations, Activations]:
        """See `qwen_model.network.decoder.Operations`."""
        if "rms_norm" in self._disabled:
            return super().norm(x, module, residual, into)
        assert isinstance(x, Tensor)
        assert not isinstance(residual, QuantizedTensor)
        layer = self._norm_layers.get(module)
        if layer is None:
            layer = self._norm_layers[module] = self._norm_layer(self.modules[module].weight)
        h = x if residual is None else torch.empty_like(x)
        operands = {
            "x": x.data_ptr(),
            "residual": _address(residual),
            "residual_out": 0 if residual is None else h.data_ptr(),
            "rows": x.shape[0],
            "stream": self._stream,
        }
        reader = self.reader(into)
        if reader is None:
            y = torch.empty_like(x)
            launch.rms_norm(layer, y=y.data_ptr(), **operands)
            return y, h
        codes = self._codes_for(reader, x)
        launch.rms_norm_quant(
            layer,
            q=codes.codes.data_ptr(),
            quant_dtype=self._code_types[reader.format.kind],
            static_scale=_address(reader.input_scale),
            scales=codes.scales.data_ptr() if codes.per_token else 0,
            **operands,
        )
        return codes, h

    def _norm_layer(self, weight: Tensor) -> launch.RmsNormLayer:
        return launch.RmsNormLayer(
            weight=_address(weight),
            hidden_size=len(weight),
            dtype=self._dtype,
            weight_dtype=self._dtype,
            eps=self.config.norm_eps,
            unit_offset=False,
            batch_invariant=self._deterministic,
        )

    def attention(self, qkv: Activations, layer: int, into: tuple[str, ...] = ()) -> Activations:
        """See `qwen_model.network.decoder.Operations`."""
        assert isinstance(qkv, Tensor)
        step, config = self.step, self.config
        if "rotary" in self._disabled:
            q, k, v = self.split_heads(qkv)
            qkv = torch.cat([*self.norm_and_rotate(q, k, layer), v], dim=1).flatten(1)
        context = qkv.new_empty(qkv.shape[0], config.num_heads * config.head_size)
        reader = self.reader(into)
        codes = None
        if reader is not None and reader.input_scale is not None:
            codes = self._codes_for(reader, context)
        decoding = step.pages.shape[0] if step.decoding else step.num_decoding
        if decoding:
            operands = self._attention_operands(qkv, layer, context, codes, reader, 0, decoding)
            self._launch_decode_attention(operands)
        if not step.decoding:
            prompts = step.pages.shape[0] - decoding
            operands = self._attention_operands(qkv, layer, context, codes, reader, decoding, prompts)
            if codes is not None:
                operands["queries"] = _row_address(context, decoding)  # scratch
            cu_seqlens = step.cu_seqlens if step.prompt_cu_seqlens is None else step.prompt_cu_seqlens
            launch.prefill_attention(**operands, cu_seqlens=cu_seqlens.data_ptr(), tokens=qkv.shape[0] - decoding)
        return self.quantized_for(into, context) if codes is None else codes

    def _launch_decode_attention(self, operands: dict[str, Any]) -> None:
        launch.decode_attention(
            **operands,
            workspace=self._partial_results.data_ptr(),
            semaphores=self._semaphores.data_ptr(),
            batch_invariant=self._deterministic,
        )

    def _attention_operands(
        self,
        qkv: Tensor,
        layer: int,
        context: Tensor,
        codes: QuantizedTensor | None,
        reader: ModuleWeights[Tensor] | None,
        first: int,
        sequences: int,
    ) -> dict[str, Any]:
        """Return what a launch for `sequences` sequences needs, the first of which has number and row `first`."""
        step, cache = self.step, self.cache
        operands = {
            "heads": self._attention_heads(layer, first),
            "cache": cache.data[layer].data_ptr(),
            "cache_dtype": self._cache_dtype,
            "max_positions": PAGE_SIZE,
            "pages": _row_address(step.pages, first),
            "pages_row_stride": step.pages.shape[1],
            "qkv": _row_address(qkv, first),
            "qkv_row_stride": qkv.shape[1],
            "context": _row_address(context if codes is None else codes.codes, first),
            "past_lengths": _row_address(step.device_past_lengths, first),
            "sequences": sequences,
            "softmax_scale": self.config.head_size**-0.5,
            "stream": self._stream,
        }
        if codes is not None and reader is not None:
            operands["context_dtype"] = self._code_types[reader.format.kind]
            operands["context_scale"] = codes.scales.data_ptr()
        return operands

    def _attention_heads(self, layer: int, first: int) -> launch.AttentionHeads:
        """Describe the heads of a layer, with the rotary embedding of the current step from sequence `first` on."""
        key = (*self._head_norms[layer], first)
        heads = self._heads.get(key)
        if heads is None:
            heads = self._heads[key] = self._make_heads(*key)
        return heads

    def _make_heads(self, q_norm: int, k_norm: int, first: int) -> launch.AttentionHeads:
        config, step = self.config, self.step
        rotate = "rotary" not in self._disabled
        scale = step.query_scale if rotate else None
        return launch.AttentionHeads(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_size=config.head_size,
            rotary_dim=step.rotary_table.shape[1] if rotate else 0,
            dtype=self._dtype,
            rotary_table=step.rotary_table.data_ptr() if rotate else 0,
            rotary_offsets=_row_address(step.rotary_offsets, first),
            rotary_style=launch.RotaryStyle.neox,
            query_scale=_address(scale),
            q_norm_weight=q_norm,
            k_norm_weight=k_norm,
            norm_eps=config.norm_eps,
        )

    def _allocate_workspace(self, sequences: int) -> None:
        """Allocate what decode attention of so many sequences needs; layers use it one after the other."""
        config, device = self.config, self.cache.data.device
        heads = launch.AttentionHeads(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_size=config.head_size,
            rotary_dim=0,
            dtype=self._dtype,
            rotary_table=0,
            rotary_offsets=0,
            rotary_style=launch.RotaryStyle.neox,
            query_scale=0,
            q_norm_weight=0,
            k_norm_weight=0,
            norm_eps=config.norm_eps,
        )
        size = launch.decode_attention_workspace_bytes(heads, sequences=sequences)
        self._partial_results = torch.empty(size, dtype=torch.uint8, device=device)
        # Zero between launches.
        self._semaphores = torch.zeros(sequences, config.num_heads, dtype=torch.int32, device=device)


def copy_from_host(host: Tensor, target: Tensor, row_numbers: Tensor) -> None:
    """Copy pinned memory to the GPU with a kernel, on the current stream.

    Between the kernels of two steps this takes a third of the time of a copy by the driver, for which another part of
    the GPU must begin and end.

    host: int32 [elements], pinned. target: the same on the GPU. row_numbers: int32 on the GPU, 0, 1, 2, ...
    """
    rows = row_numbers[: len(host) // COPIED_WORDS]
    _gather_words(host, rows, target, COPIED_WORDS, torch.cuda.current_stream(target.device).cuda_stream)


def _gather_words(table: Tensor, rows: Tensor, y: Tensor, row_size: int, stream: int) -> None:
    """Gather rows of `row_size` numbers of 4 bytes each."""
    launch.gather_rows(
        table=table.data_ptr(),
        ids=rows.data_ptr(),
        y=y.data_ptr(),
        table_rows=len(table) // row_size,
        row_size=row_size,
        rows=len(rows),
        dtype=launch.DataType.__members__["float32"],
        stream=stream,
    )


def _row_address(tensor: Tensor, row: int) -> int:
    """Return the address of a row of a contiguous tensor."""
    return tensor.data_ptr() + row * tensor.stride(0) * tensor.element_size()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
