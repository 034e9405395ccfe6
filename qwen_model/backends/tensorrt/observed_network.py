"""Add to a network what shows the result of each operation, and what replaces it, as further outputs and inputs."""

from __future__ import annotations

from typing import Any

import tensorrt as trt

from ...checkpoints.config import ModelConfig
from ...interface.engine_config import EngineConfig
from . import compat


class Taps:
    """Mark the result of each operation as an output; if `isolated`, let an input go on in its place.

    The operations are then independent of each other: each computes with what it is given. It is to be called as
    `ObservedOperations` calls `observe`.
    """

    def __init__(self, config: EngineConfig, isolated: bool):
        """Prepare for one network, of this engine."""
        self._config = config
        self._isolated = isolated
        self.results: dict[str, int] = {}  # columns of each result, by its name
        self.given: dict[str, int] = {}  # columns of each input that goes on in a result's place
        self.network: Any = None

    def __call__(self, name: str, result: Any) -> Any:
        """Mark a result, and return what goes on."""
        if name == "lm_head":  # the network's output anyway
            return result
        dtype = compat.dtypes()[self._config.dtype]
        columns = self.results[name] = width(self._config.model, name)
        result.name = result_tensor(name)
        self.network.mark_output(result)
        compat.set_tensor_type(result, dtype, self.network)
        result.allowed_formats = 1 << int(trt.TensorFormat.LINEAR)
        if not self._isolated or name == "final_norm.residual":  # which nothing reads
            return result
        self.given[name] = columns
        given = self.network.add_input(given_tensor(name), dtype, (-1, columns))
        given.allowed_formats = 1 << int(trt.TensorFormat.LINEAR)
        return given


def result_tensor(name: str) -> str:
    """Return the name of the output that shows a result."""
    return f"{name}:result"


def given_tensor(name: str) -> str:
    """Return the name of the input that goes on in a result's place."""
    return f"{name}:given"


def width(model: ModelConfig, name: str) -> int:
    """Return the columns of an operation's result."""
    heads = model.num_heads * model.head_size
    widths = {
        "attention": heads,
        "qkv": heads + 2 * model.num_kv_heads * model.head_size,
        "gate_up": model.intermediate_size,
        "lm_head": model.vocab_size,
    }
    return widths.get(name.rpartition(".")[2], model.hidden_size)
