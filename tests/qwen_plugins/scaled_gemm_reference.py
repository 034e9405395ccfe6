"""The linear layer whose x and weight are 8-bit codes, in float64, and what its tests have in common."""

from __future__ import annotations

import torch

from qwen_plugins import launch
from tests.qwen_plugins.gemm_reference import launch_layer, make, reference

CODE_TYPES = [torch.int8, torch.float8_e4m3fn]
KINDS = {torch.int8: "int8_rows", torch.float8_e4m3fn: "fp8_rows"}
LIMITS = {torch.int8: 127, torch.float8_e4m3fn: 448}
BLOCK = 128


def random_codes(*shape, dtype, device, generator=None):
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8).to(device)
    # Gaussian, so that codes of all exponents occur.
    return (torch.randn(shape, generator=generator) * 64).clamp(-448, 448).to(dtype).to(device)


class Layer:
    """A weight as codes and scales, and as float64."""

    def __init__(self, in_features, out_features, *, code_type, blocks=False, device="cuda"):
        generator = torch.Generator().manual_seed(in_features + 7 * out_features)
        self.code_type = code_type
        self.blocks = blocks
        codes = random_codes(out_features, in_features, dtype=code_type, device="cpu", generator=generator)
        shape = (-(-out_features // BLOCK), -(-in_features // BLOCK)) if blocks else (out_features, 1)
        scales = (torch.rand(shape, generator=generator) + 0.5) / (LIMITS[code_type] * in_features**0.5)
        self.weight = codes.float().double() * per_element(scales, out_features, in_features, blocks).double()
        self.codes, self.scales, self.weight = codes.to(device), scales.to(device), self.weight.to(device)

    @property
    def shape(self):
        return tuple(self.codes.shape)

    def operands(self, rows, *, dtype=torch.float16, bias=True, per_row=True):
        """Return codes of x, their scales and a bias."""
        out_features, in_features = self.shape
        device = self.codes.device
        x = random_codes(rows, in_features, dtype=self.code_type, device=device)
        scales = (torch.rand((rows, 1) if per_row else (1,), device=device) + 0.5) / LIMITS[self.code_type]
        return x, 2 * scales, make(out_features, dtype=dtype, device=device.type) if bias else None


def per_element(scales, out_features, in_features, blocks):
    if not blocks:
        return scales.expand(out_features, in_features)
    return scales.repeat_interleave(BLOCK, 0)[:out_features].repeat_interleave(BLOCK, 1)[:, :in_features]


def check(y, x, x_scales, layer, bias, activation, *, y_scale=None, sum_error=2.0**-18):
    """Check y for one rounding to its type.

    Sums of int8 are exact; others may be off by `sum_error` in proportion to the sum of absolute values.
    """
    codes = x.float().double()
    expected, size = reference(codes * x_scales, layer.weight, bias, activation)
    if layer.code_type == torch.int8:
        sum_error = 2.0**-20
        if activation is None:  # the reference's own sums, of dequantized operands, are not exact
            size = expected.abs() + (0 if bias is None else bias.double().abs()) + 2.0**-24 * size
    error = sum_error * size
    if y_scale is None:
        assert y.is_floating_point()
        assert y.element_size() > 1
        rounding = torch.finfo(y.dtype).eps * expected.abs() * 0.51 + torch.finfo(y.dtype).tiny
        found = y.double()
    else:
        assert y.dtype == layer.code_type
        expected, error = expected / y_scale, error / y_scale + 2.0**-22 * (expected / y_scale).abs()
        expected = expected.clamp(-448, 448) if layer.code_type == torch.float8_e4m3fn else expected.clamp(-128, 127)
        found = y.float().double()
        exponent = expected.abs().clamp(min=2.0**-6).log2().floor()
        rounding = 2.0 ** (exponent - 4) * 1.001 if y.is_floating_point() else 0.5
    assert y.shape == expected.shape
    assert y.is_contiguous()
    wrong = ~((found - expected).abs() <= rounding + error)
    assert not wrong.any(), (
        f"{tuple(x.shape)}: {int(wrong.sum())} of {wrong.numel()} wrong, first at {wrong.nonzero()[0].tolist()}: "
        f"{found[wrong][0].item()}, not {expected[wrong][0].item()}"
    )


def launch_kernel(name, layer, x, x_scales, bias, activation, y, *, dtype=torch.float16, y_scale=None):
    """Launch one kernel by its name on operands of any address; the rules decide where it cannot compute y."""
    out_features, in_features = layer.shape
    per_row = x_scales.numel() != 1
    linear = launch.LinearLayer(
        weight=layer.codes.data_ptr(),
        scales=layer.scales.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        in_features=in_features,
        out_features=out_features,
        activation=launch.Activation.__members__[activation or "none"],
        dtype=launch.DataType.__members__[str(dtype).removeprefix("torch.")],
        constant_weight=True,
        kernels=[(2**29, name)],
        weight_format=launch.WeightFormat(
            kind=launch.WeightKind.__members__[KINDS[layer.code_type]],
            group_size=BLOCK if layer.blocks else 0,
            scale_dtype=launch.DataType.float32,
        ),
        input_scale=0 if per_row else x_scales.data_ptr(),
        output_scale=0 if y_scale is None else y_scale.data_ptr(),
    )
    launch_layer(linear, x, y, x_scales if per_row else None)
