"""List the linear layers of a network by what the choice of a GEMM kernel depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ..checkpoints.config import ModelConfig
from ..checkpoints.module_weights import NOT_QUANTIZED, Formats, ModuleWeights, WeightFormat
from ..checkpoints.weights import network_modules
from ..network.decoder import decoder

T = TypeVar("T")


@dataclass(frozen=True)
class LinearShape:
    """Describe a linear layer as a GEMM: layers of the same shape use the same kernels.

    out_features: of the weight; with the activation "swiglu" twice the columns of the result.
    dtype: of x, bias and result, where they are not quantized, and of a weight that is not.
    weight_format: of a quantized weight; None: it is not.
    quantized_y: the result is quantized as x is, for the layer that reads it.
    """

    in_features: int
    out_features: int
    dtype: str
    activation: str | None = None
    bias: bool = False
    weight_format: WeightFormat | None = None
    quantized_y: bool = False

    @property
    def text(self) -> str:
        """Return the shape as files and tables have it: "float16 3584 to 4608, bias"."""
        parts = [f"{self.dtype} {self.in_features} to {self.out_features}"]
        parts += [] if self.weight_format is None else [f"{self.weight_format.text}, {self.weight_format.scale_dtype}"]
        parts += ["bias"] if self.bias else []
        parts += [self.activation] if self.activation else []
        parts += ["quantized y"] if self.quantized_y else []
        return ", ".join(parts)


class _Recorder:
    """Implement `Operations` without tensors: note the linear layers, with activations and what reads their outputs."""

    def __init__(self) -> None:
        self.activations: dict[str, str | None] = {}
        self.into: dict[str, tuple[str, ...]] = {}

    def embedding(self, input_ids: None, module: str) -> None:
        return None

    def norm(self, x: None, module: str, residual: None = None, into: tuple[str, ...] = ()) -> tuple[None, None]:
        return None, None

    def linear(
        self, x: None, module: str, activation: str | None = None, into: tuple[str, ...] = (), reduce: bool = False
    ) -> None:
        self.activations[module] = activation
        self.into[module] = into

    def attention(self, qkv: None, layer: int, into: tuple[str, ...] = ()) -> None:
        return None

    def last_token(self, x: None, residual: None) -> tuple[None, None]:
        return None, None


def linear_layers(config: ModelConfig, dtype: str, formats: Formats = NOT_QUANTIZED) -> dict[str, LinearShape]:
    """Return the shape of every linear layer, by the name of its module, in the order of the network."""
    recorder = _Recorder()
    decoder(recorder, config, None)
    modules = network_modules(config, dtype, formats)
    found = {}
    for name, activation in recorder.activations.items():
        module = modules[name]
        out_features, in_features = module.shape
        # The order of x's columns does not matter: x is gathered before.
        weight_format = dataclasses.replace(module.format, permuted=False) if module.format.bits else None
        bias = module.bias is not None
        quantizes = any(quantizes_for(module, modules[reader]) for reader in recorder.into[name])
        found[name] = LinearShape(in_features, out_features, dtype, activation, bias, weight_format, quantizes)
    return found


def quantizing_reader(modules: Mapping[str, ModuleWeights[T]], into: tuple[str, ...]) -> ModuleWeights[T] | None:
    """Return a module of `into`, by name the linear layers that read a result, if these take a quantized x."""
    return next((modules[name] for name in into if modules[name].format.activation is not None), None)


def quantizes_for(module: ModuleWeights[Any], reader: ModuleWeights[Any]) -> bool:
    """Tell whether the GEMM of a linear layer can quantize its result for the layer that reads it.

    It needs the scale before, and computes with codes of that kind itself.
    """
    return reader.input_scale is not None and module.format.activation == reader.format.activation
