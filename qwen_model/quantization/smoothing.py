"""Calibrate layers whose inputs are quantized: static scales, and SmoothQuant (Xiao et al., "SmoothQuant", 2023).

A few channels of x are a hundred times larger than the others, which one scale for all of them leaves a few codes.
SmoothQuant divides each channel by s, and multiplies the weight's column by it: s[k] = max|x[k]|^α / max|W[k]|^(1 - α).
The division costs nothing at run time; see activation_aware.py for where it goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.config import ModelConfig
from ..checkpoints.eight_bit_weight import LARGEST_CODES
from ..checkpoints.module_weights import Formats
from ..checkpoints.tensor_files import as_numpy
from ..checkpoints.weights import network_modules
from ..common.errors import QwenModelError
from ..common.extras import import_extra
from ..common.progress import Progress
from .activation_aware import SAMPLE_ROWS, CalibratedWeights, InputScales, shared_inputs
from .options import QuantizationOptions
from .search import Floats

ALPHAS = tuple(index / 20 for index in range(6, 19))
"""The exponents that "auto" tries, besides no smoothing: 0.3 to 0.9."""
LEAST_SCALE, LEAST_PART = 1e-5, 1e-4
"""The least s, and the least part of the largest channel that one counts as: what calibration never saw is not 0."""
LEAST_STATIC = 2.0**-24
"""The least static scale, of inputs that are all 0: the least number of float16."""


@dataclass(frozen=True)
class _Inputs:
    """Hold what was seen of the inputs of a linear layer: the largest magnitude of each channel, and a sample."""

    largest: Floats
    sample: Floats


def calibrate_inputs(
    checkpoint: Checkpoint,
    model: ModelConfig,
    formats: Formats,
    options: QuantizationOptions,
    texts: Sequence[Sequence[int]],
    progress: Progress,
) -> InputScales:
    """Run the network over texts, given as token ids; find smoothing and static scales of every quantized layer.

    Raises:
        QwenModelError: PyTorch is not installed, or the network's numbers are not finite.
    """
    import_extra("torch", f"calibration for {options.kind}", extra="torch")
    from .calibration_network import observe_linear_layers

    calibration = _Calibration(checkpoint, model, formats, options)
    total = sum(name.startswith("layers.") for name in formats)

    def observe(module: str, x: Any, weight: Any) -> None:
        progress("calibration", calibration.num_seen, total)
        if module in formats:
            calibration.see(module, x)

    observe_linear_layers(model, checkpoint.read, texts, observe)
    return calibration.found


class _Calibration:
    """Find the scales of a layer's modules once all of their inputs have been seen."""

    def __init__(self, checkpoint: Checkpoint, model: ModelConfig, formats: Formats, options: QuantizationOptions):
        self._model = model
        self._formats = formats
        self._options = options
        self._modules = network_modules(model, "float32")
        self._seen: dict[str, _Inputs] = {}
        self.num_seen = 0
        self.found = InputScales()
        self._folded = CalibratedWeights(checkpoint, model, self.found)

    def see(self, module: str, x: Any) -> None:
        """Take the inputs of a module; those of the down projection complete a layer."""
        largest = np.maximum(x.amax(0).cpu().numpy(), -x.amin(0).cpu().numpy())
        if not np.isfinite(largest).all():
            raise QwenModelError(f"the inputs of {module} are not finite, over the calibration texts")
        sample = x[:: max(1, len(x) // SAMPLE_ROWS)].cpu().numpy()
        self._seen[module] = _Inputs(largest, sample)
        self.num_seen += 1
        if module.endswith(".mlp.down"):
            self._finish_layer()

    def _finish_layer(self) -> None:
        """Go from the last module to the first: the rows of one are divided by the scales of the next."""
        for module, inputs in reversed(self._seen.items()):
            scales = np.ones_like(inputs.largest)
            if self._options.kind == "smoothquant" and self._options.alpha != "none":
                scales = self._smoothing(module, inputs)
                self.found.scales[module] = scales
            if self._formats[module].activation_scale == "tensor":
                largest = float((inputs.largest / scales).max())
                scale = largest / LARGEST_CODES[self._formats[module].kind]
                self.found.static[module] = max(scale, LEAST_STATIC)
        self._seen.clear()

    def _smoothing(self, module: str, inputs: _Inputs) -> Floats:
        """Return what the columns of a weight are multiplied by."""
        spec = self._modules[module].weight
        weight = as_numpy(self._folded(spec)).astype(np.float32, copy=False)
        columns = np.abs(weight).max(axis=0)
        shared = shared_inputs(self._model, module)
        if self._options.alpha != "auto":
            return _scales(inputs.largest, columns, float(self._options.alpha), shared)
        tried = [np.ones_like(columns), *(_scales(inputs.largest, columns, alpha, shared) for alpha in ALPHAS)]
        rows = slice(None, None, max(1, len(weight) // SAMPLE_ROWS))
        sample = weight[rows]
        bounds = np.abs(sample)
        if not self._options.per_channel:
            bounds = _bounds_of_parts(weight, [source.shape[0] for source in spec.sources], rows)
        errors = [_error(inputs, sample, bounds, scales, self._options.per_token) for scales in tried]
        return tried[int(np.argmin(errors))]


def _scales(inputs: Floats, columns: Floats, alpha: float, shared: tuple[int, int, int]) -> Floats:
    """Return max|x|^alpha / max|W|^(1 - alpha) of each channel, the largest of the channels that share it."""
    x = np.maximum(inputs, max(LEAST_SCALE, LEAST_PART * float(inputs.max())))
    w = np.maximum(columns, LEAST_SCALE)
    scales = np.maximum(x**alpha / w ** (1 - alpha), LEAST_SCALE).reshape(shared)
    return np.array(np.broadcast_to(scales.max(axis=1, keepdims=True), scales.shape)).reshape(-1)


def _bounds_of_parts(weight: Floats, parts: Sequence[int], rows: slice) -> Floats:
    """Return for some rows the largest magnitudes of the columns of their parts, [rows, in]."""
    ends = np.cumsum(parts)
    maxima = np.stack([np.abs(part).max(axis=0) for part in np.split(weight, ends[:-1])])
    return np.asarray(maxima[np.repeat(np.arange(len(parts)), parts)[rows]])


def _error(inputs: _Inputs, weight: Floats, bounds: Floats, scales: Floats, per_token: bool) -> float:
    """Return the squared error of the products of sampled tokens with rows of a weight, both rounded to int8.

    bounds: magnitudes [rows, in], the largest of which, times the scales, is a row's largest code.
    """
    largest_code = np.float32(LARGEST_CODES["int8"])
    steps = np.maximum((bounds * scales).max(axis=1, keepdims=True), LEAST_SCALE) / largest_code
    x = inputs.sample / scales
    largest = np.abs(x).max(axis=1, keepdims=True) if per_token else np.abs(inputs.largest / scales).max()
    rounded_x = _rounded(x, np.maximum(largest, LEAST_SCALE) / largest_code)
    difference = rounded_x @ _rounded(weight * scales, steps).T - inputs.sample @ weight.T
    return float(np.square(difference).sum(dtype=np.float64))


def _rounded(numbers: Floats, step: Floats) -> Floats:
    rounded: Floats = np.clip(np.rint(numbers / step), -127, 127)
    rounded *= step
    return rounded
