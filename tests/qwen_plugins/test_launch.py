"""The launchers as a caller without a framework sees them; 0 rows launch nothing, so that most of it needs no GPU."""

import pytest

from qwen_plugins import _core, launch
from qwen_plugins._numbers import ACTIVATIONS, HEAD_SIZES

ADDRESS = 4096  # never read


def linear_layer(**changed):
    options = {"weight": ADDRESS, "bias": 0, "in_features": 64, "out_features": 96, "constant_weight": True}
    options |= {"activation": launch.Activation.none, "dtype": launch.DataType.float16}
    return launch.LinearLayer(**(options | changed))


def norm_layer():
    half = launch.DataType.float16
    return launch.RmsNormLayer(
        weight=ADDRESS, hidden_size=64, dtype=half, weight_dtype=half, eps=1e-6, unit_offset=False
    )


def attention_heads(**changed):
    options = {"num_heads": 4, "num_kv_heads": 2, "head_size": 64, "rotary_dim": 0, "rotary_table": 0, "norm_eps": 1e-6}
    options |= {"rotary_offsets": 0, "query_scale": 0, "q_norm_weight": 0, "k_norm_weight": 0}
    options |= {"dtype": launch.DataType.float16, "rotary_style": launch.RotaryStyle.neox}
    return launch.AttentionHeads(**(options | changed))


def sampling_slots(**changed):
    names = ("settings", "biases", "marks", "mask_rows", "masks", "last_tokens", "workspace", "semaphores")
    return launch.SamplingSlots(**({"vocab_size": 8} | dict.fromkeys(names, ADDRESS) | changed))


def sample(memory=None, **changed):
    options = {"logits": ADDRESS, "logits_row_stride": 8, "sequences": 0, "slots": 0, "largest": False}
    options |= {"tokens": ADDRESS, "stream": 0, "dtype": launch.DataType.float16}
    launch.sample(memory or sampling_slots(), **(options | changed))


def logprobs(**changed):
    options = {"logits": ADDRESS, "logits_row_stride": 8, "sequences": 0, "vocab_size": 8, "num_best": 3, "stream": 0}
    options |= dict.fromkeys(("tokens", "logprobs", "best_tokens", "best_logprobs"), ADDRESS)
    launch.logprobs(**({"dtype": launch.DataType.float16} | options | changed))


def test_all_launchers_are_exported():
    assert sorted(launch.__all__) == sorted(name for name in vars(_core) if not name.startswith("_"))


def test_numbers_that_python_has_without_the_compiled_module():
    """Those of the Gemm plug-in and of the head sizes are compared in tests/plugins/test_plugin_life_cycle.py."""
    activations = {name or "none": number for name, number in ACTIVATIONS.items()}
    assert activations == {name: int(value) for name, value in launch.Activation.__members__.items()}


def test_a_linear_layer():
    layer = linear_layer()
    assert layer.columns == 96
    assert linear_layer(activation=launch.Activation.swiglu).columns == 48
    assert layer.workspace_bytes(1) == 0
    assert 0 < layer.workspace_bytes(100) <= layer.workspace_bytes(2000)
    launch.gemm(layer, x=ADDRESS, x_row_stride=64, y=ADDRESS, rows=0, workspace=0, stream=0)
    with pytest.raises(RuntimeError, match="invalid argument"):
        launch.gemm(layer, x=ADDRESS, x_row_stride=64, y=ADDRESS, rows=-1, workspace=0, stream=0)


def test_a_norm_layer():
    strides = {"x": (0, 64), "residual": (0, 0), "residual_out": (0, 0), "y": (0, 64)}
    for options in ({}, {"layout": launch.RowLayout(inner_rows=1, **strides)}, {"round_before_weight": True}):
        addresses = {"x": ADDRESS, "residual": 0, "residual_out": 0, "y": ADDRESS}
        launch.rms_norm(norm_layer(), **addresses, rows=0, stream=0, **options)
        with pytest.raises(RuntimeError, match="rms_norm: invalid argument"):
            launch.rms_norm(norm_layer(), **addresses, rows=-1, stream=0, **options)


def test_quantization():
    addresses = {"x": ADDRESS, "q": ADDRESS, "quant_dtype": launch.DataType.int8, "stream": 0}
    norm = {"residual": 0, "residual_out": 0}
    matrix = {"x_row_stride": 64, "columns": 64, "dtype": launch.DataType.float16}
    for scales in ({"static_scale": ADDRESS, "scales": 0}, {"static_scale": 0, "scales": ADDRESS}):
        launch.rms_norm_quant(norm_layer(), rows=0, **addresses, **norm, **scales)
        launch.quantize(rows=0, **addresses, **matrix, **scales)
        with pytest.raises(RuntimeError, match="rms_norm_quant: invalid argument"):
            launch.rms_norm_quant(norm_layer(), rows=-1, **addresses, **norm, **scales)
        with pytest.raises(RuntimeError, match="quantize: invalid argument"):
            launch.quantize(rows=-1, **addresses, **matrix, **scales)
    for changed in (
        {"quant_dtype": launch.DataType.float16},
        {"dtype": launch.DataType.int8},
        {"columns": 0},
        {"x": 0},
        {"static_scale": 0, "scales": 0},
        {"static_scale": ADDRESS, "scales": ADDRESS},
    ):
        with pytest.raises(RuntimeError, match="quantize: invalid argument"):
            launch.quantize(**({"rows": 1} | addresses | matrix | {"static_scale": ADDRESS, "scales": 0} | changed))


def test_sampling():
    sample()
    for memory, changed in (
        (sampling_slots(vocab_size=2**19 + 1), {}),
        (sampling_slots(settings=0), {"sequences": 1}),
        (sampling_slots(masks=0), {"sequences": 1}),
        (None, {"sequences": -1}),
    ):
        with pytest.raises(RuntimeError, match="sampling: invalid argument"):
            sample(memory, **changed)
    options = {"starts": ADDRESS, "biases": 0, "tokens": 0, "stream": 0}
    launch.start_sampling(sampling_slots(), sequences=0, **options)
    for memory, sequences in ((sampling_slots(), -1), (sampling_slots(marks=0), 1)):
        with pytest.raises(RuntimeError, match="start_sampling: invalid argument"):
            launch.start_sampling(memory, sequences=sequences, **options)


def test_logprobs():
    logprobs()
    logprobs(num_best=launch.MAX_BEST)
    for changed in (
        {"num_best": launch.MAX_BEST + 1},
        {"sequences": -1},
        {"vocab_size": 0},
        {"sequences": 1, "best_tokens": 0},
    ):
        with pytest.raises(RuntimeError, match="logprobs: invalid argument"):
            logprobs(**changed)


def test_every_function_says_what_it_does():
    functions = [name for name in launch.__all__ if callable(getattr(launch, name)) and name.islower()]
    assert functions
    for name in functions:
        # pybind11 writes the signature into the first line.
        assert "\n\n" in getattr(launch, name).__doc__, name


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (linear_layer, {"dtype": 1}),
        (linear_layer, {"activation": 1}),
        (linear_layer, {"activation": _core.DataType.float16}),
        (attention_heads, {"rotary_style": 0}),
        (attention_heads, {"dtype": _core.RotaryStyle.neox}),
        (sample, {"dtype": 1}),
        (logprobs, {"dtype": 1}),
    ],
)
def test_enumerations_take_no_numbers(function, arguments):
    with pytest.raises(TypeError, match=r"incompatible .*arguments"):
        function(**arguments)


def test_arguments_are_keywords():
    with pytest.raises(TypeError, match=r"incompatible .*arguments"):
        launch.gemm(linear_layer(), ADDRESS, 64, ADDRESS, 0, 0, 0)
    with pytest.raises(TypeError, match=r"incompatible .*arguments"):
        launch.LinearLayer(ADDRESS, 0, 64, 96, launch.Activation.none, launch.DataType.float16, True)
    with pytest.raises(TypeError, match=r"incompatible .*arguments"):
        launch.gather_rows(ADDRESS, ADDRESS, ADDRESS, 1, 1, 0, launch.DataType.float16, 0)


@pytest.mark.gpu
def test_attention_takes_exactly_the_head_sizes():
    import torch

    accepted = []
    for head_size in range(8, 520, 8):
        qkv = torch.zeros(1, 8 * head_size, dtype=torch.float16, device="cuda")
        cache = torch.zeros(1, 2, 2, 4, head_size, dtype=torch.float16, device="cuda")
        context = torch.empty(1, 4 * head_size, dtype=torch.float16, device="cuda")
        heads = attention_heads(head_size=head_size)
        integers = torch.zeros(5, dtype=torch.int32, device="cuda")
        try:
            workspace_bytes = launch.decode_attention_workspace_bytes(heads, sequences=1)
            workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device="cuda")
            launch.decode_attention(
                heads=heads,
                cache=cache.data_ptr(),
                max_positions=4,
                qkv=qkv.data_ptr(),
                qkv_row_stride=8 * head_size,
                context=context.data_ptr(),
                past_lengths=integers[4:].data_ptr(),
                sequences=1,
                softmax_scale=1.0,
                workspace=workspace.data_ptr(),
                semaphores=integers.data_ptr(),
                stream=torch.cuda.current_stream().cuda_stream,
            )
        except RuntimeError:
            continue
        accepted.append(head_size)
        torch.cuda.synchronize()
    assert tuple(accepted) == HEAD_SIZES
