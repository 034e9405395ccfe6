"""Read the tensors of an engine's modules from a checkpoint, quantized ones packed for the kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.eight_bit_weight import EightBitWeight
from ..checkpoints.module_weights import ModuleWeights
from ..checkpoints.quantized_weight import QuantizedWeight
from ..checkpoints.tensor_files import Framework, Weight
from ..checkpoints.weights import Modules, WeightSpec
from .activation_aware import CalibratedWeights
from .eight_bit import round_to_eight_bits
from .search import Floats, round_weight

Array = npt.NDArray[Any]


class EngineWeights:
    """Read a tensor at a time: call it with a `WeightSpec` of the engine's modules.

    The tensors of a quantized module are made together, and kept until those of another are asked for: a back end that
    reads module by module makes each once.

    relative_errors: of the modules that were quantized here, by name: see `Rounded`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        modules: Modules,
        calibrated: CalibratedWeights | None = None,
        per_channel: bool = True,
    ):
        """Take the engine's modules; quantized ones that the checkpoint does not have quantized are quantized here.

        calibrated: what calibration found; None: there was none.
        per_channel: where x is quantized, too, each output has a scale of its own, rather than each of the
            checkpoint's tensors.
        """
        self._checkpoint = checkpoint
        self._modules = modules
        self._read: Callable[[WeightSpec], Weight] = checkpoint.read if calibrated is None else calibrated
        self._importance: Mapping[str, Floats] = {} if calibrated is None else calibrated.importance
        self._static: Mapping[str, float] = {} if calibrated is None else calibrated.static
        self._per_channel = per_channel
        self._made: tuple[str, dict[str, Weight]] = ("", {})
        self.relative_errors: dict[str, float] = {}

    def __call__(self, spec: WeightSpec) -> Weight:
        """Return the tensor, of the checkpoint's framework; if it is not packed, of any floating-point type.

        Raises:
            QwenModelError: a number, or a scale, is not finite.
        """
        name, _, field = spec.name.rpartition(".")
        module = self._modules[name]
        if not module.format.bits or field == "bias":
            return self._read(spec)
        if self._made[0] != name:
            self._made = ("", {})  # the memory of the last one, before that of this one is taken
            self._made = (name, self._packed(name, module))
        return self._made[1][spec.name]

    def _packed(self, name: str, module: ModuleWeights[WeightSpec]) -> dict[str, Weight]:
        weight = self._quantized(name, module)
        if isinstance(weight, EightBitWeight):
            wrap = _WRAPPED[self._checkpoint.framework]
            tensors = {field: wrap(array, "") for field, array in weight.tensors.items()}
        else:
            tensors = packed_tensors(weight, self._checkpoint.framework)
        return {f"{name}.{field}": tensor for field, tensor in tensors.items()}

    def _quantized(self, name: str, module: ModuleWeights[WeightSpec]) -> QuantizedWeight | EightBitWeight:
        if self._checkpoint.is_quantized(module.weight):
            return self._checkpoint.read_quantized(module.weight)
        if module.format.activation is not None:
            by_row = self._per_channel or self._checkpoint.has_scaled_rows(module.weight)
            parts = () if by_row else [source.shape[0] for source in module.weight.sources]
            weight, self.relative_errors[name] = round_to_eight_bits(
                self._read(module.weight), module.format.kind, parts, self._static.get(name)
            )
            return weight
        rounded = round_weight(self._read(module.weight), module.format, self._importance.get(name))
        self.relative_errors[name] = rounded.relative_error
        return rounded.weight


def packed_tensors(weight: QuantizedWeight, framework: Framework) -> dict[str, Weight]:
    """Pack a quantized weight in layout 2; return the tensors by the fields of `ModuleWeights` that they are for."""
    from qwen_plugins import quantized

    groups = weight.scales.shape[1]
    packed = quantized.pack(
        weight.codes,
        bits_of(weight.scales, weight.scale_dtype),
        weight.zeros,
        bits=weight.bits,
        group_size=weight.codes.shape[1] // groups if groups > 1 else 0,
        scale_dtype=weight.scale_dtype,
    )
    arrays = {"weight": packed.codes, "zeros": packed.zeros, "permutation": weight.permutation}
    wrap = _WRAPPED[framework]
    found = {field: wrap(array, "") for field, array in arrays.items() if array is not None}
    return {**found, "scales": wrap(packed.scales, weight.scale_dtype)}


def bits_of(scales: Array, dtype: str) -> npt.NDArray[np.uint16]:
    """Return the bits of scales, float16 or float32, in float16 or bfloat16: NumPy has no bfloat16 of its own."""
    if dtype == "float16":
        return scales.astype(np.float16).view(np.uint16)
    return (np.ascontiguousarray(scales, np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def _as_tensor(array: Array, dtype: str) -> Weight:
    import torch

    tensor = torch.from_numpy(array.view(np.int16) if dtype else array)
    return tensor.view(getattr(torch, dtype)) if dtype else tensor


def _as_array(array: Array, dtype: str) -> Weight:
    if dtype == "bfloat16":
        import ml_dtypes

        return array.view(ml_dtypes.bfloat16)
    return array.view(np.float16) if dtype else array


_WRAPPED: dict[Framework, Callable[[Array, str], Weight]] = {"torch": _as_tensor, "numpy": _as_array}
