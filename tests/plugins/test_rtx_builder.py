"""The plug-ins in the real builder of TensorRT-RTX, which needs no GPU: every mode, chains, profiles, whole networks.

Needs the packages tensorrt-rtx-cu13 (1.7) and onnx.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install tensorrt-rtx-cu13==1.7.1.116")
pytest.importorskip("onnx", reason="onnx is not installed: pip install onnx")

from compiling import CPP_TESTS, compile_command, run_checked
from onnx import TensorProto

from qwen_model.engine.export import export_onnx
from qwen_model.packaged_model import packaged_model_dir
from tests.support.onnx_models import ONNX_TYPES, Value, model, plugin_node
from tests.support.plugin_fields import name_and_version
from tests.support.rtx_builder import Built, Tensor, build

pytestmark = pytest.mark.tensorrt_registry

LAYER = "the_layer"
FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BFLOAT16, INT64 = range(9)
LISTED_TYPES = {FLOAT: "Float", HALF: "Half", INT8: "Int8", INT32: "Int32", FP8: "FP8", BFLOAT16: "BFloat16"}
ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM", "QWenLMHeadModel", "DeciCoderForCausalLM")
CAPABILITIES = ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121")
LEAST_MODES = {"RmsNorm": 12, "RmsNormQuantization": 96, "Gemm": 24, "QwenGemm": 1}
LEAST_MODES |= {"GptAttention": 72, "GptAttention:2": 72, "Gemm:2": 24, "QwenGemm:2": 1, "Gemm:3": 144, "QwenGemm:3": 1}
LEAST_MODES |= {"QuantizePerToken": 12, "QuantizeTensor": 12}
ATTENTION = {"num_heads": 4, "num_kv_heads": 2, "head_size": 32}


@pytest.fixture(scope="module")
def modes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every mode that the tests in C++ drive."""
    program = tmp_path_factory.mktemp("modes") / "print_modes"
    sources = [CPP_TESTS / "print_modes.cpp", CPP_TESTS / "recorded_launches.cpp"]
    run_checked([*compile_command(11), *sources, "-o", program])
    return [json.loads(line) for line in run_checked([program]).splitlines()]


def shapes_and_types(mode: dict[str, Any], tensors: str) -> list[Tensor]:
    """The tensors of a mode as the builder lists them."""
    dynamic = mode["dynamic"]
    return [
        Tensor(LISTED_TYPES[number], tuple(-1 if extent in dynamic else extent for extent in shape))
        for number, shape in mode[tensors]
    ]


def model_of(mode: dict[str, Any], node: dict[str, Any] | None = None) -> tuple[bytes, dict[str, Any]]:
    """A network of one plug-in, all of whose inputs are the network's, and its profile.

    node: replaces arguments of `plugin_node`.
    """
    values = [
        {
            f"{kind}{i}": Value(ONNX_TYPES[number], [None if extent in mode["dynamic"] else extent for extent in shape])
            for i, (number, shape) in enumerate(mode[f"{kind}puts"])
        }
        for kind in ("in", "out")
    ]
    arguments = {"inputs": list(values[0]), "outputs": list(values[1]), "fields": mode["fields"]} | (node or {})
    profile = {
        name: (tuple(1 if extent in mode["dynamic"] else extent for extent in shape), tuple(shape), tuple(shape))
        for name, (_, shape) in zip(values[0], mode["inputs"], strict=True)
        if set(shape) & set(mode["dynamic"])
    }
    return model([plugin_node(mode["plugin"], LAYER, **arguments)], *values), profile


def check_one_layer(built: Built, mode: dict[str, Any]) -> None:
    assert built.plan is not None, built.errors
    assert [layer.name for layer in built.plugins] == [LAYER]
    assert {layer.kind for layer in built.layers} <= {"custom_layer", "shape_call"}
    [layer] = built.plugins
    assert list(layer.inputs) == shapes_and_types(mode, "inputs")
    outputs = shapes_and_types(mode, "outputs")
    assert list(layer.outputs[: len(outputs)]) == outputs
    assert all(tensor.type == "UInt8" for tensor in layer.outputs[len(outputs) :])  # the workspace


@pytest.mark.parametrize("known", [False, True], ids=["dynamic", "known"])
@pytest.mark.parametrize("plugin", LEAST_MODES)
def test_every_mode_becomes_one_layer(modes: list[dict[str, Any]], plugin: str, known: bool) -> None:
    """With the types and shapes that the README says, and nothing before or after it."""
    of_plugin = [mode for mode in modes if mode["plugin"] == plugin]
    assert len(of_plugin) >= LEAST_MODES[plugin]
    for mode in of_plugin:
        if known:
            mode = mode | {"dynamic": []}
        built_model, profile = model_of(mode)
        check_one_layer(build(built_model, [profile] if profile else []), mode)


@pytest.mark.parametrize("output", [INT8, FP8])
def test_scale_may_be_a_scalar(output: int) -> None:
    mode = {
        "plugin": "RmsNormQuantization",
        "fields": {"type_id": HALF, "dyn_act_scaling": 0, "out_type_id": output},
        "inputs": [[HALF, [3, 64]], [HALF, [64]], [FLOAT, []]],
        "outputs": [[output, [3, 64]]],
        "dynamic": [3],
    }
    built_model, profile = model_of(mode)
    built = build(built_model, [profile])
    assert built.plan is not None, built.errors
    assert len(built.plugins) == 1


def test_workspace_of_each_profile() -> None:
    mode = {
        "plugin": "Gemm",
        "fields": {"type_id": HALF, "activation": 1},
        "inputs": [[HALF, [100, 64]], [HALF, [96, 64]]],
        "outputs": [[HALF, [100, 48]]],
        "dynamic": [100],
    }
    built_model, _ = model_of(mode)
    built = build(built_model, [{"in0": ((1, 64), (rows, 64), (rows, 64))} for rows in (16, 3000)])
    found = [tensor.shape[0] for layer in built.plugins for tensor in layer.outputs if tensor.type == "UInt8"]
    assert found == [(32 << 20) + rows * 96 * 2 for rows in (16, 3000)]


def chain(type_id: int, quantized: int, rows: int | None) -> bytes:
    """Norm, product, norm with a residual, product with SwiGLU, norm with a residual and quantization; 64 columns."""
    kind = {"type_id": type_id}
    vector, matrix, wide = (Value(ONNX_TYPES[type_id], shape) for shape in ([64], [64, 64], [128, 64]))
    nodes = [
        plugin_node("RmsNorm", "norm_0", ["x", "weight"], ["a"], kind),
        plugin_node("Gemm", "product_0", ["a", "matrix", "weight"], ["b"], kind | {"bias": 1}),
        plugin_node("RmsNorm", "norm_1", ["b", "weight", "x"], ["c", "h"], kind | {"residual": 1}),
        plugin_node("Gemm", "product_1", ["c", "wide"], ["d"], kind | {"activation": 1}),
        plugin_node(
            "RmsNormQuantization",
            "norm_2",
            ["d", "weight", "h"],
            ["q", "scales", "sum"],
            kind | {"residual": 1, "dyn_act_scaling": 1, "out_type_id": quantized},
        ),
    ]
    value = Value(ONNX_TYPES[type_id], [rows, 64])
    inputs = {"x": value, "weight": vector, "matrix": matrix, "wide": wide}
    outputs = {"q": Value(ONNX_TYPES[quantized], [rows, 64]), "scales": Value(TensorProto.FLOAT, [rows, 1])}
    return model(nodes, inputs, outputs | {"sum": value})


@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize("quantized", [INT8, FP8])
@pytest.mark.parametrize("type_id", [FLOAT, HALF, BFLOAT16])
def test_nothing_comes_between_two_plugins(type_id: int, quantized: int, rows: int | None) -> None:
    profile = {"x": ((1, 64), (16, 64), (512, 64))}
    built = build(chain(type_id, quantized, rows), [profile] if rows is None else [])
    assert built.plan is not None, built.errors
    names = [layer.name for layer in built.layers if layer.kind != "shape_call"]
    assert names == ["norm_0", "product_0", "norm_1", "product_1", "norm_2"]


@pytest.mark.parametrize("capabilities", [*((one,) for one in CAPABILITIES), CAPABILITIES[1:]], ids="-".join)
def test_engines_for_each_compute_capability(capabilities: tuple[str, ...]) -> None:
    built = build(chain(HALF, INT8, None), [{"x": ((1, 64), (16, 64), (512, 64))}], capabilities)
    assert built.plan is not None, built.errors
    assert len(built.plugins) == 5


def check_decoder(model_dir: Path, dtype: str, folder: Path, **options: Any) -> None:
    """Export a checkpoint's network as ONNX, with the plug-ins as nodes, and build it."""
    sizes = {"max_batch_size": 4, "max_input_len": 32, "max_output_len": 32}
    summary = export_onnx(model_dir, output=folder / "network.onnx", dtype=dtype, **sizes, **options)
    built = build(summary.path, summary.profiles, ["SM86", "SM89", "SM120"])
    assert built.plan is not None, built.errors
    # A layer has two norms, attention, and four products; after the last come a norm and a product. Each profile lists
    # all of them. What else there is gathers rows: of the embedding, and of the last tokens.
    assert len(built.plugins) == len(summary.profiles) * (7 * summary.model.num_layers + 2)
    others = [layer for layer in built.layers if layer.kind not in ("custom_layer", "shape_call")]
    assert all("Gath" in layer.name for layer in others), [layer.name for layer in others]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_packaged_model(dtype: str, tmp_path: Path) -> None:
    check_decoder(packaged_model_dir(), dtype, tmp_path)


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_caches_of_8_bits(kv_cache_dtype: str, tmp_path: Path) -> None:
    check_decoder(packaged_model_dir(), "float16", tmp_path, kv_cache_dtype=kv_cache_dtype)


def test_weights_in_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_model.backends.onnx.export.LARGEST_MODEL", 0)
    check_decoder(packaged_model_dir(), "float16", tmp_path)
    assert (tmp_path / "network.onnx.data").is_file()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_standard_operators(dtype: str, tmp_path: Path) -> None:
    """TensorRT has all of them; Attention in 16-bit types only."""
    model_dir = packaged_model_dir()
    summary = export_onnx(model_dir, output=tmp_path / "network.onnx", operators="standard", dtype=dtype)
    named = {"batch_size": (1, 1, 4), "sequence_length": (1, 16, 64)}
    named |= {"total_sequence_length": (1, 64, 256), "past_sequence_length": (0, 48, 255)}
    ranges = {
        tensor.name: [named.get(str(size), (size,) * 3) for size in tensor.shape] for tensor in summary.written.inputs
    }
    profile = {name: tuple(zip(*sizes, strict=True)) for name, sizes in ranges.items()}
    built = build(summary.path, [profile], ["SM86", "SM89", "SM120"])
    assert built.plan is not None, built.errors


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_random_checkpoint_of_every_architecture(architecture: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the random checkpoints are made with PyTorch")
    from tests.qwen_model import model_files

    sizes = {"hidden_size": 192, "num_attention_heads": 6, "num_hidden_layers": 2}
    if architecture == "QWenLMHeadModel":
        made = model_files.qwen_v1(**sizes, kv_channels=32)
        folder = model_files.save_reference(*made, tmp_path / "model", "bfloat16")
    elif architecture == "DeciCoderForCausalLM":
        made = model_files.decicoder(**sizes)
        folder = model_files.save_reference(*made, tmp_path / "model", "bfloat16")
    else:
        head = {"head_dim": 32} if architecture == "Qwen3ForCausalLM" else {}
        hugging_face = model_files.hugging_face_model(architecture, **sizes, **head)
        folder = model_files.save_hugging_face(hugging_face, tmp_path / "model")
    check_decoder(folder, "float16", tmp_path)


# The inputs of each plug-in with everything that is optional, as messages call them, with their types and shapes.
FULL = {
    "RmsNorm": {
        "fields": {"type_id": HALF, "residual": 1},
        "inputs": {"x": [HALF, [3, 64]], "weight": [HALF, [64]], "residual": [HALF, [3, 64]]},
        "outputs": [[HALF, [3, 64]], [HALF, [3, 64]]],
    },
    "RmsNormQuantization": {
        "fields": {"type_id": HALF, "residual": 1, "smoothing": 1, "dyn_act_scaling": 0},
        "inputs": {
            **{"x": [HALF, [3, 64]], "weight": [HALF, [64]], "residual": [HALF, [3, 64]]},
            **{"scale": [FLOAT, [1]], "smoothing": [FLOAT, [64]]},
        },
        "outputs": [[INT8, [3, 64]], [HALF, [3, 64]]],
    },
    "Gemm": {
        "fields": {"type_id": HALF, "bias": 1, "activation": 1},
        "inputs": {"x": [HALF, [3, 64]], "weight": [HALF, [48, 64]], "bias": [HALF, [48]]},
        "outputs": [[HALF, [3, 24]]],
    },
    "Gemm:2": {
        "fields": {"type_id": HALF, "in_features": 192, "out_features": 96, "weight_bits": 4}
        | {"group_size": 64, "zeros": 1, "bias": 1, "activation": 1},
        "inputs": {
            **{"x": [HALF, [3, 192]], "weight": [INT32, [2, 8, 256]], "scales": [INT32, [4, 64]]},
            **{"zeros": [INT32, [4, 32]], "bias": [HALF, [96]]},
        },
        "outputs": [[HALF, [3, 48]]],
    },
    "GptAttention": {
        "fields": {"type_id": HALF, **ATTENTION, "rotary_embedding_dim": 32, "position_embedding_type": 2}
        | {"query_scale": 1, "qk_norm": 1},
        "inputs": {
            **{"qkv": [HALF, [5, 256]], "past_key_value": [HALF, [8, 2, 2, 100, 32]], "cu_seqlens": [INT32, [4]]},
            **{"past_lengths": [INT32, [3]], "rotary_offsets": [INT32, [3]], "rotary_table": [FLOAT, [200, 32]]},
            **{"semaphores": [INT32, [8, 4]], "query_scale": [FLOAT, [200]]},
            **{"q_norm_weight": [HALF, [32]], "k_norm_weight": [HALF, [32]]},
        },
        "outputs": [[HALF, [5, 128]], [HALF, [8, 2, 2, 100, 32]]],
    },
    "GptAttention:2": {
        "fields": {"type_id": HALF, **ATTENTION, "rotary_embedding_dim": 32, "position_embedding_type": 2}
        | {"tokens_per_block": 64, "kv_cache_type": 1},
        "inputs": {
            **{"qkv": [HALF, [5, 256]], "past_key_value": [INT32, [9, 2304]], "cu_seqlens": [INT32, [4]]},
            **{"past_lengths": [INT32, [3]], "pages": [INT32, [3, 7]], "rotary_offsets": [INT32, [3]]},
            **{"rotary_table": [FLOAT, [200, 32]], "semaphores": [INT32, [8, 4]]},
        },
        "outputs": [[HALF, [5, 128]], [INT32, [9, 2304]]],
    },
}
WRONG_TYPES = {
    **{FLOAT: "float32", HALF: "float16", INT8: "int8", INT32: "int32", BOOL: "bool", UINT8: "uint8"},
    **{FP8: "float8_e4m3fn", BFLOAT16: "bfloat16", INT64: "int64"},
}


# Dimensions that may change alone.
FREE = {("Gemm", "x", 0), ("Gemm:2", "x", 0), ("GptAttention", "qkv", 0), ("GptAttention", "past_key_value", 3)}
FREE |= {("GptAttention:2", *axis) for axis in (("qkv", 0), ("past_key_value", 0), ("pages", 1), ("semaphores", 0))}
FREE |= {("GptAttention:2", "rotary_table", 0)}


def full_mode(plugin: str, changed: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """The mode of `FULL` with other types and shapes of some inputs, and other fields; None takes a field away."""
    given = FULL[plugin]
    merged = given["fields"] | fields
    return {
        "plugin": plugin,
        "fields": {name: value for name, value in merged.items() if value is not None},
        "inputs": list((given["inputs"] | (changed or {})).values()),
        "outputs": given["outputs"],
        "dynamic": [],
    }


def wrong_uses() -> dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]]:
    """Each: a mode, changed arguments of the node, changed ranges of the profile, and what must be said."""
    cases: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {}

    def add(case: str, mode: dict[str, Any], says: str, node: Any = None, profile: Any = None) -> None:
        cases[f"{mode['plugin']}-{case}"] = (mode, node or {}, profile or {}, says)

    for plugin, given in FULL.items():
        for name, (right, shape) in given["inputs"].items():
            for wrong, called in WRONG_TYPES.items():
                if wrong != right:
                    mode = full_mode(plugin, {name: [wrong, shape]})
                    add(f"{name}-{called}", mode, f"input '{name}' has type {called}; expected ")
            add(f"{name}-rank", full_mode(plugin, {name: [right, [*shape, 1]]}), "input '")
            for axis in range(len(shape)):
                larger = [extent + (i == axis) for i, extent in enumerate(shape)]
                if (plugin, name, axis) in FREE:
                    continue
                add(f"{name}-axis{axis}", full_mode(plugin, {name: [right, larger]}), "input '")
        count = len(given["inputs"])
        for number in (count - 1, count + 1):
            inputs = [f"in{i % count}" for i in range(number)]
            add(f"{number}-inputs", full_mode(plugin), f"got {number} inputs; expected {count}", {"inputs": inputs})
        for name, value in given["fields"].items():
            add(f"{name}-float", full_mode(plugin, **{name: float(value)}), f"field '{name}' has type FLOAT32")
            add(f"{name}-99", full_mode(plugin, **{name: 99}), "field '")
            add(f"{name}-list", full_mode(plugin, **{name: [1, 2]}), f"field '{name}' has 2 values; expected 1")
        add("no-type", full_mode(plugin, type_id=None), "required field 'type_id' is missing")
    add("kernels-3", full_mode("Gemm", kernels=[4, 0, 8]), "field 'kernels' has 3 values; expected pairs")
    add("kernels-order", full_mode("Gemm", kernels=[4, 0, 4, 0]), "field 'kernels' has 4 rows after 4; expected more")
    for plugin in ("RmsNorm", "RmsNormQuantization"):
        add("eps-int", full_mode(plugin, eps=1), "field 'eps' has type INT32; expected FLOAT32")
        add("eps-negative", full_mode(plugin, eps=-1e-6), "field 'eps' is -0.000001; expected a finite number above 0")
        add("eps-text", full_mode(plugin, eps="1e-6"), "field 'eps' has type CHAR; expected FLOAT32")
    add_limits(add)
    return cases


def add_limits(add: Any) -> None:
    """Sizes beyond the limits, known or a profile's maximum."""
    dynamic_x = {"x": [HALF, [2, 3, 64]]}
    empty = {"x": [HALF, [3, 0]], "weight": [HALF, [48, 0]]}
    add("in-features-0", full_mode("Gemm", empty), "where in_features is 0; expected 1 to 1073741823")
    rows = full_mode("Gemm", dynamic_x) | {"dynamic": [2, 3], "outputs": [[HALF, [2, 3, 24]]]}
    largest = {"in0": ((1, 1, 64), (1, 1, 64), (1 << 20, 1 << 20, 64))}
    add("rows", rows, "the product of its leading dimensions is 1099511627776; expected 0 to", profile=largest)
    dynamic_scale = {
        "plugin": "RmsNormQuantization",
        "fields": {"type_id": HALF, "dyn_act_scaling": 1},
        "inputs": [[HALF, [3, 0]], [HALF, [0]]],
        "outputs": [[INT8, [3, 0]], [FLOAT, [3, 1]]],
        "dynamic": [],
    }
    add("empty-rows", dynamic_scale, "where hidden_size is 0; expected 1 to 2147483647")
    attention = full_mode("GptAttention") | {"dynamic": [5, 4, 3]}
    attention["inputs"] = [
        [number, [6 if (extent, i) == (4, 6) else extent for extent in shape]]
        for i, (number, shape) in enumerate(attention["inputs"])
    ]
    attention["fields"] = attention["fields"] | {"num_heads": 6}
    attention["inputs"][0][1] = [5, 320]
    attention["outputs"] = [[HALF, [5, 192]], attention["outputs"][1]]
    for sequences, tokens, says in (
        (65536, 65536, "input 'cu_seqlens' has shape [65537], where sequences is 65536; expected 0 to 65535"),
        (8, (1 << 21) + 1, "input 'qkv' has shape [2097153, 320], where tokens is 2097153; expected 0 to 2097152"),
        (16385, 20000, "has 16385 sequences and 'qkv' 20000 tokens; expected at most 16384 sequences, or one token"),
    ):
        profile = {"in0": ((1, 320), (5, 320), (tokens, 320)), "in2": ((2,), (4,), (sequences + 1,))}
        profile |= dict.fromkeys(("in3", "in4"), ((1,), (3,), (sequences,)))
        add(f"{sequences}-sequences-{tokens}-tokens", attention, says, profile=profile)
    small = full_mode("GptAttention", {"past_key_value": [HALF, [2, 2, 2, 100, 32]], "semaphores": [INT32, [2, 4]]})
    small["outputs"] = [small["outputs"][0], [HALF, [2, 2, 2, 100, 32]]]
    add("batch", small, "'past_lengths' has 3 sequences; expected at most 2, the first dimension of past_key_value")
    none = full_mode("GptAttention", {"past_key_value": [HALF, [8, 2, 2, 0, 32]]})
    add("no-positions", none, "where max_positions is 0; expected 1 to 2147483647")


WRONG_USES = wrong_uses()
# What TensorRT itself finds: a node with another number of outputs than the plug-in has, a version without a creator.
WRONG_NODES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    f"{plugin}-{case}": (full_mode(plugin), node, {}, LAYER)
    for plugin, given in FULL.items()
    for case, node in {
        "more-outputs": {"outputs": [*(f"out{i}" for i in range(len(given["outputs"]))), "more"]},
        "no-output": {"outputs": [""] * len(given["outputs"])},
        "version": {"version": "3"},
    }.items()
}


@pytest.fixture(scope="module")
def said() -> dict[str, dict[str, Any]]:
    """What TensorRT said of each wrong use, in a process of its own: an abort would take the tests with it."""
    lines = []
    for case, (mode, node, ranges, _) in (WRONG_USES | WRONG_NODES).items():
        data, profile = model_of(mode, node)
        lines.append(json.dumps({"case": case, "model": data.hex(), "profile": profile | ranges}))
    worker = [sys.executable, "-m", "tests.support.rtx_builder"]
    root = Path(__file__).parents[2]
    result = subprocess.run(worker, input="\n".join(lines), cwd=root, capture_output=True, text=True, check=False)
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    found = {answer["case"]: answer for answer in answers}
    if result.returncode != 0:
        fatal = [*WRONG_USES, *WRONG_NODES, "none"][len(answers)]
        pytest.fail(f"the process ended with {result.returncode} at case {fatal}:\n{result.stderr[-2000:]}")
    return found


@pytest.mark.parametrize("case", WRONG_USES)
def test_wrong_use_is_an_error_that_names_layer_and_input(said: dict[str, dict[str, Any]], case: str) -> None:
    mode, *_, says = WRONG_USES[case]
    assert not said[case]["built"]
    start = f"[qwen_plugins] {name_and_version(mode['plugin'])[0]} '{LAYER}': "
    ours = [error for error in said[case]["errors"] if error.startswith(start)]
    assert ours, said[case]["errors"]
    assert says in ours[0]


@pytest.mark.parametrize("case", WRONG_NODES)
def test_wrong_node_is_an_error_that_names_it(said: dict[str, dict[str, Any]], case: str) -> None:
    assert not said[case]["built"]
    assert any(LAYER in error for error in said[case]["errors"]), said[case]["errors"]


def test_the_right_uses_of_these_cases_are_built() -> None:
    for plugin in FULL:
        built_model, profile = model_of(full_mode(plugin))
        assert not profile
        assert build(built_model).plan is not None


def test_what_the_parser_does_to_attributes() -> None:
    """It drops those that the creator does not list, and cuts integers to 32 bits: docs/tensorrt.md warns of both."""
    misspelt, _ = model_of(full_mode("RmsNorm", epsilon=1e-3))
    assert build(misspelt).plan is not None
    cut, _ = model_of(full_mode("RmsNorm", residual=(1 << 32) + 1))
    assert build(cut).plan is not None
