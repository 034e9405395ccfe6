"""Engines with the plug-ins on a real TensorRT and a GPU, against float64.

    pytest tests/plugins -m tensorrt

Needs tensorrt, cuda-bindings and NumPy; no torch.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

trt = pytest.importorskip("tensorrt", reason="TensorRT is not installed", exc_type=ImportError)
pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

import qwen_plugins.tensorrt as plugins  # noqa: E402
from qwen_plugins.registration import find_creator  # noqa: E402
from support.tensorrt_engines import LOG, Engine, Graph, Input, build_plan, check, cudart  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.tensorrt]

EPS = 1e-5
TYPES = {"float32": trt.float32, "float16": trt.float16}
NUMPY_TYPES = {"float32": np.float32, "float16": np.float16}


def rows_input(dtype: str, hidden_size: int, max_tokens: int = 8192, *, min_tokens: int = 1) -> Input:
    return Input(TYPES[dtype], (-1, hidden_size), (min_tokens,), (64,), (max_tokens,))


def add_all_modes(
    weights: dict[str, np.ndarray], *, plugin: bool = True
) -> Callable[[Any, dict[str, Any]], dict[str, Any]]:
    """Add every mode of both operations on one x to a network."""

    def describe(network: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        x, residual = tensors["x"], tensors["residual"]
        weight, weight32, smoothing = weights["weight"], weights["weight"].astype(np.float32), weights["smoothing"]
        common = {"eps": EPS, "plugin": plugin}
        out = {"y": plugins.rms_norm(network, x, weight, **common)}
        out["y_residual"], out["h"] = plugins.rms_norm(network, x, weight32, residual=residual, **common)
        out["y_offset"] = plugins.rms_norm(network, x, weight, unit_offset=True, **common)
        out["y_rounded"] = plugins.rms_norm(network, x, weight, round_before_weight=True, **common)
        out["q"], out["scales"] = plugins.rms_norm_quant(network, x, weight, **common)
        out["q_smooth"], out["scales_smooth"], out["h_smooth"] = plugins.rms_norm_quant(
            network, x, weight, smoothing=smoothing, residual=residual, **common
        )
        out["q_static"] = plugins.rms_norm_quant(network, x, weight, scale=weights["scale"], **common)
        out["q_static_smooth"], out["h_static"] = plugins.rms_norm_quant(
            network, x, weight, scale=weights["scale"], smoothing=smoothing, residual=residual, **common
        )
        return out

    return describe


def make_weights(dtype: str, hidden_size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng()
    return {
        "weight": rng.normal(1, 0.2, hidden_size).astype(NUMPY_TYPES[dtype]),
        "smoothing": rng.uniform(0.3, 3, hidden_size).astype(np.float32),
        "scale": np.float32(0.03),
    }


def make_rows(dtype: str, *shape: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng()
    return {name: rng.standard_normal(shape, np.float32).astype(NUMPY_TYPES[dtype]) for name in ("x", "residual")}


def normalised(h: np.ndarray) -> np.ndarray:
    h = h.astype(np.float64)
    return h / np.sqrt(np.mean(h * h, axis=-1, keepdims=True) + EPS)


def assert_within_units(actual: np.ndarray, exact: np.ndarray, units: float) -> None:
    """Check that values are at most ``units`` units in the last place away from the exact ones."""
    unit = np.spacing(np.abs(exact).astype(actual.dtype)).astype(np.float64)
    error = np.abs(actual.astype(np.float64) - exact) / unit
    assert np.all(error <= units), f"up to {np.nanmax(error)} units away"


def assert_quantized(q: np.ndarray, exact: np.ndarray, scale: np.ndarray | np.float32) -> None:
    """Check for rounding to nearest and saturation; near a tie, within float32's rounding, either neighbour passes."""
    steps = np.clip(exact / np.asarray(scale, np.float64), -128, 127)
    assert np.all(np.abs(q.astype(np.float64) - steps) <= 0.5 + 5e-4)


def assert_all_modes(
    results: dict[str, np.ndarray], rows: dict[str, np.ndarray], weights: dict[str, np.ndarray]
) -> None:
    """Check the results of `add_all_modes` against float64, on the first and last rows and a sample of the others."""
    x, residual, units = rows["x"], rows["residual"], 1.0 if rows["x"].dtype == np.float16 else 4.0
    if len(x) > 40:
        sample = np.unique([0, len(x) - 1, *np.random.default_rng().integers(len(x), size=38)])
        x, residual = x[sample], residual[sample]
        results = {name: array[sample] for name, array in results.items()}
    weight, smoothing = weights["weight"].astype(np.float64), weights["smoothing"].astype(np.float64)
    h = x + residual
    y, y_residual = normalised(x) * weight, normalised(h) * weight
    for name in ("h", "h_smooth", "h_static"):
        np.testing.assert_array_equal(results[name], h)
    assert_within_units(results["y"], y, units)
    assert_within_units(results["y_residual"], y_residual, units)
    assert_within_units(results["y_offset"], normalised(x) * (weight + 1), units)
    assert_within_units(results["y_rounded"], y, 2 * units)
    for name, exact in (("", y), ("_smooth", y_residual / smoothing)):
        scales = np.max(np.abs(exact), axis=-1, keepdims=True) / 127
        np.testing.assert_allclose(results["scales" + name], scales, rtol=1e-5)
        assert_quantized(results["q" + name], exact, results["scales" + name])
    assert_quantized(results["q_static"], y, weights["scale"])
    assert_quantized(results["q_static_smooth"], y_residual / smoothing, weights["scale"])


@pytest.mark.parametrize(
    ("dtype", "hidden_size", "max_tokens"),
    [
        ("float16", 4096, 8192),
        ("float16", 8192, 2048),
        ("float16", 127, 8192),
        ("float16", 1, 8192),
        ("float32", 4096, 2048),
        ("float32", 127, 8192),
    ],
)
def test_every_mode_at_dynamic_shapes(dtype: str, hidden_size: int, max_tokens: int) -> None:
    rows = rows_input(dtype, hidden_size, max_tokens)
    weights = make_weights(dtype, hidden_size)
    engine = Engine(build_plan({"x": rows, "residual": rows}, add_all_modes(weights)))
    for num_tokens in (1, 7, 64, 1023, max_tokens):
        arrays = make_rows(dtype, num_tokens, hidden_size)
        assert_all_modes(engine.run(arrays), arrays, weights)


def test_no_tokens() -> None:
    weights = make_weights("float16", 64)
    rows = rows_input("float16", 64, min_tokens=0)
    engine = Engine(build_plan({"x": rows, "residual": rows}, add_all_modes(weights)))
    results = engine.run(make_rows("float16", 0, 64))

    assert results["y"].shape == results["q"].shape == (0, 64)
    assert results["scales"].shape == (0, 1)


@pytest.mark.parametrize("shape", [(96,), (5, 3, 96), (2, 2, 3, 96), (1, 1, 1, 1, 1, 4, 96)])  # 8.6 has 7 at most
def test_any_rank(shape: tuple[int, ...]) -> None:
    weights = make_weights("float16", 96)
    rows = Input(trt.float16, shape)
    engine = Engine(build_plan({"x": rows, "residual": rows}, add_all_modes(weights)))
    arrays = make_rows("float16", *shape)
    results = engine.run(arrays)

    assert results["scales"].shape == (*shape[:-1], 1)
    flat = {name: array.reshape(-1, array.shape[-1]) for name, array in results.items()}
    assert_all_modes(flat, {name: array.reshape(-1, 96) for name, array in arrays.items()}, weights)


def test_weights_as_tensors() -> None:
    """Weight, smoothing and scale are inputs of the network."""

    def describe(network: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {
            "q": plugins.rms_norm_quant(
                network, tensors["x"], tensors["weight"], EPS, scale=tensors["scale"], smoothing=tensors["smoothing"]
            )
        }

    weights = make_weights("float16", 256)
    inputs = {"x": rows_input("float16", 256), "weight": Input(trt.float16, (256,))}
    inputs |= {"smoothing": Input(trt.float32, (256,)), "scale": Input(trt.float32, (1,))}
    engine = Engine(build_plan(inputs, describe))
    x = make_rows("float16", 33, 256)["x"]
    results = engine.run({"x": x} | weights | {"scale": weights["scale"].reshape(1)})

    assert_quantized(results["q"], normalised(x) * weights["weight"] / weights["smoothing"], weights["scale"])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_native_layers_give_the_same(dtype: str) -> None:
    weights = make_weights(dtype, 512)
    rows = rows_input(dtype, 512)
    inputs = {"x": rows, "residual": rows}
    arrays = make_rows(dtype, 37, 512)
    native = Engine(build_plan(inputs, add_all_modes(weights, plugin=False))).run(arrays)
    plugin = Engine(build_plan(inputs, add_all_modes(weights))).run(arrays)

    assert native.keys() == plugin.keys()
    for name, array in native.items():
        assert array.dtype == plugin[name].dtype
        if name.startswith("q"):
            assert np.max(np.abs(array.astype(int) - plugin[name])) <= 1
        else:
            tolerance = 2e-3 if array.dtype == np.float16 else 1e-5
            np.testing.assert_allclose(array.astype(np.float64), plugin[name], rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("plugin", [True, False])
def test_squares_beyond_float16(plugin: bool) -> None:
    """Values whose squares overflow in float16 give finite, correct results, with the plug-in and without."""
    weights = make_weights("float16", 256)
    engine = Engine(
        build_plan(
            {"x": rows_input("float16", 256)},
            lambda network, tensors: {
                "y": plugins.rms_norm(network, tensors["x"], weights["weight"], EPS, plugin=plugin)
            },
        )
    )
    x = (make_rows("float16", 5, 256)["x"] * np.float16(5000)).astype(np.float16)

    assert_within_units(engine.run({"x": x})["y"], normalised(x) * weights["weight"].astype(np.float64), 2)


LOAD_AND_RUN = """
import sys
import numpy as np
import qwen_plugins
from support.tensorrt_engines import Engine
plan, arrays, results = sys.argv[1:]
with open(plan, "rb") as file:
    engine = Engine(file.read())
np.savez(results, **engine.run(np.load(arrays)))
"""


def test_saved_engine_runs_in_a_new_process(tmp_path: Path) -> None:
    weights = make_weights("float16", 4096)
    rows = rows_input("float16", 4096)
    plan = build_plan({"x": rows, "residual": rows}, add_all_modes(weights))
    arrays = make_rows("float16", 65, 4096)
    (tmp_path / "engine.plan").write_bytes(plan)
    np.savez(tmp_path / "arrays.npz", **arrays)

    files = [str(tmp_path / name) for name in ("engine.plan", "arrays.npz", "results.npz")]
    subprocess.run([sys.executable, "-c", LOAD_AND_RUN, *files], check=True, cwd=Path(__file__).parents[2])

    results = np.load(tmp_path / "results.npz")
    for name, array in Engine(plan).run(arrays).items():
        np.testing.assert_array_equal(results[name], array)


def test_two_contexts_on_two_streams() -> None:
    weights = make_weights("float16", 4096)
    rows = rows_input("float16", 4096)
    engine = Engine(build_plan({"x": rows, "residual": rows}, add_all_modes(weights)))
    arrays = [make_rows("float16", num_tokens, 4096) for num_tokens in (1000, 13)]
    executions = [engine.bind(given) for given in arrays]
    assert executions[0].stream.handle != executions[1].stream.handle
    for execution in executions:
        for output in execution.outputs.values():
            output.poison()
    check(cudart.cudaDeviceSynchronize())
    for _ in range(50):
        for execution in executions:
            execution.enqueue()

    for execution, given in zip(executions, arrays, strict=True):
        assert_all_modes(execution.results(), given, weights)


def test_cuda_graph_capture() -> None:
    weights = make_weights("float16", 4096)
    rows = rows_input("float16", 4096)
    engine = Engine(build_plan({"x": rows, "residual": rows}, add_all_modes(weights)))
    execution = engine.bind(make_rows("float16", 64, 4096))
    execution.run()  # TensorRT prepares a context in its first run, which can't be captured
    graph = Graph(execution.stream, execution.enqueue)
    for _ in range(2):
        arrays = make_rows("float16", 64, 4096)
        for name, array in arrays.items():
            execution.inputs[name].upload(array)
        for output in execution.outputs.values():
            output.poison()
        check(cudart.cudaDeviceSynchronize())
        graph.launch()
        assert_all_modes(execution.results(), arrays, weights)


def test_a_chain_is_nothing_but_the_plugins() -> None:
    """32 layers with a residual are 32 kernels without reformatting or copies between them, and correct."""
    weight = make_weights("float16", 4096)["weight"]

    def describe(network: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        y, h = tensors["x"], tensors["residual"]
        for i in range(32):
            y, h = plugins.rms_norm(network, y, weight, EPS, residual=h, dtype=trt.float16, name=f"rms_norm_{i}")
        return {"y": y, "h": h}

    rows = rows_input("float16", 4096)
    execution = Engine(build_plan({"x": rows, "residual": rows}, describe)).bind(
        arrays := make_rows("float16", 64, 4096)
    )
    results = execution.run()

    y, h = arrays["x"], arrays["residual"]
    for _ in range(32):
        h = y + h
        y = (normalised(h) * weight.astype(np.float64)).astype(np.float16)
    np.testing.assert_allclose(results["y"].astype(float), y.astype(float), rtol=0.02, atol=0.02)
    assert Graph(execution.stream, execution.enqueue).node_types() == ["Kernel"] * 32


def test_a_chain_of_quantizations_with_the_residual() -> None:
    """The residual of each layer feeds the next one, as in a decoder; every q is an output."""
    weight = make_weights("float16", 512)["weight"]

    def describe(network: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        h, outputs = tensors["residual"], {}
        for i in range(4):
            outputs[f"q_{i}"], outputs[f"scales_{i}"], h = plugins.rms_norm_quant(
                network, tensors["x"], weight, EPS, residual=h, dtype=trt.float16
            )
        return outputs | {"h": h}

    rows = rows_input("float16", 512)
    arrays = make_rows("float16", 33, 512)
    results = Engine(build_plan({"x": rows, "residual": rows}, describe)).run(arrays)

    h = arrays["residual"]
    for i in range(4):
        h = arrays["x"] + h
        y = normalised(h) * weight.astype(np.float64)
        q = results[f"q_{i}"]  # TensorRT 8.6 hands some of them out as float32, with the same integers
        assert np.array_equal(q, np.round(q).clip(-128, 127))
        assert_quantized(q, y, results[f"scales_{i}"])
    np.testing.assert_array_equal(results["h"], h)


def test_wrong_inputs_fail_the_build_with_the_reason_in_the_log() -> None:
    """A plug-in whose fields promise a residual that the network lacks; the Python functions would refuse it."""

    def describe(network: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        creator = find_creator(trt, "RmsNorm")
        arrays = {name: np.array([1], np.int32) for name in ("type_id", "residual")}
        fields = [trt.PluginField(name, array, trt.PluginFieldType.INT32) for name, array in arrays.items()]
        plugin = creator.create_plugin("layer", trt.PluginFieldCollection(fields))
        weight = network.add_constant((64,), trt.Weights(np.ones(64, np.float16))).get_output(0)
        return {"y": network.add_plugin_v2([tensors["x"], weight], plugin).get_output(0)}

    LOG.messages.clear()
    with pytest.raises((RuntimeError, ValueError)):
        build_plan({"x": rows_input("float16", 64)}, describe)
    expected = "RmsNorm 'layer': got 2 inputs; expected 3 with these fields: x, weight, residual"
    assert any(expected in message for message in LOG.messages)


def network_with_x() -> tuple[Any, Any]:
    network = trt.Builder(LOG).create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
    return network, network.add_input("x", trt.float16, (-1, 64))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"network": None}, TypeError, "network is a NoneType; expected a tensorrt.INetworkDefinition"),
        ({"x": np.ones((2, 64), np.float16)}, TypeError, "x is a ndarray; expected a tensorrt.ITensor"),
        ({"weight": np.ones(63)}, ValueError, r"weight has shape \(63,\); expected \[64\], the last dimension of x"),
        ({"weight": np.ones((1, 64))}, ValueError, r"weight has shape \(1, 64\); expected \[64\]"),
        ({"weight": np.array(["a"] * 64)}, TypeError, "weight has type <U1; expected a floating-point array"),
        ({"eps": 0.0}, ValueError, "eps is 0.0; expected a finite number above 0"),
        ({"eps": float("nan")}, ValueError, "eps is nan"),
        ({"residual": np.ones((2, 64))}, TypeError, "residual is a ndarray"),
        ({"dtype": trt.int32}, TypeError, "x has type DataType.INT32; expected one of"),
        ({"quant_dtype": trt.float16}, TypeError, "quant_dtype is DataType.HALF"),
        ({"scale": -1.0}, ValueError, "scale is -1.0; expected one finite number above 0"),
        ({"scale": np.ones(2)}, ValueError, r"scale is array\(\[1., 1.\]\); expected one"),
        ({"smoothing": np.ones(3)}, ValueError, r"smoothing has shape \(3,\)"),
    ],
)  # fmt: skip
def test_bad_arguments(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    network, x = network_with_x()
    arguments = {"network": network, "x": x, "weight": np.ones(64, np.float16)} | changed
    with pytest.raises(error, match=message):
        plugins.rms_norm_quant(**arguments)
    if not changed.keys() & {"quant_dtype", "scale", "smoothing"}:
        with pytest.raises(error, match=message):
            plugins.rms_norm(**arguments)
