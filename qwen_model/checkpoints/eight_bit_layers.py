"""Find and read the layers of published checkpoints that compute in 8 bits: their codes are stored as they are.

compressed-tensors, ModelOpt and AutoFP8 call the scales `weight_scale`, Qwen's and DeepSeek's own blocks
`weight_scale_inv`, which is multiplied all the same. A static scale of the inputs is `input_scale`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..common.errors import QwenModelError
from .eight_bit_weight import EightBitWeight, eight_bit_format
from .module_weights import BLOCK_SIZE, WeightFormat
from .quantization_config import EightBitScheme, PublishedQuantization
from .tensor_files import WEIGHT_DTYPES, Shape, StoredTensor, as_numpy

CODE_KINDS = {"int8": "int8", "float8_e4m3fn": "fp8"}
"""The kinds of codes, by the type of a weight in a checkpoint."""
SCALES = ("weight_scale", "weight_scale_inv")
ZERO_POINTS = ("weight_zero_point", "input_zero_point")
"""Zero points of schemes without any, which some files have all the same, all 0."""


@dataclass(frozen=True)
class EightBitLayer:
    """Describe one layer of a checkpoint that computes in 8 bits.

    name: of the layer, without a tensor's.
    tensors: by the last part of their names; they have the types and shapes that they must have.
    scales: which of `SCALES` it has.
    """

    name: str
    tensors: Mapping[str, StoredTensor]
    scheme: EightBitScheme
    scales: str

    def read_format(self) -> WeightFormat:
        """Return the format in which an engine has the layer."""
        scale = "tensor" if self.scheme.static else "token"
        return eight_bit_format(self.scheme.kind, scale, BLOCK_SIZE if self.scheme.weights == "block" else 0)

    def read(self) -> EightBitWeight:
        """Read the layer; a scale of the tensor is repeated for each output.

        Raises:
            QwenModelError: scales or numbers are not finite, or there are zero points other than 0.
        """
        for suffix in ZERO_POINTS:
            if suffix in self.tensors and self._array(suffix).any():
                raise QwenModelError(f"{self.name}.{suffix} is not 0, which is not supported")
        codes = self._array("weight")
        scales = self._array(self.scales).astype(np.float32)
        if self.scheme.weights == "block":
            scales = scales.reshape(_block_grid(codes.shape))
        else:
            scales = np.broadcast_to(scales.reshape(-1, 1), (len(codes), 1)).copy()
        input_scale = float(self._array("input_scale").reshape(-1)[0]) if self.scheme.static else None
        weight = EightBitWeight(self.scheme.kind, codes, scales, input_scale)
        weight.check(self.name)
        return weight

    def _array(self, suffix: str) -> npt.NDArray[Any]:
        return as_numpy(self.tensors[suffix].read(()))


def find_eight_bit_layer(
    name: str, shape: Shape, quantization: PublishedQuantization, tensors: Mapping[str, StoredTensor]
) -> EightBitLayer | None:
    """Find the tensors of the layer `name`, whose weight has this shape; None: its weight is not of 8 bits.

    tensors: of the checkpoint, by name.

    Raises:
        QwenModelError: tensors are missing, or do not fit the shape or the configuration.
    """
    suffixes = ("weight", *SCALES, "input_scale", *ZERO_POINTS)
    own = {suffix: tensors[f"{name}.{suffix}"] for suffix in suffixes if f"{name}.{suffix}" in tensors}
    if "weight" not in own or own["weight"].dtype not in CODE_KINDS:
        return None
    weight = own["weight"]
    if weight.shape != shape:
        raise QwenModelError(f"{name}.weight must be {list(shape)}, not {list(weight.shape)}")
    scales = next((suffix for suffix in SCALES if suffix in own), None)
    if scales is None:
        raise QwenModelError(f"{name}.weight is {weight.dtype}, but {name}.weight_scale is missing")
    for suffix in (scales, "input_scale"):
        if suffix in own and own[suffix].dtype not in WEIGHT_DTYPES:
            raise QwenModelError(f"{name}.{suffix} must be {' or '.join(WEIGHT_DTYPES)}, not {own[suffix].dtype}")
    if "input_scale" in own and own["input_scale"].shape not in ((), (1,)):
        raise QwenModelError(f"{name}.input_scale must be one number, not {list(own['input_scale'].shape)}")
    kind, static = CODE_KINDS[weight.dtype], "input_scale" in own
    for scheme in sorted(quantization.eight_bit, key=lambda each: each.weights):
        fits = own[scales].shape in _scale_shapes(scheme.weights, shape)
        if fits and (scheme.kind, scheme.static) == (kind, static):
            return EightBitLayer(name, own, scheme, scales)
    expected = "; or ".join(sorted(scheme.text for scheme in quantization.eight_bit)) or "not in 8 bits"
    raise QwenModelError(
        f"{name} does not fit {quantization.where}, which says: {expected}. It has {weight.dtype} weights "
        f"{list(shape)}, {scales} {list(own[scales].shape)} and {'an' if static else 'no'} input_scale"
    )


def _scale_shapes(weights: str, shape: Shape) -> tuple[Shape, ...]:
    """Return the shapes that the scales of a weight may have; see `EightBitScheme.weights`."""
    rows, columns = _block_grid(shape)
    return {
        "tensor": ((), (1,), (1, 1)),
        "channel": ((shape[0],), (shape[0], 1)),
        "block": ((rows, columns), (rows, 1, columns, 1)),
    }[weights]


def _block_grid(shape: Shape) -> Shape:
    return tuple(-(-size // BLOCK_SIZE) for size in shape)


def fused_eight_bit_format(layers: Sequence[EightBitLayer]) -> WeightFormat:
    """Return the format of layers that are computed as one, as q, k and v.

    Raises:
        QwenModelError: their kinds, blocks or scales of inputs differ, or a block would have outputs of two of them.
    """
    first = layers[0].read_format()
    for layer in layers[1:]:
        if layer.read_format() != first:
            raise QwenModelError(
                f"{layers[0].name} and {layer.name} are quantized differently ({first.text}; "
                f"{layer.read_format().text}), which is not supported: they are computed as one layer"
            )
    for layer in layers[:-1]:
        outputs = layer.tensors["weight"].shape[0]
        if first.group_size and outputs % BLOCK_SIZE:
            raise QwenModelError(
                f"{layer.name} has {outputs} outputs, which are no whole blocks of {BLOCK_SIZE}: that is not "
                f"supported, because it is computed as one layer with {layers[-1].name}; --quantization none builds "
                "an engine of the numbers in 16 bits"
            )
    return first
