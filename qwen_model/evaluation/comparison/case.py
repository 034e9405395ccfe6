"""Hold what one operation reads in one step, so that it can be computed again with a fault in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...checkpoints.config import ModelConfig
from ...interface.probe import Array

Module = tuple[Array, Array | None]

LINEAR_INPUTS = {
    "attention.qkv": "input_norm",
    "attention.output": "attention",
    "mlp.gate_up": "post_attention_norm",
    "mlp.down": "mlp.gate_up",
    "lm_head": "final_norm",
}
"""What each linear layer reads: kinds of results."""


@dataclass(frozen=True)
class Case:
    """Describe one result of one step.

    name: of the result, as in `qwen_model.network.observed`.
    values: exact results of the step, by name, float64 [tokens, size].
    past_values: those of the steps before it.
    tokens: of the step. `past` tokens came before them.
    module: reads weight and bias of a module, and raises KeyError where there is none of that name.
    """

    name: str
    config: ModelConfig
    values: Mapping[str, Array]
    past_values: Sequence[Mapping[str, Array]]
    tokens: Sequence[int]
    past: int
    prompt_length: int
    module: Callable[[str], Module]

    @property
    def layer(self) -> int | None:
        """Return the index of the layer; None: the result is not of a layer."""
        parts = self.name.split(".")
        return int(parts[1]) if parts[0] == "layers" else None

    @property
    def kind(self) -> str:
        """Return the name without the layer."""
        return kind_of(self.name)

    def sibling(self, kind: str, layer: int | None = None) -> str:
        """Return the name of another result or module of the same layer, or of the given one."""
        return f"layers.{self.layer if layer is None else layer}.{kind}"

    def neighbours(self) -> list[str]:
        """Return the modules of this kind in the layers before and after."""
        layers = [] if self.layer is None else [self.layer - 1, self.layer + 1]
        return [self.sibling(self.kind, layer) for layer in layers if 0 <= layer < self.config.num_layers]

    @property
    def norm_inputs(self) -> tuple[Array, Array | None]:
        """Return x and residual of a norm, or of the sum that a norm computes."""
        kind = self.kind.removesuffix(".residual")
        x, residual = norm_input_names(kind, self.config.num_layers if self.layer is None else self.layer)
        return self.values[x], None if residual is None else self.values[residual]

    @property
    def linear_input(self) -> tuple[str, Array]:
        """Return name and value of what a linear layer reads."""
        source = LINEAR_INPUTS[self.kind]
        name = source if self.layer is None else self.sibling(source)
        return name, self.values[name]


def norm_input_names(kind: str, layer: int) -> tuple[str, str | None]:
    """Return the names of what a norm reads, x and residual; `layer` is the number of layers for the final norm."""
    if kind == "post_attention_norm":
        before = "embedding" if layer == 0 else f"layers.{layer}.input_norm.residual"
        return f"layers.{layer}.attention.output", before
    if layer == 0:
        return "embedding", None
    return f"layers.{layer - 1}.mlp.down", f"layers.{layer - 1}.post_attention_norm.residual"


def kind_of(name: str) -> str:
    """Return a result's name without the layer: "input_norm", "attention.qkv", "lm_head", ..."""
    return name.split(".", 2)[2] if name.startswith("layers.") else name
