"""The key-value cache of an engine: how it keeps numbers, how many pages it gets, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import qwen_model
from qwen_model.checkpoints.checkpoint import Checkpoint
from qwen_model.checkpoints.config import ModelConfig
from qwen_model.common.errors import OutOfMemoryError
from qwen_model.interface.engine_config import EngineConfig, Limits
from qwen_model.interface.memory import most_pages, page_bytes, pool_pages
from qwen_model.quantization.key_balance import key_factors
from tests.qwen_model.model_files import hugging_face_model, random_prompt, save_hugging_face

SCHEME = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
CACHE_ALONE = {
    "llm-compressor": {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": SCHEME},
    "llm-compressor, attention": {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Attention"], "weights": None, "output_activations": SCHEME}},
        "kv_cache_scheme": SCHEME,
    },
    "ModelOpt": {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"},
    "unnamed": None,
}


@pytest.mark.parametrize("quantization", CACHE_ALONE.values(), ids=CACHE_ALONE)
def test_static_scales_of_a_cache_are_a_warning(model_dir, tmp_path, quantization):
    """Weights are not quantized; there are scales beside them, and what made them says that the cache is."""
    model = shutil.copytree(model_dir, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    scales = {f"model.layers.0.self_attn.{name}": torch.tensor([0.03]) for name in ("k_scale", "v_scale")}
    save_file(tensors | scales, model / "model.safetensors")
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**values, "quantization_config": quantization}))
    warnings = qwen_model.build_engine(model, output_dir=tmp_path / "engine").warnings
    (found,) = [warning for warning in warnings if "scales" in warning]
    assert "static scales of a key-value cache of 8 bits, which are not used: one scale for all tokens" in found
    assert found.endswith("--kv-cache-dtype fp8 makes one for each token and head")
    # Nothing depends on them, with a cache of 8 bits either.
    prompt = random_prompt(40, seed=1)
    for kind in ("auto", "fp8"):
        logits = []
        for number, source in enumerate((model, model_dir)):
            folder = tmp_path / f"{kind}{number}"
            qwen_model.build_engine(source, output_dir=folder, dtype="float32", kv_cache_dtype=kind)
            logits.append(torch.from_numpy(qwen_model.load_engine(folder, device="cpu").logits(prompt)))
        assert torch.equal(*logits)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_an_8_bit_cache(model_dir, tmp_path, session, kind):
    sizes = {"max_batch_size": 3, "max_input_len": 100, "max_output_len": 20, "max_num_tokens": 150}
    summary = qwen_model.build_engine(
        model_dir, output_dir=tmp_path / "e", dtype="float32", kv_cache_dtype=kind, **sizes
    )
    assert summary.config.limits.max_num_tokens == 150
    assert EngineConfig.read(tmp_path / "e").kv_cache_dtype == kind
    loaded = qwen_model.load_engine(tmp_path / "e", device="cpu")
    model = summary.config.model
    assert loaded.device.cache.data.nbytes == loaded.device.num_pages * page_bytes(model, "float32", kind)
    assert loaded.device.num_pages == most_pages(summary.config.limits) == 3 * 2 + 1
    # A code for each number of 4 bytes, and a scale of 4 bytes for each head's numbers.
    size = model.head_size
    assert page_bytes(model, "float32") / page_bytes(model, "float32", kind) == 4 * size / (size + 4)
    prompts = [random_prompt(length, seed=length) for length in (40, 7, 99)]
    exact = [torch.from_numpy(session.logits(prompt)).log_softmax(-1) for prompt in prompts]
    for prompt, expected in zip(prompts, exact, strict=True):
        found = torch.from_numpy(loaded.logits(prompt)).log_softmax(-1)
        assert 0 < (found - expected).abs().max() < {"int8": 0.3, "fp8": 1.5}[kind]
    assert len(loaded.generate(prompts, max_new_tokens=20).outputs[2].output_ids) == 20


def test_engines_without_these_options_read_as_before(engine_dir, tmp_path):
    folder = shutil.copytree(engine_dir, tmp_path / "engine")
    path = folder / "config.json"
    values = json.loads(path.read_text())
    del values["kv_cache_dtype"], values["limits"]["max_num_tokens"]
    path.write_text(json.dumps(values))
    config = EngineConfig.read(folder)
    assert (config.kv_cache_dtype, config.limits.max_num_tokens) == ("auto", 8192)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_dtype": "int4"}, "kv_cache_dtype must be one of auto, int8, fp8, not 'int4'"),
        ({"max_num_tokens": 0}, "max_num_tokens must be a positive integer, not 0"),
    ],
)
def test_options_that_cannot_be_built(model_dir, tmp_path, options, message):
    with pytest.raises(qwen_model.QwenModelError, match=message):
        qwen_model.build_engine(model_dir, output_dir=tmp_path / "engine", **options)
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("value", [0, 1.1, -0.5, True, "0.9"])
def test_parts_of_the_memory_that_there_are_not(engine_dir, value):
    with pytest.raises(
        qwen_model.QwenModelError, match="gpu_memory_utilization must be a number above 0 and at most 1"
    ):
        qwen_model.load_engine(engine_dir, device="cpu", gpu_memory_utilization=value)


def test_a_cpu_is_not_deterministic(engine_dir):
    with pytest.raises(qwen_model.QwenModelError, match=r"deterministic \(--deterministic\) is for NVIDIA GPUs.*cpu"):
        qwen_model.load_engine(engine_dir, device="cpu", deterministic=True)


def test_how_many_pages_there_are(engine_dir):
    """As many as fit, no more than can be used, and no fewer than one sequence needs."""
    config = EngineConfig.read(engine_dir)
    model: ModelConfig = config.model
    limits = Limits(max_batch_size=10, max_input_len=100, max_output_len=60)  # 3 pages each
    size = page_bytes(model, "float16")
    assert pool_pages(model, limits, "float16", "auto", 20.9 * size) == 20
    assert pool_pages(model, limits, "float16", "auto", 1e12) == most_pages(limits) == 31
    assert pool_pages(model, limits, "float16", "auto", 4 * size) == 4
    for available in (3.9 * size, -1e9):
        with pytest.raises(
            OutOfMemoryError, match=r"one sequence of 160 tokens needs .* GiB: give a larger --gpu-memory"
        ):
            pool_pages(model, limits, "float16", "auto", available)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_large_key_biases_beside_int8_codes(tmp_path, quantization):
    """The factors of keys and queries cancel: only what an int8 cache rounds differs.

    The queries that meet the large key are small: else the rounding of that key itself would be most of the difference.
    """
    model = hugging_face_model("Qwen2ForCausalLM")
    attention, heads = model.model.layers[1].self_attn, model.config.num_attention_heads
    attention.k_proj.bias.data[5] = -312.0
    size = model.config.hidden_size // heads
    for parameter in (attention.q_proj.weight, attention.q_proj.bias):
        parameter.data.view(heads, size, -1)[:, [5, 5 + size // 2]] /= 64
    save_hugging_face(model, tmp_path / "model")
    logits = {}
    for kind in ("int8", "auto"):
        summary = qwen_model.build_engine(
            tmp_path / "model",
            output_dir=tmp_path / kind,
            kv_cache_dtype=kind,
            quantization=quantization,
            dtype="float32",
            max_input_len=40,
        )
        assert not any("keys have biases" in warning for warning in summary.warnings)
        logits[kind] = qwen_model.load_engine(tmp_path / kind, device="cpu").logits(list(range(40)))
    np.testing.assert_allclose(logits["int8"], logits["auto"], atol=0.01 * np.abs(logits["auto"]).max())


def test_factors_of_large_key_biases(tmp_path):
    """Powers of two, shared by a pair of the rotary embedding and by the queries of a head of keys."""
    model = hugging_face_model("Qwen2ForCausalLM")
    model.model.layers[1].self_attn.k_proj.bias.data[5] = -312.0
    folder = save_hugging_face(model, tmp_path / "model")
    checkpoint, config = Checkpoint(folder), ModelConfig.from_model_dir(folder)
    checkpoint.check(config)
    factors, largest = key_factors(checkpoint, config, {})
    assert (list(factors), largest) == (["layers.1.attention.qkv"], 0.0)
    found = factors["layers.1.attention.qkv"].reshape(-1, config.head_size)
    group = config.num_heads // config.num_kv_heads
    expected = np.ones_like(found)
    for channel in (5, 5 + config.head_size // 2):
        expected[:group, channel] = 128
        expected[config.num_heads, channel] = 1 / 128
    np.testing.assert_array_equal(found, expected)
