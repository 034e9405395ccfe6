"""A model whose activations overflow in float16 at one token, and what then holds for a session of any back end.

No PyTorch.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import qwen_model
from qwen_model import QwenModelError, SamplingOptions

LIMITS = {"max_batch_size": 6, "max_input_len": 16, "max_output_len": 32}
HIDDEN, LAYERS, VOCAB = 128, 2, 48
ENDLESS = list(range(20, 32))  # each token is followed by the next, the last by the first
OVERFLOWING = list(range(1, 9))  # each is followed by the next; the last one overflows
PROMPTS = [ENDLESS[:2], OVERFLOWING[:2], ENDLESS[5:6]]
OVERFLOW = 1  # the prompt that does
FINITE_TOKENS = len(OVERFLOWING) - 2  # that follow this prompt
CHOICES = [
    {},
    {"repetition_penalty": 1.05},
    {"temperature": 0.9, "seed": 1},
    {"top_k": 5, "seed": 1},
    {"top_p": 0.9, "seed": 1},
    {"top_k": 20, "top_p": 0.9, "repetition_penalty": 1.05, "seed": 1},
]


def save_overflowing_model(folder: Path, num_heads: int = 2) -> Path:
    """A checkpoint in float32: LLaMA without attention, whose MLP sees the first dimension alone."""
    random = np.random.default_rng(0)
    embedding, head = np.zeros((2, VOCAB, HIDDEN), np.float32)
    for tokens, dimensions in ((ENDLESS, slice(1, 64)), (OVERFLOWING[:-1], slice(64, HIDDEN))):
        rows = random.standard_normal((len(tokens), dimensions.stop - dimensions.start))
        embedding[tokens, dimensions] = rows / np.linalg.norm(rows, axis=1, keepdims=True) * HIDDEN**0.5
    embedding[OVERFLOWING[-1], 0] = HIDDEN**0.5
    head[ENDLESS] = np.roll(embedding[ENDLESS], 1, axis=0)
    head[OVERFLOWING[1:]] = embedding[OVERFLOWING[:-1]]
    ones = np.ones(HIDDEN, np.float32)
    tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": head, "model.norm.weight": ones}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        first = np.zeros((64, HIDDEN), np.float32)
        first[:, 0] = 2.0
        tensors |= {prefix + f"{norm}_layernorm.weight": ones for norm in ("input", "post_attention")}
        tensors |= {prefix + f"self_attn.{name}_proj.weight": np.zeros((HIDDEN, HIDDEN), np.float32) for name in "qkvo"}
        tensors |= {prefix + "mlp.gate_proj.weight": first, prefix + "mlp.up_proj.weight": first}
        tensors[prefix + "mlp.down_proj.weight"] = np.full((HIDDEN, 64), 100.0, np.float32)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def expected_ids(prompt: list[int], count: int) -> list[int]:
    if prompt[-1] in ENDLESS:
        return [ENDLESS[(prompt[-1] - ENDLESS[0] + step) % len(ENDLESS)] for step in range(1, count + 1)]
    return OVERFLOWING[OVERFLOWING.index(prompt[-1]) + 1 :][:count]


def check_that_overflow_is_an_error(session: qwen_model.Session) -> None:
    """In float16 a request that overflows fails, and names the prompt; the other prompts' tokens are right."""
    advice = "65504, the largest number of float16.*--dtype bfloat16 or float32"
    count = FINITE_TOKENS + 5
    others = [prompt for index, prompt in enumerate(PROMPTS) if index != OVERFLOW]
    for options in CHOICES:
        sampling = SamplingOptions(**options)
        with pytest.raises(QwenModelError, match=f"logits of prompt {OVERFLOW} .*{advice}"):
            session.generate(PROMPTS, max_new_tokens=count, sampling=sampling)
        with pytest.raises(QwenModelError, match=f"logits of the prompt .*{advice}"):
            session.generate(PROMPTS[OVERFLOW], max_new_tokens=count, sampling=sampling)
        outputs = session.generate(others, max_new_tokens=count, sampling=sampling).outputs
        assert [output.output_ids for output in outputs] == [expected_ids(prompt, count) for prompt in others]
    _check_streams(session, count, advice)
    _check_sequences_that_end_before(session, count)
    for prompts, name in ((PROMPTS[OVERFLOW], "the prompt"), (PROMPTS[: OVERFLOW + 1], f"prompt {OVERFLOW}")):
        with pytest.raises(QwenModelError, match=f"logits of {name} .*{advice}"):
            session.generate(prompts, max_new_tokens=count, num_beams=2)
    assert session.generate(others[0], max_new_tokens=count, num_beams=2).outputs[0].output_ids == expected_ids(
        others[0], count
    )
    assert session.logits(OVERFLOWING[:-1]).argmax(-1).tolist() == OVERFLOWING[1:]
    with pytest.raises(QwenModelError, match=f"logits of the prompt .*{advice}"):
        session.logits(OVERFLOWING)


def _check_streams(session: qwen_model.Session, count: int, advice: str) -> None:
    """What comes before the error is right, also where the device has begun the steps after it."""
    tokens: list[list[int]] = [[] for _ in PROMPTS]

    def collect() -> None:
        for event in session.stream(PROMPTS, max_new_tokens=count):
            tokens[event.index].append(event.token_id)

    with pytest.raises(QwenModelError, match=f"logits of prompt {OVERFLOW} .*{advice}"):
        collect()
    for index, (prompt, found) in enumerate(zip(PROMPTS, tokens, strict=True)):
        assert found == expected_ids(prompt, FINITE_TOKENS + (index < OVERFLOW))


def _check_sequences_that_end_before(session: qwen_model.Session, count: int) -> None:
    """A finished sequence stays in the batch, and may overflow there: the others go on as if it did not."""
    outputs = session.generate(PROMPTS, max_new_tokens=FINITE_TOKENS).outputs
    assert outputs[OVERFLOW].output_ids == expected_ids(PROMPTS[OVERFLOW], FINITE_TOKENS)
    config = dataclasses.replace(session.config, end_token_ids=(OVERFLOWING[4],))
    outputs = qwen_model.Session(config, session.scheduler).generate(PROMPTS, max_new_tokens=count).outputs
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected = expected_ids(prompt, count)
        assert output.output_ids == (expected if prompt[-1] in ENDLESS else OVERFLOWING[2:5])


def check_that_there_is_room(session: qwen_model.Session) -> None:
    """In types of a wider range it is a model like any other."""
    outputs = session.generate(PROMPTS, max_new_tokens=FINITE_TOKENS + 5).outputs
    assert outputs[OVERFLOW].output_ids[:FINITE_TOKENS] == expected_ids(PROMPTS[OVERFLOW], FINITE_TOKENS)
    assert np.isfinite(session.logits(OVERFLOWING)).all()
