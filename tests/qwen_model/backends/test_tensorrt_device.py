"""The TensorRT Device on TensorRT, CUDA and kernels in NumPy: steps over pages give what the torch Device's do."""

import numpy as np
import pytest

import qwen_model
from qwen_model.engine.back_ends import back_end
from qwen_model.interface.engine_config import EngineConfig
from tests import stand_ins
from tests.qwen_model.backends.device_runs import Running, batch_of, generate, prompt_logits, run_chunks, run_decoding
from tests.qwen_model.model_files import random_prompt
from tests.qwen_model.tensorrt_reference import ARCHITECTURES, save_model

VERSIONS = ["8.6.0", "10.14.1", "11.1.0"]
LIMITS = {"max_batch_size": 5, "max_input_len": 160, "max_output_len": 40, "max_num_tokens": 300}
PROMPTS = [random_prompt(length, seed=length) for length in (70, 1, 131, 33)]
PAGES = [[3, 9], [7], [12, 4, 6], [5]]
NEW_TOKENS = 12


@pytest.fixture(params=VERSIONS)
def trt(request, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with stand_ins.installed(request.param) as module:
        yield module


def both(model_dir, folder, **options):
    """The Device of each back end."""
    found = []
    for name in ("torch", "tensorrt"):
        settings = {"backend": name, "dtype": "float32", **LIMITS, **options}
        qwen_model.build_engine(model_dir, output_dir=folder / name, **settings)
        config = EngineConfig.read(folder / name)
        where = "cpu" if name == "torch" else None
        found.append(back_end(name).load_device(folder / name, config, where))
    return found


def sequences(prompts=PROMPTS):
    return [Running(prompt, slot, list(pages)) for slot, (prompt, pages) in enumerate(zip(prompts, PAGES, strict=True))]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("options", [{}, {"kv_cache_dtype": "int8"}, {"disable_plugins": ["rotary"]}], ids=str)
def test_tokens_and_logits_are_those_of_the_torch_device(trt, architecture, options, tmp_path):
    theirs, ours = both(save_model(architecture, tmp_path / "model"), tmp_path, **options)
    assert generate(ours, sequences(), NEW_TOKENS, chunk=50) == generate(theirs, sequences(), NEW_TOKENS)
    # A number beside the middle of two codes may become either.
    tolerance = 2e-4 if options.get("kv_cache_dtype", "auto") == "auto" else 0.02
    for prompt in PROMPTS[1:3]:
        found = prompt_logits(ours, prompt, [8, 2, 10], chunk=60)
        np.testing.assert_allclose(found, prompt_logits(theirs, prompt, [1, 2, 3]), atol=tolerance)
