"""Engines of a real TensorRT beside references, whose files come from where there is PyTorch.

python -m tests.qwen_model.tensorrt_reference FOLDER                                        # where there is PyTorch
QWEN_MODEL_REFERENCE=FOLDER pytest tests/qwen_model/evaluation/comparison/test_tensorrt_gpu.py   # with TensorRT
"""

import os
from pathlib import Path

import pytest

import qwen_model
from qwen_model.common.errors import QwenModelError
from qwen_model.evaluation.comparison.compare import compare_engine
from qwen_model.evaluation.comparison.reference_file import read_reference
from qwen_model.evaluation.comparison.report import text
from qwen_model.packaged_model import packaged_model_dir
from tests.qwen_model.tensorrt_reference import ARCHITECTURES, LIMITS

REFERENCE = os.environ.get("QWEN_MODEL_REFERENCE")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.tensorrt,
    pytest.mark.skipif(REFERENCE is None, reason="QWEN_MODEL_REFERENCE does not name the references"),
]


def compared(model, dtype, folder, **options):
    model_dir = packaged_model_dir() if model == "packaged" else Path(REFERENCE) / model
    qwen_model.build_engine(
        model_dir, output_dir=folder / "engine", backend="tensorrt", dtype=dtype, **{**LIMITS, **options}
    )
    return compare_engine(folder / "engine", read_reference(Path(REFERENCE) / f"{model}.safetensors"), model_dir)


@pytest.mark.parametrize("model", [*ARCHITECTURES, "packaged"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_nothing_is_off(model, dtype, tmp_path):
    found = compared(model, dtype, tmp_path)
    assert found.passed, text(found)


def test_the_rotary_embedding_in_native_layers(tmp_path):
    from qwen_model.backends.tensorrt.compat import MAJOR

    def compare():
        return compared("Qwen3ForCausalLM", "float16", tmp_path, disable_plugins=["rotary"])

    if MAJOR < 10:
        with pytest.raises(QwenModelError, match="--disable-plugin rotary"):
            compare()
        return
    found = compare()
    assert found.passed, text(found)
