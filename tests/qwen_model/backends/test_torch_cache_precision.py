"""The packaged model with 8-bit caches: what they cost in perplexity, and what key biases of some hundreds do to them.

A bias is added to two channels of the keys of one kv head in every layer, a pair that the rotary embedding turns
together. The function stays the same: the queries of that head have zeros in these channels, weights and biases, before
and after. So the bias only takes room in the codes, as it does in Qwen2.5.
"""

import numpy as np
import pytest
import torch

import qwen_model
from qwen_model.backends.torch import back_end, paged_cache
from qwen_model.checkpoints.tokenizer import load_tokenizer
from qwen_model.interface.engine_config import EngineConfig
from qwen_model.packaged_model import held_out_text
from qwen_model.quantization.key_balance import row_factors
from tests.qwen_model.backends.device_runs import prompt_logits

TOKENS = 400
BIAS, CHANNELS = 300.0, (31, 63)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines") / "engine"
    sizes = {"max_batch_size": 1, "max_input_len": TOKENS, "max_output_len": 16}
    qwen_model.build_engine(output_dir=folder, dtype="float32", **sizes)
    device = back_end.load_device(folder, EngineConfig.read(folder), "cpu")
    return device, EngineConfig.read(folder), load_tokenizer(folder).encode(held_out_text())[:TOKENS]


def perplexity(engine, kind, bias=None, balanced=False):
    """bias: of the keys; None: the model as it is."""
    device, config, tokens = engine
    modules = {name: module.map(torch.clone) for name, module in device.operations.modules.items()}
    if bias is not None:
        for layer in range(config.model.num_layers):
            add_key_bias(config.model, modules[f"layers.{layer}.attention.qkv"], bias)
    if balanced:
        with_balanced_keys(config.model, modules)
    fresh = paged_cache.PagedCache(config.model, device.num_pages, torch.float32, kind, device.device)
    right = device.operations, device.cache
    device.cache, device.operations = fresh, type(right[0])(config.model, modules, fresh)
    try:
        logits = torch.from_numpy(prompt_logits(device, tokens, list(range(1, 8)), chunk=150)).log_softmax(-1)
    finally:
        device.operations, device.cache = right
    return float((-logits[np.arange(TOKENS - 1), tokens[1:]].mean()).exp())


def add_key_bias(config, qkv, bias):
    """For the first kv head, and so the first query heads."""
    keys = config.num_heads * config.head_size
    for channel in CHANNELS:
        for head in range(config.num_heads // config.num_kv_heads):
            qkv.weight[head * config.head_size + channel] = 0.0
            qkv.bias[head * config.head_size + channel] = 0.0
        qkv.bias[keys + channel] += bias


def with_balanced_keys(config, modules):
    """What `build` makes of large biases in an engine with an int8 cache."""
    for layer in range(config.num_layers):
        qkv = modules[f"layers.{layer}.attention.qkv"]
        keys = qkv.bias[config.num_heads * config.head_size :][: config.num_kv_heads * config.head_size]
        factors = row_factors(keys.numpy().reshape(config.num_kv_heads, -1), config, len(qkv.bias))
        qkv.weight.mul_(torch.from_numpy(factors)[:, None])
        qkv.bias.mul_(torch.from_numpy(factors))


def one_scale(x, kind):
    """What `quantize` gives with one scale for all keys of the model that does not cut the largest."""
    codes, scales = quantize(x, kind)
    largest = paged_cache.LARGEST_CODES[kind]
    scales[:, 0] = BIAS * 2**0.5 / largest  # both channels of the pair turn
    keys = (x[:, 0].float() / scales[:, 0, :, None]).clamp(-largest, largest).round()
    codes[:, 0] = keys.to(paged_cache.CODE_TYPES[kind]).view(torch.uint8)
    return codes, scales


quantize = paged_cache.quantize


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_scales_of_each_token_and_head(engine, kind):
    assert perplexity(engine, kind) == pytest.approx(perplexity(engine, "auto"), rel=0.01)


def test_key_biases(engine, monkeypatch):
    """Codes with an exponent keep small numbers beside large ones, codes of int8 where `build` balances the keys."""
    exact = perplexity(engine, "auto", 0.0)
    assert perplexity(engine, "auto", BIAS) == pytest.approx(exact, rel=1e-4)
    assert perplexity(engine, "fp8", BIAS) == pytest.approx(exact, rel=0.01)
    assert perplexity(engine, "auto", BIAS, balanced=True) == pytest.approx(exact, rel=1e-4)
    assert perplexity(engine, "int8", BIAS, balanced=True) == pytest.approx(exact, rel=0.01)
    per_token_and_head = perplexity(engine, "int8", BIAS) / exact
    monkeypatch.setattr(paged_cache, "quantize", one_scale)
    static = perplexity(engine, "int8", BIAS) / exact
    print(f"int8: {per_token_and_head:.3f} with a scale for each token and head, {static:.3f} with one scale")
    assert 1.01 < per_token_and_head < 1.25
    assert static > 1.25
