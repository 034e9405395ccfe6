"""Choosing tokens and log-probabilities, beside torch and exact distributions in float64."""

import dataclasses
import math
import random

import numpy as np
import pytest
import torch

from qwen_plugins.embedding import gather_rows
from qwen_plugins.sampling import NO_TOKEN, SamplingState, SequenceStart, logprobs, sample
from tests.qwen_plugins import sampling_reference as reference

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
VOCAB_SIZES = [1, 2, 7, 8, 31, 1000, 4097, 151936]
DRAWS = 20_000


def greedy(logits: torch.Tensor, **options) -> torch.Tensor:
    state = SamplingState(max(1, len(logits)), logits.shape[1], "cuda")
    return sample(logits, state, largest=True, **options)


def started(count: int, vocab_size: int, **options) -> SamplingState:
    """A state with `count` sequences, which draw from different streams."""
    state = SamplingState(count, vocab_size, "cuda")
    restart(state, count, **options)
    return state


def restart(state: SamplingState, count: int, **options) -> None:
    state.start([SequenceStart(slot=i, draw_stream=i, **options) for i in range(count)])


def int32(values) -> torch.Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.int32, device="cuda")


def first_largest(logits: torch.Tensor) -> torch.Tensor:
    """As torch.argmax on a CPU: the first of equal ones. NO_TOKEN where the largest is not finite."""
    largest, tokens = logits.float().cpu().max(-1)
    return torch.where(largest.isfinite(), tokens, NO_TOKEN).int().cuda()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("sequences", [0, 1, 3, 70, 600])
def test_argmax(sequences, vocab_size, dtype):
    if sequences * vocab_size > 2e7:
        pytest.skip("the same as 70 sequences")
    logits = torch.randn(sequences, vocab_size, device="cuda").to(dtype)
    assert torch.equal(greedy(logits), first_largest(logits))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [7, 1000, 151936])
def test_argmax_of_many_equal_ones(vocab_size, dtype):
    logits = torch.randint(-1, 2, (40, vocab_size), device="cuda").to(dtype)
    logits[0], logits[1], logits[2] = -0.0, -math.inf, math.inf
    logits[3, ::2] = 0.0
    logits[3, 1::2] = -0.0
    logits[4] = -math.inf
    logits[4, -1] = -60000.0
    assert torch.equal(greedy(logits), first_largest(logits))


CHOICES = {
    "argmax": None,
    "greedy": {"greedy": True},
    "greedy after penalties": {"greedy": True, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    "draw": {},
    "draw after a penalty": {"repetition_penalty": 1.3},
    "draw at a low temperature": {"temperature": 1e-4},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.2},
    "everything": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3},
}


def choose(name: str, logits: torch.Tensor) -> list[int]:
    """The tokens of two choices by that name, in permuted slots; checks what else a choice writes."""
    options, (count, vocab_size) = CHOICES[name], logits.shape
    state = SamplingState(count, vocab_size, "cuda")
    slots = torch.randperm(count, generator=torch.Generator().manual_seed(count)).int().cuda()
    if options is not None:
        prompt = [0, vocab_size // 2, vocab_size - 1]
        numbers = slots.tolist()
        state.start(
            [SequenceStart(slot=s, seed=11, draw_stream=i, prompt=prompt, **options) for i, s in enumerate(numbers)]
        )
    found = []
    for _ in range(2):
        past = torch.arange(count, dtype=torch.int32, device="cuda")
        tokens = sample(logits, state, slots, largest=options is None, past_lengths=past)
        assert torch.equal(state.last_tokens[slots.long()], tokens.clamp(min=0))
        assert past.tolist() == list(range(1, count + 1))
        assert not state._semaphores.any()
        found += tokens.tolist()
    return found


def set_not_finite(row: torch.Tensor, value: float, place: int) -> None:
    """NaN of either sign, +infinity, or with -infinity a row of nothing else."""
    if value == -math.inf:
        row[:] = value
    elif math.isnan(value) and math.copysign(1, value) < 0:
        bits = {torch.float32: -(2**22), torch.float16: -(2**9), torch.bfloat16: -(2**6)}[row.dtype]
        row.view(torch.int32 if row.dtype == torch.float32 else torch.int16)[place] = bits
    else:
        row[place] = value


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf], ids=["nan", "-nan", "inf", "-inf"])
@pytest.mark.parametrize("vocab_size", [1, 7, 8, 1000, 4097, 151936])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_finite(dtype, vocab_size, value, name):
    """They get no token, wherever the value stands and however many blocks share a row; other rows get theirs."""
    places = sorted({place % vocab_size for place in (0, 1, 6, 8, vocab_size // 2, vocab_size // 3, -9, -8, -2, -1)})
    for count in (1, 3, 20, 80):
        if count == 80 and vocab_size > 5000:
            continue
        logits = torch.randn(count, vocab_size, device="cuda").to(dtype)
        logits[:, 1::3] = -math.inf  # which by itself is nothing wrong
        expected = choose(name, logits)
        assert NO_TOKEN not in expected
        assert not any(token % 3 == 1 for token in expected)
        for round_ in range(len(places) if count == 1 else 2):
            damaged = logits.clone()
            rows = range(0, count, 3)
            for row in rows:
                set_not_finite(damaged[row], value, places[(row + round_) % len(places)])
            found = choose(name, damaged)
            assert found == [NO_TOKEN if i % count in rows else token for i, token in enumerate(expected)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [7, 1000, 151936])
def test_many_values_that_are_not_finite(vocab_size, dtype):
    logits = torch.randn(20, vocab_size, device="cuda").to(dtype)
    logits[::2][torch.rand(10, vocab_size, device="cuda") < 0.5] = math.nan
    logits[0], logits[2, vocab_size // 2] = math.nan, math.inf
    logits[4] = math.nan
    logits[4, vocab_size // 2] = 5.0
    bad = (~logits.float().max(-1).values.isfinite()).tolist()
    for name in CHOICES:
        assert [token == NO_TOKEN for token in choose(name, logits)] == 2 * bad
    own, tokens, best = logprobs(logits, torch.zeros(20, dtype=torch.int32, device="cuda"), 3)
    assert own.isnan().tolist() == bad
    assert (tokens == NO_TOKEN).all(-1).tolist() == best.isnan().all(-1).tolist() == bad


@pytest.mark.parametrize("name", CHOICES)
def test_a_graph_finds_what_is_not_finite(name):
    """Replayed, with a row that comes and goes: the next step's embedding always has an id that it can gather."""
    clean = torch.randn(3, 151936, device="cuda").half()
    logits, table = clean.clone(), torch.randn(151936, 8, device="cuda").half()
    state = SamplingState(3, 151936, "cuda")
    tokens, slots = torch.zeros(3, dtype=torch.int32, device="cuda"), int32([2, 0, 1])
    inputs = torch.zeros_like(tokens)

    def step() -> torch.Tensor:
        sample(logits, state, slots, largest=CHOICES[name] is None, out=tokens)
        inputs.copy_(state.last_tokens[slots.long()])
        return gather_rows(table, inputs)

    graph, rows = captured(step)

    def replay(damaged: bool) -> list[list[int]]:
        restart(state, 3, seed=2, **(CHOICES[name] or {}))
        found = []
        for number in range(4):
            logits.copy_(clean)
            if damaged and number in (1, 2):
                logits[1, 151936 - number] = math.nan
            graph.replay()
            assert torch.equal(rows, table[tokens.clamp(min=0).long()])
            found.append(tokens.tolist())
        return found

    expected, found = replay(False), replay(True)
    for number, (before, after) in enumerate(zip(expected, found, strict=True)):
        assert (after[0], after[2]) == (before[0], before[2])
        if number < 3:
            assert after[1] == (NO_TOKEN if number in (1, 2) else before[1])
        else:
            assert after[1] != NO_TOKEN


def captured(step) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph of a step, and what the step returns."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            result = step()
    torch.cuda.synchronize()
    return graph, result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shift", "stride"), [(0, 1008), (0, 1009), (1, 1008), (3, 1015), (8, 1016)])
def test_rows_of_a_wider_matrix(shift, stride, dtype):
    wide = torch.randn(9, stride, device="cuda").to(dtype)
    wide[:, :shift], wide[:, shift + 1000 :] = math.inf, math.inf
    logits = wide[:, shift : shift + 1000]
    assert torch.equal(greedy(logits), first_largest(logits))
    tokens = int32(range(9))
    for ours, contiguous in zip(logprobs(logits, tokens, 4), logprobs(logits.contiguous(), tokens, 4), strict=True):
        assert torch.equal(ours, contiguous)
    for options in ({}, {"top_k": 20}, {"top_p": 0.7}, {"top_k": 50, "top_p": 0.9, "repetition_penalty": 1.5}):
        states = [started(9, 1000, seed=3, **options) for _ in range(2)]
        for _ in range(3):
            assert torch.equal(sample(logits, states[0]), sample(logits.contiguous(), states[1]))


def probabilities(logits: torch.Tensor, **options) -> np.ndarray:
    return reference.probabilities(logits.float().cpu().numpy(), SequenceStart(slot=0, **options))


def assert_distributed(tokens: torch.Tensor, expected: np.ndarray) -> None:
    """Pearson's chi-squared test, rare tokens together; a right sampler fails it once in a million."""
    drawn = np.bincount(tokens.cpu().numpy(), minlength=len(expected)).astype(float)
    assert not drawn[expected == 0].any()
    counts = expected * drawn.sum()
    common = counts >= 5
    observed = np.append(drawn[common], drawn[~common].sum())
    wanted = np.append(counts[common], counts[~common].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    chi_squared = float(((observed - wanted) ** 2 / wanted).sum())
    freedom = max(1, len(wanted) - 1)
    assert chi_squared < freedom + 5 * math.sqrt(2 * freedom) + 15


CASES = [
    {},
    {"temperature": 0.4},
    {"temperature": 100.0},
    {"temperature": 0.01},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 100},
    {"top_p": 0.8},
    {"top_p": 0.999},
    {"top_p": 1e-6},
    {"min_p": 0.13},
    {"min_p": 1.0},
    {"temperature": 0.7, "top_k": 12, "top_p": 0.6},
    {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.11},
    {"temperature": 1.3, "repetition_penalty": 1.8, "top_p": 0.9},
    {"repetition_penalty": 0.5},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -0.7, "top_k": 9},
    {"temperature": 1e-4, "top_k": 3},
    {"repetition_penalty": 1.2, "presence_penalty": -1.0, "frequency_penalty": 0.4, "temperature": 0.9, "min_p": 0.02},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 40, 1001])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_distribution(options, vocab_size, dtype):
    """Of sequences whose settings are alike but for the draw stream, in one step; in some steps without penalties."""
    generator = torch.Generator("cuda").manual_seed(vocab_size)
    logits = (torch.randn(vocab_size, device="cuda", generator=generator) * 2).to(dtype)
    best = logits.float().topk(min(3, vocab_size)).indices.tolist()
    seen = {"prompt": [0, *best], "output": [vocab_size - 1, best[0], best[0], vocab_size // 2, -1, vocab_size]}
    penalizes = any("penalty" in name for name in options)
    if "repetition_penalty" in options:
        options = {**options, "logit_bias": {best[0]: -1.0, vocab_size - 1: 0.5}}
    count = 8000 if penalizes else 2000
    state = started(count, vocab_size, seed=1, **seen, **options)
    tokens = [sample(logits.expand(count, -1), state) for _ in range(1 if penalizes else 10)]
    assert_distributed(torch.cat(tokens), probabilities(logits, **seen, **options))


@pytest.mark.parametrize("options", CASES, ids=str)
def test_distribution_over_the_steps(options):
    """Of a few sequences' draws, one after the other: blocks work together on each."""
    logits = (torch.randn(3, 5000, device="cuda") * 3).half()
    options = {name: value for name, value in options.items() if "penalty" not in name}
    state = started(3, 5000, seed=2, **options)
    tokens = torch.stack([sample(logits, state) for _ in range(4000)])
    for i in range(3):
        assert_distributed(tokens[:, i], probabilities(logits[i], **options))


def random_start(slot: int, vocab_size: int, rng: random.Random, **changed) -> SequenceStart:
    """A sequence with any of the options."""

    def maybe(value, default):
        return value if rng.random() < 0.5 else default

    def some(count):
        return [rng.randrange(vocab_size) for _ in range(rng.randrange(count))]

    options = {
        "greedy": rng.random() < 0.3,
        "temperature": maybe(rng.uniform(0.3, 2), 1.0),
        "top_k": maybe(rng.randrange(1, 2 * vocab_size), 0),
        "top_p": maybe(rng.uniform(0.05, 1), 1.0),
        "min_p": maybe(rng.uniform(0.01, 0.3), 0.0),
        "repetition_penalty": maybe(rng.uniform(0.5, 2), 1.0),
        "presence_penalty": maybe(rng.uniform(-2, 2), 0.0),
        "frequency_penalty": maybe(rng.uniform(-2, 2), 0.0),
        "logit_bias": maybe({token: rng.uniform(-5, 5) for token in some(min(vocab_size, 400))}, {}),
        "prompt": some(100),
        "output": some(50) + [rng.randrange(vocab_size)] * rng.randrange(5),
        "seed": rng.randrange(2**63),
        "draw_stream": rng.randrange(2**32),
    }
    return SequenceStart(slot=slot, **(options | changed))


@pytest.mark.parametrize("vocab_size", [7, 33, 1000, 4097])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixtures_of_options(dtype, vocab_size):
    """Every row, of any slot, with or without a mask, gets a token that its own settings allow; slots are used again.

    The greedy ones' tokens are known: those of the float64 reference, where no second logit is near. What was chosen is
    counted: the reference is told.
    """
    rng = random.Random(vocab_size)
    state = SamplingState(40, vocab_size, "cuda")
    known: dict[int, SequenceStart] = {}
    for _ in range(12):
        for slot in rng.sample(range(40), 10):
            known[slot] = random_start(slot, vocab_size, rng)
            state.start([known[slot]])
        slots = rng.sample(sorted(known), rng.randrange(1, len(known) + 1))
        masks = {
            s: reference.mask_of(rng.sample(range(vocab_size), rng.randrange(vocab_size)), vocab_size)
            for s in slots
            if rng.random() < 0.3
        }
        state.set_masks(masks)
        logits = (torch.randn(len(slots), vocab_size, device="cuda") * 3).to(dtype)
        tokens = sample(logits, state, int32(slots)).tolist()
        for slot, row, token in zip(slots, logits.float().cpu().numpy(), tokens, strict=True):
            start = known[slot]
            check_token(row, start, masks.get(slot), token)
            if token != NO_TOKEN:
                known[slot] = dataclasses.replace(start, output=[*start.output, token])


def check_token(row: np.ndarray, start: SequenceStart, mask: np.ndarray | None, token: int) -> None:
    values = reference.processed(row, start, mask)
    if not np.isfinite(values.max()):
        assert token == NO_TOKEN
    elif start.greedy:
        assert values[token] >= values.max() - 1e-4
    else:
        # Limits a little wider, for a token whose float32 probability is at one.
        wider = dataclasses.replace(start, top_p=min(1.0, start.top_p * 1.0001), min_p=start.min_p * 0.999)
        assert reference.probabilities(row, wider, mask)[token] > 0


@pytest.mark.parametrize("vocab_size", [1000, 4097, 151936])
def test_tokens_do_not_depend_on_the_company(vocab_size):
    """Alone, in any row of a batch of others, and in another slot after it was taken back: the same tokens."""
    rng = random.Random(5)
    starts = [random_start(0, vocab_size, rng) for _ in range(12)]
    logits = [(torch.randn(12, vocab_size, device="cuda") * 3).half() for _ in range(6)]

    def alone(start: SequenceStart, i: int) -> list[int]:
        state = SamplingState(1, vocab_size, "cuda")
        state.start([start])
        return [int(sample(step[i : i + 1], state)) for step in logits]

    expected = [alone(start, i) for i, start in enumerate(starts)]
    state = SamplingState(100, vocab_size, "cuda")
    places = rng.sample(range(100), 12)
    state.start([dataclasses.replace(start, slot=slot) for start, slot in zip(starts, places, strict=True)])
    found: list[list[int]] = [[] for _ in starts]
    for number, step in enumerate(logits):
        if number == 3:  # all move
            places = rng.sample(range(100), 12)
            state.start(
                [
                    dataclasses.replace(start, slot=slot, output=[*start.output, *output])
                    for start, slot, output in zip(starts, places, found, strict=True)
                ]
            )
        order = rng.sample(range(12), 12)
        others = torch.randn(rng.choice([0, 20, 60]), vocab_size, device="cuda").half()
        free = [slot for slot in range(100) if slot not in places][: len(others)]
        rows = torch.cat([others, step[order]])
        tokens = sample(rows, state, int32([*free, *(places[i] for i in order)])).tolist()
        for i, token in zip(order, tokens[len(others) :], strict=True):
            found[i].append(token)
    assert found == expected


def test_a_draw_is_that_of_its_seed_stream_and_step():
    """Other seeds, streams and steps draw differently; the step is the length of the output."""
    logits = torch.zeros(4, 1000, device="cuda")
    state = SamplingState(4, 1000, "cuda")
    numbers = [(7, 0, 0), (7, 1, 0), (8, 0, 0), (7, 0, 1)]
    state.start(
        [
            SequenceStart(slot=i, seed=seed, draw_stream=stream, output=[0] * step)
            for i, (seed, stream, step) in enumerate(numbers)
        ]
    )
    first, second = sample(logits, state).tolist(), sample(logits, state).tolist()
    assert len(set(first)) == 4
    assert second[0] == first[3]


@pytest.mark.parametrize("count", [1, 30])
def test_masks(count):
    """Of both kinds of rows, in a graph that is replayed; a mask that allows nothing gives no token."""
    vocab_size = 4097
    logits = torch.randn(count, vocab_size, device="cuda").half()
    state = SamplingState(count, vocab_size, "cuda")
    state.start([SequenceStart(slot=i, greedy=i % 3 == 0, top_k=5 * (i % 3)) for i in range(count)])
    graph, tokens = captured(lambda: sample(logits, state))
    rng = random.Random(1)
    for _ in range(5):
        allowed = {slot: rng.sample(range(vocab_size), rng.choice([0, 1, 3, 4000])) for slot in range(0, count, 2)}
        state.set_masks({slot: reference.mask_of(tokens, vocab_size) for slot, tokens in allowed.items()})
        graph.replay()
        for slot, token in enumerate(tokens.tolist()):
            if slot not in allowed:
                assert token != NO_TOKEN
            else:
                assert token in allowed[slot] if allowed[slot] else token == NO_TOKEN
    state.set_masks({})
    graph.replay()
    assert tokens[0] == logits[0].argmax()
    assert NO_TOKEN not in tokens.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 7, 1000, 4097, 151936])
def test_logprobs(vocab_size, dtype):
    for count, num_best in ((1, 0), (1, 5), (3, 128), (40, 1), (200, 20)):
        if count * vocab_size > 2e7:
            continue
        logits = (torch.randn(count, vocab_size, device="cuda") * 4).to(dtype)
        logits[0, ::5] = logits[0, 0].clone()  # equal ones
        logits[-1, 1::2] = -math.inf
        tokens = torch.randint(vocab_size, (count,), device="cuda").int()
        tokens[-1] = NO_TOKEN
        own, best_tokens, best = logprobs(logits, tokens, num_best)
        expected = logits.double().log_softmax(-1)
        assert own[-1].isnan()
        wanted = expected.gather(1, tokens.long().clamp(min=0)[:, None])[:, 0].float()
        torch.testing.assert_close(own[:-1], wanted[:-1], rtol=1e-5, atol=1e-5)
        order = logits.float().sort(descending=True, stable=True).indices[:, :num_best]
        there = min(num_best, vocab_size)
        assert torch.equal(best_tokens[:, :there], order.int())
        torch.testing.assert_close(best[:, :there], expected.gather(1, order).float(), rtol=1e-5, atol=1e-5)
        assert (best_tokens[:, there:] == NO_TOKEN).all()
        assert (best[:, there:] == -math.inf).all()
        if count > 1:
            for ours, alone in zip((own, best_tokens, best), logprobs(logits[:1], tokens[:1], num_best), strict=True):
                assert torch.equal(ours[:1], alone)


def test_logprobs_in_a_graph():
    logits = torch.zeros(3, 4097, device="cuda")
    tokens = int32([0, 5, 4096])
    graph, best_tokens = captured(lambda: logprobs(logits, tokens, 7)[1])
    logits.copy_(torch.randn_like(logits))
    graph.replay()
    assert torch.equal(best_tokens, logits.topk(7).indices.int())


@pytest.mark.parametrize("sequences", [1, 20, 40, 200])
@pytest.mark.parametrize("vocab_size", [1000, 151936])
def test_the_tokens_that_may_be_drawn(vocab_size, sequences):
    """Exactly the top k and the smallest set that reaches top_p: at a high temperature all of them are drawn."""
    if sequences * vocab_size > 2e7:
        pytest.skip("large")
    logits = torch.randn(sequences, vocab_size, device="cuda").half()
    logits[:, : vocab_size // 3] = logits[:, :1]  # equal ones, of which some may be at the limit
    state = SamplingState(sequences, vocab_size, "cuda")
    for options in ({"top_k": 5}, {"top_k": 200, "top_p": 0.02, "temperature": 50.0}, {"top_p": 0.0002}):
        allowed = [probabilities(row, **options) > 0 for row in logits]
        restart(state, sequences, seed=5, **options)
        drawn = np.zeros((sequences, vocab_size), dtype=bool)
        for tokens in torch.stack([sample(logits, state) for _ in range(500)]).cpu().numpy():
            drawn[np.arange(sequences), tokens] = True
        for row, possible in zip(drawn, allowed, strict=True):
            assert not (row & ~possible).any()
            if possible.sum() < 50:
                assert (row == possible).all()


def test_equal_logits():
    """top_k keeps exactly k of equal tokens, the first; top_p as many as reach it."""
    logits = torch.zeros(DRAWS, 1000, device="cuda")
    state = SamplingState(DRAWS, 1000, "cuda")
    for options, count in (({"top_k": 17}, 17), ({"top_p": 0.0335}, 34), ({"top_k": 100, "top_p": 0.505}, 51)):
        restart(state, DRAWS, seed=4, **options)
        expected = np.zeros(1000)
        expected[:count] = 1 / count
        assert_distributed(sample(logits, state), expected)


@pytest.mark.parametrize("logits", [[5, 3, 3, 3], [5, 3, 3, 3, 3, 1, 1, 1], [9, 9, 9, 9, 9, 9, 9, 9, 1]], ids=str)
def test_top_p_brings_back_nothing_that_top_k_left_out(logits):
    """Both limits fall among equal logits."""
    row = torch.tensor(logits, device="cuda", dtype=torch.bfloat16)
    state = SamplingState(2000, len(logits), "cuda")
    for top_k in range(1, len(logits) + 1):
        for top_p in (0.5, 0.95, 0.999):
            options = {"top_k": top_k, "top_p": top_p, "temperature": 5.0}
            restart(state, 2000, seed=top_k, **options)
            rows = row.expand(2000, -1).contiguous()
            tokens = torch.cat([sample(rows, state) for _ in range(5)])
            assert_distributed(tokens, probabilities(row, **options))


def test_temperature_extremes():
    logits = torch.randn(64, 151936, device="cuda")
    state = SamplingState(64, 151936, "cuda")
    for temperature in (1e-4, 1e-30, 1e-44):
        for options in ({}, {"top_k": 50}, {"top_p": 0.9}):
            restart(state, 64, temperature=temperature, **options)
            near = logits.gather(1, sample(logits, state).long()[:, None])[:, 0]
            assert (near > logits.max(-1).values - 3e-3).all()
    restart(state, 64, temperature=1e30, seed=1)
    tokens = torch.cat([sample(logits, state) for _ in range(300)])
    assert_distributed(tokens // 1187, np.full(128, 1 / 128))


def test_counts_are_limited():
    """More than 2^15 - 1 of one token count as that many, and do not become a token of the prompt."""
    logits = torch.zeros(1, 40, device="cuda")
    state = SamplingState(1, 40, "cuda")
    state.start([SequenceStart(slot=0, greedy=True, frequency_penalty=-1.0, output=[3] * 40000 + [5] * 32766)])
    assert sample(logits, state).tolist() == [3]
    logits[0, 3] = -2.0
    assert [int(sample(logits, state)) for _ in range(5)] == [5] * 5
    assert state._counts[0, [3, 5]].tolist() == [2**15 - 1] * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [7, 1000, 151936])
def test_repetition_penalty(vocab_size, dtype):
    """Greedy choice, with what was chosen before and the prompts seen."""
    logits = torch.randn(5, vocab_size, device="cuda").to(dtype)
    prompts = [torch.randint(-2, vocab_size + 2, (n,)) for n in (3, 0, 1000, 17, 1)]
    state = SamplingState(8, vocab_size, "cuda")
    state.start(
        [SequenceStart(slot=i, greedy=True, repetition_penalty=1.7, prompt=p.tolist()) for i, p in enumerate(prompts)]
    )
    seen = torch.zeros(5, vocab_size, dtype=torch.bool)
    for row, prompt in zip(seen, prompts, strict=True):
        row[prompt[(prompt >= 0) & (prompt < vocab_size)]] = True
    for _ in range(6):
        wide = logits.float().cpu()
        penalised = torch.where(seen, torch.where(wide > 0, wide / 1.7, wide * 1.7), wide)
        tokens = sample(logits, state).cpu().long()
        assert torch.equal(penalised.gather(1, tokens[:, None])[:, 0], penalised.max(-1).values)
        seen[torch.arange(5), tokens] = True


def test_infinities():
    logits = torch.full((2000, 300), -math.inf, device="cuda").half()
    state = SamplingState(2000, 300, "cuda")
    for options in ({}, {"top_k": 5}, {"top_p": 0.5}, {"temperature": 1e-4}):
        restart(state, 2000, **options)
        assert (sample(logits, state) == NO_TOKEN).all()
        some = logits.clone()
        some[:, [7, 200]] = 3.0
        restart(state, 2000, **options)
        expected = {7} if options.get("top_p") else {7, 200}
        assert set(sample(some, state).tolist()) == expected


def test_errors():
    logits = torch.randn(3, 50, device="cuda")
    state = SamplingState(2, 50, "cuda")
    with pytest.raises(ValueError, match=r"up to 2, 50.*\[3, 50\]"):
        sample(logits, state)
    with pytest.raises(ValueError, match="must be on an NVIDIA GPU"):
        sample(logits.cpu(), state)
    with pytest.raises(TypeError, match="logits must be float16, bfloat16 or float32, not float64"):
        sample(logits[:2].double(), state)
    with pytest.raises(TypeError, match="past_lengths must be int32, not float32"):
        sample(logits[:2], state, past_lengths=torch.zeros(2, device="cuda"))
    with pytest.raises(ValueError, match=r"slots must have the shape \(2,\), not \(3,\)"):
        sample(logits[:2], state, int32([0, 1, 2]))
    with pytest.raises(ValueError, match="must be contiguous"):
        sample(torch.randn(50, 2, device="cuda").T, state)
    with pytest.raises(ValueError, match="slot must be below 2, not 2"):
        state.start([SequenceStart(slot=2)])
    with pytest.raises(ValueError, match=r"slots must be different, not \[1, 1\]"):
        state.start([SequenceStart(slot=1), SequenceStart(slot=1)])
    with pytest.raises(ValueError, match="logit_bias: token 50 is not below vocab_size, 50"):
        state.start([SequenceStart(slot=1, logit_bias={50: 1.0})])
    with pytest.raises(ValueError, match=r"a mask must be uint32 \[2\], not int64 \[2\]"):
        state.set_masks({0: np.zeros(2, np.int64)})
    with pytest.raises(ValueError, match="num_best must be from 0 to 128, not 129"):
        logprobs(logits, int32([0, 0, 0]), 129)
    with pytest.raises(ValueError, match=r"tokens must have the shape \(3,\), not \(2,\)"):
        logprobs(logits, int32([0, 0]))
    with pytest.raises(ValueError, match="vocab_size"):
        SamplingState(1, 2**24, "cuda")
    with pytest.raises(ValueError, match="NVIDIA GPU"):
        SamplingState(1, 50, "cpu")
