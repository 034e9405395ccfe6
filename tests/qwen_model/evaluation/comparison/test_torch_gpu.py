"""Engines of the torch back end on a GPU beside a reference: our kernels are not off, in any type."""

import pytest

from qwen_model.evaluation.comparison.compare import compare_engine
from qwen_model.evaluation.comparison.make_reference import make_reference
from qwen_model.evaluation.comparison.report import text
from tests.qwen_model.evaluation.comparison.models import save_engine
from tests.qwen_model.model_files import random_prompt
from tests.qwen_model.tensorrt_reference import ARCHITECTURES, save_model

pytestmark = pytest.mark.gpu
DTYPES = ("float32", "float16", "bfloat16")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    found = {}

    def make(architecture):
        if architecture not in found:
            folder = tmp_path_factory.mktemp(architecture)
            model_dir = None if architecture == "packaged" else save_model(architecture, folder / "model")
            found[architecture] = model_dir, make_reference(packaged(model_dir), random_prompt(40), 4, DTYPES)
        return found[architecture]

    return make


def packaged(model_dir):
    from qwen_model.packaged_model import packaged_model_dir

    return model_dir or packaged_model_dir()


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "packaged"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_off(made, architecture, dtype, tmp_path):
    model_dir, reference = made(architecture)
    found = compare_engine(save_engine(model_dir, tmp_path / "engine", dtype), reference, packaged(model_dir), "cuda")
    assert found.passed, text(found)


@pytest.mark.parametrize("disabled", ["rms_norm", "gemm", "rotary"])
def test_without_a_kernel(made, disabled, tmp_path):
    model_dir, reference = made("Qwen3ForCausalLM")
    engine = save_engine(model_dir, tmp_path / "engine", "float16", disable_plugins=[disabled])
    found = compare_engine(engine, reference, model_dir, "cuda")
    assert found.passed, text(found)
    assert ("layers.0.attention.q" in found.passes.isolated[0]) == (disabled == "rotary")
