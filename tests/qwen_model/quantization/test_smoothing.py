"""Smoothing changes nothing of a network's function, and static scales are those of what calibration saw."""

import numpy as np
import pytest
import torch

from qwen_model import QwenModelError
from qwen_model.checkpoints.checkpoint import Checkpoint
from qwen_model.checkpoints.config import ModelConfig
from qwen_model.quantization.activation_aware import CalibratedWeights
from qwen_model.quantization.calibration_network import observe_linear_layers
from qwen_model.quantization.eight_bit import round_to_eight_bits
from qwen_model.quantization.formats import own_formats
from qwen_model.quantization.options import quantization_options
from qwen_model.quantization.smoothing import calibrate_inputs
from tests.qwen_model.model_files import (
    decicoder,
    hugging_face_model,
    qwen_v1,
    random_prompt,
    save_hugging_face,
    save_reference,
)

TEXTS = [random_prompt(length, seed=length) for length in (40, 40, 23)]
MODELS = {
    "qwen2": lambda folder: save_hugging_face(hugging_face_model("Qwen2ForCausalLM"), folder),
    "qwen3": lambda folder: save_hugging_face(hugging_face_model("Qwen3ForCausalLM", attention_bias=True), folder),
    "llama, biases": lambda folder: save_hugging_face(
        hugging_face_model("LlamaForCausalLM", attention_bias=True, mlp_bias=True), folder
    ),
    "qwen": lambda folder: save_reference(*qwen_v1(), folder),
    "decicoder": lambda folder: save_reference(*decicoder(), folder),
}


def opened(folder):
    config = ModelConfig.from_model_dir(folder)
    checkpoint = Checkpoint(folder)
    checkpoint.check(config)
    return checkpoint, config


def observed(config, read):
    """The inputs of every linear layer, and its outputs but for the bias, over the texts."""
    found = {}
    observe_linear_layers(config, read, TEXTS, lambda module, x, w: found.update({module: (x, x @ w.T, w)}))
    return found


def calibrated(checkpoint, config, kind="smoothquant", **options):
    options = quantization_options(kind, **options)
    formats = own_formats(options, config, "float32")
    return calibrate_inputs(checkpoint, config, formats, options, TEXTS, lambda *progress: None)


@pytest.mark.parametrize("alpha", [0.5, "auto"])
@pytest.mark.parametrize("model", MODELS)
def test_the_function_is_the_same(tmp_path, model, alpha):
    """Inputs are divided by the scales, by what is before the layer alone, and products are the same."""
    checkpoint, config = opened(MODELS[model](tmp_path / "model"))
    found = calibrated(checkpoint, config, alpha=alpha)
    before, after = observed(config, checkpoint.read), observed(config, CalibratedWeights(checkpoint, config, found))
    assert found.scales.keys() == before.keys() == after.keys()
    for module, (x, y, _) in before.items():
        smoothed, same, _ = after[module]
        torch.testing.assert_close(smoothed * torch.from_numpy(found.scales[module]), x, rtol=2e-4, atol=2e-4)
        if not module.endswith(("qkv", "gate_up")):  # whose own outputs the next layer's scales divide
            torch.testing.assert_close(same, y, rtol=2e-4, atol=2e-4)
        largest = smoothed.abs().max().item()
        assert found.static[module] == pytest.approx(largest / 127, rel=1e-4)


def test_the_formula(tmp_path):
    """With alpha 0.5 the largest of each input and of each column of the weight become equal."""
    checkpoint, config = opened(MODELS["qwen2"](tmp_path / "model"))
    found = calibrated(checkpoint, config, alpha=0.5)
    plain = observed(config, checkpoint.read)
    after = observed(config, CalibratedWeights(checkpoint, config, found))
    for module in ("layers.1.mlp.down", "layers.2.mlp.down"):  # nothing is folded into the outputs of these
        x, _, w = plain[module]
        expected = (x.abs().amax(0) / w.abs().amax(0)).sqrt().numpy()
        np.testing.assert_allclose(found.scales[module], expected, rtol=1e-5)
        smoothed, _, weight = after[module]
        torch.testing.assert_close(smoothed.abs().amax(0), weight.abs().amax(0), rtol=1e-3, atol=1e-4)


def test_query_heads_of_one_key_head_share_scales(tmp_path):
    checkpoint, config = opened(MODELS["qwen2"](tmp_path / "model"))
    found = calibrated(checkpoint, config, alpha=0.7)
    x, _, w = observed(config, checkpoint.read)["layers.1.attention.output"]
    each = x.abs().amax(0).numpy() ** 0.7 / w.abs().amax(0).numpy() ** 0.3
    groups = each.reshape(config.num_kv_heads, -1, config.head_size)
    expected = np.broadcast_to(groups.max(1, keepdims=True), groups.shape).reshape(-1)
    np.testing.assert_allclose(found.scales["layers.1.attention.output"], expected, rtol=1e-5)


def test_auto_is_no_worse_than_any_fixed_alpha(tmp_path):
    """By the error of a layer's products with inputs and weights rounded, with outliers in the inputs."""
    folder = tmp_path / "model"
    model = hugging_face_model("Qwen2ForCausalLM")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight[::17] *= 60
    checkpoint, config = opened(save_hugging_face(model, folder))

    def error(alpha):
        found = calibrated(checkpoint, config, alpha=alpha)
        x, y, w = observed(config, CalibratedWeights(checkpoint, config, found))["layers.1.mlp.gate_up"]
        step = found.static["layers.1.mlp.gate_up"]
        rounded_x = (x / step).round().clamp(-127, 127) * step
        scales = torch.cat([part.abs().max().expand(len(part), 1) for part in w.chunk(2)]) / 127
        return (rounded_x @ ((w / scales).round() * scales).T - x @ w.T).square().sum().item() / y.square().sum().item()

    errors = {alpha: error(alpha) for alpha in ("none", 0.3, 0.5, 0.7, 0.9, "auto")}
    assert errors["auto"] < 1.05 * min(errors.values())
    assert errors["none"] > 5 * errors["auto"]


def test_fp8_is_calibrated_and_not_smoothed(tmp_path):
    checkpoint, config = opened(MODELS["qwen2"](tmp_path / "model"))
    found = calibrated(checkpoint, config, kind="fp8", calibration="texts")
    assert not found.scales
    for module, (x, _, _) in observed(config, checkpoint.read).items():
        assert found.static[module] == pytest.approx(x.abs().max().item() / 448)


def test_scales_per_token_are_not_calibrated(tmp_path):
    checkpoint, config = opened(MODELS["qwen2"](tmp_path / "model"))
    found = calibrated(checkpoint, config, per_token=True)
    assert not found.static
    assert len(found.scales) == 4 * config.num_layers


def test_inputs_that_are_not_finite(tmp_path):
    model = hugging_face_model("Qwen2ForCausalLM")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight *= 1e38
    checkpoint, config = opened(save_hugging_face(model, tmp_path / "model"))
    with pytest.raises(QwenModelError, match=r"the inputs of layers\.1\.mlp\.down are not finite"):
        calibrated(checkpoint, config)


def test_channels_that_calibration_never_saw(tmp_path):
    """They get no scale so small that the norm before them would overflow."""
    model = hugging_face_model("Qwen2ForCausalLM")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = 0
    checkpoint, config = opened(save_hugging_face(model, tmp_path / "model"))
    scales = calibrated(checkpoint, config, alpha=0.9).scales["layers.0.attention.qkv"]
    assert scales[3] > 1e-4 * scales.max()


E4M3 = torch.float8_e4m3fn


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_rounding_per_output(kind, dtype):
    weight = torch.randn(70, 300, generator=torch.Generator().manual_seed(0))
    weight[5], weight[6] = 0, 1e-7
    found, error = round_to_eight_bits(weight.to(getattr(torch, dtype)), kind, scale_dtype=dtype)
    w = weight.to(getattr(torch, dtype)).float()
    scales = (w.abs().amax(1, keepdim=True) / (127 if kind == "int8" else 448)).to(getattr(torch, dtype)).float()
    if dtype == "float16":
        scales[6] = 2.0**-24
    np.testing.assert_array_equal(found.scales, scales.numpy())
    scaled = w / torch.where(scales == 0, 1.0, scales)
    if kind == "int8":
        np.testing.assert_array_equal(found.codes, scaled.round().clamp(-127, 127).numpy())
    else:
        codes = scaled.clamp(-448, 448).to(E4M3).view(torch.uint8)
        np.testing.assert_array_equal(found.codes, codes.numpy())
    difference = torch.from_numpy(found.dequantized()) - w
    assert error == pytest.approx((difference.square().sum() / w.square().sum()).sqrt().item(), rel=1e-3)
    assert error < (0.01 if kind == "int8" else 0.03)


def test_rounding_per_tensor():
    """Each of several tensors that are joined has a scale of its own."""
    weight = torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    weight[20:] *= 100
    found, _ = round_to_eight_bits(weight, "int8", parts=(20, 30))
    largest = np.repeat([weight[:20].abs().max(), weight[20:].abs().max()], [20, 30]).astype(np.float32)
    np.testing.assert_array_equal(found.scales[:, 0], largest / np.float32(127))
