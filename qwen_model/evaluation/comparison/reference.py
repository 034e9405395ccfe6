"""Hold what engines are compared with: exact results of each operation, and the errors of PyTorch's own operations."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.config import ModelConfig
from ...checkpoints.tensor_files import Framework, Weight
from ...checkpoints.weights import WeightSpec, network_modules
from ...interface.engine_config import EngineConfig
from ...interface.probe import Array
from ...quantization.engine_weights import EngineWeights
from .case import Case
from .errors import Error

ReadArrays = Callable[[str], tuple[Array, Array | None]]
"""Read weight and bias of a module, and raise KeyError where there is none of that name."""

StepErrors = dict[str, Error]
"""The error of each result of one step, by name."""


@dataclass(frozen=True)
class Passes:
    """Hold the errors of each step: each operation on exact inputs, and each on the results of those before it."""

    isolated: list[StepErrors]
    chained: list[StepErrors]


@dataclass(frozen=True)
class Finding:
    """Name the first operation that is off, and say what its result looks like.

    step: 0 for the prompt, then the number of the decode step.
    """

    name: str
    step: int
    error: Error
    ratio: float
    reason: str


@dataclass(frozen=True)
class Reference:
    """Hold the exact results for one prompt and the tokens that follow it.

    output: the tokens of the decode steps, the likeliest each time.
    original: the network that was compared with ours, or None where there is none.
    difference: the first operation that the original computes otherwise than ours; None: there is none.
    values: exact results of each step, by name.
    own: errors of PyTorch's own operations, by type.
    samples: the first numbers of some modules' weights, to recognise a model by.
    """

    model: ModelConfig
    prompt: list[int]
    output: list[int]
    original: str | None
    difference: Finding | None
    values: list[dict[str, Array]]
    own: dict[str, Passes]
    samples: dict[str, Array]

    @property
    def steps(self) -> list[tuple[list[int], int]]:
        """Return the tokens of each step, and how many come before them."""
        return [(self.prompt, 0), *(([token], len(self.prompt) + index) for index, token in enumerate(self.output))]

    def case(self, name: str, step: int, module: ReadArrays) -> Case:
        """Return what the operation of this result reads in a step."""
        tokens, past = self.steps[step]
        return Case(name, self.model, self.values[step], self.values[:step], tokens, past, len(self.prompt), module)


def result_names(config: ModelConfig) -> list[str]:
    """List the results of a network in the order in which they are computed."""
    layer = (
        *("input_norm.residual", "input_norm", "attention.qkv", "attention.q", "attention.k", "attention.v"),
        *("attention", "attention.output", "post_attention_norm.residual", "post_attention_norm"),
        *("mlp.gate_up", "mlp.down"),
    )
    names = [f"layers.{index}.{kind}" for index in range(config.num_layers) for kind in layer]
    names.remove("layers.0.input_norm.residual")  # the embedding itself
    return ["embedding", *names, "final_norm.residual", "final_norm", "lm_head"]


def layer_end(config: ModelConfig, layer: int) -> str:
    """Return the name of the sum of all that a layer and those before it have added."""
    last = layer == config.num_layers - 1
    return "final_norm.residual" if last else f"layers.{layer + 1}.input_norm.residual"


class CheckpointModules:
    """Read weight and bias of a module of the network from a checkpoint, as tensors of its framework."""

    def __init__(self, model_dir: Path, config: ModelConfig, framework: Framework):
        """Open the checkpoint and compare its tensors with what the network needs, which can raise QwenModelError."""
        self._checkpoint = Checkpoint(model_dir, framework)
        self._checkpoint.check(config)
        self._modules = network_modules(config, self._checkpoint.dtype)

    @property
    def read(self) -> Callable[[WeightSpec], Weight]:
        """Return the function that reads a tensor of the network."""
        return self._checkpoint.read

    @property
    def is_quantized(self) -> bool:
        """Tell whether the checkpoint has any weight quantized."""
        return any(self._checkpoint.is_quantized(module.weight) for module in self._modules.values())

    def of_engine(self, config: EngineConfig) -> EngineWeights:
        """Return what reads the tensors that an engine's modules are made of."""
        return EngineWeights(self._checkpoint, network_modules(config.model, config.dtype, config.weight_formats))

    def __call__(self, name: str) -> tuple[Weight, Weight | None]:
        """Return weight and bias, in the checkpoint's type; KeyError: there is no such module."""
        module = self._modules[name]
        return self.read(module.weight), None if module.bias is None else self.read(module.bias)

    def arrays(self, name: str) -> tuple[Array, Array | None]:
        """Return weight and bias as float64 NumPy arrays; KeyError: there is no such module."""
        weight, bias = self(name)
        return _array(weight), None if bias is None else _array(bias)


def _array(weight: Weight) -> Array:
    wide: Array = weight.astype(np.float64) if isinstance(weight, np.ndarray) else weight.double().numpy()
    return wide


SAMPLE = 8
"""The numbers of a weight that a reference keeps to recognise a model by."""


def samples_of(config: ModelConfig, read: Callable[[str], tuple[Weight, Weight | None]]) -> dict[str, Array]:
    """Return the first numbers of some weights, those that can be read, float64 [SAMPLE or fewer] by module."""
    ends = ("embedding", "layers.0.", f"layers.{config.num_layers - 1}.", "final_norm")
    found = {}
    for name in network_modules(config, "float32"):
        if name.startswith(ends):
            with suppress(KeyError):
                found[name] = _array(read(name)[0].reshape(-1)[:SAMPLE])
    return found
