"""The functions on TensorRT-LLM's tensors: what they add is what `qwen_plugins.tensorrt` adds."""

import numpy as np
import pytest

from tests.stand_ins import numpy_tensorrt, numpy_tensorrt_llm

X = np.random.default_rng(0).standard_normal((5, 16), np.float32)
WEIGHT = np.linspace(0.5, 2, 16, dtype=np.float32)
NORMED = X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-5) * WEIGHT


@pytest.fixture
def llm():
    with numpy_tensorrt_llm.installed("1.2") as network:
        yield network


def tensor(array):
    return numpy_tensorrt_llm.Tensor(numpy_tensorrt.tensor_of(array))


@pytest.mark.parametrize("given", ["array", "tensor", "parameter"])
def test_rms_norm(llm, given):
    from qwen_plugins import tensorrt_llm

    weight = WEIGHT if given == "array" else tensor(WEIGHT)
    weight = numpy_tensorrt_llm.Parameter(weight) if given == "parameter" else weight
    y = tensorrt_llm.rms_norm(tensor(X), weight, 1e-5)
    np.testing.assert_allclose(y.trt_tensor.array, NORMED, rtol=1e-5)
    twice, h = tensorrt_llm.rms_norm(y, weight, 1e-5, y)
    np.testing.assert_allclose(h.trt_tensor.array, 2 * NORMED, rtol=1e-5)
    assert twice.producer is h.producer is llm.trt_network.layers[-1]
    assert [plugin.name for plugin in llm.trt_network.plugins] == ["RmsNorm"] * 2


def test_rms_norm_quant(llm):
    from qwen_plugins import tensorrt_llm

    x = tensor(X)
    q, scales, h = tensorrt_llm.rms_norm_quant(x, WEIGHT, smoothing=tensor(WEIGHT), residual=x, unit_offset=True)
    assert (q.shape, scales.shape, h.shape) == ((5, 16), (5, 1), (5, 16))
    assert q.dtype == numpy_tensorrt.DataType.INT8
    static = tensorrt_llm.rms_norm_quant(x, WEIGHT, scale=0.5, quant_dtype=numpy_tensorrt.DataType.FP8)
    assert static.dtype == numpy_tensorrt.DataType.FP8
    fields = [plugin.fields for plugin in llm.trt_network.plugins]
    names = ("dyn_act_scaling", "smoothing", "residual", "unit_offset")
    assert [[field[name] for name in names] for field in fields] == [[1, 1, 1, 1], [0, 0, 0, 0]]


def test_wrong_arguments_are_named(llm):
    from qwen_plugins import tensorrt_llm

    with pytest.raises(ValueError, match=r"weight has shape \(15,\); expected \[16\]"):
        tensorrt_llm.rms_norm(tensor(X), WEIGHT[:15])
    with pytest.raises(TypeError, match="x is a ndarray; expected"):
        tensorrt_llm.rms_norm(X, WEIGHT)
    assert llm.trt_network.plugins == []


def test_without_tensorrt_llm():
    with pytest.raises(ImportError, match=r"qwen_plugins\.tensorrt_llm needs the tensorrt_llm package"):
        import qwen_plugins.tensorrt_llm  # noqa: F401
