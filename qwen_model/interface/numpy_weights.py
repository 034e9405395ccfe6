"""Read a checkpoint's weights as NumPy arrays of the types that they have in an engine or a file."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoints.tensor_files import all_finite
from ..checkpoints.weights import WeightSpec, too_large
from ..common.errors import QwenModelError
from ..common.progress import Progress
from .back_end import ReadWeight


def numpy_dtype(name: str) -> npt.DTypeLike:
    """Return NumPy's type of that name; bfloat16 comes from ml_dtypes."""
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def reporting_reader(read_weight: ReadWeight, total: int, progress: Progress) -> ReadWeight:
    """Wrap `read_weight`: convert to the weight's type in the engine, and report the bytes read, of `total`."""
    done: dict[str, int] = {}

    def read(spec: WeightSpec) -> npt.NDArray[Any]:
        weight = as_dtype(read_weight(spec), numpy_dtype(spec.dtype), spec.name)
        done[spec.name] = weight.nbytes
        progress("weights", sum(done.values()), total)
        return weight

    return read


def as_dtype(weight: npt.NDArray[Any], dtype: npt.DTypeLike, name: str) -> npt.NDArray[Any]:
    """Convert a weight to `dtype`.

    Raises:
        QwenModelError: a number is too large for the type.
    """
    with np.errstate(over="ignore"):
        converted = weight.astype(dtype, copy=False)
    if weight.dtype != converted.dtype and not all_finite(converted):
        raise QwenModelError(too_large(name, converted.dtype.name, float(np.abs(weight.astype(np.float64)).max())))
    return converted
