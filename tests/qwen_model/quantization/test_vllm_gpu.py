"""vLLM loads what `quantize` writes, and generates what our engine of the same folder generates."""

import gc
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import qwen_model
from qwen_model import quantize_checkpoint
from tests.qwen_model.conftest import save_byte_tokenizer
from tests.qwen_model.model_files import hugging_face_model, random_prompt, save_hugging_face

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]

ROOT = Path(__file__).parents[3]
SIZES = {  # Marlin, Machete and CUTLASS take them
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
PER_TOKEN = {"quantization": "smoothquant", "per_token": True, "per_channel": True, "alpha": "none"}
FORMATS = {
    "gptq int4": {"stored_as": "gptq", "quantization": "int4"},
    "gptq int8": {"stored_as": "gptq", "quantization": "int8"},
    "int4": {"quantization": "int4"},
    "int4 zero points": {"quantization": "int4", "symmetric": False},
    "int8": {"quantization": "int8"},
    "int4, int8 head": {"quantization": "int4", "head_quantization": "int8"},
    "smoothquant per token": PER_TOKEN,
    "smoothquant static": {"quantization": "smoothquant", "per_channel": True},
    "fp8": {"quantization": "fp8"},
}
TOLERANCES = {"smoothquant per token": 0.15, "smoothquant static": 0.15, "fp8": 0.3}
"""Of log-probabilities, whose standard deviation is 1; the others' is 0.03. A code of x that is rounded the other way,
because float16 sums are added in another order, is a step of int8 or fp8."""
PROMPTS = [random_prompt(length, seed=length, vocab_size=4096) for length in (5, 16, 17, 33, 48, 64, 90, 100)]
NEW_TOKENS = 16
SECONDS = 300


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Write the checkpoint in each format."""
    root = tmp_path_factory.mktemp("checkpoints")
    plain = save_hugging_face(hugging_face_model("Qwen2ForCausalLM", seed=7, **SIZES).half(), root / "plain")
    save_byte_tokenizer(plain)
    texts = root / "texts.txt"
    texts.write_text("".join(f"{number} is a number, and so is {number * number}.\n" for number in range(100)))
    found = {}
    for index, (name, options) in enumerate(FORMATS.items()):
        found[name] = root / f"quantized_{index}"
        calibration = texts if name == "smoothquant static" else None
        quantize_checkpoint(plain, output_dir=found[name], **options, calibration=calibration)
    return found


@pytest.fixture(scope="module")
def of_vllm(folders, tmp_path_factory):
    """Generate from each folder with vLLM."""
    folder = tmp_path_factory.mktemp("vllm")
    job, results = folder / "job.json", folder / "results.json"
    given = {"folders": [str(folder) for folder in folders.values()], "prompts": PROMPTS, "new_tokens": NEW_TOKENS}
    job.write_text(json.dumps(given))
    command = [sys.executable, "-m", "tests.qwen_model.quantization.run_vllm", str(job), str(results)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(results.read_text())


def our_logits(folder, engine_dir, tokens):
    """Return the logits that choose vLLM's tokens, [tokens, vocabulary] for each prompt."""
    qwen_model.build_engine(folder, output_dir=engine_dir, max_batch_size=8, max_input_len=128, max_output_len=16)
    session = qwen_model.load_engine(engine_dir, tuning=False, gpu_memory_utilization=0.5)
    whole = [prompt + output for prompt, output in zip(PROMPTS, tokens, strict=True)]
    found = session.last_logits(whole, [NEW_TOKENS + 1] * len(whole))
    del session
    gc.collect()
    torch.cuda.empty_cache()
    return [logits[:-1] for logits in found]


@pytest.mark.parametrize("name", FORMATS)
def test_vllm_generates_what_our_engine_does(folders, of_vllm, tmp_path, name):
    found = of_vllm[str(folders[name])]
    assert "error" not in found, found["error"]
    tolerance = TOLERANCES.get(name, 0.03)
    logits = our_logits(folders[name], tmp_path / "engine", found["tokens"])
    for ours, tokens, logprobs in zip(logits, found["tokens"], found["logprobs"], strict=True):
        chosen = ours[np.arange(NEW_TOKENS), tokens]
        assert np.all(ours.max(axis=1) - chosen <= tolerance)
        expected = chosen - np.logaddexp.reduce(ours, axis=1)
        np.testing.assert_allclose(logprobs, expected, atol=tolerance, rtol=0)
