"""scaled_gemm against float64, layouts, graphs; refused arguments."""

from __future__ import annotations

import pytest
import torch

from qwen_plugins import launch, scaled_gemm, tuning
from qwen_plugins.quantized import WeightFormat
from tests.qwen_plugins.gemm_reference import ACTIVATIONS, DEVICES, DTYPES, HALF_TYPES, runs_hopper_kernels
from tests.qwen_plugins.norm_reference import EXTREME_SCALES
from tests.qwen_plugins.scaled_gemm_reference import CODE_TYPES, Layer, check, launch_kernel, random_codes

INT8, FP8 = CODE_TYPES
WEIGHTS = [(INT8, False), (FP8, False), (FP8, True)]
# Hopper's tensor cores add products of float8 in registers of 14 bits.
SUM_ERROR = {"cpu": 2.0**-18, "cuda": 2.0**-12}


def multiply(layer, x, x_scales, bias, **options):
    return scaled_gemm(x, layer.codes, x_scales, layer.scales, bias, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("code_type", "blocks"), WEIGHTS)
def test_matches_float64(device, dtype, activation, code_type, blocks):
    y_scale = torch.tensor([0.021], device=device)
    for in_features, out_features in ((256, 64), (1, 2), (1040, 656), (301, 130)):
        layer = Layer(in_features, out_features, code_type=code_type, blocks=blocks, device=device)
        for rows in (0, 1, 3, 70) if device == "cpu" else (0, 1, 2, 7, 16, 17, 33, 64, 65, 130):
            x, scales, bias = layer.operands(rows, dtype=dtype, bias=rows % 2 > 0, per_row=rows % 3 > 0)
            for scale in (None, y_scale):
                y = multiply(layer, x, scales, bias, activation=activation, dtype=dtype, y_scale=scale)
                assert y.dtype == (dtype if scale is None else code_type)
                check(y, x, scales, layer, bias, activation, y_scale=scale, sum_error=SUM_ERROR[device])


@pytest.mark.parametrize("device", DEVICES)
def test_sums_of_int8_are_exact(device):
    for rows in (1, 40, 300):
        x = torch.full((rows, 2**17 - 16), -128, dtype=torch.int8, device=device)
        weight = torch.full((16, 2**17 - 16), -128, dtype=torch.int8, device=device)
        x[:, 5], weight[1, 7] = 127, 126
        ones = torch.ones(1, device=device), torch.ones(16, 1, device=device)
        y = scaled_gemm(x, weight, *ones, dtype=torch.float32)
        expected = (x.double() @ weight.double().T).float()
        assert torch.equal(y, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_shapes_and_layouts(device):
    layer = Layer(64, 48, code_type=INT8, device=device)
    x, scales, bias = layer.operands(6)
    y = multiply(layer, x, scales, bias)
    assert torch.equal(multiply(layer, x.view(2, 3, 64), scales.view(2, 3), bias), y.view(2, 3, 48))
    assert torch.equal(multiply(layer, x.view(2, 3, 64), scales.view(2, 3, 1), bias), y.view(2, 3, 48))
    assert torch.equal(multiply(layer, x[0], scales[0], bias), y[0])
    assert torch.equal(scaled_gemm(x, layer.codes, scales, layer.scales.flatten(), bias), y)
    strided = torch.zeros(6, 80, dtype=torch.int8, device=device)[:, :64]
    strided.copy_(x)
    assert torch.equal(multiply(layer, strided, scales, bias), y)
    transposed = x.t().contiguous().t()
    assert torch.equal(multiply(layer, transposed, scales, bias), y)


@pytest.mark.parametrize("device", DEVICES)
def test_not_a_number(device):
    layer = Layer(128, 32, code_type=FP8, device=device)
    x, scales, bias = layer.operands(3)
    x.view(torch.uint8)[1, 5] = 0x7F
    y = multiply(layer, x, scales, bias)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()
    codes = multiply(layer, x, scales, bias, y_scale=torch.ones(1, device=device))
    assert codes.float()[1].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("code_type", CODE_TYPES)
def test_codes_saturate(device, code_type):
    layer = Layer(64, 32, code_type=code_type, device=device)
    x, scales, _ = layer.operands(20)
    y = multiply(layer, x, scales, None, dtype=torch.float32)
    codes = multiply(layer, x, scales, None, y_scale=torch.full((1,), 1e-6, device=device)).float()
    smallest, largest = (-128, 127) if code_type == INT8 else (-448, 448)
    assert (codes[y > 1e-3] == largest).all()
    assert (codes[y < -1e-3] == smallest).all()


def check_scales_of_any_size(multiply_with):
    """Check `multiply_with(layer, x, scales, y_scale)`, whose middle row of x is of zeros."""
    for code_type in CODE_TYPES:
        layer = Layer(256, 64, code_type=code_type, device="cpu")
        x, scales, _ = layer.operands(3)
        x.view(torch.uint8)[1] = 0
        z = (x.float() * scales).double() @ layer.weight.T
        for scale in EXTREME_SCALES:
            codes = multiply_with(layer, x, scales, torch.tensor([scale])).float()
            factor = min(1 / scale, torch.finfo(torch.float32).max) if scale else torch.finfo(torch.float32).max
            low, high = (-128, 127) if code_type == INT8 else (-448, 448)
            assert ((codes - (z * factor).clamp(low, high)).abs() <= (0.51 if code_type == INT8 else 16)).all()
            assert codes[1].eq(0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_scales_of_y_of_any_size(device):
    def multiply_with(layer, x, scales, y_scale):
        operands = [tensor.to(device) for tensor in (x, layer.codes, scales, layer.scales)]
        return scaled_gemm(*operands, y_scale=y_scale.to(device)).cpu()

    check_scales_of_any_size(multiply_with)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["plain", "cublas_lt_eight_bit", "stream_eight_bit", "tiles_eight_bit:n128s1"])
def test_scales_of_y_of_any_size_in_every_kernel(name):
    if name.startswith(("stream", "tiles")) and not runs_hopper_kernels():
        pytest.skip("for Hopper")

    def multiply_with(layer, x, scales, y_scale):
        on_gpu = Layer(256, 64, code_type=layer.code_type)
        y = torch.empty(3, 64, dtype=x.dtype, device="cuda")
        launch_kernel(name, on_gpu, x.cuda(), scales.cuda(), None, None, y, y_scale=y_scale.cuda())
        return y.cpu()

    check_scales_of_any_size(multiply_with)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_and_torch_compile(device):
    for code_type, blocks in WEIGHTS:
        layer = Layer(128, 32, code_type=code_type, blocks=blocks, device=device)
        x, scales, bias = layer.operands(3)
        y_scale = torch.ones(1, device=device)
        operator = torch.ops.qwen_plugins.scaled_gemm.default
        operands = (x, layer.codes, scales, layer.scales)
        checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        if code_type == INT8:  # PyTorch cannot compare float8 tensors as this check does
            checks = ("test_schema", *checks)
        torch.library.opcheck(operator, (*operands, bias, None, None, torch.float16, False), test_utils=checks)
        torch.library.opcheck(operator, (*operands, None, y_scale, "swiglu", torch.bfloat16, True), test_utils=checks)

    def function(x):
        return multiply(layer, x, scales, bias, activation="swiglu") * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), function(x))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 40, 100, 300])
@pytest.mark.parametrize("code_type", CODE_TYPES)
def test_captured_graph_behind_the_kernels_that_make_its_inputs(rows, code_type):
    layer = Layer(512, 1024, code_type=code_type)
    y_scale = torch.full((1,), 0.03, device="cuda")
    x, _, bias = layer.operands(rows, per_row=False)
    scale = torch.full((1,), 0.02, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    outputs = []
    with torch.cuda.graph(graph):
        h = x
        for _ in range(6):
            h = multiply(layer, h, scale, bias, activation="swiglu", y_scale=y_scale, constant_weight=True)
            outputs.append(h)
    for _ in range(3):
        x.copy_(random_codes(rows, 512, dtype=code_type, device="cuda"))
        graph.replay()
        h = x
        for output in outputs:
            check(output, h, scale, layer, bias, "swiglu", y_scale=y_scale, sum_error=SUM_ERROR["cuda"])
            h = output


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 33, 128, 300])
@pytest.mark.parametrize("code_type", CODE_TYPES)
@pytest.mark.parametrize("offset", [1, 4, 8])
def test_misaligned_views(rows, code_type, offset):
    layer = Layer(512, 256, code_type=code_type)
    for activation in ACTIVATIONS:
        x, scales, bias = layer.operands(rows)

        def moved(tensor):
            bits = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
            shifted = torch.cat([bits.new_zeros(offset), bits.flatten()])[offset:].view(bits.shape)
            return shifted.view(tensor.dtype)

        y = multiply(layer, moved(x), moved(scales), moved(bias), activation=activation)
        check(y, x, scales, layer, bias, activation, sum_error=SUM_ERROR["cuda"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("code_type", "blocks"), WEIGHTS)
def test_plain_kernel(dtype, activation, code_type, blocks):
    layer = Layer(272, 320, code_type=code_type, blocks=blocks)
    for rows in (1, 5, 130):
        x, scales, bias = layer.operands(rows, dtype=dtype)
        y = torch.empty(rows, 320 // (2 if activation else 1), dtype=dtype, device="cuda")
        launch_kernel("plain", layer, x, scales, bias, activation, y, dtype=dtype)
        check(y, x, scales, layer, bias, activation)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("code_type", CODE_TYPES)
def test_cublas_lt(dtype, activation, code_type):
    y_scale = torch.tensor([0.021], device="cuda")
    for in_features, out_features, all_rows in ((272, 320, (1, 5, 130)), (1024, 32768, (300, 700))):
        layer = Layer(in_features, out_features, code_type=code_type)
        for rows in all_rows:
            x, scales, bias = layer.operands(rows, dtype=dtype, per_row=rows % 3 > 0)
            for scale in (None, y_scale):
                y = torch.empty(rows, out_features // (2 if activation else 1), dtype=dtype, device="cuda")
                y = y if scale is None else y.to(code_type)
                launch_kernel("cublas_lt_eight_bit", layer, x, scales, bias, activation, y, dtype=dtype, y_scale=scale)
                check(y, x, scales, layer, bias, activation, y_scale=scale, sum_error=SUM_ERROR["cuda"])


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["int8", "fp8"])
def test_candidates_can_be_measured(activation):
    shape = {"rows": 128, "in_features": 512, "out_features": 1024, "activation": "swiglu"}
    weight_format = WeightFormat(8, scale_dtype="float32", activation=activation)
    for quantized_y in (False, True):
        times = tuning.measure(**shape, weight_format=weight_format, quantized_y=quantized_y)
        assert set(times) == set(tuning.candidates(**shape, weight_format=weight_format, quantized_y=quantized_y))
        assert min(times.values()) > 0


OPERANDS = {"x": (3, 256), "weight": (8, 256), "x_scales": (3, 1), "weight_scales": (8, 1)}


def codes(*shape, dtype=FP8):
    return torch.zeros(shape, dtype=torch.uint8).view(dtype)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.ones(3, 256)}, TypeError, "x must be int8 or float8_e4m3fn, not float32"),
        ({"x": codes(3, 256, dtype=INT8)}, TypeError, "weight must be int8 like x, not float8_e4m3fn"),
        ({"x": codes(3, 255)}, ValueError, r"weight must have the shape \(out_features, 255\).*not \(8, 256\)"),
        ({"weight": codes(8, 512)[:, ::2]}, ValueError, "weight must be contiguous"),
        ({"weight": codes(8, 256).to("meta")}, ValueError, "weight must be on the device"),
        ({"x_scales": torch.ones(2)}, ValueError, r"x_scales must have one element, or the shape \(3, 1\) .*\(2,\)"),
        ({"x_scales": torch.ones(3).half()}, TypeError, "x_scales must be float32, not float16"),
        ({"x_scales": None}, TypeError, "x_scales must be a torch.Tensor, not NoneType"),
        (
            {"weight_scales": torch.ones(1, 8)},
            ValueError,
            r"weight_scales must have the shape \(8, 1\) or \(1, 2\), in blocks, .*not \(1, 8\)",
        ),
        ({"weight_scales": torch.ones(16)[::2]}, ValueError, "weight_scales must be contiguous"),
        ({"bias": torch.ones(8)}, TypeError, "bias must be float16 like dtype, not float32"),
        ({"bias": torch.ones(4).half()}, ValueError, r"bias must have the shape \(8,\)"),
        ({"dtype": torch.int32}, TypeError, "dtype must be float16, bfloat16 or float32, not int32"),
        ({"dtype": "float16"}, TypeError, r"dtype must be a torch\.dtype, not str"),
        ({"activation": "gelu"}, ValueError, 'activation must be None or "swiglu"'),
        ({"y_scale": torch.ones(3)}, ValueError, "y_scale must have one element"),
    ],
)
def test_errors(changed, error, message):
    operands = {"x": codes(3, 256), "weight": codes(8, 256)}
    operands |= {"x_scales": torch.ones(3, 1), "weight_scales": torch.ones(8, 1)} | changed
    with pytest.raises(error, match=message):
        scaled_gemm(**operands)


def test_blocks_are_of_float8_alone():
    operands = (codes(3, 256, dtype=INT8), codes(8, 256, dtype=INT8), torch.ones(3, 1), torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"weight_scales must have the shape \(8, 1\) for a weight"):
        scaled_gemm(*operands)


def test_too_many_columns_of_int8():
    x = torch.zeros(1, 2**17, dtype=torch.int8, device="meta")
    scales = torch.ones(1, 1, device="meta")
    with pytest.raises(ValueError, match="x must have at most 131071 columns of int8, not 131072"):
        scaled_gemm(x, x, scales, scales)


@pytest.mark.parametrize(
    "changed",
    [{"bits": 4}, {"has_zeros": True}, {"scale_dtype": "float16"}, {"group_size": 128}, {"activation": "int4"}],
)
def test_formats_that_do_not_exist(changed):
    with pytest.raises(ValueError, match="must"):
        WeightFormat(**({"bits": 8, "scale_dtype": "float32", "activation": "int8"} | changed))


def test_formats_for_launch():
    for activation, kind in (("int8", launch.WeightKind.int8_rows), ("fp8", launch.WeightKind.fp8_rows)):
        assert WeightFormat(8, scale_dtype="float32", activation=activation).for_launch().kind == kind
