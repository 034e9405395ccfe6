"""The choice of GEMM kernels by measured times, with a measurement that needs no GPU."""

import dataclasses
import json

import pytest

from qwen_model.checkpoints.config import ModelConfig
from qwen_model.checkpoints.eight_bit_weight import eight_bit_format
from qwen_model.checkpoints.module_weights import WeightFormat
from qwen_model.checkpoints.weights import network_modules
from qwen_model.interface.engine_config import Limits
from qwen_model.interface.weight_formats import kernel_format
from qwen_model.tuning import choice
from qwen_model.tuning.choice import MANY_ROWS, ROWS, KernelRange, buckets, by_module, choose_kernels, ranges
from qwen_model.tuning.linear_layers import LinearShape, linear_layers
from qwen_model.tuning.timings import GemmTimings
from qwen_plugins import quantized
from tests.qwen_model.tensorrt_reference import ARCHITECTURES, save_model

LIMITS = Limits(max_batch_size=4, max_input_len=100, max_output_len=10, max_num_tokens=400)


class FakeGpu:
    """Stream is fastest up to 16 rows, cuBLASLt above; measurements are counted."""

    def __init__(self, **environment):
        self.measured = []
        self.environment_values = {"gpu": "NVIDIA Fake/1", "driver": "580.1", "cublas_lt": 130000, **environment}

    def environment(self):
        return self.environment_values

    def candidates(self, *, rows, in_features, out_features, activation, dtype):
        return ["stream", "cublas_lt"]

    def measure(self, *, rows, in_features, out_features, activation, dtype, bias):
        self.measured.append((rows, in_features, out_features, activation, dtype, bias))
        return {"stream": 2.0 if rows <= 16 else 9.0, "cublas_lt": 3.0}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qwen_model"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return ModelConfig.from_model_dir(save_model("Qwen2ForCausalLM", tmp_path_factory.mktemp("model")))


def nothing(phase, done, total):
    pass


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_linear_layers_are_those_that_the_network_calls(architecture, tmp_path):
    config = ModelConfig.from_model_dir(save_model(architecture, tmp_path / "model"))
    layers = linear_layers(config, "float16")
    assert list(layers)[-1] == "lm_head"
    assert len(layers) == 4 * config.num_layers + 1
    up = layers["layers.0.mlp.gate_up"]
    assert (up.in_features, up.out_features) == (config.hidden_size, 2 * config.intermediate_size)
    assert (up.activation, up.dtype, up.bias) == ("swiglu", "float16", config.mlp_bias)
    assert layers["layers.0.attention.qkv"].bias == config.qkv_bias
    assert (layers["lm_head"].in_features, layers["lm_head"].out_features) == (config.hidden_size, config.vocab_size)


def test_a_shape_as_text():
    assert LinearShape(64, 128, "bfloat16").text == "bfloat16 64 to 128"
    assert LinearShape(64, 128, "float16", "swiglu", True).text == "float16 64 to 128, bias, swiglu"


def test_quantized_layers_are_measured_in_their_formats(model):
    """Those whose formats differ only in the order of x's columns are measured once."""
    four = WeightFormat("int4", 32, symmetric=False, layout=2, scale_dtype="float16")
    eight = WeightFormat("int8", layout=2, scale_dtype="bfloat16")
    layers = {"layers.0.attention.qkv": four, "layers.1.attention.qkv": dataclasses.replace(four, permuted=True)}
    formats = {**layers, "lm_head": eight}
    shapes = linear_layers(model, "float16", formats)
    qkv, head = shapes["layers.0.attention.qkv"], shapes["lm_head"]
    assert (qkv.out_features, qkv.in_features) == network_modules(model, "float16")["layers.0.attention.qkv"].shape
    assert qkv == shapes["layers.1.attention.qkv"] != shapes["layers.2.attention.qkv"]
    assert "int4, groups of 32, zero points, float16, bias" in qkv.text
    assert head.text.endswith("int8, a scale per output, bfloat16")

    class Quantized(FakeGpu):
        def candidates(self, *, weight_format=None, **shape):
            return ["stream"] if weight_format is None else ["stream_quantized"]

        def measure(self, *, weight_format=None, rows, bias, **shape):
            self.measured.append((rows, weight_format))
            return {"stream": 2.0} if weight_format is None else {"stream_quantized": 1.0}

    gpu = Quantized()
    kernels = choose_kernels(model, LIMITS, "float16", nothing, gpu, formats)
    modules = by_module(model, "float16", kernels, formats)
    assert modules["layers.1.attention.qkv"][0][1] == modules["lm_head"][0][1] == "stream_quantized"
    assert modules["layers.0.mlp.down"][0][1] == "stream"
    asked = {each for _, each in gpu.measured}
    assert asked == {
        None,
        quantized.WeightFormat(4, 32, True, "float16"),
        quantized.WeightFormat(8, 0, False, "bfloat16"),
    }


@pytest.mark.parametrize(
    ("scale", "kinds", "quantizes"),
    [
        ("tensor", ("fp8", "fp8"), True),
        ("token", ("fp8", "fp8"), False),
        ("tensor", ("fp8", "int8"), False),  # a GEMM writes codes of the kind that it reads
        ("tensor", (None, "int8"), False),
    ],
)
def test_layers_that_quantize_their_result_are_measured_so(model, scale, kinds, quantizes):
    up, down = (None if kind is None else eight_bit_format(kind, scale) for kind in kinds)
    formats = {"layers.0.mlp.gate_up": up, "layers.0.mlp.down": down}
    formats = {name: each for name, each in formats.items() if each is not None}
    shapes = linear_layers(model, "float16", formats)
    shape = shapes["layers.0.mlp.gate_up"]
    assert shape.quantized_y == quantizes
    assert shape.text.endswith("quantized y") == quantizes
    assert not shapes["layers.0.mlp.down"].quantized_y

    class EightBit(FakeGpu):
        def candidates(self, *, weight_format=None, quantized_y=False, **shape):
            return ["stream"] if weight_format is None else ["stream_eight_bit"]

        def measure(self, *, weight_format=None, quantized_y=False, rows, bias, **shape):
            self.measured.append((weight_format, quantized_y))
            return {"stream": 2.0, "stream_eight_bit": 1.0}

    gpu = EightBit()
    modules = by_module(model, "float16", choose_kernels(model, LIMITS, "float16", nothing, gpu, formats), formats)
    assert modules["layers.0.mlp.down"][0][1] == "stream_eight_bit"
    expected = {(None, False), (kernel_format(down), False)}
    expected |= set() if up is None else {(kernel_format(up), quantizes)}
    assert set(gpu.measured) == expected


def test_buckets_reach_the_most_rows():
    assert buckets(1) == [1]
    assert buckets(3) == [1, 2, 4]
    assert buckets(64)[-2:] == [48, 64]
    assert buckets(10**6) == list(ROWS)


def test_the_fastest_kernel_serves_each_bucket_of_rows(model):
    kernels = choose_kernels(model, LIMITS, "float16", nothing, FakeGpu())
    modules = by_module(model, "float16", kernels)
    assert set(modules) == set(linear_layers(model, "float16"))
    assert modules["layers.0.attention.qkv"] == ((16, "stream"), (512, "cublas_lt"))
    assert modules["lm_head"] == ((16, "stream"), (128, "cublas_lt"))
    assert ranges(modules["lm_head"]) == [
        KernelRange(1, 16, "stream"),
        KernelRange(17, 128, "cublas_lt"),
        KernelRange(129, None, "rules"),
    ]


def test_the_last_bucket_has_no_end(model):
    limits = Limits(max_batch_size=100, max_input_len=200)
    kernels = by_module(model, "float16", choose_kernels(model, limits, "float16", nothing, FakeGpu()))
    assert kernels["layers.1.mlp.down"] == ((16, "stream"), (MANY_ROWS, "cublas_lt"))
    assert ranges(kernels["layers.1.mlp.down"])[-1] == KernelRange(17, None, "cublas_lt")


def test_layers_without_a_choice_are_served_by_rules():
    assert ranges(()) == [KernelRange(1, None, "rules")]


def test_times_are_kept_for_the_same_gpu_and_libraries(model, cache):
    first, again = FakeGpu(), FakeGpu()
    expected = choose_kernels(model, LIMITS, "float16", nothing, first)
    assert first.measured
    assert choose_kernels(model, LIMITS, "float16", nothing, again) == expected
    assert not again.measured
    other = FakeGpu(driver="590.2")
    choose_kernels(model, LIMITS, "float16", nothing, other)
    assert sorted(other.measured, key=str) == sorted(first.measured, key=str)
    assert len(list(cache.iterdir())) == 2
    more = FakeGpu()
    choose_kernels(model, Limits(4, 200, 10, max_num_tokens=800), "float16", nothing, more)
    assert {rows for rows, *_ in more.measured} == {192, 256, 768, 1024}  # what larger limits add


def test_a_damaged_file_costs_a_measurement(model, cache, caplog):
    choose_kernels(model, LIMITS, "float16", nothing, FakeGpu())
    (path,) = cache.iterdir()
    good = json.loads(path.read_text())
    (shape,) = list(good["microseconds"])[:1]
    damages = [
        b"",
        b"\xff\xfe",
        b"[]",
        json.dumps({**good, "version": 99}).encode(),
        json.dumps({**good, "environment": {"gpu": "another"}}).encode(),
        json.dumps({**good, "microseconds": {shape: {"one": {"stream": 1.0}}}}).encode(),
        json.dumps({**good, "microseconds": {shape: {"1": {"stream": -1.0}}}}).encode(),
        json.dumps({**good, "microseconds": {shape: {"1": {"stream": True}}}}).encode(),
        json.dumps({**good, "microseconds": {shape: 3}}).encode(),
    ]
    for damage in damages:
        path.write_bytes(damage)
        caplog.clear()
        gpu = FakeGpu()
        choose_kernels(model, LIMITS, "float16", nothing, gpu)
        assert gpu.measured
        assert "is damaged and will be replaced" in caplog.text
        assert json.loads(path.read_text()) == good


def test_a_kernel_that_does_not_exist_is_not_chosen(model, cache):
    expected = choose_kernels(model, LIMITS, "float16", nothing, FakeGpu())
    (path,) = cache.iterdir()
    edited = json.loads(path.read_text())
    for by_rows in edited["microseconds"].values():
        for times in by_rows.values():
            times["no_such_kernel"] = 0.001
    path.write_text(json.dumps(edited))
    assert choose_kernels(model, LIMITS, "float16", nothing, FakeGpu()) == expected


def test_without_a_folder_that_can_be_written_nothing_is_lost_but_time(model, cache, tmp_path, monkeypatch, caplog):
    (tmp_path / "cache").write_text("a file")
    assert choose_kernels(model, LIMITS, "float16", nothing, FakeGpu())
    assert "cannot be kept" in caplog.text


def test_two_processes_add_to_the_same_file(tmp_path):
    shape, environment = LinearShape(8, 8, "float16"), {"gpu": "a"}
    one, two = GemmTimings(environment, tmp_path), GemmTimings(environment, tmp_path)
    one.put(shape, 1, {"stream": 1.0})
    two.put(shape, 2, {"stream": 2.0})
    one.keep()
    two.keep()
    both = GemmTimings(environment, tmp_path)
    assert (both.get(shape, 1), both.get(shape, 2)) == ({"stream": 1.0}, {"stream": 2.0})


def test_what_cannot_be_measured_is_left_to_the_rules(model, caplog):
    class Full(FakeGpu):
        def measure(self, *, rows, **shape):
            if shape["activation"] == "swiglu" or rows == 8:
                raise RuntimeError("0.2 GB are needed, 0.1 GB are free")
            return super().measure(rows=rows, **shape)

    kernels = by_module(model, "float16", choose_kernels(model, LIMITS, "float16", nothing, Full()))
    assert "layers.0.mlp.gate_up" not in kernels
    assert kernels["lm_head"] == ((4, "stream"), (8, "rules"), (16, "stream"), (128, "cublas_lt"))
    assert "0.1 GB are free" in caplog.text


def test_measuring_ends_in_time_with_few_rows_first(model, monkeypatch, caplog):
    seconds = iter(range(0, 1000, 2))
    monkeypatch.setattr(choice.time, "perf_counter", lambda: float(next(seconds)))
    gpu = FakeGpu()
    choose_kernels(model, LIMITS, "float16", nothing, gpu)
    assert [rows for rows, *_ in gpu.measured] == sorted(rows for rows, *_ in gpu.measured)
    assert len(gpu.measured) == 10
    assert "products were not measured" in caplog.text


def test_progress_reaches_the_end(model):
    reports = []
    choose_kernels(model, LIMITS, "float16", lambda *report: reports.append(report), FakeGpu())
    phase, done, total = reports[-1]
    assert (phase, done) == ("GEMM kernels", total)
    reports.clear()
    choose_kernels(model, LIMITS, "float16", lambda *report: reports.append(report), FakeGpu())
    assert not reports
