"""The custom operators as PyTorch sees them: opcheck, torch.compile, fake tensors; and the package without PyTorch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import qwen_plugins
import qwen_plugins.torch_ops
from tests.qwen_plugins.test_rms_norm import DEVICES, make, make_weight

OPS = torch.ops.qwen_plugins


def operator_calls(device):
    x = make(3, 40, dtype=torch.float16, device=device)
    residual = make(3, 40, dtype=torch.float16, device=device)
    weight = make_weight(40, torch.float16, device)
    scale = torch.tensor([0.05], device=device)
    norm = (1e-6, False, False)
    quant = (None, 1e-6, torch.int8, True)
    smoothed = (weight.abs() + 1, 1e-6, torch.float8_e4m3fn, False)
    return {
        "rms_norm": (x, weight, *norm),
        "rms_norm_residual": (x, residual, weight, *norm),
        "rms_norm_out": (x, weight, torch.empty_like(x), *norm),
        "rms_norm_residual_out": (x, residual, weight, torch.empty_like(x), torch.empty_like(x), *norm),
        "rms_norm_quant": (x, weight, scale, *quant),
        "rms_norm_quant_residual": (x, residual, weight, scale, *smoothed),
        "rms_norm_dynamic_quant": (x, weight, *smoothed),
        "rms_norm_dynamic_quant_residual": (x, residual, weight, *quant),
        "quantize": (x, scale, torch.int8),
        "dynamic_quantize": (x, torch.float8_e4m3fn),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", list(operator_calls("cpu")))
def test_opcheck(device, name):
    torch.library.opcheck(getattr(OPS, name).default, operator_calls(device)[name])


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_as_one_graph(device):
    weight = make_weight(64, torch.float32, device)

    def layer(x, residual):
        y, residual = qwen_plugins.rms_norm(x, weight, residual=residual)
        q, scales = qwen_plugins.rms_norm_quant(y * 2, weight)
        out = torch.empty_like(y)
        qwen_plugins.rms_norm(y, weight, out=out)
        q2, scales2 = qwen_plugins.quantize(out, torch.int8)
        return q.float() * scales + out, residual, q2.float() * scales2

    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    for tokens in (3, 5):
        x = make(tokens, 64, dtype=torch.float32, device=device)
        residual = make(tokens, 64, dtype=torch.float32, device=device)
        for actual, expected in zip(compiled(x, residual), layer(x, residual), strict=True):
            torch.testing.assert_close(actual, expected)


def test_fake_tensors_have_the_shapes_of_real_ones():
    x = torch.empty(2, 3, 8, device="meta", dtype=torch.float16)
    weight = torch.empty(8, device="meta", dtype=torch.float16)
    y, h = qwen_plugins.rms_norm(x, weight, residual=x)
    q, scales = qwen_plugins.rms_norm_quant(x, weight, quant_dtype=torch.float8_e4m3fn)
    assert (y.shape, h.dtype) == (x.shape, torch.float16)
    assert (q.shape, q.dtype, scales.shape) == (x.shape, torch.float8_e4m3fn, (2, 3, 1))
    q, scales = qwen_plugins.quantize(x, torch.int8)
    assert (q.shape, q.dtype, scales.shape) == (x.shape, torch.int8, (2, 3, 1))


def test_importing_the_package_does_not_import_torch():
    code = "import sys, qwen_plugins as q; assert 'torch' not in sys.modules; q.rms_norm; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_torch_the_error_names_the_extra():
    code = "import sys; sys.modules['torch'] = None; import qwen_plugins; qwen_plugins.rms_norm"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert 'qwen_plugins.rms_norm needs PyTorch: pip install "qwen-plugins[torch]"' in result.stderr


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="has no attribute 'layer_norm'"):
        _ = qwen_plugins.layer_norm
