"""qwen_plugins.tensorrt's functions for every version of TensorRT, on a stand-in that computes with NumPy."""

import importlib
import sys
import types
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")

from numpy_tensorrt import DataType, INetworkDefinition, ITensor, make_module

EPS = 1e-5
VERSIONS = [("8.6.0", False), ("10.0.1", False), ("10.14.1", True), ("11.1.0", True)]


@pytest.fixture(params=VERSIONS, ids=lambda given: f"{given[0]}{' strongly typed' if given[1] else ''}")
def tensorrt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """The package's functions on one version of TensorRT, and an empty network."""
    version, strongly_typed = request.param
    monkeypatch.setitem(sys.modules, "tensorrt", make_module(version))
    for name in modules_with_tensorrt():
        monkeypatch.delitem(sys.modules, name)
    functions = importlib.import_module("qwen_plugins.tensorrt")
    for name in modules_with_tensorrt():
        monkeypatch.setitem(sys.modules, name, sys.modules[name])  # forgotten after the test
    return types.SimpleNamespace(
        functions=functions,
        network=INetworkDefinition(strongly_typed),
        major=int(version.split(".")[0]),
        strongly_typed=strongly_typed,
    )


def modules_with_tensorrt() -> list[str]:
    """The package's modules that import tensorrt: all but the one that looks for it."""
    prefixes = ("qwen_plugins.tensorrt", "qwen_plugins._tensorrt_")
    return [name for name in sys.modules if name.startswith(prefixes) and not name.endswith("_registration")]


def rows(*shape: int, dtype: type = np.float16) -> ITensor:
    return ITensor(np.random.default_rng().standard_normal(shape, np.float32).astype(dtype))


def normalised(h: np.ndarray) -> np.ndarray:
    h = h.astype(np.float64)
    return h / np.sqrt(np.mean(h * h, axis=-1, keepdims=True) + EPS)


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64)])
def test_native_rms_norm_computes_the_operation(tensorrt: Any, shape: tuple[int, ...]) -> None:
    x, residual = rows(*shape), rows(*shape)
    weight = np.random.default_rng().normal(1, 0.2, 64)
    y, h = tensorrt.functions.rms_norm(
        tensorrt.network, x, weight, EPS, residual, unit_offset=True, round_before_weight=True, plugin=False
    )

    np.testing.assert_array_equal(h.array, x.array + residual.array)
    assert y.dtype == h.dtype == DataType.HALF
    exact = normalised(h.array) * (weight.astype(np.float16).astype(np.float64) + 1)
    np.testing.assert_allclose(y.array.astype(float), exact, rtol=2e-3)


@pytest.mark.parametrize("static", [True, False])
def test_native_quantization_computes_the_operation(tensorrt: Any, static: bool) -> None:
    x, residual = rows(7, 64), rows(7, 64)
    x.array[3] = -residual.array[3]  # a row of zeros
    weight, smoothing = np.ones(64, np.float32), np.random.default_rng().uniform(0.5, 2, 64).astype(np.float32)
    scale = 0.02 if static else None
    q, *scales, h = tensorrt.functions.rms_norm_quant(
        tensorrt.network, x, weight, EPS, scale=scale, smoothing=smoothing, residual=residual, plugin=False
    )

    y = normalised(h.array) / smoothing
    assert q.dtype == DataType.INT8
    assert len(scales) == (0 if static else 1)
    divisor = scale if static else scales[0].array
    assert np.all(np.abs(q.array - np.clip(y / divisor, -128, 127)) <= 0.5 + 1e-3)
    assert not q.array[3].any()
    if not static:
        assert scales[0].shape == (7, 1)
        assert np.all(np.isfinite(scales[0].array))
        np.testing.assert_allclose(scales[0].array[:3, 0], np.max(np.abs(y[:3]), axis=-1) / 127, rtol=1e-5)


def test_native_float8(tensorrt: Any) -> None:
    arguments = (tensorrt.network, rows(4, 64), np.ones(64), EPS)
    if tensorrt.major < 10:
        with pytest.raises(ValueError, match=r"quant_dtype is DataType.FP8; a plug-in gives DataType.INT8"):
            tensorrt.functions.rms_norm_quant(*arguments, quant_dtype=DataType.FP8, plugin=False)
        return
    q, scales = tensorrt.functions.rms_norm_quant(*arguments, quant_dtype=DataType.FP8, plugin=False)
    y = normalised(arguments[1].array)
    np.testing.assert_allclose(q.array.astype(np.float64) * scales.array, y, rtol=0.07, atol=1e-2)


def test_plugin_gets_its_fields_and_inputs(tensorrt: Any) -> None:
    x, residual, weight = rows(5, 64), rows(5, 64), rows(64)
    y, h = tensorrt.functions.rms_norm(
        tensorrt.network, x, weight, EPS, residual, unit_offset=True, round_before_weight=True, name="ln_1"
    )

    (plugin,) = tensorrt.network.plugins
    assert (plugin.name, plugin.layer) == ("RmsNorm", "ln_1")
    assert plugin.phase == ("build" if tensorrt.major >= 10 else None)
    assert plugin.fields.pop("eps") == pytest.approx(EPS)
    assert plugin.fields == {
        **{"type_id": 1, "weight_type_id": 1, "residual": 1},
        **{"unit_offset": 1, "round_before_weight": 1},
    }
    assert plugin.kinds == {name: "FLOAT32" if name == "eps" else "INT32" for name in plugin.kinds}
    assert plugin.inputs == [x, weight, residual]
    assert y.dtype == h.dtype == DataType.HALF


@pytest.mark.parametrize("static", [True, False])
def test_quantization_plugin_gets_its_fields_and_inputs(tensorrt: Any, static: bool) -> None:
    x, residual = rows(5, 64), rows(5, 64)
    smoothing, scale = rows(64, dtype=np.float32), rows(1, dtype=np.float32) if static else None
    outputs = tensorrt.functions.rms_norm_quant(
        tensorrt.network, x, np.ones(64, np.float32), EPS, scale=scale, smoothing=smoothing, residual=residual
    )

    (plugin,) = tensorrt.network.plugins
    assert plugin.fields.pop("eps") == pytest.approx(EPS)
    assert plugin.fields == {
        **{"type_id": 1, "weight_type_id": 0, "residual": 1, "dyn_act_scaling": int(not static), "out_type_id": 2},
        **{"smoothing": 1, "smoothing_type_id": 0, "unit_offset": 0},
    }
    x_given, weight_given, *others = plugin.inputs
    assert x_given is x
    assert weight_given.dtype == DataType.FLOAT
    assert others == [residual, *([scale] if static else []), smoothing]
    assert len(outputs) == (2 if static else 3)
    assert outputs[0].dynamic_range == (None if tensorrt.strongly_typed else (-127, 127))


def test_bfloat16_weights(tensorrt: Any) -> None:
    import ml_dtypes

    x = rows(5, 64, dtype=ml_dtypes.bfloat16)
    weight = np.random.default_rng().normal(1, 0.2, 64).astype(ml_dtypes.bfloat16)
    if tensorrt.major < 10:
        with pytest.raises(TypeError, match=r"x has type DataType.BF16; expected one of"):
            tensorrt.functions.rms_norm(tensorrt.network, x, weight)
        return
    tensorrt.functions.rms_norm(tensorrt.network, x, weight)
    given = tensorrt.network.plugins[0].inputs[1]
    assert given.dtype == DataType.BF16
    np.testing.assert_array_equal(given.array, weight)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"network": None}, TypeError, "network is a NoneType; expected a tensorrt.INetworkDefinition"),
        ({"x": np.ones((2, 64), np.float16)}, TypeError, "x is a ndarray; expected a tensorrt.ITensor"),
        ({"x": ITensor(np.ones((), np.float16))}, ValueError, "x has no dimensions"),
        ({"x": ITensor(np.ones((2, 64), np.int32))}, TypeError, "x has type DataType.INT32; expected one of"),
        ({"weight": np.ones(63)}, ValueError, r"weight has shape \(63,\); expected \[64\], the last dimension of x"),
        ({"weight": np.ones((1, 64))}, ValueError, r"weight has shape \(1, 64\); expected \[64\]"),
        ({"weight": np.array(["a"] * 64)}, TypeError, "weight has type <U1; expected a floating-point array"),
        ({"weight": ITensor(np.ones(64, np.int8))}, TypeError, "weight has type DataType.INT8; expected DataType.HALF"),
        ({"eps": 0.0}, ValueError, "eps is 0.0; expected a finite number above 0"),
        ({"eps": float("nan")}, ValueError, "eps is nan"),
        ({"residual": rows(3, 64)}, ValueError, r"residual has shape \(3, 64\); expected that of x, \(2, 64\)"),
        ({"quant_dtype": DataType.HALF}, ValueError, "quant_dtype is DataType.HALF"),
        ({"scale": -1.0}, ValueError, "scale is -1.0; expected one finite number above 0"),
        ({"scale": np.ones(2)}, ValueError, r"scale is array\(\[1., 1.\]\); expected one"),
        ({"scale": ITensor(np.ones(1, np.float16))}, ValueError, r"scale is DataType.HALF of shape \(1,\)"),
        ({"smoothing": np.ones(3)}, ValueError, r"smoothing has shape \(3,\)"),
    ],
)
def test_bad_arguments(tensorrt: Any, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"network": tensorrt.network, "x": rows(2, 64), "weight": np.ones(64, np.float16)} | changed
    with pytest.raises(error, match=message):
        tensorrt.functions.rms_norm_quant(**arguments)
    if not changed.keys() & {"quant_dtype", "scale", "smoothing"}:
        with pytest.raises(error, match=message):
            tensorrt.functions.rms_norm(**arguments)
    assert tensorrt.network.plugins == []
