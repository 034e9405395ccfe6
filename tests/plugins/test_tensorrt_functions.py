"""The functions of qwen_plugins.tensorrt with every version of TensorRT, on the stand-in in NumPy."""

import importlib
import pkgutil
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")

from tests import stand_ins
from tests.stand_ins.numpy_kernels import GEMM_KERNELS
from tests.stand_ins.numpy_plugins import quantized
from tests.stand_ins.numpy_tensorrt import DataType, ITensor, tensor_of

EPS = 1e-5
VERSIONS = [("8.6.0", False), ("10.0.1", False), ("10.14.1", True), ("11.1.0", True)]


@pytest.fixture(params=VERSIONS, ids=lambda given: f"{given[0]}{' strongly typed' if given[1] else ''}")
def tensorrt(request: pytest.FixtureRequest) -> Iterator[types.SimpleNamespace]:
    """Give the package's functions on one version of TensorRT, and an empty network."""
    version, strongly_typed = request.param
    with stand_ins.installed(version) as trt:
        yield types.SimpleNamespace(
            trt=trt,
            functions=importlib.import_module("qwen_plugins.tensorrt"),
            network=trt.INetworkDefinition(strongly_typed),
            major=int(version.split(".")[0]),
            strongly_typed=strongly_typed,
        )


def rows(*shape: int, dtype: type = np.float16) -> ITensor:
    return tensor_of(np.random.default_rng().standard_normal(shape, np.float32).astype(dtype))


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
    assert y.known_type == h.known_type == DataType.HALF
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
    assert q.known_type == DataType.INT8
    assert len(scales) == (0 if static else 1)
    divisor = scale if static else scales[0].array
    assert np.all(np.abs(q.array - np.clip(y / divisor, -128, 127)) <= 0.5 + 1e-3)
    assert not q.array[3].any()
    if not static:
        assert scales[0].shape == (7, 1)
        assert np.all(np.isfinite(scales[0].array))
        np.testing.assert_allclose(scales[0].array[:3, 0], np.max(np.abs(y[:3]), axis=-1) / 127, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "bfloat16"])
def test_constants_keep_their_type(tensorrt: Any, dtype: str) -> None:
    if not hasattr(tensorrt.trt, dtype):
        pytest.skip("TensorRT 8.6 has no bfloat16")
    values = np.arange(-6, 6).reshape(3, 4)
    tensor = tensorrt.functions.constant(tensorrt.network, values, getattr(tensorrt.trt, dtype), "numbers")
    assert tensor.known_type == getattr(tensorrt.trt, dtype)
    assert tuple(tensor.shape) == (3, 4)
    np.testing.assert_array_equal(tensor.array.astype(int), values)
    with pytest.raises(TypeError, match=r"network is a str; expected a tensorrt\.INetworkDefinition"):
        tensorrt.functions.constant("network", values, tensorrt.trt.float32, "numbers")
    with pytest.raises(TypeError, match="array has type bool; expected"):
        tensorrt.functions.constant(tensorrt.network, values > 0, tensorrt.trt.float32, "numbers")


def test_a_name_leads_to_one_place(tensorrt: Any) -> None:
    """No function has the name of a module, which it would hide."""
    for module in pkgutil.iter_modules(tensorrt.functions.__path__):
        assert importlib.import_module(f"qwen_plugins.tensorrt.{module.name}") is getattr(
            tensorrt.functions, module.name
        )


def test_native_float8(tensorrt: Any) -> None:
    arguments = (tensorrt.network, rows(4, 64), np.ones(64), EPS)
    if tensorrt.major < 10:
        with pytest.raises(TypeError, match=r"quant_dtype is DataType.FP8; expected DataType.INT8"):
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
    assert y.known_type == h.known_type == DataType.HALF


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
    assert weight_given.known_type == DataType.FLOAT
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
    assert given.known_type == DataType.BF16
    np.testing.assert_array_equal(given.array, weight)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"network": None}, TypeError, "network is a NoneType; expected a tensorrt.INetworkDefinition"),
        ({"x": np.ones((2, 64), np.float16)}, TypeError, "x is a ndarray; expected a tensorrt.ITensor"),
        ({"x": tensor_of(np.ones((), np.float16))}, ValueError, "x has no dimensions"),
        ({"x": tensor_of(np.ones((2, 64), np.int32))}, TypeError, "x has type DataType.INT32; expected one of"),
        ({"weight": np.ones(63)}, ValueError, r"weight has shape \(63,\); expected \[64\], the last dimension of x"),
        ({"weight": np.ones((1, 64))}, ValueError, r"weight has shape \(1, 64\); expected \[64\]"),
        ({"weight": np.array(["a"] * 64)}, TypeError, "weight has type <U1; expected a floating-point array"),
        (
            {"weight": tensor_of(np.ones(64, np.int8))},
            TypeError,
            "weight has type DataType.INT8; expected DataType.HALF",
        ),
        ({"eps": 0.0}, ValueError, "eps is 0.0; expected a finite number above 0"),
        ({"eps": float("nan")}, ValueError, "eps is nan"),
        ({"eps": "1e-6"}, TypeError, "eps is a str; expected a number"),
        ({"residual": rows(3, 64)}, ValueError, r"residual has shape \(3, 64\); expected that of x, \(2, 64\)"),
        ({"quant_dtype": DataType.HALF}, TypeError, "quant_dtype is DataType.HALF; expected DataType.INT8"),
        ({"scale": -1.0}, ValueError, "scale is -1.0; expected one finite number above 0"),
        ({"scale": np.ones(2)}, ValueError, r"scale is array\(\[1., 1.\]\); expected one"),
        (
            {"scale": tensor_of(np.ones(1, np.float16))},
            TypeError,
            "scale has type DataType.HALF; expected DataType.FLOAT",
        ),
        ({"scale": tensor_of(np.ones((1, 1), np.float32))}, ValueError, r"scale has shape \(1, 1\); expected \[\] or"),
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


def test_gemm_gets_its_fields_and_inputs(tensorrt: Any) -> None:
    x, weight, bias = rows(2, 3, 64), rows(96, 64).array, rows(96).array
    y = tensorrt.functions.gemm(tensorrt.network, x, weight, bias, activation="swiglu", name="gate_up")

    (plugin,) = tensorrt.network.plugins
    assert (plugin.name, plugin.layer) == ("Gemm", "gate_up")
    assert plugin.fields == {"type_id": 1, "bias": 1, "activation": 1, "constant_weight": 1}
    assert set(plugin.kinds.values()) == {"INT32"}
    assert plugin.inputs[0] is x
    np.testing.assert_array_equal(plugin.inputs[1].array, weight)
    np.testing.assert_array_equal(plugin.inputs[2].array, bias)
    assert y.known_type == DataType.HALF


def quantized_module() -> Any:
    """Return qwen_plugins.quantized, which needs the module that is compiled for this version of Python."""
    if quantized is None:
        pytest.skip("the package is not built for this version of Python")
    return quantized


def packed_weight(**changed: Any) -> Any:
    generator = np.random.default_rng(5)
    codes = generator.integers(0, 16, (96, 192), np.uint8)
    given = {"scales": generator.uniform(0.01, 0.02, (96, 3)).astype(np.float16), "bits": 4, "group_size": 64}
    given["zeros"] = generator.integers(0, 16, (96, 3), np.uint8)
    return quantized_module().pack(codes, **(given | changed))


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("plugin", [False, True])
def test_gemm_of_a_packed_weight(tensorrt: Any, permuted: bool, plugin: bool) -> None:
    if not (plugin or tensorrt.strongly_typed):
        pytest.skip("the stand-in's native products need types")
    x, bias, weight = rows(6, 192), rows(96).array, packed_weight()
    order = np.random.default_rng(1).permutation(192) if permuted else None
    y = tensorrt.functions.gemm(
        tensorrt.network, x, weight, bias, activation="swiglu", permutation=order, plugin=plugin, name="gate_up"
    )

    columns = np.arange(192) if order is None else order
    z = x.array[..., columns].astype(np.float32) @ quantized_module().dequantize(weight).T + bias
    gate, up = np.split(z, 2, axis=-1)
    np.testing.assert_allclose(y.array, gate / (1 + np.exp(-gate)) * up, rtol=5e-3, atol=5e-3)
    assert y.known_type == DataType.HALF
    if not plugin:
        assert not tensorrt.network.plugins
        return
    (added,) = tensorrt.network.plugins
    assert (added.name, added.version, added.layer) == ("Gemm", "2", "gate_up")
    sizes = {"in_features": 192, "out_features": 96, "weight_bits": 4, "group_size": 64, "zeros": 1, "scale_type_id": 1}
    assert added.fields == sizes | {"type_id": 1, "bias": 1, "activation": 1, "constant_weight": 1}
    assert [tensor.known_type for tensor in added.inputs[1:4]] == [DataType.INT32] * 3
    assert np.shares_memory(added.inputs[1].array, weight.codes)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": rows(5, 64)}, "weight has 192 columns; expected those of x, 64"),
        (
            {"permutation": np.zeros(192, np.int32)},
            r"permutation has shape \(192,\); expected each of 192 columns once",
        ),
        ({"bias": np.zeros(95)}, r"bias has shape \(95,\)"),
        ({"weight": rows(96, 192).array, "permutation": np.arange(192)}, "permutation is given; expected None unless"),
    ],
)
def test_bad_arguments_with_a_packed_weight(tensorrt: Any, changed: dict[str, Any], message: str) -> None:
    given = {"x": rows(5, 192), "weight": packed_weight()} | changed
    with pytest.raises(ValueError, match=message):
        tensorrt.functions.gemm(tensorrt.network, **given)
    assert tensorrt.network.plugins == []


CODES = {"int8": np.dtype(np.int8), "fp8": np.dtype("float8_e4m3fn")}
LARGEST = {"int8": 127, "fp8": 448}


def words(codes: np.ndarray) -> ITensor:
    return tensor_of(np.ascontiguousarray(codes).view(np.int32))


def codes_of(tensor: ITensor, kind: str) -> np.ndarray:
    assert tensor.known_type == DataType.INT32
    return tensor.array.view(CODES[kind]).astype(np.float64)


def assert_codes(tensor: ITensor, kind: str, exact: np.ndarray, scales: Any) -> None:
    """Check codes against values within the range."""
    scaled = exact / np.asarray(scales, np.float64)
    step = 1.0 if kind == "int8" else 2.0 ** (np.floor(np.log2(np.maximum(np.abs(scaled), 2.0**-6))) - 3)
    assert np.all(np.abs(codes_of(tensor, kind) - scaled) <= step * 0.51)


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("kind", CODES)
def test_norm_to_codes_in_int32(tensorrt: Any, kind: str, static: bool) -> None:
    x, residual = rows(5, 64, dtype=np.float32), rows(5, 64, dtype=np.float32)
    scale = 6.0 / LARGEST[kind] if static else None
    q, *scales, h = tensorrt.functions.rms_norm_quant(
        tensorrt.network, x, np.ones(64, np.float32), EPS, residual=residual, quant_dtype=kind, scale=scale
    )
    (plugin,) = tensorrt.network.plugins
    assert {name: plugin.fields[name] for name in ("out_type_id", "int32_output", "dyn_act_scaling")} == {
        **{"out_type_id": {"int8": 2, "fp8": 6}[kind], "int32_output": 1, "dyn_act_scaling": int(not static)},
    }
    assert q.shape == (5, 16)
    assert q.dynamic_range is None
    assert len(scales) == int(not static)
    assert_codes(q, kind, normalised(h.array), scale if static else scales[0].array)


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("kind", CODES)
def test_quantize(tensorrt: Any, kind: str, static: bool) -> None:
    x = rows(2, 3, 64)
    scale = 6.0 / LARGEST[kind] if static else None
    found = tensorrt.functions.quantize(tensorrt.network, x, kind, scale, name="codes")
    q, scales = (found, scale) if static else (found[0], found[1].array)
    (plugin,) = tensorrt.network.plugins
    assert (plugin.name, plugin.layer) == ("QuantizeTensor" if static else "QuantizePerToken", "codes")
    assert plugin.fields == {"type_id": 1, "out_type_id": {"int8": 2, "fp8": 6}[kind], "int32_output": 1}
    assert_codes(q, kind, x.array.astype(np.float64), scales)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"network": None}, TypeError, "network is a NoneType; expected a tensorrt.INetworkDefinition"),
        (
            {"x": rows(2, 66)},
            ValueError,
            r"x has shape \(2, 66\); expected a last dimension that is a known multiple of",
        ),
        ({"x": rows(2, 64).array}, TypeError, "x is a ndarray; expected a tensorrt.ITensor"),
        ({"x": words(np.zeros((2, 64), np.int8))}, TypeError, "x has type DataType.INT32; expected one of"),
        ({"quant_dtype": "int4"}, ValueError, "quant_dtype is 'int4'; expected one of 'int8', 'fp8'"),
        ({"scale": 0.0}, ValueError, "scale is 0.0; expected one finite number above 0"),
    ],
)
def test_bad_arguments_of_quantize(
    tensorrt: Any, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tensorrt.functions.quantize(
            **({"network": tensorrt.network, "x": rows(2, 64), "quant_dtype": "int8"} | changed)
        )
    assert tensorrt.network.plugins == []


def test_norm_to_codes_in_int32_is_a_plugin(tensorrt: Any) -> None:
    for changed, message in (
        ({"quant_dtype": "fp8", "plugin": False}, "plugin is False; expected True with the quant_dtype 'fp8'"),
        ({"quant_dtype": "float8"}, "quant_dtype is 'float8'; expected one of 'int8', 'fp8'"),
        ({"quant_dtype": "int8", "x": rows(2, 66), "weight": np.ones(66)}, "x has shape .* known multiple of 4"),
    ):
        given = {"network": tensorrt.network, "x": rows(2, 64), "weight": np.ones(64)} | changed
        with pytest.raises(ValueError, match=message):
            tensorrt.functions.rms_norm_quant(**given)


def eight_bit_operands(kind: str, blocks: bool = False) -> dict[str, Any]:
    generator = np.random.default_rng(3)
    if kind == "int8":
        x, weight = (generator.integers(-127, 128, shape, np.int8) for shape in ((6, 192), (96, 192)))
    else:
        x, weight = (generator.normal(0, 8, shape).astype(CODES[kind]) for shape in ((6, 192), (96, 192)))
        weight = weight.view(np.uint8)
    scales = generator.uniform(0.01, 0.02, (1, 2) if blocks else (96, 1)).astype(np.float32)
    return {"x": words(x), "weight": weight, "weight_scales": scales}


def exact_eight_bit(kind: str, given: dict[str, Any], x_scales: Any, bias: np.ndarray) -> np.ndarray:
    weight = given["weight"].view(CODES[kind]).astype(np.float64)
    scales = given["weight_scales"].astype(np.float64)
    if scales.shape == (1, 2):
        scales = scales.repeat(128, 1)[:, :192]
    z = codes_of(given["x"], kind) @ (weight * scales).T * x_scales + bias
    gate, up = np.split(z, 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * up


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize(("kind", "blocks"), [("int8", False), ("fp8", False), ("fp8", True)])
def test_scaled_gemm(tensorrt: Any, kind: str, blocks: bool, per_token: bool, quantized: bool) -> None:
    given = eight_bit_operands(kind, blocks)
    bias = rows(96).array
    x_scales = tensor_of(np.linspace(1e-3, 3e-3, 6, dtype=np.float32)[:, None]) if per_token else 2e-3
    exact = exact_eight_bit(kind, given, x_scales.array if per_token else x_scales, bias)
    y_scale = np.abs(exact).max() / LARGEST[kind] if quantized else None
    y = tensorrt.functions.scaled_gemm(
        tensorrt.network,
        **given,
        x_scales=x_scales,
        bias=bias,
        dtype=DataType.HALF,
        activation="swiglu",
        y_scale=y_scale,
        kernels=[(16, "stream")],
        name="gate_up",
    )
    (plugin,) = tensorrt.network.plugins
    assert (plugin.name, plugin.version, plugin.layer) == ("Gemm", "3", "gate_up")
    assert plugin.fields == {
        **{"type_id": 1, "x_type_id": {"int8": 2, "fp8": 6}[kind], "in_features": 192, "out_features": 96},
        **{"group_size": 128 if blocks else 0, "has_per_token_scaling": int(per_token)},
        **{"quantize_output": int(quantized), "bias": 1, "activation": 1, "constant_weight": 1},
        "kernels": [16, GEMM_KERNELS["stream"]],
    }
    assert np.shares_memory(plugin.inputs[1].array, given["weight"])
    if quantized:
        assert_codes(y, kind, exact, y_scale)
    else:
        assert y.known_type == DataType.HALF
        np.testing.assert_allclose(y.array, exact, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"network": None}, TypeError, "network is a NoneType; expected a tensorrt.INetworkDefinition"),
        ({"x": rows(6, 192)}, ValueError, r"x has shape \(6, 192\); expected \[..., in_features / 4\], here .* is 192"),
        ({"dtype": DataType.INT8}, TypeError, "y has type DataType.INT8; expected one of"),
        ({"activation": "gelu"}, ValueError, "activation is 'gelu'; expected None or 'swiglu'"),
        ({"weight": np.zeros((96, 192), np.float16)}, TypeError, "weight is of float16; expected an array of int8, or"),
        ({"weight": [1]}, TypeError, "weight is of list; expected an array of int8, or of e4m3"),
        (
            {"weight": np.zeros((96, 190), np.int8)},
            ValueError,
            r"weight has shape \(96, 190\); expected .* multiple of 4",
        ),
        ({"weight_scales": np.ones(95)}, ValueError, r"weight_scales has shape \(95,\); expected \(96,\)$"),
        ({"weight_scales": np.ones((1, 2))}, ValueError, r"weight_scales has shape \(1, 2\); expected \(96,\)$"),
        ({"x_scales": 0.0}, ValueError, "x_scales is 0.0; expected one finite number above 0"),
        (
            {"x_scales": rows(5, 1, dtype=np.float32)},
            ValueError,
            r"x_scales has shape \(5, 1\); expected .* \(6, 1\), or",
        ),
        ({"y_scale": -1}, ValueError, "y_scale is -1; expected one finite number above 0"),
        ({"bias": np.ones(95)}, ValueError, r"bias has shape \(95,\); expected \[out_features\], here \(96,\)"),
        (
            {"weight": np.zeros((90, 192), np.int8), "y_scale": 1.0},
            ValueError,
            "weight has 90 rows; expected a multiple of 4",
        ),
    ],
)
def test_bad_arguments_of_scaled_gemm(
    tensorrt: Any, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"network": tensorrt.network, "x_scales": 0.03, "dtype": DataType.HALF} | eight_bit_operands("int8")
    with pytest.raises(error, match=message):
        tensorrt.functions.scaled_gemm(**(given | changed))
    assert tensorrt.network.plugins == []


def test_gemm_takes_kernels_by_the_number_of_rows(tensorrt: Any) -> None:
    kernels = [(16, "stream"), (64, "cublas_lt:2"), (100, "rules")]
    tensorrt.functions.gemm(tensorrt.network, rows(5, 64), rows(96, 64), kernels=kernels)

    (plugin,) = tensorrt.network.plugins
    assert plugin.fields["kernels"] == [16, GEMM_KERNELS["stream"], 64, GEMM_KERNELS["cublas_lt:2"], 100, 0]
    assert plugin.kinds["kernels"] == "INT32"


@pytest.mark.parametrize(
    ("kernels", "message"),
    [
        ([(16, "fastest")], "this build of qwen_plugins has no GEMM kernel 'fastest'"),
        ([(0, "stream")], r"kernels has the rows \[0\]; expected numbers that increase from 1 on"),
        ([(16, "stream"), (16, "rules")], r"kernels has the rows \[16, 16\]"),
        ([(2**31, "stream")], r"kernels has the rows \[2147483648\]"),
        ([(n, "stream") for n in range(1, 34)], "kernels has 33 pairs; expected at most 32"),
    ],
)
def test_bad_kernels(tensorrt: Any, kernels: list[tuple[int, str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tensorrt.functions.gemm(tensorrt.network, rows(5, 64), rows(96, 64), kernels=kernels)
    assert tensorrt.network.plugins == []


def test_gemm_does_not_copy_a_weight_of_the_right_type(tensorrt: Any) -> None:
    x, weight = rows(5, 64), rows(96, 64).array
    tensorrt.functions.gemm(tensorrt.network, x, weight)
    tensorrt.functions.gemm(tensorrt.network, x, tensorrt.trt.Weights(weight))
    tensorrt.functions.gemm(tensorrt.network, x, weight.astype(np.float32))

    as_array, as_weights, converted = (plugin.inputs[1].array for plugin in tensorrt.network.plugins)
    assert np.shares_memory(as_array, weight)
    assert np.shares_memory(as_weights, weight)
    assert as_weights.shape == (96, 64)
    np.testing.assert_array_equal(converted, weight)


def test_gemm_of_bfloat16(tensorrt: Any) -> None:
    import ml_dtypes

    if tensorrt.major < 10:
        pytest.skip("TensorRT 8.6 has no bfloat16")
    weight = rows(96, 64).array.astype(ml_dtypes.bfloat16)
    tensorrt.functions.gemm(tensorrt.network, rows(5, 64, dtype=ml_dtypes.bfloat16), weight)
    given = tensorrt.network.plugins[0].inputs[1]
    assert given.known_type == DataType.BF16
    assert np.shares_memory(given.array, weight)


@pytest.mark.parametrize("given", [True, False, None])
def test_which_weights_are_constant(tensorrt: Any, given: bool | None) -> None:
    """By default those that are given as arrays."""
    x = rows(5, 64)
    tensorrt.functions.gemm(tensorrt.network, x, rows(96, 64), constant_weight=given)
    tensorrt.functions.gemm(tensorrt.network, x, rows(96, 64).array, rows(96), constant_weight=given)
    tensorrt.functions.gemm(tensorrt.network, x, rows(96, 64).array, rows(96).array, constant_weight=given)

    assert [plugin.fields["constant_weight"] for plugin in tensorrt.network.plugins] == [
        *[int(bool(given))] * 2,
        1 if given is None else int(given),
    ]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"network": None}, TypeError, "network is a NoneType; expected a tensorrt.INetworkDefinition"),
        ({"x": np.ones((2, 64))}, TypeError, "x is a ndarray; expected a tensorrt.ITensor"),
        ({"x": tensor_of(np.ones((), np.float16))}, ValueError, r"x has shape \(\); expected \[..., in_features\]"),
        ({"x": tensor_of(np.ones((2, 64), np.int8))}, TypeError, "x has type DataType.INT8; expected one of"),
        ({"weight": np.ones((96, 63))}, ValueError, r"weight has shape \(96, 63\); .* here \(-1, 64\)"),
        ({"weight": np.ones(64)}, ValueError, r"weight has shape \(64,\); expected \[out_features, in_features\]"),
        ({"weight": rows(96, 63)}, ValueError, r"weight has shape \(96, 63\); expected"),
        ({"weight": np.ones((0, 64))}, ValueError, "weight has 0 rows; expected a known number"),
        (
            {"weight": np.ones((95, 64)), "bias": None, "activation": "swiglu"},
            ValueError,
            "weight has 95 rows; .* even",
        ),
        ({"weight": np.array([["a"] * 64])}, TypeError, "weight has type <U1; expected a floating-point array"),
        ({"bias": np.ones(95)}, ValueError, r"bias has shape \(95,\); expected \[out_features\], here \(96,\)"),
        ({"bias": rows(1, 96)}, ValueError, r"bias has shape \(1, 96\); expected \[out_features\]"),
        ({"activation": "gelu"}, ValueError, "activation is 'gelu'; expected None or 'swiglu'"),
    ],
)
def test_bad_arguments_of_gemm(tensorrt: Any, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"network": tensorrt.network, "x": rows(2, 64), "weight": np.ones((96, 64)), "bias": np.ones(96)}
    with pytest.raises(error, match=message):
        tensorrt.functions.gemm(**(arguments | changed))
    assert tensorrt.network.plugins == []


def test_gemm_of_weights_of_a_wrong_size_or_type(tensorrt: Any) -> None:
    for array, error, message in (
        (np.ones(95 * 64 + 1, np.float16), ValueError, r"weight has 6081 elements; expected \[out_features, in_fea"),
        (np.ones(96 * 64, np.float32), TypeError, "weight has type DataType.FLOAT; expected DataType.HALF"),
    ):
        with pytest.raises(error, match=message):
            tensorrt.functions.gemm(tensorrt.network, rows(2, 64), tensorrt.trt.Weights(array))


def attention_arguments(network: Any) -> dict[str, Any]:
    """Return arguments for 8 tokens of 3 sequences, 4 heads and 2 kv heads of 64 elements, caches of 20 positions."""
    integers = {"cu_seqlens": (4,), "past_lengths": (3,), "rotary_offsets": (3,), "semaphores": (4, 4)}
    return {
        "network": network,
        "qkv": rows(8, 512),
        "past_key_value": rows(4, 2, 2, 20, 64),
        **{name: tensor_of(np.zeros(shape, np.int32)) for name, shape in integers.items()},
        "rotary_table": np.ones((20, 64), np.float32),
        **{"num_heads": 4, "num_kv_heads": 2, "head_size": 64},
    }


def test_gpt_attention_gets_its_fields_and_inputs(tensorrt: Any) -> None:
    arguments = attention_arguments(tensorrt.network)
    optional = {"query_scale": np.ones(20), "q_norm_weight": rows(64), "k_norm_weight": np.ones(64)}
    context, present = tensorrt.functions.gpt_attention(
        **arguments, **optional, q_scaling=2.0, norm_eps=1e-5, name="attention"
    )

    (plugin,) = tensorrt.network.plugins
    assert (plugin.name, plugin.version, plugin.layer) == ("GptAttention", "1", "attention")
    assert plugin.fields.pop("norm_eps") == pytest.approx(1e-5)
    assert plugin.fields == {
        **{"type_id": 1, "num_heads": 4, "num_kv_heads": 2, "head_size": 64, "rotary_embedding_dim": 64},
        **{"position_embedding_type": 2, "q_scaling": 2.0, "query_scale": 1, "qk_norm": 1},
    }
    floats = {"q_scaling", "norm_eps"}
    assert plugin.kinds == {name: "FLOAT32" if name in floats else "INT32" for name in plugin.kinds}
    given = plugin.inputs
    names = ("qkv", "past_key_value", "cu_seqlens", "past_lengths", "rotary_offsets")
    assert given[:5] == [arguments[name] for name in names]
    assert given[6] is arguments["semaphores"]
    assert given[8] is optional["q_norm_weight"]
    assert [tensor.known_type for tensor in (given[5], given[7], given[9])] == [DataType.FLOAT] * 2 + [DataType.HALF]
    assert context.known_type == present.known_type == DataType.HALF


def page_arguments(network: Any, kv_cache_dtype: str = "auto") -> dict[str, Any]:
    """Return the same arguments over a cache of 9 pages, of which a sequence has at most 5."""
    words = 2 * 2 * 64 * (64 // 4 + 1)
    pool = rows(9, 2, 2, 64, 64) if kv_cache_dtype == "auto" else tensor_of(np.zeros((9, words), np.int32))
    pages = tensor_of(np.zeros((3, 5), np.int32))
    more = {"past_key_value": pool, "pages": pages, "kv_cache_dtype": kv_cache_dtype}
    return attention_arguments(network) | more


@pytest.mark.parametrize(("kv_cache_dtype", "number"), [("auto", 0), ("int8", 1), ("fp8", 2)])
def test_pages_make_it_version_2(tensorrt: Any, kv_cache_dtype: str, number: int) -> None:
    arguments = page_arguments(tensorrt.network, kv_cache_dtype)
    context, present = tensorrt.functions.gpt_attention(**arguments)

    (plugin,) = tensorrt.network.plugins
    assert (plugin.name, plugin.version) == ("GptAttention", "2")
    assert (plugin.fields["tokens_per_block"], plugin.fields["kv_cache_type"]) == (64, number)
    names = ("qkv", "past_key_value", "cu_seqlens", "past_lengths", "pages", "rotary_offsets")
    assert plugin.inputs[:6] == [arguments[name] for name in names]
    assert plugin.inputs[7:] == [arguments["semaphores"]]
    assert context.known_type == DataType.HALF
    assert present.known_type == (DataType.HALF if number == 0 else DataType.INT32)
    assert tuple(present.shape) == tuple(arguments["past_key_value"].shape)


@pytest.mark.parametrize(
    ("kv_cache_dtype", "changed", "error", "message"),
    [
        ("auto", {"past_key_value": rows(9, 2, 2, 32, 64)}, ValueError, r"here \(-1, 2, 2, 64, 64\)"),
        ("auto", {"pages": tensor_of(np.zeros((3, 5), np.int64))}, TypeError, "pages has type DataType.INT64"),
        ("auto", {"pages": tensor_of(np.zeros(3, np.int32))}, ValueError, r"expected \[sequences, max_pages\]"),
        ("auto", {"tokens_per_block": 32}, ValueError, "tokens_per_block is 32; expected 64"),
        ("auto", {"kv_cache_dtype": "int4"}, ValueError, "kv_cache_dtype is 'int4'; expected one of auto, int8, fp8"),
        ("fp8", {"pages": None}, ValueError, "kv_cache_dtype is 'fp8'; expected pages with it"),
        ("int8", {"past_key_value": rows(9, 2, 2, 64, 64)}, ValueError, r"here \(-1, 4352\)"),
        ("int8", {"past_key_value": rows(9, 4352)}, TypeError, "past_key_value has type DataType.HALF; expected"),
    ],
)
def test_bad_pages(
    tensorrt: Any, kv_cache_dtype: str, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tensorrt.functions.gpt_attention(**(page_arguments(tensorrt.network, kv_cache_dtype) | changed))
    assert tensorrt.network.plugins == []


@pytest.mark.parametrize(
    ("changed", "rotary_dim", "number"),
    [
        ({}, 64, 2),
        ({"rotary_embedding_dim": 32, "rotary_table": np.ones((20, 32))}, 32, 2),
        ({"position_embedding_type": "rope_gptj"}, 64, 1),
        ({"rotary_table": None}, 0, 0),
        ({"rotary_table": None, "position_embedding_type": "learned_absolute"}, 0, 0),
        ({"rotary_table": None, "rotary_embedding_dim": 0}, 0, 0),
    ],
)
def test_position_embeddings(tensorrt: Any, changed: dict[str, Any], rotary_dim: int, number: int) -> None:
    tensorrt.functions.gpt_attention(**(attention_arguments(tensorrt.network) | changed))

    (plugin,) = tensorrt.network.plugins
    assert (plugin.fields["rotary_embedding_dim"], plugin.fields["position_embedding_type"]) == (rotary_dim, number)
    assert len(plugin.inputs) == (7 if rotary_dim else 6)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"network": None}, TypeError, "network is a NoneType"),
        ({"qkv": np.ones((8, 512))}, TypeError, "qkv is a ndarray; expected a tensorrt.ITensor"),
        ({"qkv": rows(8, 256)}, ValueError, r"qkv has shape \(8, 256\); expected \[tokens, .* here \(-1, 512\)"),
        (
            {"past_key_value": rows(4, 2, 4, 20, 64)},
            ValueError,
            r"past_key_value has shape .* here \(-1, 2, 2, -1, 64\)",
        ),
        (
            {"past_key_value": rows(4, 2, 2, 20, 64, dtype=np.float32)},
            TypeError,
            "past_key_value has type DataType.FLOAT",
        ),
        ({"past_lengths": rows(3)}, TypeError, "past_lengths has type DataType.HALF; expected DataType.INT32"),
        ({"cu_seqlens": np.zeros(4, np.int32)}, TypeError, "cu_seqlens is a ndarray"),
        ({"semaphores": tensor_of(np.zeros((4, 2), np.int32))}, ValueError, r"semaphores has shape \(4, 2\)"),
        ({"rotary_table": np.ones((20, 32))}, ValueError, r"rotary_table has shape \(20, 32\)"),
        (
            {"rotary_embedding_dim": 63},
            ValueError,
            "rotary_embedding_dim is 63; expected an even number up to head_size",
        ),
        ({"rotary_embedding_dim": 0}, ValueError, "rotary_embedding_dim is 0; expected no rotary_table with it"),
        ({"rotary_table": None, "rotary_embedding_dim": 64}, ValueError, "is 64; expected a rotary_table with it"),
        (
            {"position_embedding_type": "alibi"},
            ValueError,
            "position_embedding_type is 'alibi'; expected one of learned",
        ),
        ({"position_embedding_type": "learned_absolute"}, ValueError, "'learned_absolute'; expected no rotary_table"),
        ({"num_heads": "4"}, TypeError, "num_heads is a str; expected an integer"),
        ({"num_kv_heads": 3}, ValueError, "num_heads is 4 and num_kv_heads 3; expected a divisor of num_heads"),
        ({"head_size": 72}, ValueError, "head_size is 72; expected one of 32, 64, 80, 96, 128, 256"),
        ({"q_scaling": 0.0}, ValueError, "q_scaling is 0.0; expected a finite number above 0"),
        ({"norm_eps": float("nan")}, ValueError, "norm_eps is nan"),
        ({"q_norm_weight": np.ones(64)}, ValueError, "only one of q_norm_weight and k_norm_weight"),
        ({"query_scale": np.ones((20, 1))}, ValueError, r"query_scale has shape \(20, 1\); expected \[rows\]"),
    ],
)
def test_bad_arguments_of_gpt_attention(
    tensorrt: Any, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tensorrt.functions.gpt_attention(**(attention_arguments(tensorrt.network) | changed))
    assert tensorrt.network.plugins == []
