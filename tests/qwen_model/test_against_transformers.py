"""Logits, greedy tokens and beams of Qwen2, Qwen3 and LLaMA beside transformers, float32 on the CPU."""

import dataclasses

import numpy as np
import pytest
import torch

import qwen_model
from tests.qwen_model.model_files import hugging_face_model, random_prompt, save_hugging_face

NEW_TOKENS = 64
ROPE = {"rope_theta": 10000.0}
CASES = {
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2-multi-head-tied": ("Qwen2ForCausalLM", {"num_key_value_heads": 6, "tie_word_embeddings": True}),
    "qwen2-one-kv-head": ("Qwen2ForCausalLM", {"num_key_value_heads": 1}),
    "qwen2-window-of-no-layer": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    ),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "qwen3-biases": ("Qwen3ForCausalLM", {"attention_bias": True, "tie_word_embeddings": True}),
    "llama": ("LlamaForCausalLM", {}),
    "llama-biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-large-base": ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "linear": ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, **ROPE}}),
    "dynamic": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, **ROPE}, "max_position_embeddings": 48},
    ),
    "llama3": (
        "LlamaForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
                **ROPE,
            }
        },
    ),
    "yarn": (
        "Qwen2ForCausalLM",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **ROPE}},
    ),
}


def test_up_to_its_length_a_sliding_window_changes_nothing(tmp_path):
    """The last token generated is fed at position 63, and sees 64: transformers with the window says the same."""
    window = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    reference = hugging_face_model("Qwen2ForCausalLM", **window)
    save_hugging_face(reference, tmp_path / "model")
    qwen_model.build_engine(tmp_path / "model", output_dir=tmp_path / "engine", dtype="float32", max_input_len=54)
    session = qwen_model.load_engine(tmp_path / "engine", device="cpu")
    assert session.config.limits.max_positions == 64
    prompt = random_prompt(54, seed=2)
    expected = reference.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False)[0, 54:]
    assert session.generate(prompt, max_new_tokens=10).outputs[0].output_ids == expected.tolist()


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """A model of transformers and our session on the same weights."""
    architecture, changes = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    reference = hugging_face_model(architecture, **changes)
    save_hugging_face(reference, folder / "model")
    qwen_model.build_engine(
        folder / "model", output_dir=folder / "engine", dtype="float32", max_input_len=160, max_output_len=NEW_TOKENS
    )
    return reference, qwen_model.load_engine(folder / "engine", device="cpu")


@pytest.mark.parametrize("length", [1, 7, 60])
def test_logits(pair, length):
    reference, session = pair
    prompt = random_prompt(length, seed=length)
    with torch.no_grad():
        expected = reference(torch.tensor([prompt])).logits[0].numpy()
    error = np.abs(session.logits(prompt) - expected).max() / np.abs(expected).max()
    assert error < 1e-4


# 40 + 64 tokens go past the trained length of the dynamic case, 70 are past it from the beginning.
@pytest.mark.parametrize("length", [2, 40, 70])
def test_greedy_tokens(pair, length):
    reference, session = pair
    prompt = random_prompt(length, seed=100 + length)
    reference(torch.tensor([[0]]))  # with dynamic NTK transformers keeps the longest length until it sees a short one
    expected = reference.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, length:]
    assert session.generate(prompt, max_new_tokens=NEW_TOKENS).outputs[0].output_ids == expected.tolist()


def test_prompts_that_begin_alike(pair):
    """They share a page of the cache, but where the rotary embedding depends on the prompt's length."""
    reference, session = pair
    for length in (150, 70, 130, 66):
        prompt = random_prompt(150, seed=7)[:length]
        reference(torch.tensor([[0]]))
        expected = reference.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, length:]
        assert session.generate(prompt, max_new_tokens=8).outputs[0].output_ids == expected.tolist()


@pytest.mark.parametrize("num_end_tokens", [0, 40])
def test_beams(pair, num_end_tokens):
    """With many end tokens most beams finish early; transformers fills those up with the padding token."""
    reference, session = pair
    ends = list(range(num_end_tokens))
    prompt = random_prompt(9, seed=5)
    options = {"eos_token_id": ends, "pad_token_id": 316} if ends else {}
    expected = reference.generate(
        torch.tensor([prompt]),
        max_new_tokens=24,
        do_sample=False,
        num_beams=4,
        num_return_sequences=4,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    beams = _with_end_tokens(session, ends).generate(prompt, max_new_tokens=24, num_beams=4).outputs[0].beams
    for beam, ids, score in zip(beams, expected.sequences[:, 9:].tolist(), expected.sequences_scores, strict=True):
        assert beam.output_ids == ids[: len(beam.output_ids)]
        assert all(token == 316 for token in ids[len(beam.output_ids) :])
        assert beam.score == pytest.approx(score.item(), rel=1e-4)


def _with_end_tokens(session, ends):
    config = dataclasses.replace(session.config, end_token_ids=tuple(ends))
    return qwen_model.Session(config, session.scheduler, session.tokenizer)


def test_repetition_penalty(pair):
    reference, session = pair
    prompt = random_prompt(12, seed=8)
    expected = reference.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, repetition_penalty=1.7)[
        0, 12:
    ]
    sampling = qwen_model.SamplingOptions(repetition_penalty=1.7)
    assert session.generate(prompt, max_new_tokens=24, sampling=sampling).outputs[0].output_ids == expected.tolist()
