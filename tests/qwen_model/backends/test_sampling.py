"""The choice of tokens, with PyTorch and with our kernels, beside exact distributions and transformers'."""

import dataclasses
import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwen_model import QwenModelError, SamplingOptions
from qwen_model.backends.torch.sampling import KernelSampler, TorchSampler
from qwen_model.interface.device import NO_TOKEN, Start
from qwen_model.interface.kernel_sampling import sequence_starts
from tests.qwen_model.model_files import random_prompt
from tests.qwen_plugins import sampling_reference as reference

Sampler = TorchSampler | KernelSampler
SAMPLERS = [
    pytest.param((TorchSampler, torch.device("cpu")), id="torch"),
    pytest.param((KernelSampler, torch.device("cuda")), id="kernels", marks=pytest.mark.gpu),
]
DRAWS = 4000
VOCABULARY = 41
PROMPT, OUTPUT = [1, 5, 5, 30], [2, 5, 40, 40, 40]
CASES = [
    {"temperature": 1.0},
    {"temperature": 0.4},
    {"temperature": 2.5},
    {"top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 0.7, "top_k": 12, "top_p": 0.6},
    {"temperature": 1.3, "top_k": 30, "top_p": 0.95, "min_p": 0.15},
    {"temperature": 1.3, "repetition_penalty": 1.8, "top_p": 0.9},
    {"temperature": 0.8, "repetition_penalty": 0.7, "min_p": 0.1, "logit_bias": {5: 2.0, 30: -1.5, 8: 3.0}},
    {"top_k": 100},
]
CASES_OF_VLLM = [
    {"presence_penalty": 1.5, "temperature": 1.0},
    {"frequency_penalty": 0.6, "temperature": 0.9, "top_k": 20},
    {"frequency_penalty": -0.6, "presence_penalty": -0.5, "repetition_penalty": 1.3, "min_p": 0.05},
]


def some_logits(rows: int = 1, size: int = VOCABULARY, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 2


def probabilities(logits: torch.Tensor, start: Start, mask: np.ndarray | None = None) -> np.ndarray:
    (described,) = sequence_starts([start], len(logits))
    return reference.probabilities(logits.numpy(), described, mask)


@pytest.fixture(params=SAMPLERS)
def make(request):
    """Make a sampler of some slots."""
    sampler, device = request.param
    return lambda slots, vocab_size=VOCABULARY: sampler(slots, vocab_size, device)


def choose(sampler: Sampler, logits: torch.Tensor, slots: Sequence[int], masks=None) -> list[int]:
    numbers, device = np.array(slots, np.int32), sampler.last_tokens.device
    sampler.set_masks(masks or {})
    variant = sampler.variant(numbers, masked=bool(masks))
    tokens = sampler.choose(logits.to(device), torch.from_numpy(numbers).to(device), variant)
    assert tokens.dtype == sampler.last_tokens.dtype == torch.int32
    assert torch.equal(sampler.last_tokens[list(slots)], tokens.clamp(min=0))
    return tokens.tolist()


def probabilities_of_transformers(
    logits, seen, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, min_p=0.0, logit_bias=None
):
    processors = LogitsProcessorList()
    if logit_bias:
        processors.append(SequenceBiasLogitsProcessor({(token,): bias for token, bias in logit_bias.items()}))
    processors.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    processors.append(TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    processors.append(TopPLogitsWarper(top_p))
    processors.append(MinPLogitsWarper(min_p))
    return processors(torch.tensor([seen]), logits.clone()[None]).softmax(-1)[0]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_float64_reference_is_transformers(options):
    """All tokens that transformers has seen are of the prompt here: it does not tell them from those of the output."""
    (logits,) = some_logits()
    ours = probabilities(logits, Start(0, SamplingOptions(**options), 0, PROMPT))
    np.testing.assert_allclose(ours, probabilities_of_transformers(logits, PROMPT, **options), atol=1e-6)


@pytest.mark.parametrize("options", [*CASES, *CASES_OF_VLLM], ids=str)
def test_distribution(make, options):
    """Pearson's chi-squared test over sequences of one seed; at this threshold a right sampler fails once in 10^6."""
    (logits,) = some_logits()
    sampler = make(DRAWS)
    starts = [Start(i, SamplingOptions(seed=1, **options), i, PROMPT, OUTPUT) for i in range(DRAWS)]
    sampler.start(starts)
    expected = probabilities(logits, starts[0])
    drawn = np.bincount(choose(sampler, logits.expand(DRAWS, -1), range(DRAWS)), minlength=VOCABULARY)
    assert not drawn[expected == 0].any()
    common = expected * DRAWS >= 5
    counts = np.append(expected[common], expected[~common].sum()) * DRAWS
    observed = np.append(drawn[common], drawn[~common].sum())
    chi_squared = float(((observed - counts)[counts > 0] ** 2 / counts[counts > 0]).sum())
    freedom = max(1, (counts > 0).sum() - 1)
    assert chi_squared < freedom + 5 * np.sqrt(2 * freedom) + 15


def random_options(rng: random.Random, size: int) -> SamplingOptions:
    def maybe(value, default):
        return value if rng.random() < 0.5 else default

    return SamplingOptions(
        temperature=rng.choice([None, 0.0, 0.5, 1.7]),
        top_k=maybe(rng.randrange(1, 2 * size), 0),
        top_p=maybe(rng.uniform(0.1, 1), 1.0),
        min_p=maybe(rng.uniform(0, 0.3), 0.0),
        repetition_penalty=maybe(rng.uniform(0.5, 2), 1.0),
        presence_penalty=maybe(rng.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(rng.uniform(-2, 2), 0.0),
        logit_bias=maybe({rng.randrange(size): rng.uniform(-5, 5) for _ in range(9)}, {}),
        seed=rng.randrange(2**63),
    )


def test_mixtures_of_options_in_any_company(make):
    """Every row gets a token that its own settings allow, and the same as alone, in whichever row and slot it is.

    Half of the sequences move to another slot in each step, as after preemption.
    """
    rng = random.Random(3)
    sampler = make(30)
    starts: dict[int, Start] = {}
    for slot in range(30):
        starts[slot] = Start(slot, random_options(rng, VOCABULARY), slot, PROMPT)
    sampler.start(list(starts.values()))
    for step in range(8):
        slots = rng.sample(range(30), 20)
        logits = some_logits(20, seed=step)
        masks = {slot: reference.mask_of(rng.sample(range(VOCABULARY), 5), VOCABULARY) for slot in slots[:6]}
        for slot, row, token in zip(slots, logits, choose(sampler, logits, slots, masks), strict=True):
            assert probabilities(row, starts[slot], masks.get(slot))[token] > 0
            alone = make(1)
            alone.start([dataclasses.replace(starts[slot], slot=0)])
            assert choose(alone, row[None], [0], {0: masks[slot]} if slot in masks else {}) == [token]
            starts[slot] = dataclasses.replace(starts[slot], output=[*starts[slot].output, token])
        moved = rng.sample(range(30), 15)
        places = rng.sample(moved, 15)
        found = {
            place: dataclasses.replace(starts[slot], slot=place) for slot, place in zip(moved, places, strict=True)
        }
        starts.update(found)
        sampler.start(list(found.values()))


def test_the_lowest_temperature_is_greedy(make):
    logits = some_logits(50) * 5
    sampler = make(50)
    sampler.start([Start(i, SamplingOptions(temperature=1e-38), 0, [1]) for i in range(50)])
    assert choose(sampler, logits, range(50)) == logits.argmax(-1).tolist()


def test_rows_without_a_token(make):
    """Those that are not finite, and those whose mask allows nothing: they affect no other row."""
    options = [{}, {"temperature": 1.0}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1, "presence_penalty": 1.0}]
    clean = some_logits(2 * len(options))
    for value in (math.nan, math.inf, -math.inf, "mask"):
        sampler, masks = make(len(clean)), {}
        sampler.start([Start(i, SamplingOptions(seed=1, **options[i // 2]), i, PROMPT) for i in range(len(clean))])
        logits = clean.clone()
        if value == "mask":
            masks = {i: reference.mask_of([], VOCABULARY) for i in range(0, len(clean), 2)}
        else:
            logits[::2, slice(None) if value == -math.inf else 7] = value
        tokens = choose(sampler, logits, range(len(clean)), masks)
        assert [token == NO_TOKEN for token in tokens] == [True, False] * len(options)
        assert NO_TOKEN not in choose(sampler, clean, range(len(clean)))


def test_a_forbidden_token_does_not_hide_logits_that_are_not_finite(make):
    logits = some_logits(2)
    logits[0, 3] = math.nan
    masks = {slot: reference.mask_of([8], VOCABULARY) for slot in (0, 1)}
    assert choose(make(2), logits, [0, 1], masks) == [NO_TOKEN, 8]


@pytest.mark.parametrize("mask", [np.zeros(2, np.int64), np.zeros(3, np.uint32), [1, 2]])
def test_masks_of_another_form(make, mask):
    with pytest.raises(QwenModelError, match=r"a mask of allowed tokens must be uint32 \[2\], not"):
        make(2).set_masks({0: mask})


def test_a_bias_outside_of_the_vocabulary_changes_nothing(make):
    sampler = make(2)
    wrong = SamplingOptions(logit_bias={VOCABULARY: 1.0})
    with pytest.raises(QwenModelError, match="logit_bias: token 41 is not in the vocabulary of 41 tokens"):
        sampler.start([Start(0, SamplingOptions(logit_bias={3: 100.0}), 0, []), Start(1, wrong, 0, [])])
    assert choose(sampler, some_logits(2), [0, 1]) == some_logits(2).argmax(-1).tolist()


@pytest.mark.parametrize("num_best", [0, 5, 128])
def test_logprobs(make, num_best):
    """Of equal logits the lower token comes first; beyond the vocabulary there is none."""
    logits = some_logits(6).round()
    logits[4, ::2] = -math.inf
    logits[5, 3] = math.nan
    tokens = torch.tensor([0, 40, NO_TOKEN, 3, 1, 1], dtype=torch.int32)
    sampler = make(6)
    device = sampler.last_tokens.device
    found = sampler.logprobs(logits.to(device), tokens.to(device), num_best)
    own, best_tokens, best = (tensor.cpu() for tensor in found)
    assert own.isnan().tolist() == [False, False, True, False, False, True]
    for i in range(5):
        exact, count = reference.logprobs(logits[i].numpy()), min(num_best, VOCABULARY)
        if i != 2:
            assert own[i] == pytest.approx(exact[tokens[i]], abs=1e-5)
        order = reference.best_tokens(logits[i].numpy(), num_best)
        assert best_tokens[i].tolist() == order.tolist() + [NO_TOKEN] * (num_best - count)
        np.testing.assert_allclose(best[i, :count], exact[order], rtol=1e-5, atol=1e-5)
        assert best[i, count:].tolist() == [-math.inf] * (num_best - count)
    assert best_tokens[5].tolist() == [NO_TOKEN] * num_best
    assert best[5].isnan().all()


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
