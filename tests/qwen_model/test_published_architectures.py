"""Qwen v1 and DeciCoder beside a plain writing of the published architectures."""

import numpy as np
import pytest
import torch

import qwen_model
from tests.qwen_model.model_files import decicoder, qwen_v1, random_prompt, save_reference

CASES = {
    "qwen": lambda: qwen_v1(),
    "qwen-plain": lambda: qwen_v1(use_dynamic_ntk=False, use_logn_attn=False),
    "qwen-logn": lambda: qwen_v1(use_dynamic_ntk=False),
    "qwen-v1.0": lambda: qwen_v1_0(),
    "decicoder": lambda: decicoder(),
    "decicoder-one-kv-head": lambda: decicoder(num_key_value_heads=1),
}


def qwen_v1_0():
    """The names that config.json had when Qwen-7B was first published."""
    model, config = qwen_v1()
    older = {"n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}
    older |= {"ffn_hidden_size": "intermediate_size", "padded_vocab_size": "vocab_size"}
    present = {name: value for name, value in config.items() if name not in older.values()}
    return model, {**present, **{key: config[name] for key, name in older.items()}, "n_positions": 512}


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model, config = CASES[request.param]()
    save_reference(model, config, folder / "model")
    qwen_model.build_engine(
        folder / "model", output_dir=folder / "engine", dtype="float32", max_input_len=300, max_output_len=64
    )
    return model, qwen_model.load_engine(folder / "engine", device="cpu")


# The trained length of Qwen here is 64: 65 and 128 stretch the base by 3, 129 by 7, 257 by 15.
@pytest.mark.parametrize("length", [1, 33, 64, 65, 128, 129, 257])
def test_logits(pair, length):
    model, session = pair
    prompt = random_prompt(length, seed=length)
    with torch.no_grad():
        expected = model(prompt).numpy()
    assert np.abs(session.logits(prompt) - expected).max() / np.abs(expected).max() < 1e-4


@pytest.mark.parametrize("length", [3, 40, 70, 130])
def test_greedy_tokens(pair, length):
    model, session = pair
    prompt = random_prompt(length, seed=length)
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(64):
            ids.append(int(model(ids, prompt_length=length)[-1].argmax()))
    assert session.generate(prompt, max_new_tokens=64).outputs[0].output_ids == ids[length:]


def test_sequences_of_a_batch_have_their_own_stretch(pair):
    _, session = pair
    prompts = [random_prompt(length, seed=length) for length in (10, 64, 65, 200, 300)]
    together = session.generate(prompts, max_new_tokens=32).outputs
    for prompt, output in zip(prompts, together, strict=True):
        assert session.generate(prompt, max_new_tokens=32).outputs[0].output_ids == output.output_ids
