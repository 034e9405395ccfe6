"""Which warnings there are about the errors of quantized weights."""

import pytest

from qwen_model.checkpoints.module_weights import WeightFormat
from qwen_model.quantization.summary import error_warnings

INT4 = WeightFormat("int4", 128, layout=2, scale_dtype="float16")
INT8 = WeightFormat("int8", layout=2, scale_dtype="float16")
W8A8 = WeightFormat("int8", activation="int8", scale_dtype="float32", activation_scale="token")
FP8 = WeightFormat("fp8", activation="fp8", scale_dtype="float32", activation_scale="token")


@pytest.mark.parametrize(
    ("weight_format", "normal", "large", "remedy"),
    [
        (INT4, 0.16, 0.17, "--group-size 32 or int8 has smaller errors"),
        (INT8, 0.05, 0.06, "which fp8 keeps better"),
        (W8A8, 0.05, 0.06, "which --per-channel, where it is not given, or fp8 keeps better"),
        (FP8, 0.05, 0.06, "16 bits suit them better"),
    ],
    ids=str,
)
def test_layers_with_large_errors(weight_format, normal, large, remedy):
    names = [f"layers.{layer}.mlp.down" for layer in range(5)]
    formats = dict.fromkeys(names, weight_format)
    assert list(error_warnings(formats, dict.fromkeys(names, normal))) == []
    (warning,) = error_warnings(formats, {**dict.fromkeys(names, normal), names[3]: large})
    assert warning.startswith(f"{names[3]} ({large:.0%}) ")
    assert remedy in warning
    assert weight_format.text in warning
    (warning,) = error_warnings(formats, {name: large + i / 10 for i, name in enumerate(names)})
    assert warning.startswith(f"{names[4]} ({large + 0.4:.0%}), {names[3]} ({large + 0.3:.0%}), ")
    assert " and 2 more layers " in warning


@pytest.mark.parametrize(("weight_format", "remedy"), [(INT4, "int8"), (INT8, "none")], ids=str)
def test_the_head_has_a_remedy_of_its_own(weight_format, remedy):
    formats = {"lm_head": weight_format, "layers.0.mlp.down": weight_format}
    layer, head = sorted(error_warnings(formats, dict.fromkeys(formats, 0.5)))
    assert "--head-quantization" not in layer
    assert f"--head-quantization {remedy} has smaller errors" in head


def test_formats_have_warnings_of_their_own():
    formats = {"lm_head": INT8, "layers.0.mlp.down": INT4}
    assert len(list(error_warnings(formats, dict.fromkeys(formats, 0.5)))) == 2
