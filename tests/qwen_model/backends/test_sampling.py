"""The distribution of sampled tokens, and that a seed repeats them."""

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwen_model import QwenModelError, SamplingOptions
from qwen_model.backends.torch.sampling import TorchSampler
from tests.qwen_model.model_files import random_prompt

DRAWS = 40_000
VOCABULARY = 40
CASES = [
    {"temperature": 1.0},
    {"temperature": 0.4},
    {"temperature": 2.5},
    {"top_k": 7},
    {"top_p": 0.8},
    {"temperature": 0.7, "top_k": 12, "top_p": 0.6},
    {"temperature": 1.3, "repetition_penalty": 1.8, "top_p": 0.9},
    {"top_k": 100},
]


def probabilities_of_transformers(logits, prompt, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0):
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(repetition_penalty)])
    processors.append(TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    processors.append(TopPLogitsWarper(top_p))
    return processors(torch.tensor([prompt]), logits.clone()[None]).softmax(-1)[0]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_distribution_is_that_of_transformers(options):
    """Pearson's chi-squared test; at this threshold a right sampler fails once in a million."""
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0)) * 2
    prompt = [1, 5, 5, 30]
    expected = probabilities_of_transformers(logits, prompt, **options).numpy()
    sampler = TorchSampler(SamplingOptions(seed=1, **options), [prompt] * DRAWS, VOCABULARY, torch.device("cpu"))
    drawn = np.bincount(sampler(logits.expand(DRAWS, -1)).numpy(), minlength=VOCABULARY)
    possible = expected > 0
    assert not drawn[~possible].any()
    counts = expected[possible] * DRAWS
    chi_squared = float(((drawn[possible] - counts) ** 2 / counts).sum())
    freedom = possible.sum() - 1
    assert chi_squared < freedom + 5 * np.sqrt(2 * freedom) + 15


def test_the_lowest_temperature_is_greedy():
    logits = torch.randn(50, VOCABULARY) * 5
    sampler = TorchSampler(SamplingOptions(temperature=1e-38), [[1]] * 50, VOCABULARY, torch.device("cpu"))
    assert torch.equal(sampler(logits), logits.argmax(-1))


def test_a_seed_repeats(session):
    prompts = [random_prompt(4, seed=1), random_prompt(9, seed=2)]

    def draw(seed):
        outputs = session.generate(
            prompts, max_new_tokens=20, sampling=SamplingOptions(temperature=1.5, seed=seed)
        ).outputs
        return [output.output_ids for output in outputs]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0, "top_p": 0.5}, {"top_k": 1}, {"top_p": 1e-9}])
def test_greedy_in_several_words(session, options):
    prompt = random_prompt(6, seed=4)
    greedy = session.generate(prompt, max_new_tokens=20).outputs
    assert session.generate(prompt, max_new_tokens=20, sampling=SamplingOptions(**options)).outputs == greedy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature.*-0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k.*-1"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-40}, r"repetition_penalty must be a number from 1e-12 to 1e\+12, not 1e-40"),
        ({"seed": -1}, "seed"),
        ({"temperature": "1"}, "temperature must be a number, not '1'"),
        ({"top_k": 2.5}, "top_k must be an integer, not 2.5"),
        ({"top_k": True}, "top_k must be an integer, not True"),
        ({"top_p": None}, "top_p must be a number, not None"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"min_p": -0.1}, "min_p must be from 0 to 1, not -0.1"),
        ({"min_p": float("nan")}, "min_p must be from 0 to 1, not nan"),
        ({"presence_penalty": 2.5}, "presence_penalty must be from -2 to 2, not 2.5"),
        ({"frequency_penalty": "much"}, "frequency_penalty must be a number, not 'much'"),
        ({"logit_bias": None}, "logit_bias must map token ids to numbers, not None"),
        ({"logit_bias": [3, 4]}, r"logit_bias must map token ids to numbers, not \[3, 4\]"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias: a token id must be an integer of at least 0, not -1"),
        ({"logit_bias": {"the": 1.0}}, "logit_bias: a token id must be an integer of at least 0, not 'the'"),
        ({"logit_bias": {3: 101}}, "logit_bias: token 3 must have a number from -100 to 100, not 101"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias: token 3 must have a number from -100 to 100, not nan"),
        ({"logit_bias": {3: None}}, "logit_bias: token 3 must have a number from -100 to 100, not None"),
        ({"logit_bias": dict.fromkeys(range(513), 1)}, "logit_bias may have at most 512 tokens, not 513"),
    ],
)
def test_errors(options, message):
    with pytest.raises(QwenModelError, match=message):
        SamplingOptions(**options)
