"""Choosing tokens, beside torch.argmax and exact distributions in float64."""

import math

import numpy as np
import pytest
import torch

from qwen_plugins.embedding import gather_rows
from qwen_plugins.sampling import NO_TOKEN, SamplingState, mark_seen, sample, sampling_state

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
VOCAB_SIZES = [1, 2, 7, 8, 31, 1000, 4097, 151936]
DRAWS = 20_000


def greedy(logits: torch.Tensor, **options) -> torch.Tensor:
    state = sampling_state(max(1, len(logits)), logits.shape[1], "cuda")
    return sample(logits, state, greedy=True, penalty=False, **options)


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
    "argmax": (True, False, {}),
    "argmax after a penalty": (True, True, {"repetition_penalty": 1.3}),
    "draw": (False, False, {}),
    "draw after a penalty": (False, True, {"repetition_penalty": 1.3}),
    "draw at a low temperature": (False, False, {"temperature": 1e-4}),
    "top_k": (False, False, {"top_k": 5}),
    "top_p": (False, False, {"top_p": 0.9}),
    "everything": (False, True, {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.3}),
}


def choose(name: str, logits: torch.Tensor, state: SamplingState) -> tuple[list[int], torch.Tensor]:
    """The tokens and the marks of what was seen after a choice by that name; checks what else it writes."""
    is_greedy, penalty, options = CHOICES[name]
    count, vocab_size = logits.shape
    state.set(seed=11, **options)
    if penalty:
        prompts = torch.tensor([0, vocab_size // 2, vocab_size - 1] * count, dtype=torch.int32, device="cuda")
        mark_seen(prompts, torch.arange(0, 3 * count + 1, 3, dtype=torch.int32, device="cuda"), state)
    past = torch.arange(count, dtype=torch.int32, device="cuda")
    input_ids = torch.full_like(past, -7)
    tokens = sample(logits, state, greedy=is_greedy, penalty=penalty, past_lengths=past, input_ids=input_ids)
    assert torch.equal(input_ids, tokens.clamp(min=0))
    assert past.tolist() == list(range(1, count + 1))
    assert not state.semaphores.any()
    return tokens.tolist(), state.seen[:count].clone()


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
        state = sampling_state(count, vocab_size, "cuda")
        expected, seen = choose(name, logits, state)
        assert NO_TOKEN not in expected
        assert not any(token % 3 == 1 for token in expected)
        for round_ in range(len(places) if count == 1 else 2):
            damaged = logits.clone()
            rows = range(0, count, 3)
            for row in rows:
                set_not_finite(damaged[row], value, places[(row + round_) % len(places)])
            tokens, marks = choose(name, damaged, state)
            assert tokens == [NO_TOKEN if row in rows else token for row, token in enumerate(expected)]
            others = [row for row in range(count) if row not in rows]
            assert torch.equal(marks[others], seen[others])
            if CHOICES[name][1]:
                untouched = sampling_state(count, vocab_size, "cuda")
                prompt = torch.tensor([0, vocab_size // 2, vocab_size - 1], dtype=torch.int32, device="cuda")
                mark_seen(prompt, torch.tensor([0, 3], dtype=torch.int32, device="cuda"), untouched)
                assert (marks[list(rows)] == untouched.seen[0]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [7, 1000, 151936])
def test_many_values_that_are_not_finite(vocab_size, dtype):
    logits = torch.randn(20, vocab_size, device="cuda").to(dtype)
    logits[::2][torch.rand(10, vocab_size, device="cuda") < 0.5] = math.nan
    logits[0], logits[2, vocab_size // 2] = math.nan, math.inf
    logits[4] = math.nan
    logits[4, vocab_size // 2] = 5.0
    for name in CHOICES:
        tokens, _ = choose(name, logits, sampling_state(20, vocab_size, "cuda"))
        bad = (~logits.float().max(-1).values.isfinite()).tolist()
        assert [token == NO_TOKEN for token in tokens] == bad


@pytest.mark.parametrize("name", CHOICES)
def test_a_graph_finds_what_is_not_finite(name):
    """Replayed, with a row that comes and goes: the next step's embedding always has an id that it can gather."""
    is_greedy, penalty, options = CHOICES[name]
    clean = torch.randn(3, 151936, device="cuda").half()
    logits, table = clean.clone(), torch.randn(151936, 8, device="cuda").half()
    state = sampling_state(3, 151936, "cuda")
    tokens, input_ids, past = (torch.zeros(3, dtype=torch.int32, device="cuda") for _ in range(3))

    torch.cuda.synchronize()

    def step() -> torch.Tensor:
        sample(logits, state, greedy=is_greedy, penalty=penalty, past_lengths=past, input_ids=input_ids, out=tokens)
        return gather_rows(table, input_ids)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            rows = step()
    torch.cuda.synchronize()

    def replay(damaged: bool) -> list[list[int]]:
        state.set(seed=2, **options)
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
    assert past.tolist() == [9, 9, 9]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shift", "stride"), [(0, 1008), (0, 1009), (1, 1008), (3, 1015), (8, 1016)])
def test_rows_of_a_wider_matrix(shift, stride, dtype):
    wide = torch.randn(9, stride, device="cuda").to(dtype)
    wide[:, :shift], wide[:, shift + 1000 :] = math.inf, math.inf
    logits = wide[:, shift : shift + 1000]
    assert torch.equal(greedy(logits), first_largest(logits))
    states = [sampling_state(9, 1000, "cuda") for _ in range(2)]
    for options in ({}, {"top_k": 20}, {"top_p": 0.7}, {"top_k": 50, "top_p": 0.9, "repetition_penalty": 1.5}):
        for state in states:
            state.set(seed=3, **options)
        for _ in range(3):
            assert torch.equal(sample(logits, states[0]), sample(logits.contiguous(), states[1]))


def probabilities(
    logits: torch.Tensor, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, seen=()
) -> np.ndarray:
    """Of one row, in float64; of equal logits at a limit the first stay."""
    values = logits.double().cpu().numpy().copy()
    for token in set(seen):
        values[token] *= repetition_penalty if values[token] <= 0 else 1 / repetition_penalty
    order = np.argsort(-values, kind="stable")
    if top_k:
        order = order[:top_k]
    weights = np.exp((values[order] - values[order[0]]) / temperature)
    weights /= weights.sum()
    if top_p < 1:
        order = order[: int(np.searchsorted(np.cumsum(weights), top_p)) + 1]
        weights = weights[: len(order)] / weights[: len(order)].sum()
    result = np.zeros_like(values)
    result[order] = weights
    return result


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
    {"temperature": 2.5},
    {"temperature": 100.0},
    {"temperature": 0.01},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 100},
    {"top_p": 0.8},
    {"top_p": 0.999},
    {"top_p": 1e-6},
    {"temperature": 0.7, "top_k": 12, "top_p": 0.6},
    {"temperature": 1.3, "repetition_penalty": 1.8, "top_p": 0.9},
    {"repetition_penalty": 0.5},
    {"temperature": 1e-4, "top_k": 3},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 7, 40, 1000])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_distribution(options, vocab_size, dtype):
    """Of one step's sequences."""
    generator = torch.Generator("cuda").manual_seed(vocab_size)
    logits = (torch.randn(vocab_size, device="cuda", generator=generator) * 2).to(dtype)
    seen = [0, vocab_size // 2, vocab_size - 1]
    state = sampling_state(DRAWS, vocab_size, "cuda")
    state.set(seed=1, **options)
    mark_seen(
        torch.tensor(seen * DRAWS, dtype=torch.int32, device="cuda"),
        torch.arange(0, 3 * DRAWS + 1, 3, dtype=torch.int32, device="cuda"),
        state,
    )
    tokens = sample(logits.expand(DRAWS, -1), state)
    assert_distributed(tokens, probabilities(logits, **options, seen=seen))


@pytest.mark.parametrize("options", CASES, ids=str)
def test_distribution_over_the_steps(options):
    """Of a few sequences' draws, one after the other: blocks work together on each."""
    logits = (torch.randn(3, 5000, device="cuda") * 3).half()
    options = {name: value for name, value in options.items() if name != "repetition_penalty"}
    state = sampling_state(3, 5000, "cuda")
    state.set(seed=2, **options)
    tokens = torch.stack([sample(logits, state, penalty=False) for _ in range(4000)])
    for i in range(3):
        assert_distributed(tokens[:, i], probabilities(logits[i], **options))


@pytest.mark.parametrize("sequences", [1, 20, 40, 200])
@pytest.mark.parametrize("vocab_size", [1000, 151936])
def test_the_tokens_that_may_be_drawn(vocab_size, sequences):
    """Exactly the top k and the smallest set that reaches top_p: at a high temperature all of them are drawn."""
    if sequences * vocab_size > 2e7:
        pytest.skip("large")
    logits = torch.randn(sequences, vocab_size, device="cuda").half()
    logits[:, : vocab_size // 3] = logits[:, :1]  # equal ones, of which some may be at the limit
    state = sampling_state(sequences, vocab_size, "cuda")
    for options in ({"top_k": 5}, {"top_k": 200, "top_p": 0.02, "temperature": 50.0}, {"top_p": 0.0002}):
        allowed = [probabilities(row, **options) > 0 for row in logits]
        state.set(seed=5, **options)
        drawn = np.zeros((sequences, vocab_size), dtype=bool)
        for tokens in torch.stack([sample(logits, state, penalty=False) for _ in range(500)]).cpu().numpy():
            drawn[np.arange(sequences), tokens] = True
        for row, possible in zip(drawn, allowed, strict=True):
            assert not (row & ~possible).any()
            if possible.sum() < 50:
                assert (row == possible).all()


def test_equal_logits():
    """top_k keeps exactly k of equal tokens, the first; top_p as many as reach it."""
    logits = torch.zeros(DRAWS, 1000, device="cuda")
    state = sampling_state(DRAWS, 1000, "cuda")
    for options, count in (({"top_k": 17}, 17), ({"top_p": 0.0335}, 34), ({"top_k": 100, "top_p": 0.505}, 51)):
        state.set(seed=4, **options)
        expected = np.zeros(1000)
        expected[:count] = 1 / count
        assert_distributed(sample(logits, state), expected)


@pytest.mark.parametrize("logits", [[5, 3, 3, 3], [5, 3, 3, 3, 3, 1, 1, 1], [9, 9, 9, 9, 9, 9, 9, 9, 1]], ids=str)
def test_top_p_brings_back_nothing_that_top_k_left_out(logits):
    """Both limits fall among equal logits."""
    row = torch.tensor(logits, device="cuda", dtype=torch.bfloat16)
    state = sampling_state(DRAWS, len(logits), "cuda")
    for top_k in range(1, len(logits) + 1):
        for top_p in (0.5, 0.95, 0.999):
            options = {"top_k": top_k, "top_p": top_p, "temperature": 5.0}
            state.set(seed=top_k, **options)
            assert_distributed(sample(row.expand(DRAWS, -1).contiguous(), state), probabilities(row, **options))


def test_temperature_extremes():
    logits = torch.randn(64, 151936, device="cuda")
    state = sampling_state(64, 151936, "cuda")
    for temperature in (1e-4, 1e-30, 1e-44):
        for options in ({}, {"top_k": 50}, {"top_p": 0.9}):
            state.set(temperature=temperature, **options)
            near = logits.gather(1, sample(logits, state, penalty=False).long()[:, None])[:, 0]
            assert (near > logits.max(-1).values - 3e-3).all()
    state.set(temperature=1e30, seed=1)
    tokens = torch.cat([sample(logits, state, penalty=False) for _ in range(300)])
    assert_distributed(tokens // 1187, np.full(128, 1 / 128))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [7, 1000, 151936])
def test_repetition_penalty(vocab_size, dtype):
    """Greedy choice, with what was chosen before and the prompts seen."""
    logits = torch.randn(5, vocab_size, device="cuda").to(dtype)
    prompts = [torch.randint(-2, vocab_size + 2, (n,)) for n in (3, 0, 1000, 17, 1)]
    state = sampling_state(8, vocab_size, "cuda")
    state.set(repetition_penalty=1.7)
    ends = torch.tensor([0, *np.cumsum([len(p) for p in prompts])], dtype=torch.int32, device="cuda")
    mark_seen(torch.cat(prompts).int().cuda(), ends, state)
    seen = torch.zeros(5, vocab_size, dtype=torch.bool)
    for row, prompt in zip(seen, prompts, strict=True):
        row[prompt[(prompt >= 0) & (prompt < vocab_size)]] = True
    for _ in range(6):
        wide = logits.float().cpu()
        penalised = torch.where(seen, torch.where(wide > 0, wide / 1.7, wide * 1.7), wide)
        tokens = sample(logits, state, greedy=True).cpu().long()
        assert torch.equal(penalised.gather(1, tokens[:, None])[:, 0], penalised.max(-1).values)
        seen[torch.arange(5), tokens] = True
    words = state.seen[:5].cpu().numpy().view(np.uint8)
    assert (np.unpackbits(words, axis=1, bitorder="little")[:, :vocab_size] == seen.numpy()).all()
    assert not state.seen[5:].any()


@pytest.mark.parametrize("options", [{}, {"top_k": 40}, {"top_p": 0.9}], ids=str)
def test_a_seed_repeats_whatever_else_is_in_the_batch(options):
    logits = torch.randn(70, 151936, device="cuda").half()
    state = sampling_state(70, 151936, "cuda")

    def draw(count: int, seed: int) -> torch.Tensor:
        state.set(seed=seed, **options)
        return torch.stack([sample(logits[:count], state, penalty=False) for _ in range(4)])

    first = draw(70, 9)
    assert torch.equal(first, draw(70, 9))
    assert not torch.equal(first, draw(70, 10))
    assert not torch.equal(first[0], first[1])
    for count in (1, 2, 17, 33, 65):
        assert torch.equal(draw(count, 9), first[:, :count])


def test_in_a_graph():
    """Settings and step are in device memory: one graph for all requests. Past lengths grow with each."""
    logits = torch.randn(3, 151936, device="cuda").half()
    state = sampling_state(4, 151936, "cuda")
    past = torch.tensor([5, 0, 100], dtype=torch.int32, device="cuda")
    out = torch.full((3,), -7, dtype=torch.int32, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        sample(logits, state, past_lengths=past, out=out)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            sample(logits, state, past_lengths=past, out=out)
    torch.cuda.synchronize()
    for options in ({"seed": 3}, {"seed": 3, "top_k": 9}, {"temperature": 0.5, "top_p": 0.5, "step": 2**40}):
        state.set(**options)
        expected = [sample(logits, state, penalty=False).tolist() for _ in range(5)]
        state.set(**options)
        replayed = []
        for _ in range(5):
            out.fill_(-7)
            graph.replay()
            replayed.append(out.tolist())
        assert replayed == expected
        assert int(state.settings[24:].view(torch.int64)) == options.get("step", 0) + 5
    assert past.tolist() == [21, 16, 116]
    assert not state.semaphores.any()


def test_infinities():
    logits = torch.full((DRAWS, 300), -math.inf, device="cuda").half()
    state = sampling_state(DRAWS, 300, "cuda")
    for options in ({}, {"top_k": 5}, {"top_p": 0.5}, {"temperature": 1e-4}):
        state.set(**options)
        assert (sample(logits, state) == NO_TOKEN).all()
        some = logits.clone()
        some[:, [7, 200]] = 3.0
        state.set(**options)
        expected = {7} if options.get("top_p") else {7, 200}
        assert set(sample(some, state).tolist()) == expected


def test_errors():
    logits = torch.randn(3, 50, device="cuda")
    state = sampling_state(2, 50, "cuda")
    with pytest.raises(ValueError, match=r"up to 2, 50.*\[3, 50\]"):
        sample(logits, state)
    with pytest.raises(ValueError, match="must be on an NVIDIA GPU"):
        sample(logits.cpu(), state)
    with pytest.raises(TypeError, match="logits must be float16, bfloat16 or float32, not float64"):
        sample(logits[:2].double(), state)
    with pytest.raises(TypeError, match="past_lengths must be int32, not float32"):
        sample(logits[:2], state, past_lengths=torch.zeros(2, device="cuda"))
    with pytest.raises(ValueError, match=r"input_ids must have the shape \(2,\), not \(3,\)"):
        sample(logits[:2], state, input_ids=torch.zeros(3, dtype=torch.int32, device="cuda"))
    with pytest.raises(ValueError, match="must be contiguous"):
        sample(torch.randn(50, 2, device="cuda").T, state)
    with pytest.raises(TypeError, match=r"tokens must be a torch\.Tensor, not int"):
        mark_seen(3, torch.zeros(2, dtype=torch.int32, device="cuda"), state)
    with pytest.raises(ValueError, match=r"cu_seqlens must have the shape \(1,\), not \(\)"):
        mark_seen(torch.zeros(2).int().cuda(), torch.zeros((), dtype=torch.int32, device="cuda"), state)
    with pytest.raises(ValueError, match="vocab_size"):
        sampling_state(1, 2**24, "cuda")
    with pytest.raises(ValueError, match="NVIDIA GPU"):
        sampling_state(1, 50, "cpu")
