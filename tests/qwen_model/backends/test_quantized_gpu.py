"""Engines with quantized weights on a GPU: the tokens of engines of 16 bits that have the same numbers."""

import dataclasses

import numpy as np
import pytest

import qwen_model
from qwen_model.interface.engine_config import EngineConfig
from qwen_model.packaged_model import held_out_text
from tests.qwen_model.quantized_files import Layout, save_layout

pytestmark = pytest.mark.gpu

NEW_TOKENS = 64
FORMATS = {
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "int4 zero points": {"quantization": "int4", "group_size": 64, "symmetric": False},
    "int4 one group": {"quantization": "int4", "group_size": -1},
}
CLOSE = 0.06
"""How far below the largest logit of the one engine the other's choice may be: they round weights differently."""


def engine(model_dir, folder, **options):
    sizes = {"max_batch_size": 24, "max_input_len": 640, "max_output_len": NEW_TOKENS}
    qwen_model.build_engine(model_dir, output_dir=folder, **sizes, **options)
    dataclasses.replace(EngineConfig.read(folder), end_token_ids=()).write(folder)
    return qwen_model.load_engine(folder, device="cuda", tuning=False)


def check_but_for_ties(session, reference, prompts):
    """Where tokens first differ, the reference must have had them nearly tied; return how many prompts' are the same.

    The largest logits of bfloat16 are often equal.
    """
    found = session.generate(prompts, max_new_tokens=NEW_TOKENS).outputs
    expected = reference.generate(prompts, max_new_tokens=NEW_TOKENS).outputs
    same = 0
    for prompt, ours, theirs in zip(prompts, found, expected, strict=True):
        first, second = ours.output_ids, theirs.output_ids
        place = next((i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b), None)
        same += place is None
        if place is not None:
            logits = reference.logits([*prompt, *second[:place]])[-1]
            assert logits[second[place]] - logits[first[place]] < CLOSE * np.abs(logits).max()
    return same


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_the_packaged_model(tmp_path, options, dtype):
    """One sequence, a few, and many; prompts of one step's rows and of hundreds."""
    own = {key: value for key, value in options.items() if key != "quantization"}
    checkpoint = qwen_model.quantize_checkpoint(
        output_dir=tmp_path / "checkpoint", quantization=options["quantization"], **own
    ).output_dir
    quantized = engine(checkpoint, tmp_path / "quantized", dtype=dtype)
    assert quantized.config.weight_formats
    plain = engine(checkpoint, tmp_path / "plain", dtype=dtype, quantization="none")
    tokens = plain.tokenizer.encode(held_out_text()[:20_000])
    same = 0
    for count, length in ((1, 40), (3, 17), (20, 100), (2, 550)):
        prompts = [tokens[index * 50 : index * 50 + length] for index in range(count)]
        same += check_but_for_ties(quantized, plain, prompts)
    assert same >= (20 if dtype == "float16" else 13)  # of 26
    cpu = qwen_model.load_engine(tmp_path / "quantized", device="cpu")
    logits, expected = quantized.logits(tokens[:200]), cpu.logits(tokens[:200])
    assert np.abs(logits - expected).max() < (0.02 if dtype == "float16" else 0.15) * np.abs(expected).max()


@pytest.mark.parametrize("disabled", [(), ("gemm",)], ids=["kernels", "pytorch"])
def test_act_order_and_a_quantized_head(tmp_path, disabled):
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}  # of 32, which there are kernels for
    folder, _, _ = save_layout(tmp_path, Layout("gptq", desc_act=True), **heads)
    options = {"max_batch_size": 4, "max_input_len": 60, "dtype": "float16", "head_quantization": "int8"}
    qwen_model.build_engine(folder, output_dir=tmp_path / "engine", disable_plugins=disabled, **options)
    prompt = np.random.default_rng(0).integers(0, 320, 50).tolist()
    logits, expected = (
        qwen_model.load_engine(tmp_path / "engine", device=device, tuning=False).logits(prompt)
        for device in ("cuda", "cpu")
    )
    assert np.abs(logits - expected).max() < 0.02 * np.abs(expected).max()


def test_tuning_measures_the_quantized_layers(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    qwen_model.build_engine(output_dir=tmp_path / "engine", quantization="int4", dtype="float16", max_batch_size=2)
    session = qwen_model.load_engine(tmp_path / "engine", device="cuda")
    chosen = session.device.gemm_kernels
    assert any("int4" in shape for shape in chosen)
    assert len(session.generate([1, 2, 3], max_new_tokens=4).outputs[0].output_ids) <= 4
