"""Open files of tensors: safetensors, and PyTorch's with its safe loader, which runs no code from the file.

Files are memory-mapped if possible; a tensor is read when it is asked for.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..common.errors import QwenModelError, shown
from ..common.files import check_readable
from ..common.log import Stopwatch

LOG = logging.getLogger(__name__)

Shape = tuple[int, ...]
Framework = Literal["torch", "numpy"]
Weight = Any  # a torch.Tensor or a NumPy array, whose bfloat16 is that of ml_dtypes

_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_SAFETENSORS_DTYPES = {**_FLOATS, "F8_E4M3": "float8_e4m3fn", "I8": "int8", "I32": "int32", "I64": "int64"}
WEIGHT_DTYPES = tuple(_FLOATS.values())
"""The types that weights can have in a checkpoint, and the scales of quantized ones."""
_EXPONENTS: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "float16": (np.uint16, 0x7C00),
    "bfloat16": (np.uint16, 0x7F80),
    "float32": (np.uint32, 0x7F800000),
    "float64": (np.uint64, 0x7FF << 52),
}
"""The bits of the exponent, which are all set in infinities and NaN."""
_CHUNK = 1 << 20


@dataclass(frozen=True)
class StoredTensor:
    """Describe a tensor in a file. `dtype` is PyTorch's name of a type that is read here, or the file's of another.

    NumPy has no float8_e4m3fn: an array of it has its bytes, uint8.

    read: takes a slice of each of the first dimensions, and reads only that part; (): all of the tensor.
    """

    shape: Shape
    dtype: str
    read: Callable[[tuple[slice, ...]], Weight]


def open_tensors(path: Path, framework: Framework) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name, to be read as arrays of `framework`.

    Raises:
        QwenModelError: the file cannot be read, is damaged, or holds anything besides tensors.
    """
    check_readable(path)
    watch = Stopwatch(LOG)
    if path.suffix == ".safetensors":
        tensors = _open_safetensors(path, framework)
    elif framework == "torch":
        tensors = _open_bin(path)
    else:
        raise QwenModelError(
            f"{path} can only be read with PyTorch: use the torch back end, or save the checkpoint as safetensors "
            "(save_pretrained does)"
        )
    watch.lap(f"{len(tensors)} tensors found in {path}", path.stat().st_size)
    return tensors


def _open_safetensors(path: Path, framework: Framework) -> dict[str, StoredTensor]:
    from safetensors import safe_open

    if framework == "numpy":
        import ml_dtypes  # noqa: F401  # registers bfloat16 with NumPy, for safetensors

    tensors: dict[str, StoredTensor] = {}
    try:
        file = safe_open(
            str(path), framework="pt" if framework == "torch" else "numpy"
        )  # closed when the readers are gone
        for name in file.keys():  # noqa: SIM118  # not a dict: it has no __iter__
            part = file.get_slice(name)
            dtype = part.get_dtype()
            shape = tuple(part.get_shape())
            read = partial(_read_safetensors, file, name)
            if dtype == "F8_E4M3" and framework == "numpy":
                read = partial(_read_bytes, path, name, shape)
            tensors[name] = StoredTensor(shape, _SAFETENSORS_DTYPES.get(dtype, dtype), read)
    except Exception as error:  # the library raises its own class, OSError and others
        raise QwenModelError(f"{path} cannot be read: {shown(str(error)).strip(chr(39))}") from error
    return tensors


def _read_safetensors(file: Any, name: str, part: tuple[slice, ...]) -> Weight:
    return file.get_slice(name)[part] if part else file.get_tensor(name)


def _read_bytes(path: Path, name: str, shape: Shape, part: tuple[slice, ...]) -> Weight:
    """Read numbers of one byte, whose type NumPy does not have, from a file that safetensors has checked."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        begin, _ = json.loads(file.read(length))[name]["data_offsets"]
    return np.array(np.memmap(path, np.uint8, "r", 8 + length + begin, shape)[part])


def _open_bin(path: Path) -> dict[str, StoredTensor]:
    import torch

    tensors = _load_bin(path)
    if not isinstance(tensors, dict):
        raise QwenModelError(f"{path} cannot be read: it must hold a dict of tensors, not {type(tensors).__name__}")
    for name, tensor in tensors.items():
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not isinstance(name, str) or not plain:
            raise QwenModelError(f"{path} cannot be read: its {shown(name)} is not a dense tensor")
    return {
        name: StoredTensor(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.detach().__getitem__)
        for name, tensor in tensors.items()
    }


def _load_bin(path: Path) -> Any:
    """Load a file with PyTorch; its own errors are not passed on, since they advise to disable the safe loader."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles of other versions
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # files of before PyTorch 1.6 cannot be mapped
                return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        more = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it holds {more[1]} besides tensors" if more else "it is damaged, or not written by torch.save"
        raise QwenModelError(
            f"{path} cannot be read: {what}; only tensors are read, because anything else could run code. Download "
            "it again, or save the checkpoint as safetensors where it was made"
        ) from error


def all_finite(weight: Weight) -> bool:
    """Tell whether a tensor or array has neither infinities nor NaN, as fast as memory is read. Integers have none."""
    dtype = weight.dtype.name if isinstance(weight, np.ndarray) else str(weight.dtype).removeprefix("torch.")
    if dtype not in _EXPONENTS:
        return True
    if isinstance(weight, np.ndarray):
        numbers = np.ascontiguousarray(weight).reshape(-1)
    else:
        import torch

        numbers = weight.contiguous().reshape(-1).view(torch.uint8).numpy()
    unsigned, exponent = _EXPONENTS[dtype]
    bits: npt.NDArray[Any] = numbers.view(unsigned)
    return all((bits[i : i + _CHUNK] & unsigned(exponent)).max() < exponent for i in range(0, len(bits), _CHUNK))


def as_numpy(weight: Weight) -> npt.NDArray[Any]:
    """Return a tensor or array as an array, without a copy where NumPy has the type.

    bfloat16 becomes float32; of float8_e4m3fn the bytes are returned, uint8.
    """
    if isinstance(weight, np.ndarray):
        return weight.astype(np.float32) if weight.dtype.name == "bfloat16" else weight
    import torch

    if weight.dtype == torch.float8_e4m3fn:
        return np.asarray(weight.detach().contiguous().view(torch.uint8).numpy())
    return np.asarray((weight.float() if weight.dtype == torch.bfloat16 else weight).detach().numpy())


def as_framework(array: npt.NDArray[Any], framework: Framework) -> Weight:
    """Return an array as a tensor of PyTorch, which shares its memory, or as it is."""
    if framework == "numpy":
        return array
    import torch

    return torch.from_numpy(array)
