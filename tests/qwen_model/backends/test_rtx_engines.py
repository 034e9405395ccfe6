"""Engines of the real TensorRT-RTX, built without a GPU.

Needs the packages tensorrt-rtx-cu13 (1.7) and onnx. What the builder makes of the network, layer by layer, is in
tests/plugins/test_rtx_builder.py.
"""

import json

import pytest

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install tensorrt-rtx-cu13")
pytest.importorskip("onnx", reason="onnx is not installed: pip install onnx")

import tensorrt_rtx as trt

import qwen_model
from qwen_model.interface.engine_config import RTX_COMPUTE_CAPABILITIES
from tests.support.files import redirect

pytestmark = pytest.mark.tensorrt_registry

LIMITS = {"max_batch_size": 2, "max_input_len": 64, "max_output_len": 16}


def build(folder, model_dir=None, **options):
    return qwen_model.build_engine(model_dir, output_dir=folder, backend="tensorrt-rtx", **LIMITS, **options)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("external", [False, True], ids=["one file", "weights beside it"])
def test_the_packaged_model(dtype, external, tmp_path, monkeypatch):
    if external:
        monkeypatch.setattr("qwen_model.backends.onnx.export.LARGEST_MODEL", 0)
    summary = build(tmp_path / "engine", dtype=dtype)
    plan = (tmp_path / "engine" / "model.plan").read_bytes()
    assert plan[:4] == b"vtrt"
    assert len(plan) > summary.weight_bytes
    config = json.loads((tmp_path / "engine" / "config.json").read_text())
    assert config["versions"]["tensorrt_rtx"] == trt.__version__
    assert tuple(config["compute_capabilities"]) == RTX_COMPUTE_CAPABILITIES
    names = {path.name for path in (tmp_path / "engine").iterdir()}
    assert names == {"config.json", "model.plan", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize(
    "options",
    [
        {"quantization": "fp8"},
        {"quantization": "smoothquant"},
        {"quantization": "smoothquant", "per_token": True, "per_channel": True, "kv_cache_dtype": "fp8"},
    ],
    ids=str,
)
def test_quantized_x(options, tmp_path):
    summary = build(tmp_path / "engine", dtype="float16", **options)
    assert any(each.activation is not None for each in summary.config.weight_formats.values())
    assert (tmp_path / "engine" / "model.plan").read_bytes()[:4] == b"vtrt"


def test_every_compute_capability_alone(tmp_path):
    for capability in RTX_COMPUTE_CAPABILITIES:
        summary = build(tmp_path / "engine", compute_capabilities=[capability])
        assert summary.config.compute_capabilities == (capability,)


def test_a_full_disk_is_an_error_of_the_folder(tmp_path, monkeypatch):
    from qwen_model.backends.tensorrt_rtx import builder

    def full(*arguments):
        redirect("model.plan", "/dev/full")
        return new_writer(*arguments)

    new_writer = builder._new_writer
    monkeypatch.setattr(builder, "_new_writer", full)
    with pytest.raises(qwen_model.QwenModelError, match=r"engine cannot be written: No space left on device"):
        build(tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []


def test_running_needs_a_gpu(tmp_path):
    reason = "cuda-bindings is not installed"
    runtime = pytest.importorskip("cuda.bindings.runtime", reason=reason, exc_type=ImportError)
    if runtime.cudaGetDeviceCount()[0] == runtime.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU")
    build(tmp_path / "engine")
    message = "^an engine of TensorRT-RTX is built without a GPU, but runs on an NVIDIA GPU only: "
    with pytest.raises(qwen_model.QwenModelError, match=message):
        qwen_model.load_engine(tmp_path / "engine")
