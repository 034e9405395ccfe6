"""Run a checkpoint's network over texts, module by module, to see what its linear layers get: float32, in PyTorch.

Weights are read when they are used and not kept, so that the host needs memory for one module at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoints.config import ModelConfig
from ..checkpoints.tensor_files import Weight, as_numpy
from ..checkpoints.weights import WeightSpec, network_modules
from ..common.errors import OutOfMemoryError
from ..network.decoder import decoder
from ..network.rotary import cos_sin, inverse_frequencies

ROWS = 8192
"""The tokens of which a linear layer's outputs are computed at a time, before SwiGLU halves them."""

ReadWeight = Callable[[WeightSpec], Weight]
Observe = Callable[[str, Tensor, Tensor], None]
"""Sees a linear layer's module, its input x [tokens, in], and its weight [out, in]."""


class CalibrationOperations:
    """Implement `qwen_model.network.decoder.Operations` for whole texts, without a cache."""

    def __init__(self, config: ModelConfig, read: ReadWeight, lengths: Sequence[int], observe: Observe):
        """Take the lengths of the texts, in tokens, which are packed one after the other.

        observe: is called before each linear layer but the output projection.
        """
        self._config = config
        self._read = read
        self._observe = observe
        self._modules = network_modules(config, "float32")
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._runs = [(len(list(run)), length) for length, run in groupby(lengths)]  # neighbours of equal length

    def _tensor(self, spec: WeightSpec) -> Tensor:
        return torch.from_numpy(as_numpy(self._read(spec))).to(self._device).float()

    def _rotation(self, length: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of the positions of a text, [length, dim / 2] each."""
        rotary = self._config.rotary
        table = cos_sin(torch.arange(length).numpy(), inverse_frequencies(rotary, length), rotary.attention_factor)
        cos, sin = torch.from_numpy(table).to(self._device).chunk(2, dim=-1)
        return cos, sin

    def embedding(self, input_ids: Tensor, module: str) -> Tensor:
        """See `Operations`."""
        return F.embedding(input_ids.to(self._device), self._tensor(self._modules[module].weight))

    def norm(
        self, x: Tensor, module: str, residual: Tensor | None = None, into: tuple[str, ...] = ()
    ) -> tuple[Tensor, Tensor]:
        """See `Operations`."""
        h = x if residual is None else x + residual
        return self._rms_norm(h, module), h

    def _rms_norm(self, x: Tensor, module: str) -> Tensor:
        weight = self._tensor(self._modules[module].weight)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self._config.norm_eps) * weight

    def linear(
        self, x: Tensor, module: str, activation: str | None = None, into: tuple[str, ...] = (), reduce: bool = False
    ) -> Tensor:
        """See `Operations`."""
        if module == "lm_head":
            return x  # nothing is observed behind it
        weights = self._modules[module]
        weight = self._tensor(weights.weight)
        self._observe(module, x, weight)
        bias = None if weights.bias is None else self._tensor(weights.bias)
        outputs = (F.linear(part, weight, bias) for part in x.split(ROWS))
        return torch.cat([y if activation is None else _swiglu(y) for y in outputs])

    def attention(self, qkv: Tensor, layer: int, into: tuple[str, ...] = ()) -> Tensor:
        """See `Operations`."""
        config = self._config
        heads = qkv.view(len(qkv), -1, config.head_size)
        q, k, v = heads.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        if config.qk_norm:
            q, k = (self._rms_norm(x, f"layers.{layer}.attention.{name}_norm") for x, name in ((q, "q"), (k, "k")))
        contexts, start = [], 0
        for count, length in self._runs:
            end = start + count * length
            q_run, k_run, v_run = (x[start:end].unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
            turn = self._rotation(length)
            context = F.scaled_dot_product_attention(
                self._rotated(q_run, *turn), self._rotated(k_run, *turn), v_run, is_causal=True, enable_gqa=True
            )
            contexts.append(context.transpose(1, 2).flatten(2).flatten(0, 1))
            start = end
        return torch.cat(contexts)

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate [..., length, head_size]."""
        dim = self._config.rotary.dim
        first, second = x[..., :dim].chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, x[..., dim:]], dim=-1)

    def last_token(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """See `Operations`."""
        return x, residual


def _swiglu(y: Tensor) -> Tensor:
    gate, up = y.chunk(2, dim=-1)
    return F.silu(gate) * up


@torch.inference_mode()
def observe_linear_layers(
    config: ModelConfig, read: ReadWeight, texts: Sequence[Sequence[int]], observe: Observe
) -> None:
    """Run the network over texts, given as token ids, and call `observe` before each linear layer.

    Raises:
        OutOfMemoryError: the GPU's memory does not suffice.
    """
    operations = CalibrationOperations(config, read, [len(text) for text in texts], observe)
    tokens = torch.tensor([token for text in texts for token in text])
    try:
        decoder(operations, config, tokens, last_token_only=False)
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"not enough GPU memory to run one layer over {len(tokens):,} tokens: give fewer texts (--calibration), or "
            "hide the GPU (CUDA_VISIBLE_DEVICES=)"
        ) from error
