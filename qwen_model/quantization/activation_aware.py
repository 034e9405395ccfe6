"""Scale the inputs of linear layers before rounding, as AWQ does (Lin et al., "AWQ", 2023), folded into what is before.

Inputs that are large on average matter most: their columns of a weight are multiplied by s > 1, so that they are
rounded more finely, and the inputs divided by s. The division costs nothing: it goes into the norm before the layer,
into the up projection before the down projection, and into the values before attention's output projection, whose
scales query heads of one key-value head therefore share. s is the mean of |x| to the power of the exponent that gives
the least error of the layer's output, over calibration texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.config import ModelConfig
from ..checkpoints.module_weights import Formats, WeightFormat
from ..checkpoints.tensor_files import Weight, as_framework, as_numpy
from ..checkpoints.weights import WeightSpec
from ..common.errors import QwenModelError
from ..common.extras import import_extra
from ..common.progress import Progress
from .search import round_weight

Floats = npt.NDArray[np.float32]

EXPONENTS = tuple(index / 10 for index in range(10))
SAMPLE_ROWS = 512
"""The outputs of a layer, and the rows of its input, by which an exponent is judged."""


@dataclass(frozen=True)
class InputScales:
    """Hold what calibration found of each linear layer, by its module.

    scales: that its weight's columns are multiplied by, float32 [in].
    importance: the mean squares of its inputs, after their division by the scales, float32 [in].
    static: the scale of its inputs, after their division, where they are quantized with one for all tokens.
    """

    scales: dict[str, Floats] = field(default_factory=dict)
    importance: dict[str, Floats] = field(default_factory=dict)
    static: dict[str, float] = field(default_factory=dict)


def find_input_scales(
    checkpoint: Checkpoint, model: ModelConfig, formats: Formats, texts: Sequence[Sequence[int]], progress: Progress
) -> InputScales:
    """Run the network over texts, given as token ids, and search the input scales of every quantized layer.

    Raises:
        QwenModelError: PyTorch is not installed, or the network's numbers are not finite.
    """
    import_extra("torch", "activation-aware quantization", extra="torch")
    from .calibration_network import observe_linear_layers

    found = InputScales()
    total = sum(name.startswith("layers.") for name in formats)

    def observe(module: str, x: Any, weight: Any) -> None:
        progress("calibration", len(found.scales), total)
        if module in formats:
            inputs, w = x.cpu().numpy(), weight.cpu().numpy()
            if not np.isfinite(inputs).all():
                raise QwenModelError(f"the inputs of {module} are not finite, over the calibration texts")
            scales = _search(inputs, w, formats[module], shared_inputs(model, module))
            found.scales[module] = scales
            found.importance[module] = np.square(inputs).mean(axis=0) / scales**2

    observe_linear_layers(model, checkpoint.read, texts, observe)
    return found


def shared_inputs(model: ModelConfig, module: str) -> tuple[int, int, int]:
    """Return how the inputs of a module share scales, as the shape [kv heads, query heads of each, head size]."""
    if module.endswith(".attention.output"):
        return model.num_kv_heads, model.num_heads // model.num_kv_heads, model.head_size
    return 1, 1, -1


def _search(x: Floats, weight: Floats, weight_format: WeightFormat, shared: tuple[int, int, int]) -> Floats:
    """Return the scales whose rounded weight gives the least error of the output, on a sample of it."""
    magnitude = np.abs(x).mean(axis=0).reshape(shared)
    magnitude = np.broadcast_to(magnitude.mean(axis=1, keepdims=True), magnitude.shape).reshape(-1)
    magnitude = np.maximum(magnitude, max(1e-6, 1e-4 * float(magnitude.max())))
    x = x[:: max(1, len(x) // SAMPLE_ROWS)]
    w = np.ascontiguousarray(weight[:: max(1, len(weight) // SAMPLE_ROWS)])
    best, least = np.ones_like(magnitude), np.inf
    for exponent in EXPONENTS:
        scales = magnitude**exponent
        scales /= np.sqrt(scales.max() * scales.min())
        importance = np.square(x).mean(axis=0) / scales**2
        rounded = round_weight(w * scales, weight_format, importance).weight.dequantized()
        error = float(np.square(x @ (rounded / scales - w).T).sum(dtype=np.float64))
        if error < least:
            best, least = scales, error
    return best


class CalibratedWeights:
    """Read the weights of a checkpoint with input scales folded in: a network of the same function.

    importance, static: see `InputScales`.
    """

    def __init__(self, checkpoint: Checkpoint, model: ModelConfig, found: InputScales):
        """Take what calibration found."""
        self._checkpoint = checkpoint
        self._model = model
        self._scales = found.scales
        self.importance = found.importance
        self.static = found.static

    def __call__(self, spec: WeightSpec) -> Weight:
        """Return the weight: of the checkpoint's type if nothing is folded into it, else float32."""
        module, _, field = spec.name.rpartition(".")
        weight = self._checkpoint.read(spec)
        columns = self._scales.get(module) if field == "weight" else None
        rows = self._row_scales(module, len(weight))
        if columns is None and rows is None:
            return weight
        array = as_numpy(weight).astype(np.float32)
        if columns is not None:
            array *= columns
        if rows is not None:
            array /= rows if array.ndim == 1 else rows[:, None]
        return as_framework(array, self._checkpoint.framework)

    def _row_scales(self, module: str, rows: int) -> Floats | None:
        """Return what the outputs of a module are divided by; None: by nothing."""
        layer, _, kind = module.rpartition(".")
        following = {
            "input_norm": f"{layer}.attention.qkv",
            "post_attention_norm": f"{layer}.mlp.gate_up",
            "qkv": f"{layer}.output",
            "gate_up": f"{layer}.down",
        }.get(kind, "")
        scales = self._scales.get(following)
        if scales is None or kind.endswith("norm"):
            return scales
        if kind == "qkv":
            scales = scales.reshape(shared_inputs(self._model, following))[:, 0].reshape(-1)
        all_rows = np.ones(rows, np.float32)
        all_rows[rows - len(scales) :] = scales  # v, or up, is the last part
        return all_rows
