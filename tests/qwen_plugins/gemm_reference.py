"""The linear layer in float64, and what its tests have in common."""

from __future__ import annotations

import pytest
import torch

from qwen_plugins import launch, tuning

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
HALF_TYPES = [torch.float16, torch.bfloat16]
ACTIVATIONS = [None, "swiglu"]


def make(*shape: int, dtype: torch.dtype, device: str, magnitude: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, dtype=torch.float32, device=device) * magnitude).to(dtype)


def reference(x, weight, bias, activation):
    """Return y, and the sums of absolute values that its rounding errors are in proportion to, both in float64."""
    x, weight = x.double(), weight.double()
    z = x @ weight.T
    size = x.abs() @ weight.abs().T
    if bias is not None:
        z, size = z + bias.double(), size + bias.double().abs()
    if activation is None:
        return z, size
    gate, up = z.chunk(2, dim=-1)
    gate_size, up_size = size.chunk(2, dim=-1)
    silu = gate * torch.sigmoid(gate)
    # The slope of silu is at most 1.1.
    return silu * up, 1.1 * gate_size * up.abs() + silu.abs() * up_size


def runs_hopper_kernels() -> bool:
    """Whether GEMMs run in Hopper's kernels: a build for other architectures alone runs on Hopper too, without them."""
    return launch.has_hopper_kernels() and torch.cuda.get_device_capability()[0] == 9


def measure_undisturbed(**options):
    """Return each kernel's least time of several measurements: other processes on the GPU make some longer."""
    measurements = [tuning.measure(**options) for _ in range(5)]
    return {name: min(times[name] for times in measurements) for name in measurements[0]}


def launch_layer(layer, x, y, x_scales=None):
    """Launch a `launch.LinearLayer` on rows of x, in a workspace of just the size that it asks for.

    x_scales: one for each row of x, of codes; None: the layer has the scale, or x has none.
    """
    workspace = torch.full((layer.workspace_bytes(len(x)),), 0xFF, dtype=torch.uint8, device=x.device)
    launch.gemm(
        layer,
        x=x.data_ptr(),
        x_row_stride=x.stride(0),
        y=y.data_ptr(),
        rows=len(x),
        workspace=workspace.data_ptr(),
        stream=torch.cuda.current_stream().cuda_stream,
        x_scales=0 if x_scales is None else x_scales.data_ptr(),
    )
