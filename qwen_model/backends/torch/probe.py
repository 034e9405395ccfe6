"""Run an engine of the PyTorch back end operation by operation, with the operations that it generates with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...interface.probe import Array
from .device import TorchDevice
from .eight_bit import Activations
from .quantized import dequantized


class TorchProbe:
    """Implement `Probe`. q is among the results where PyTorch rotates it; inside a kernel it is never stored."""

    def __init__(self, device: TorchDevice):
        """Take a loaded engine, of which the first slot and pages are used."""
        self._device = device
        self._heads: dict[str, Array] = {}
        self._record_queries()

    def run(self, tokens: Sequence[int], past: int, given: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """See `Probe`."""
        found: dict[str, Array] = {}
        self._heads.clear()

        def observe(name: str, result: Activations) -> Activations:
            assert isinstance(result, Tensor)  # networks with quantized x are not probed
            found[name] = _array(result)
            return result if given is None else torch.from_numpy(given[name]).to(result).contiguous()

        self._device.run_observed(tokens, past, observe)
        return {**found, **self._heads, **self._cached(past, past + len(tokens))}

    def module(self, name: str) -> tuple[Array, Array | None]:
        """See `Probe`."""
        weights = self._device.operations.modules[name]
        weight = dequantized(weights) if weights.format.bits else weights.weight
        return _array(weight), None if weights.bias is None else _array(weights.bias)

    def _record_queries(self) -> None:
        operations, heads = self._device.operations, self._heads
        norm_and_rotate = operations.norm_and_rotate

        def recorded(q: Tensor, k: Tensor, layer: int) -> tuple[Tensor, Tensor]:
            q, k = norm_and_rotate(q, k, layer)
            heads[f"layers.{layer}.attention.q"] = _array(q.flatten(1))
            return q, k

        operations.norm_and_rotate = recorded  # type: ignore[method-assign]

    def _cached(self, start: int, end: int) -> dict[str, Array]:
        """Return keys and values of these positions, [tokens, kv_heads * head_size] each, as the cache holds them."""
        found = {}
        pages = torch.from_numpy(self._device.probe_pages).to(self._device.device)
        for layer in range(self._device.config.num_layers):
            cached = self._device.cache.read(layer, pages[None])[0]
            for name, heads in zip("kv", cached, strict=True):  # [kv_heads, positions, head_size]
                rows = heads[:, start:end].transpose(0, 1).flatten(1)
                found[f"layers.{layer}.attention.{name}"] = _array(rows)
        return found


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.float().cpu().numpy()
    return array
