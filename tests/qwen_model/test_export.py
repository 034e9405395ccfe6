"""The command `qwen-model export`: its summary, the printed command of trtexec, its errors."""

import re
import shlex

import pytest
import torch

from qwen_model import build_engine, export
from qwen_model.command_line import run_command
from qwen_model.network.inputs import network_inputs
from tests.qwen_model import model_files
from tests.qwen_model.test_commands import python

onnx = pytest.importorskip("onnx")


@pytest.fixture
def command(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as exit_:
            run_command(export.main, [str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return call


def test_summary_of_plugins(command, tmp_path):
    code, out, err = command("--output", tmp_path / "model.onnx", "--max-batch-size", 2, "--max-input-len", 100)
    assert (code, err) == (0, "")
    for line in (
        rf"file        {re.escape(str(tmp_path))}/model.onnx\n",
        r"model       Qwen2ForCausalLM, 6\.6 million parameters, 6 layers\n",
        r"operators   plugins, float16, opset 17, 47 nodes\n",
        r"inputs      input_ids +int32 +\[tokens\]\n",
        r" +past_key_value_0\.\.\.5 +float16 +\[num_pages, 2, 2, 64, 64\]\n",
        r"outputs     logits +float16 +\[logit_rows, 5120\]\n",
        r"limits      2 sequences, prompts of 100 tokens, outputs of 512 tokens\n",
    ):
        assert re.search(line, out), line


def test_trtexec_gets_a_shape_for_every_dynamic_input(command, tmp_path):
    _, out, _ = command("--output", tmp_path / "my model.onnx")
    words = shlex.split(out[out.index("trtexec") :])
    assert f"--onnx={tmp_path / 'my model.onnx'}" in words
    assert f"--saveEngine={tmp_path / 'my model.plan'}" in words
    assert [word for word in words if word.startswith("--profile")] == ["--profile=0", "--profile=1"]
    graph = onnx.load(tmp_path / "my model.onnx").graph
    dynamic = {tensor.name for tensor in graph.input if any(d.dim_param for d in tensor.type.tensor_type.shape.dim)}
    shapes = [word for word in words if "Shapes=" in word]
    assert [shape.partition("=")[0] for shape in shapes] == ["--minShapes", "--optShapes", "--maxShapes"] * 2
    for shape in shapes:
        given = dict(part.split(":") for part in shape.partition("=")[2].split(","))
        assert set(given) == dynamic
    assert "input_ids:8192," in shapes[-1]
    assert "rotary_table:1536x64" in shapes[-1]


def test_inputs_are_those_of_the_tensorrt_back_end(tmp_path):
    from qwen_model.engine.export import export_onnx

    summary = export_onnx(output=tmp_path / "model.onnx", max_batch_size=3)
    expected = network_inputs(summary.model, summary.limits, "float16", "auto")
    found = {
        tensor.name: (tensor.dtype, tuple(-1 if isinstance(size, str) else size for size in tensor.shape))
        for tensor in summary.written.inputs
    }
    assert found == {name: (given.dtype, given.shape) for name, given in expected.items()}


def test_summary_of_standard_operators(command, tmp_path, monkeypatch):
    monkeypatch.setattr("qwen_model.backends.onnx.export.LARGEST_MODEL", 0)
    window = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    model = model_files.hugging_face_model("Qwen2ForCausalLM", **window)
    folder = model_files.save_hugging_face(model, tmp_path / "checkpoint")
    code, out, err = command("--model-dir", folder, "--output", tmp_path / "m.onnx", "--operators", "standard")
    assert code == 0
    assert "warning: the model attends to sequences of more than 64 tokens through a sliding window" in err
    assert f"weights     {tmp_path}/m.onnx.data\n" in out
    assert re.search(r" past_key_values\.0\.\.\.2\.key +float32 +\[batch_size, 2, past_sequence_length, 14\]\n", out)
    assert "trtexec" not in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"quantization": "int4", "group_size": 32, "head_quantization": "none"},
            "warning: the checkpoint's weights are quantized (int4, groups of 32): the file has the numbers that they "
            "stand for, in {dtype}{kept}\n",
        ),
        (
            {"quantization": "fp8"},
            "warning: the checkpoint's weights are quantized (fp8, a scale per output, x per token): the file has the "
            "numbers that they stand for, in {dtype}, and the inputs of layers are not quantized{kept}\n",
        ),
    ],
)
def test_a_quantized_checkpoint(command, tmp_path, options, said):
    from qwen_model.engine.quantize import quantize_checkpoint

    quantize_checkpoint(output_dir=tmp_path / "quantized", **options)
    for operators, dtype, kept in (
        ("plugins", "float16", "; engines of qwen-model build keep them quantized"),
        ("standard", "float32", ""),
    ):
        code, _, err = command(
            *("--model-dir", tmp_path / "quantized", "--output", tmp_path / f"{operators}.onnx"),
            *("--operators", operators),
        )
        assert code == 0, err
        assert said.format(dtype=dtype, kept=kept) in err


def test_warnings_are_those_of_a_build(command, tmp_path):
    """About lengths, scales of a cache that are not used, and keys that an int8 cache rounds."""
    from safetensors.torch import load_file, save_file

    model = model_files.hugging_face_model(
        "Qwen2ForCausalLM", max_position_embeddings=100, hidden_size=128, num_attention_heads=2, num_key_value_heads=1
    )
    folder = model_files.save_hugging_face(model, tmp_path / "checkpoint")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.k_scale"] = torch.tensor([0.03])
    tensors["model.layers.0.self_attn.k_proj.bias"][:] = 300
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    sizes = {"max_input_len": 90, "max_output_len": 20, "max_batch_size": 2, "kv_cache_dtype": "int8"}
    built = build_engine(folder, output_dir=tmp_path / "engine", **sizes)
    words = [str(word) for name, value in sizes.items() for word in (f"--{name.replace('_', '-')}", value)]
    code, _, err = command("--model-dir", folder, "--output", tmp_path / "model.onnx", *words)
    assert code == 0, err
    warnings = {line for line in err.splitlines() if line.startswith("warning: ")}
    assert warnings == {f"warning: {text}" for text in built.warnings if "token ids only" not in text}
    assert len(warnings) == 2
    # Keys are scaled as in an engine, so that the cache holds none of 300.
    weights = {
        each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(tmp_path / "model.onnx").graph.initializer
    }
    (bias,) = (array for name, array in weights.items() if name == "layers.0.attention.qkv.bias")
    assert abs(bias[128:192]).max() <= 4


def test_errors_are_one_line(command, tmp_path):
    (tmp_path / "model.onnx").write_text("mine")
    code, out, err = command("--output", tmp_path / "model.onnx")
    assert (code, out) == (1, "")
    assert err == f"error: {tmp_path}/model.onnx already exists and no export wrote it: give another name\n"


def test_neither_pytorch_nor_tensorrt_is_needed(tmp_path):
    script = (
        "import sys; sys.modules['torch'] = sys.modules['tensorrt'] = None\n"
        f"from qwen_model.export import main; main(['--output', {str(tmp_path / 'model.onnx')!r}])"
    )
    done = python("-W", "ignore", "-c", script)
    assert done.returncode == 0, done.stderr
    onnx.checker.check_model(tmp_path / "model.onnx")
