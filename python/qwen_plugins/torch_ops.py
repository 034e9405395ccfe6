"""Define RMSNorm and linear layers for PyTorch: custom operators ``torch.ops.qwen_plugins.*``, registered on import."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_plugins import _gemm, _quantize, _quantized_gemm, _scaled_gemm
from qwen_plugins import _rms_norm as implementation
from qwen_plugins._quantized_gemm import QuantizedWeight
from qwen_plugins._rms_norm import Norm, Quantization

__all__ = ["QuantizedWeight", "cublas_lt_status", "gemm", "quantize", "rms_norm", "rms_norm_quant", "scaled_gemm"]

_library = torch.library.Library("qwen_plugins", "DEF")
_NORM_OPTIONS = "float eps, bool unit_offset, bool round_before_weight"
_QUANT_OPTIONS = "Tensor? smoothing, float eps, ScalarType quant_dtype, bool unit_offset"
_SCHEMAS = (
    f"rms_norm(Tensor x, Tensor weight, {_NORM_OPTIONS}) -> Tensor",
    f"rms_norm_residual(Tensor x, Tensor residual, Tensor weight, {_NORM_OPTIONS}) -> (Tensor, Tensor)",
    f"rms_norm_out(Tensor x, Tensor weight, Tensor(a!) out, {_NORM_OPTIONS}) -> ()",
    "rms_norm_residual_out(Tensor x, Tensor residual, Tensor weight, Tensor(a!) out, Tensor(b!) residual_out, "
    f"{_NORM_OPTIONS}) -> ()",
    f"rms_norm_quant(Tensor x, Tensor weight, Tensor scale, {_QUANT_OPTIONS}) -> Tensor",
    f"rms_norm_quant_residual(Tensor x, Tensor residual, Tensor weight, Tensor scale, {_QUANT_OPTIONS})"
    " -> (Tensor, Tensor)",
    f"rms_norm_dynamic_quant(Tensor x, Tensor weight, {_QUANT_OPTIONS}) -> (Tensor, Tensor)",
    f"rms_norm_dynamic_quant_residual(Tensor x, Tensor residual, Tensor weight, {_QUANT_OPTIONS})"
    " -> (Tensor, Tensor, Tensor)",
)
_OPERATORS = [schema.split("(")[0] for schema in _SCHEMAS]
for _schema in _SCHEMAS:
    _library.define(_schema)
_library.define("quantize(Tensor x, Tensor scale, ScalarType dtype) -> Tensor")
_library.define("dynamic_quantize(Tensor x, ScalarType dtype) -> (Tensor, Tensor)")
_GEMM_OPTIONS = "str? activation, bool constant_weight"
_library.define(f"gemm(Tensor x, Tensor weight, Tensor? bias, {_GEMM_OPTIONS}) -> Tensor")
_library.define(f"gemm_out(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out, {_GEMM_OPTIONS}) -> ()")
_QUANTIZED_WEIGHT = "Tensor codes, Tensor scales, Tensor? zeros, Tensor? permutation"
_QUANTIZED_OPTIONS = f"int group_size, int out_features, {_GEMM_OPTIONS}"
_library.define(f"gemm_quantized(Tensor x, {_QUANTIZED_WEIGHT}, Tensor? bias, {_QUANTIZED_OPTIONS}) -> Tensor")
_library.define(
    f"gemm_quantized_out(Tensor x, {_QUANTIZED_WEIGHT}, Tensor? bias, Tensor(a!) out, {_QUANTIZED_OPTIONS}) -> ()"
)
_library.define(
    "scaled_gemm(Tensor x, Tensor weight, Tensor x_scales, Tensor weight_scales, Tensor? bias, Tensor? y_scale, "
    "str? activation, ScalarType dtype, bool constant_weight) -> Tensor"
)


def gemm(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    constant_weight: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Compute y = x · weightᵀ + bias, summed in float32; with activation="swiglu" silu(gate) · up of its two halves.

    On a GPU, few rows (decoding) run in one kernel that reads the weight once, at the memory's bandwidth. Many rows
    mostly run in cuBLASLt where it can be loaded, which `qwen_plugins.cublas_lt_status()` tells. Kernels are launched
    on the current stream; the function works inside CUDA graph capture and torch.compile. It computes no gradients.

    Args:
        x: [..., in_features], float16, bfloat16 or float32.
        weight: [out_features, in_features], contiguous, in the type of x, or a QuantizedWeight. With SwiGLU (Shazeer,
            2020) the first half of its rows is the gate projection, the second half the up projection.
        bias: [out_features], in the type of x.
        activation: None or "swiglu".
        constant_weight: True where no kernel that may still run in the stream writes weight or bias: the kernel may
            then read them before the previous kernel has finished.
        out: where y is written, contiguous; it must not share memory with the inputs.

    Returns:
        y, [..., out_features], with SwiGLU [..., out_features / 2], in the type of x.

    Raises:
        TypeError, ValueError: for an argument that does not fit, before anything is written.
    """
    if isinstance(weight, QuantizedWeight):
        return _quantized(x, weight, bias, activation, constant_weight, out)
    if torch.compiler.is_compiling() or type(x) not in _PLAIN_TENSORS:
        _check_tensors(x=x, weight=weight, bias=bias, out=out)
        if out is None:
            return torch.ops.qwen_plugins.gemm(x, weight, bias, activation, constant_weight)
        torch.ops.qwen_plugins.gemm_out(x, weight, bias, out, activation, constant_weight)
        return out
    return _gemm.gemm(x, weight, bias, activation, constant_weight, out)


def _quantized(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    activation: str | None,
    constant_weight: bool,
    out: Tensor | None,
) -> Tensor:
    operands = (weight.codes, weight.scales, weight.zeros, weight.permutation, bias)
    options = (weight.group_size, weight.out_features, activation, constant_weight)
    if not torch.compiler.is_compiling() and type(x) in _PLAIN_TENSORS:
        return _quantized_gemm.gemm(x, *operands, *options, out)
    _check_tensors(x=x, bias=bias, out=out)
    if out is None:
        return torch.ops.qwen_plugins.gemm_quantized(x, *operands, *options)
    torch.ops.qwen_plugins.gemm_quantized_out(x, *operands, out, *options)
    return out


def scaled_gemm(
    x: Tensor,
    weight: Tensor,
    x_scales: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    dtype: torch.dtype = torch.float16,
    y_scale: Tensor | None = None,
    constant_weight: bool = False,
) -> Tensor:
    """Compute y = (x · weightᵀ) · weight_scales · x_scales + bias of 8-bit codes; with activation="swiglu" as `gemm`.

    Products of int8 are summed exactly, those of float8 in float32. Kernels are launched on the current stream; the
    function works inside CUDA graph capture and torch.compile. It computes no gradients.

    Args:
        x: [..., in_features], int8 or float8_e4m3fn.
        weight: [out_features, in_features], contiguous, in the type of x.
        x_scales: float32, one for all of x, or one for each row: [...] or [..., 1].
        weight_scales: float32 [out_features] or [out_features, 1]; or of float8, for blocks of 128 rows times 128
            columns, [out_features / 128, in_features / 128], both rounded up.
        bias: [out_features], of type `dtype`.
        activation: None or "swiglu".
        dtype: float16, bfloat16 or float32, of bias and y.
        y_scale: one float32 above 0. y is then codes of the type of x, saturate(round(y / y_scale)), rounded to nearest
            even.
        constant_weight: True where no kernel that may still run in the stream writes weight, weight_scales, bias or
            y_scale: the kernel may then read them before the previous kernel has finished.

    Returns:
        y, [..., out_features], with SwiGLU [..., out_features / 2].

    Raises:
        TypeError, ValueError: for an argument that does not fit, before anything is computed.
    """
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, not {type(dtype).__name__}")
    operands = (x, weight, x_scales, weight_scales, bias, y_scale, activation, dtype, constant_weight)
    if not torch.compiler.is_compiling() and type(x) in _PLAIN_TENSORS:
        return _scaled_gemm.scaled_gemm(*operands)
    given = {"x": x, "weight": weight, "x_scales": x_scales, "weight_scales": weight_scales}
    _check_tensors(**given, bias=bias, y_scale=y_scale)
    return torch.ops.qwen_plugins.scaled_gemm(*operands)


_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)  # for which the dispatcher has nothing to do


def cublas_lt_status() -> str:
    """Return the file of cuBLASLt that gemm uses for many rows, or why it uses none.

    The environment variable QWEN_PLUGINS_CUBLASLT may name another file, or "none".
    """
    return _gemm.cublas_lt_status()


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    unit_offset: bool = False,
    round_before_weight: bool = False,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute RMSNorm over the last dimension: y = h / sqrt(mean(h²) + eps) · weight (Zhang and Sennrich, 2019).

    h is x, or x + residual rounded to the type of x. Everything else is computed in float32 (float64 sums for float32
    tensors) and rounded once. On a GPU this is one kernel on the current stream; the function works inside CUDA graph
    capture and torch.compile. It computes no gradients.

    Args:
        x: [..., hidden_size], float16, bfloat16 or float32. The last dimension must be contiguous, the others may be
            strided, such as the heads inside a packed projection.
        weight: [hidden_size], in the type of x or float32.
        eps: above 0.
        residual: of the shape and type of x.
        unit_offset: the weight is stored as its difference from 1 (Gemma, Qwen3-Next).
        round_before_weight: round h / sqrt(...) to the type of x before multiplying by the weight, as the modules of
            Hugging Face transformers do. It is less exact, but equal to them in 16 bits.
        out: where y is written, or (y, h) with a residual: of the shape and type of x. Each may be x or the residual
            itself.

    Returns:
        y of the shape and type of x, contiguous; with a residual (y, h).

    A row with NaN gives a row of NaN. A row with an infinity gives NaN there and 0 elsewhere, as the formula does.
    bfloat16 rows whose sum of squares exceeds float32's range (elements beyond about 1e19) give 0.

    Raises:
        TypeError, ValueError: for an argument that does not fit, before anything is written.
    """
    _check_eps(eps)
    _check_tensors(x=x, weight=weight, residual=residual)
    ops = torch.ops.qwen_plugins
    options = (eps, unit_offset, round_before_weight)
    if residual is None:
        if out is None:
            return ops.rms_norm(x, weight, *options)
        if not isinstance(out, Tensor):
            raise TypeError(f"out must be a torch.Tensor where there is no residual, not {type(out).__name__}")
        ops.rms_norm_out(x, weight, out, *options)
        return out
    if out is None:
        return ops.rms_norm_residual(x, residual, weight, *options)
    if not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(f"out must be a tuple (y, h) where there is a residual, not {type(out).__name__}")
    ops.rms_norm_residual_out(x, residual, weight, *out, *options)
    return out


def rms_norm_quant(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    quant_dtype: torch.dtype = torch.int8,
    scale: Tensor | None = None,
    smoothing: Tensor | None = None,
    residual: Tensor | None = None,
    unit_offset: bool = False,
) -> tuple[Tensor, ...] | Tensor:
    """Compute RMSNorm and quantize it: q = saturate(round(y / smoothing / scale)), rounding to nearest even.

    y is that of `rms_norm`, but not rounded before it is quantized. On a GPU this is one kernel, which reads x once.

    Args:
        x: [..., hidden_size], float16, bfloat16 or float32, as for rms_norm.
        weight: [hidden_size], in the type of x or float32.
        eps: above 0.
        quant_dtype: torch.int8 (-128 to 127) or torch.float8_e4m3fn (-448 to 448).
        scale: for static quantization of the whole tensor, one float32 above 0 on the device of x. None: dynamic
            quantization, where each row (token) has its own scale, max|y / smoothing| / 127 (448 for float8_e4m3fn).
        smoothing: [hidden_size], in the type of x or float32: divides y (SmoothQuant: Xiao et al., 2022).
        residual: of the shape and type of x; h = x + residual is normalised and returned too.
        unit_offset: the weight is stored as its difference from 1.

    Returns:
        q with a static scale, (q, scales) without one; with a residual h comes last. q has the shape of x. scales are
        float32, of the shape of x with a last dimension of 1; q · scales gives y / smoothing back.

    A row of zeros gives zeros, and the smallest normal float32 as its scale. A row with NaN or infinity has the scale
    NaN; its NaN elements are 0 as int8, which has no NaN, and NaN as float8.

    Raises:
        TypeError, ValueError: for an argument that does not fit, before anything is written.
    """
    _check_eps(eps)
    _check_tensors(x=x, weight=weight, residual=residual, scale=scale, smoothing=smoothing)
    if not isinstance(quant_dtype, torch.dtype):
        raise TypeError(f"quant_dtype must be torch.int8 or torch.float8_e4m3fn, not {quant_dtype!r}")
    ops = torch.ops.qwen_plugins
    options = (smoothing, eps, quant_dtype, unit_offset)
    if residual is None:
        if scale is None:
            return ops.rms_norm_dynamic_quant(x, weight, *options)
        return ops.rms_norm_quant(x, weight, scale, *options)
    if scale is None:
        return ops.rms_norm_dynamic_quant_residual(x, residual, weight, *options)
    return ops.rms_norm_quant_residual(x, residual, weight, scale, *options)


def quantize(x: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize x: q = saturate(round(x / scale)), rounding to nearest even.

    Quotients are those of float32. On a GPU this is one kernel on the current stream, which reads x once; the function
    works inside CUDA graph capture and torch.compile. It computes no gradients.

    Args:
        x: [..., columns], float16, bfloat16 or float32. The last dimension must be contiguous, the others may be
            strided.
        dtype: torch.int8 (-128 to 127) or torch.float8_e4m3fn (-448 to 448).
        scale: for static quantization of the whole tensor, one float32 above 0 on the device of x. None: dynamic
            quantization, where each row (token) has its own scale, max|x| / 127 (448 for float8_e4m3fn).

    Returns:
        (q, scales): q has the shape of x and is contiguous. scales is `scale`, or float32 of the shape of x with a last
        dimension of 1; q · scales gives x back.

    A row of zeros has the smallest normal float32 as its scale. A row with NaN or infinity has the scale NaN; these
    elements are 0 as int8, which has no NaN, and NaN as float8. With a static scale infinity saturates.

    Raises:
        TypeError, ValueError: for an argument that does not fit, before anything is written.
    """
    _check_tensors(x=x, scale=scale)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be torch.int8 or torch.float8_e4m3fn, not {dtype!r}")
    if scale is None:
        return torch.ops.qwen_plugins.dynamic_quantize(x, dtype)
    return torch.ops.qwen_plugins.quantize(x, scale, dtype), scale


def _check_eps(eps: float) -> None:
    """Check what PyTorch's dispatcher would report less clearly."""
    if not isinstance(eps, float | int):
        raise TypeError(f"eps must be a number, not {type(eps).__name__}")


def _check_tensors(**tensors: Tensor | None) -> None:
    """Check what PyTorch's dispatcher would report less clearly. The operators check everything else."""
    required = ("x", "weight", "x_scales", "weight_scales")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and not (tensor is None and name not in required):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")


@dataclass(frozen=True)
class _Operators:
    """Implement the operators for one kind of device, under the names of the schemas above."""

    run_norm: Callable[[Norm, bool, Tensor, Tensor | None], None] | None  # None: fake tensors, nothing to run
    run_quant: Callable[[Norm, Quantization, Tensor, Tensor | None, Tensor | None], None] | None

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, unit_offset: bool, round_before_weight: bool) -> Tensor:
        norm = Norm(x, weight, eps, None, unit_offset)
        out = _empty_like(x)
        if self.run_norm:
            self.run_norm(norm, round_before_weight, out, None)
        return out

    def rms_norm_residual(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, unit_offset: bool, round_before_weight: bool
    ) -> tuple[Tensor, Tensor]:
        norm = Norm(x, weight, eps, residual, unit_offset)
        out, residual_out = _empty_like(x), _empty_like(x)
        if self.run_norm:
            self.run_norm(norm, round_before_weight, out, residual_out)
        return out, residual_out

    def rms_norm_out(
        self, x: Tensor, weight: Tensor, out: Tensor, eps: float, unit_offset: bool, round_before_weight: bool
    ) -> None:
        norm = Norm(x, weight, eps, None, unit_offset)
        implementation.check_like("out", out, x)
        if self.run_norm:
            implementation.check_output_memory("out", out, norm)
            self.run_norm(norm, round_before_weight, out, None)

    def rms_norm_residual_out(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        out: Tensor,
        residual_out: Tensor,
        eps: float,
        unit_offset: bool,
        round_before_weight: bool,
    ) -> None:
        norm = Norm(x, weight, eps, residual, unit_offset)
        implementation.check_like("out[0]", out, x)
        implementation.check_like("out[1]", residual_out, x)
        if self.run_norm:
            implementation.check_output_memory("out[0]", out, norm)
            implementation.check_output_memory("out[1]", residual_out, norm, other_output=out)
            self.run_norm(norm, round_before_weight, out, residual_out)

    def rms_norm_quant(
        self,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        smoothing: Tensor | None,
        eps: float,
        quant_dtype: torch.dtype,
        unit_offset: bool,
    ) -> Tensor:
        return self._quant(Norm(x, weight, eps, None, unit_offset), Quantization(quant_dtype, scale, smoothing))[0]

    def rms_norm_quant_residual(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        scale: Tensor,
        smoothing: Tensor | None,
        eps: float,
        quant_dtype: torch.dtype,
        unit_offset: bool,
    ) -> tuple[Tensor, ...]:
        return self._quant(Norm(x, weight, eps, residual, unit_offset), Quantization(quant_dtype, scale, smoothing))

    def rms_norm_dynamic_quant(
        self,
        x: Tensor,
        weight: Tensor,
        smoothing: Tensor | None,
        eps: float,
        quant_dtype: torch.dtype,
        unit_offset: bool,
    ) -> tuple[Tensor, ...]:
        return self._quant(Norm(x, weight, eps, None, unit_offset), Quantization(quant_dtype, None, smoothing))

    def rms_norm_dynamic_quant_residual(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        smoothing: Tensor | None,
        eps: float,
        quant_dtype: torch.dtype,
        unit_offset: bool,
    ) -> tuple[Tensor, ...]:
        return self._quant(Norm(x, weight, eps, residual, unit_offset), Quantization(quant_dtype, None, smoothing))

    def _quant(self, norm: Norm, quantization: Quantization) -> tuple[Tensor, ...]:
        """Return q, the scales where they are dynamic, and h where there is a residual."""
        quantization.check(norm)
        x = norm.x
        q = _empty_like(x, quantization.dtype)
        scales = None
        if quantization.scale is None:
            scales = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
        residual_out = None if norm.residual is None else _empty_like(x)
        if self.run_quant:
            self.run_quant(norm, quantization, q, scales, residual_out)
        return tuple(tensor for tensor in (q, scales, residual_out) if tensor is not None)


def _empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


for _key, _operators in {
    "CPU": _Operators(implementation.norm_on_cpu, implementation.quant_on_cpu),
    "CUDA": _Operators(implementation.norm_on_gpu, implementation.quant_on_gpu),
    "Meta": _Operators(None, None),
}.items():
    for _name in _OPERATORS:
        _library.impl(_name, getattr(_operators, _name), _key)


def _gemm_out(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, activation: str | None, constant_weight: bool
) -> None:
    _gemm.gemm(x, weight, bias, activation, constant_weight, out)


def _gemm_quantized_out(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    permutation: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    group_size: int,
    out_features: int,
    activation: str | None,
    constant_weight: bool,
) -> None:
    weight = (codes, scales, zeros, permutation)
    _quantized_gemm.gemm(x, *weight, bias, group_size, out_features, activation, constant_weight, out)


for _key in ("CPU", "CUDA", "Meta"):
    _library.impl("quantize", _quantize.quantize, _key)
    _library.impl("dynamic_quantize", _quantize.dynamic_quantize, _key)
    _library.impl("gemm", _gemm.gemm, _key)
    _library.impl("gemm_out", _gemm_out, _key)
    _library.impl("gemm_quantized", _quantized_gemm.gemm, _key)
    _library.impl("gemm_quantized_out", _gemm_quantized_out, _key)
    _library.impl("scaled_gemm", _scaled_gemm.scaled_gemm, _key)
