"""Measure which GEMM kernel is the fastest for a linear layer on the current GPU; needs no PyTorch.

A kernel is named by a text such as "stream", "stream_hopper:n32s4" (a kernel and a variant of it) or "cublas_lt:2" (the
second algorithm that cuBLASLt proposes); "rules" leaves the choice to the rules of docs/gemm.md. The names are what
`qwen_plugins.launch.LinearLayer` and `qwen_plugins.tensorrt.gemm` take as ``kernels``: pairs (max_rows, name), a kernel
for up to so many rows, in increasing order.

    layer = {"in_features": 4096, "out_features": 22016, "activation": "swiglu"}
    times = tuning.measure(rows=16, **layer)
    fastest = min(times, key=times.get)

All functions raise ValueError for a shape, type or name that does not exist, and RuntimeError without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qwen_plugins import launch
from qwen_plugins.quantized import WeightFormat

__all__ = ["candidates", "choice_by_rules", "environment", "measure"]

_DTYPES = ("float32", "float16", "bfloat16")


def candidates(
    *,
    rows: int,
    in_features: int,
    out_features: int,
    activation: str | None = None,
    dtype: str = "float16",
    weight_format: WeightFormat | None = None,
    quantized_y: bool = False,
) -> list[str]:
    """Return the names of the kernels that can compute y and may be the fastest, at least one.

    Args:
        rows: of x, 1 or more.
        in_features: columns of x and of the weight.
        out_features: rows of the weight, with swiglu twice the columns of y.
        activation: None or "swiglu".
        dtype: "float32", "float16" or "bfloat16", of x, weight, bias and y, where these are not codes.
        weight_format: of a quantized weight (`qwen_plugins.quantized`); None: the weight has the type of x.
        quantized_y: y is codes, as x is by the format's activation.
    """
    return launch.gemm_candidates(
        **_shape(rows, in_features, out_features, activation, dtype, weight_format, quantized_y)
    )


def choice_by_rules(
    *,
    rows: int,
    in_features: int,
    out_features: int,
    activation: str | None = None,
    dtype: str = "float16",
    weight_format: WeightFormat | None = None,
    quantized_y: bool = False,
) -> str:
    """Return the name of the kernel that serves where nothing was measured; the arguments are those of `candidates`."""
    return launch.gemm_choice_by_rules(
        **_shape(rows, in_features, out_features, activation, dtype, weight_format, quantized_y)
    )


def measure(
    *,
    rows: int,
    in_features: int,
    out_features: int,
    activation: str | None = None,
    dtype: str = "float16",
    bias: bool = False,
    weight_format: WeightFormat | None = None,
    quantized_y: bool = False,
    kernels: Sequence[str] | None = None,
) -> dict[str, float]:
    """Return the microseconds that one GEMM takes, by the name of the kernel, in the order of ``kernels``.

    Each figure is the median of several replays of a CUDA graph of many such GEMMs, whose weights the L2 cache does not
    hold, and the kernels take turns, so that a clock that falls meets all of them. A kernel takes about 5 ms to
    measure, and twenty GEMMs' time where that is longer. The GPU should do nothing else meanwhile. Up to 512 MB of
    device memory for weights (or one weight, if it is larger), operands and workspace are allocated and freed again.

    Args:
        rows, in_features, out_features, activation, dtype, weight_format, quantized_y: as for `candidates`.
        bias: whether a bias is added.
        kernels: names; None: the candidates. What cannot compute this GEMM is left out of the result.

    Raises:
        RuntimeError: too little device memory is free, or CUDA reports an error.
    """
    shape = _shape(rows, in_features, out_features, activation, dtype, weight_format, quantized_y)
    names = launch.gemm_candidates(**shape) if kernels is None else list(kernels)
    return dict(launch.measure_gemm(names, bias=bias, **shape))


def environment() -> dict[str, str | int]:
    """Return what measurements depend on: they are worth nothing where one of these values is another.

    "gpu" (its name), "multiprocessors", "driver" (the CUDA version that it supports, 13000 for 13.0), "cublas_lt"
    (cuBLASLt's version, 0 for none), "kernels" (this library's, raised whenever a GEMM kernel changes) and
    "hopper_kernels" (1 where they were built in).
    """
    return {
        **launch.describe_device(),
        "cublas_lt": launch.cublas_lt_version(),
        "kernels": launch.GEMM_KERNELS_VERSION,
        "hopper_kernels": int(launch.has_hopper_kernels()),
    }


def _shape(
    rows: int,
    in_features: int,
    out_features: int,
    activation: str | None,
    dtype: str,
    weight_format: WeightFormat | None,
    quantized_y: bool,
) -> dict[str, Any]:
    """Check a shape, and return it as the launchers take it."""
    for name, value in (("rows", rows), ("in_features", in_features), ("out_features", out_features)):
        if not 1 <= value < 2**30:
            raise ValueError(f"{name} must be between 1 and 2**30 - 1, not {value}")
    if activation not in (None, "swiglu"):
        raise ValueError(f'activation must be None or "swiglu", not {activation!r}')
    if activation == "swiglu" and out_features % 2 != 0:
        raise ValueError(f"out_features must be even with swiglu, not {out_features}")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, not {dtype!r}")
    weight_format = weight_format or WeightFormat()
    is_packed = weight_format.bits != 16 and weight_format.activation is None
    if is_packed and weight_format.group_size and in_features % weight_format.group_size:
        raise ValueError(
            f"in_features must be a multiple of the groups of {weight_format.group_size}, not {in_features}"
        )
    if quantized_y and weight_format.activation is None:
        raise ValueError("quantized_y must be False where weight_format has no activation")
    if weight_format.activation == "int8" and in_features >= 2**17:
        raise ValueError(f"in_features must be below 2**17 with int8 activations, not {in_features}")
    return {
        "rows": rows,
        "in_features": in_features,
        "out_features": out_features,
        "activation": launch.Activation.__members__[activation or "none"],
        "dtype": launch.DataType.__members__[dtype],
        "weight_format": weight_format.for_launch(),
        "x_scale_per_row": weight_format.activation is not None and weight_format.activation_scale == "token",
        "quantized_y": quantized_y,
    }
