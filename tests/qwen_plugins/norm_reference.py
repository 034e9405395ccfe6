"""RMSNorm in float64, and what the tests compare with it: distances in units in the last place."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Static scales from the smallest number that float32 has to infinity: the reciprocals of the first are infinite, and
# those of the last are subnormal.
EXTREME_SCALES = [0.0, 1e-45, 3e-42, 1e-38, 1e-30, 1e-19, 1.0, 1e20, 1e37, 1e38, 3.4e38, math.inf]
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def reference(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return y in float64 and h in the type of x."""
    h = x if residual is None else (x.double() + residual.double()).to(x.dtype)
    wide = h.double()
    y = wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + eps) * (weight.double() + unit_offset)
    return y, h


def ulps_apart(actual: Tensor, exact: Tensor) -> Tensor:
    """Return how many representable numbers lie between `actual` and `exact` rounded to the type of `actual`."""
    return (_order(actual) - _order(exact.to(actual.dtype))).abs()


def assert_within_one_ulp(actual: Tensor, exact: Tensor) -> None:
    assert torch.equal(actual.isnan(), exact.isnan())
    keep = ~exact.isnan()
    distance = ulps_apart(actual[keep], exact[keep])
    assert distance.numel() == 0 or distance.max().item() <= 1


def divisor_of(scale: float) -> float:
    """Return what a scale divides by: 0 counts as the smallest number above it."""
    return max(float(torch.tensor(scale)), 2.0**-149)


def _order(tensor: Tensor) -> Tensor:
    """Map floating-point numbers to integers in the same order, neighbours one apart."""
    if tensor.element_size() == 4:
        bits = tensor.contiguous().view(torch.int32).to(torch.int64)
        magnitude = bits & 0x7FFFFFFF
    else:
        bits = tensor.contiguous().view(torch.int16).to(torch.int64)
        magnitude = bits & 0x7FFF
    return torch.where(bits < 0, -magnitude, magnitude)


def assert_quantized(q: Tensor, scaled: Tensor) -> None:
    """Check q against the exact values before rounding, float64, saturating and not NaN.

    int8: equal to the rounded value, or one off where the exact value lies within float32 rounding of a tie. float8:
    the nearest representable number, or a neighbour where the exact value lies so close to the middle of the two.
    """
    limit = LIMITS[q.dtype]
    if q.dtype == torch.int8:
        scaled = scaled.clamp(-128, limit)
        error = (q.double() - scaled).abs()
        allowed = torch.full_like(error, 0.5)
    else:
        scaled = scaled.clamp(-limit, limit)
        error = (q.double() - scaled).abs()
        exponent = torch.floor(torch.log2(scaled.abs().clamp(min=2.0**-6)))
        allowed = 0.5 * 2.0 ** (exponent - 3)
    float32_rounding = 8 * 2.0**-24 * scaled.abs()
    assert bool((error <= allowed + float32_rounding).all()), f"off by {(error - allowed).max().item()} beyond a tie"
