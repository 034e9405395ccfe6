"""The back end of TensorRT-RTX on TensorRT-RTX, CUDA and kernels in NumPy, beside the torch back end."""

import json
import sys

import numpy as np
import pytest

import qwen_model
from qwen_model.engine.back_ends import back_end
from qwen_model.interface.engine_config import RTX_COMPUTE_CAPABILITIES
from tests import stand_ins
from tests.qwen_model import model_files
from tests.qwen_model.conftest import save_byte_tokenizer
from tests.qwen_model.model_files import random_prompt
from tests.qwen_model.session_checks import check_streams, check_that_nothing_is_left_behind
from tests.qwen_model.tensorrt_reference import ARCHITECTURES, save_model
from tests.stand_ins import numpy_cuda
from tests.support.files import redirect

pytest.importorskip("onnx")

LIMITS = {"max_batch_size": 6, "max_input_len": 60, "max_output_len": 30}


@pytest.fixture
def rtx(monkeypatch, tmp_path):
    """A machine with a card that TensorRT-RTX supports, and without TensorRT."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(numpy_cuda.device, "capability", (8, 9))
    with stand_ins.installed("rtx") as module:
        yield module


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = save_model("Qwen2ForCausalLM", tmp_path_factory.mktemp("models") / "model")
    return save_byte_tokenizer(folder)


def build(model_dir, folder, **options):
    settings = {"backend": "tensorrt-rtx", "dtype": "float32", **LIMITS, **options}
    return qwen_model.build_engine(model_dir, output_dir=folder, **settings)


def both(model_dir, tmp_path, **options):
    """A session of the torch back end and one of this."""
    build(model_dir, tmp_path / "torch", backend="torch", **options)
    engine = build(model_dir, tmp_path / "rtx", **options).engine_dir
    return qwen_model.load_engine(tmp_path / "torch", device="cpu"), qwen_model.load_engine(engine)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_and_tokens_are_those_of_the_torch_back_end(rtx, architecture, tmp_path):
    expected, session = both(save_model(architecture, tmp_path / "model"), tmp_path)
    assert {plugin.name for plugin in session.device.engine.network.plugins} == {
        "RmsNorm",
        "QwenGemm",
        "GptAttention",
    }
    prompt = random_prompt(50)
    np.testing.assert_allclose(session.logits(prompt), expected.logits(prompt), atol=2e-4)
    prompts = [random_prompt(length, seed=length) for length in (1, 40, 7, 7)]
    for options in ({}, {"num_beams": 2}):
        ours, theirs = (which.generate(prompts[:3], max_new_tokens=20, **options) for which in (session, expected))
        assert [output.output_ids for output in ours.outputs] == [output.output_ids for output in theirs.outputs]


def test_streams_and_requests_that_fail_or_stop(rtx, model_dir, tmp_path):
    _, session = both(model_dir, tmp_path)
    prompts = [random_prompt(20, seed=3), random_prompt(11, seed=4)]
    check_streams(session, prompts, max_new_tokens=12)
    check_that_nothing_is_left_behind(session, prompts)


@pytest.fixture
def without_gpu(rtx):
    """Nor the packages that run engines."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(numpy_cuda.device, "count", 0)
        patched.setitem(sys.modules, "cuda.bindings", None)
        yield


def test_an_engine_is_built_without_a_gpu(rtx, without_gpu, model_dir, tmp_path):
    steps = []
    summary = build(
        model_dir, tmp_path / "engine", compute_capabilities=["12.0", "8.6"], progress=lambda *step: steps.append(step)
    )
    names = {path.name for path in (tmp_path / "engine").iterdir()}
    assert names == {"config.json", "model.plan", "tokenizer.json", "tokenizer_config.json"}
    assert list(dict.fromkeys(step[0] for step in steps)) == ["weights", "TensorRT-RTX", "plan"]
    assert steps[-1] == ("plan", (tmp_path / "engine" / "model.plan").stat().st_size, 0)
    config = json.loads((tmp_path / "engine" / "config.json").read_text())
    assert config["compute_capabilities"] == ["8.6", "12.0"] == list(summary.config.compute_capabilities)
    assert config["versions"]["tensorrt_rtx"] == rtx.__version__
    assert "gpu" not in config["versions"]
    assert build(model_dir, tmp_path / "engine").config.compute_capabilities == RTX_COMPUTE_CAPABILITIES
    with pytest.raises(qwen_model.QwenModelError, match=r"^running an engine of TensorRT-RTX needs"):
        qwen_model.load_engine(tmp_path / "engine")


def test_running_without_a_gpu_is_an_error(rtx, model_dir, tmp_path, monkeypatch):
    engine = build(model_dir, tmp_path / "engine").engine_dir
    monkeypatch.setattr(numpy_cuda.device, "count", 0)
    message = (
        "^an engine of TensorRT-RTX is built without a GPU, but runs on an NVIDIA GPU only: the driver finds none$"
    )
    with pytest.raises(qwen_model.QwenModelError, match=message):
        qwen_model.load_engine(engine)


def test_other_cards_and_versions(rtx, model_dir, tmp_path, monkeypatch):
    engine = build(model_dir, tmp_path / "engine", compute_capabilities=["8.6"]).engine_dir
    with pytest.raises(qwen_model.QwenModelError) as error:
        qwen_model.load_engine(engine)
    said = str(error.value)
    assert f"{engine} is for GPUs of compute capability 8.6; NumPy has 8.9: build it again with" in said
    assert "--compute-capability 8.6 8.9 --output-dir" in said
    monkeypatch.setattr(numpy_cuda.device, "capability", (9, 0))
    with pytest.raises(
        qwen_model.QwenModelError, match=r"8\.6; NumPy has 9\.0, which TensorRT-RTX does not support: use --backend ten"
    ):
        qwen_model.load_engine(engine)
    config = json.loads((engine / "config.json").read_text())
    config["versions"]["tensorrt_rtx"] = "1.6"
    (engine / "config.json").write_text(json.dumps(config))
    with pytest.raises(qwen_model.QwenModelError, match=rf"built for tensorrt_rtx 1\.6, here {rtx.__version__}: build"):
        qwen_model.load_engine(engine)


def test_no_engine_shows_the_results_of_its_operations(rtx, model_dir, tmp_path):
    summary = build(model_dir, tmp_path / "engine")
    with pytest.raises(qwen_model.QwenModelError, match="engine of TensorRT-RTX: compare those of torch and tensorrt"):
        back_end("tensorrt-rtx").load_probe(summary.engine_dir, summary.config)


def test_compiled_kernels_are_kept_in_a_file(rtx, model_dir, tmp_path):
    engine = build(model_dir, tmp_path / "engine").engine_dir
    file = tmp_path / "cache" / "qwen_model" / f"tensorrt-rtx-{rtx.__version__}-NumPy.kernels"
    session = qwen_model.load_engine(engine)
    session.generate([[1, 2], [3]], max_new_tokens=2)
    assert (
        file.read_bytes() == b"kernels of 3"
    )  # contexts: for prompts, and for decode steps of one sequence and of two
    before = file.stat().st_ino
    session.generate([[1, 2], [3]], max_new_tokens=2)
    assert file.stat().st_ino == before  # nothing new
    with stand_ins.installed("rtx"):  # another process
        qwen_model.load_engine(build(model_dir, tmp_path / "again").engine_dir).generate([1], max_new_tokens=2)
        assert file.read_bytes() == b"kernels of 5"
    file.write_bytes(b"of another card")
    with stand_ins.installed("rtx"):
        qwen_model.load_engine(build(model_dir, tmp_path / "again").engine_dir).generate([1], max_new_tokens=2)
    assert file.read_bytes() == b"kernels of 2"


@pytest.mark.parametrize("broken", ["no folder", "no home"])
def test_running_does_not_need_the_cache_folder(rtx, model_dir, tmp_path, monkeypatch, broken):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file") if broken == "no folder" else "")
    if broken == "no home":
        monkeypatch.setattr("pathlib.Path.home", no_home)
    session = qwen_model.load_engine(build(model_dir, tmp_path / "engine").engine_dir)
    assert len(session.generate([1], max_new_tokens=2).outputs[0].output_ids) == 2


def no_home():
    raise RuntimeError("Could not determine home directory.")


def test_what_cannot_be_built(rtx, model_dir, tmp_path, monkeypatch):
    for options, message in (
        ({"compute_capabilities": ["9.0"]}, r"must be one of 8\.0, 8\.6, 8\.9, 12\.0, 12\.1, not '9\.0'"),
        ({"compute_capabilities": "8.6"}, r"must be a collection of texts, not the text '8\.6'"),
        ({"disable_plugins": ["gemm"]}, "plug-ins cannot be disabled in the tensorrt-rtx back end"),
        (
            {"timing_cache": tmp_path / "cache"},
            r"\(--timing-cache\) is for the tensorrt back end, not for tensorrt-rtx",
        ),
        (
            {"hardware_compatible": True},
            r"\(--hardware-compatible\) is for the tensorrt back end, not for tensorrt-rtx",
        ),
        ({"compute_capabilities": ["8.6"], "backend": "torch"}, r"for the tensorrt-rtx back end, not for torch"),
    ):
        with pytest.raises(qwen_model.QwenModelError, match=message):
            build(model_dir, tmp_path / "engine", **options)
    narrow = model_files.save_hugging_face(model_files.hugging_face_model("Qwen2ForCausalLM"), tmp_path / "narrow")
    with pytest.raises(qwen_model.QwenModelError, match=r"this model has 14: use the torch back end$"):
        build(narrow, tmp_path / "engine")
    monkeypatch.setattr(rtx.OnnxParser, "parse_from_file", lambda parser, path: parser.log.log(1, "no such plug-in"))
    with pytest.raises(qwen_model.QwenModelError, match=r"^TensorRT-RTX built no engine\. It says:\nno such plug-in$"):
        build(model_dir, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_a_full_disk_is_an_error_of_the_folder(rtx, model_dir, tmp_path, monkeypatch):
    def fill(builder, network, config, writer):
        redirect("model.plan", "/dev/full")
        return build_to_stream(builder, network, config, writer)

    build_to_stream = rtx.Builder.build_serialized_network_to_stream
    monkeypatch.setattr(rtx.Builder, "build_serialized_network_to_stream", fill)
    with pytest.raises(qwen_model.QwenModelError, match=r"engine cannot be written: No space left on device"):
        build(model_dir, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_the_commands(rtx, model_dir, tmp_path, capsys):
    from qwen_model import build as build_command
    from qwen_model import inspect, run

    engine = str(tmp_path / "engine")
    arguments = ["--backend", "tensorrt-rtx", "--model-dir", str(model_dir), "--output-dir", engine]
    build_command.main([*arguments, "--dtype", "float32", "--compute-capability", "8.9", "12.0"])
    assert "back end    tensorrt-rtx, float32\nGPUs        of compute capability 8.9, 12.0\n" in capsys.readouterr().out
    run.main(["--engine-dir", engine, "--json", "--max-new-tokens", "5", "abc", "de"])
    assert [len(output["output_ids"]) for output in json.loads(capsys.readouterr().out)["outputs"]] == [5, 5]
    inspect.main([engine])
    assert "layers.*.attention.qkv" in capsys.readouterr().out
    (tmp_path / "engine" / "model.plan").rename(tmp_path / "any.plan")
    inspect.main([str(tmp_path / "any.plan")])
    printed = capsys.readouterr().out
    assert f"loaded by  TensorRT-RTX {rtx.__version__} on NumPy\n" in printed
    assert "   3 x  layers.*.attention.qkv" in printed
