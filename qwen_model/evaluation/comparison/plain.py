"""Run the network plainly with PyTorch on the CPU, in any type: float64 to compare with, others as its own operations.

A weight is read when an operation needs it and dropped after it, so that a model of any size runs in the memory of
its largest weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...checkpoints.config import ModelConfig
from ...interface.probe import Array
from ...network.decoder import decoder
from ...network.observed import ObservedOperations
from ...network.rotary import RotaryTable, rotary_table

ReadModule = Callable[[str], tuple[Tensor, Tensor | None]]
"""Read weight and bias of a module of checkpoints/weights.py, in any floating-point type."""


class PlainProbe:
    """Implement `Probe` with PyTorch's own functions in one type."""

    def __init__(
        self,
        config: ModelConfig,
        read_module: ReadModule,
        dtype: str,
        max_positions: int,
        progress: Callable[[], None] = lambda: None,
    ):
        """Take the model and the longest sequence, in tokens; `progress` is called after each operation."""
        self._config = config
        self._read = read_module
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._table = rotary_table(config, max_positions)
        self._progress = progress
        self._operations: PlainOperations | None = None

    @torch.inference_mode()
    def run(self, tokens: Sequence[int], past: int, given: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """See `Probe`; results are float64 arrays."""
        operations = self._begun(tokens, past)
        found = operations.heads = {}

        def observe(name: str, result: Tensor) -> Tensor:
            found[name] = result
            self._progress()
            return result if given is None else torch.from_numpy(given[name]).to(self._dtype)

        decoder(ObservedOperations(operations, observe), self._config, torch.tensor(tokens), False)
        return {name: result.double().numpy() for name, result in found.items()}

    def _begun(self, tokens: Sequence[int], past: int) -> PlainOperations:
        """Begin a sequence with its prompt, or go on with it."""
        if past == 0:
            self._operations = PlainOperations(self._config, self._read, self._dtype, self._table, len(tokens))
        if self._operations is None:
            raise RuntimeError("the prompt comes first")
        return self._operations

    @torch.inference_mode()
    def run_attention(
        self, tokens: Sequence[int], past: int, given: Mapping[str, Array], noise: np.random.Generator
    ) -> dict[str, Array]:
        """Return the results of attention alone, in each layer, for other roundings of its inputs.

        Each number is changed by up to what rounding to the type can change it by, before it is rounded.
        """
        operations = self._begun(tokens, past)
        found = operations.heads = {}
        for layer in range(self._config.num_layers):
            exact = given[f"layers.{layer}.attention.qkv"]
            moved = exact * (1 + noise.uniform(-1, 1, exact.shape) * torch.finfo(self._dtype).eps / 2)
            found[f"layers.{layer}.attention"] = operations.attention(torch.from_numpy(moved).to(self._dtype), layer)
        return {name: result.double().numpy() for name, result in found.items()}

    def module(self, name: str) -> tuple[Array, Array | None]:
        """See `Probe`."""
        weight, bias = self._read(name)
        return weight.double().numpy(), None if bias is None else bias.double().numpy()


class PlainOperations:
    """Compute each operation of the decoder with the PyTorch function of that name, for one sequence."""

    def __init__(
        self, config: ModelConfig, read_module: ReadModule, dtype: torch.dtype, table: RotaryTable, prompt_length: int
    ):
        """Begin a sequence with a prompt of this length."""
        self.heads: dict[str, Tensor] = {}
        self._config, self._read, self._dtype = config, read_module, dtype
        self._table, self._prompt_length = table, prompt_length
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}  # by layer: keys and values, [kv_heads, tokens, head_size]

    def embedding(self, input_ids: Tensor, module: str) -> Tensor:
        """See `qwen_model.network.decoder.Operations`."""
        return F.embedding(input_ids, self._read(module)[0]).to(self._dtype)

    def norm(
        self, x: Tensor, module: str, residual: Tensor | None = None, into: tuple[str, ...] = ()
    ) -> tuple[Tensor, Tensor]:
        """See `qwen_model.network.decoder.Operations`."""
        h = x if residual is None else x + residual
        weight = self._read(module)[0].to(self._dtype)
        return F.rms_norm(h, h.shape[-1:], weight, self._config.norm_eps), h

    def linear(
        self,
        x: Tensor,
        module: str,
        activation: str | None = None,
        into: tuple[str, ...] = (),
        reduce: bool = False,
    ) -> Tensor:
        """See `qwen_model.network.decoder.Operations`."""
        weight, bias = self._read(module)
        y = F.linear(x, weight.to(self._dtype), None if bias is None else bias.to(self._dtype))
        if activation is None:
            return y
        gate, up = y.chunk(2, dim=-1)
        return F.silu(gate) * up

    def attention(self, qkv: Tensor, layer: int, into: tuple[str, ...] = ()) -> Tensor:
        """See `qwen_model.network.decoder.Operations`; also put the heads of q, k and v into `heads`."""
        config, name = self._config, f"layers.{layer}.attention"
        heads = qkv.view(len(qkv), -1, config.head_size)
        q, k, v = heads.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        if config.qk_norm:
            q, _ = self.norm(q, f"{name}.q_norm")
            k, _ = self.norm(k, f"{name}.k_norm")
        past = self._cache[layer][0].shape[1] if layer in self._cache else 0
        table, scale = self._rotary(past, len(qkv))
        q, k = _rotated(q, table.to(self._dtype)), _rotated(k, table.to(self._dtype))
        if scale is not None:
            q = q * scale.to(self._dtype)[:, None, None]
        self.heads |= {f"{name}.{part}": x.flatten(1) for part, x in (("q", q), ("k", k), ("v", v))}
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # [heads, tokens, head_size]
        if past:
            k, v = (torch.cat(pair, dim=1) for pair in zip(self._cache[layer], (k, v), strict=True))
        self._cache[layer] = k, v
        context = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=past == 0, enable_gqa=True)
        return context[0].transpose(0, 1).flatten(1)

    def last_token(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """See `qwen_model.network.decoder.Operations`."""
        return x[-1:], residual[-1:]

    def _rotary(self, past: int, count: int) -> tuple[Tensor, Tensor | None]:
        """Return cosines and sines [count, dim] of the positions from `past` on, and the factors of q [count]."""
        own = self._table.prompt_table([count], [0], [count]) if past == 0 else None
        start = 0 if own is not None else self._table.offset(self._prompt_length) + past
        table = self._table if own is None else own
        rows = np.arange(start, start + count)
        scale = None if table.query_scale is None else torch.from_numpy(table.query_scale[rows])
        return torch.from_numpy(table.values[rows]), scale


def _rotated(x: Tensor, table: Tensor) -> Tensor:
    """Rotate [tokens, heads, head_size] by cosines and sines [tokens, dim], in the NeoX style, as transformers does."""
    dim = table.shape[-1]
    cos, sin = (torch.cat([part, part], dim=-1)[:, None] for part in table.chunk(2, dim=-1))
    turned, kept = x[..., :dim], x[..., dim:]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, kept], dim=-1)
