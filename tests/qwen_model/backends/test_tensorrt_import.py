"""The TensorRT back end on a real TensorRT without a GPU: what it imports is there, and what is missing is said."""

import importlib.util
import sys

import pytest

import qwen_model

pytest.importorskip("tensorrt", reason="TensorRT is not installed", exc_type=ImportError)
runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed", exc_type=ImportError)

pytestmark = pytest.mark.tensorrt


def test_a_build_gets_as_far_as_the_gpu(monkeypatch, tmp_path):
    if runtime.cudaGetDeviceCount()[0] == runtime.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU: test_tensorrt_gpu.py builds on it")
    if importlib.util.find_spec("qwen_plugins._core") is None:  # built for another Python than this TensorRT's
        from tests.stand_ins import KERNELS, numpy_kernels

        for name in KERNELS:
            monkeypatch.setitem(sys.modules, name, numpy_kernels.core)
    with pytest.raises(qwen_model.QwenModelError, match="needs an NVIDIA GPU, for building too"):
        qwen_model.build_engine(output_dir=tmp_path / "engine", backend="tensorrt")
    assert "qwen_model.backends.tensorrt" in sys.modules
    assert list(tmp_path.iterdir()) == []
