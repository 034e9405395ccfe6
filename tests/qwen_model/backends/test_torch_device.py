"""The torch Device on a CPU: steps over pages give what transformers, and plain writings of other models, do."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

import qwen_model
from qwen_model.backends.torch.back_end import load_device, load_probe
from qwen_model.interface.engine_config import EngineConfig
from qwen_model.interface.sampling import SamplingOptions
from tests.qwen_model.backends.device_runs import (
    Running,
    batch_of,
    generate,
    prompt_logits,
    run_chunks,
    run_decoding,
    run_mixed,
)
from tests.qwen_model.model_files import (
    decicoder,
    hugging_face_model,
    qwen_v1,
    random_prompt,
    save_hugging_face,
    save_reference,
)

NEW_TOKENS = 20
ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
HUGGING_FACE = {
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "llama": ("LlamaForCausalLM", {}),
    "llama-dynamic": ("LlamaForCausalLM", {"rope_parameters": ROPE, "max_position_embeddings": 48}),
}
PUBLISHED = {"qwen-v1": qwen_v1, "decicoder": decicoder}
# Trained lengths are 48 and 64; a page has 64 positions.
PROMPTS = [random_prompt(length, seed=length) for length in (70, 1, 131, 33)]


class Reference:
    """Say what a model's logits and greedy tokens are."""

    def __init__(self, model):
        self._model = model
        self._hugging_face = hasattr(model, "generate")

    @functools.cache  # noqa: B019 (it lives as long as the module's tests)
    def logits(self, prompt):
        with torch.no_grad():
            if not self._hugging_face:
                return self._model(list(prompt)).numpy()
            self._model(torch.tensor([[0]]))  # with dynamic NTK it keeps the longest length until it sees a short one
            return self._model(torch.tensor([prompt])).logits[0].numpy()

    @functools.cache  # noqa: B019
    def tokens(self, prompt):
        with torch.no_grad():
            if self._hugging_face:
                self._model(torch.tensor([[0]]))
                ids = torch.tensor([prompt])
                return self._model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(prompt) :].tolist()
            ids = list(prompt)
            for _ in range(NEW_TOKENS):
                ids.append(int(self._model(ids, prompt_length=len(prompt))[-1].argmax()))
            return ids[len(prompt) :]


@pytest.fixture(scope="module", params=[*HUGGING_FACE, *PUBLISHED])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param in HUGGING_FACE:
        architecture, changes = HUGGING_FACE[request.param]
        model = hugging_face_model(architecture, **changes)
        save_hugging_face(model, folder / "model")
    else:
        model, config = PUBLISHED[request.param]()
        save_reference(model, config, folder / "model")
    limits = {"max_batch_size": 5, "max_input_len": 160, "max_output_len": 40}
    qwen_model.build_engine(folder / "model", output_dir=folder / "engine", dtype="float32", **limits)
    return Reference(model), load_device(folder / "engine", EngineConfig.read(folder / "engine"), "cpu")


def sequences_of(prompts, first_page=1):
    """Pages one after the other, a slot each from the last one down."""
    found, page = [], first_page
    for index, prompt in enumerate(prompts):
        count = -(-(len(prompt) + NEW_TOKENS) // 64)
        found.append(Running(prompt, 4 - index, list(range(page, page + count))))
        page += count
    return found


def error_of(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("chunk", [1, 7, 64, 65, 1000])
def test_chunks_of_every_size(pair, chunk):
    """Mixed lengths and pasts in one step, then decode steps, in which the host does not know the tokens."""
    reference, device = pair
    outputs = generate(device, sequences_of(PROMPTS), NEW_TOKENS, chunk)
    assert outputs == [reference.tokens(tuple(prompt)) for prompt in PROMPTS]


@pytest.mark.parametrize("chunk", [1, 50, 1000])
def test_logits_of_rows(pair, chunk):
    reference, device = pair
    prompt = PROMPTS[2]
    found = prompt_logits(device, prompt, [7, 2, 5], chunk=chunk)
    assert error_of(found, reference.logits(tuple(prompt))) < 1e-4
    only = batch_of([Running(PROMPTS[0], 0, [1, 9]).chunk(1000), Running(prompt, 1, [3, 8, 4]).chunk(1000)])
    rows = np.array([200, 3, 69, 70], np.int32)
    both = np.concatenate([reference.logits(tuple(PROMPTS[0])), reference.logits(tuple(prompt))])
    assert error_of(device.logits(only, rows), both[rows]) < 1e-4


def test_pages_in_any_order(pair):
    reference, device = pair
    prompt = PROMPTS[2]
    for pages in ([1, 2, 3], [20, 1, 11], [3, 2, 1]):
        assert generate(device, [Running(prompt, 2, pages)], NEW_TOKENS, 48) == [reference.tokens(tuple(prompt))]


def test_shared_pages(pair):
    """Two sequences read the first page of one prompt, each in its own slot; a chunk after it is all that is run."""
    reference, device = pair
    prompt = PROMPTS[2]
    model = getattr(device.config, "model", device.config)
    if "dynamic" in model.rotary.scaling:
        pytest.skip("keys depend on the prompt's length, which is another for each of these prompts")
    other = [*prompt[:64], *random_prompt(30, seed=5)]
    first, second = Running(prompt, 0, [1, 2, 3]), Running(other, 1, [1, 4], past=64)
    device.start([first.start(), second.start()])
    run_chunks(device, [first], 1000)
    run_chunks(device, [second], 1000)
    run_decoding(device, [first, second], NEW_TOKENS - 1)
    assert [first.output, second.output] == [reference.tokens(tuple(each)) for each in (prompt, other)]


def test_copied_pages(pair):
    """A fork continues with a copy of the page that both would write to."""
    reference, device = pair
    prompt = PROMPTS[0]
    first = Running(prompt, 0, [1, 2])
    device.start([first.start()])
    run_chunks(device, [first], 1000)
    device.copy_pages([(2, 6), (1, 9)])
    fork = Running(prompt, 3, [9, 6], past=first.past, output=list(first.output))
    device.start([fork.start()])
    device.forward(batch_of([first.decode(), fork.chunk(1)]))  # the fork's token is given, the other's is not
    tokens = device.choose().wait().tokens.tolist()
    assert tokens == reference.tokens(tuple(prompt))[1:2] * 2
    for sequence in (first, fork):
        sequence.output.append(tokens[0])
    run_decoding(device, [fork], NEW_TOKENS - 2)
    device.copy_pages([])
    run_decoding(device, [first], NEW_TOKENS - 2)
    assert first.output == fork.output == reference.tokens(tuple(prompt))


def test_slots_and_pages_are_reused(pair):
    reference, device = pair
    device.cache.data.fill_(torch.nan)  # as a request leaves it whose activations overflow
    expected = [reference.tokens(tuple(prompt)) for prompt in PROMPTS]
    for turn in range(3):
        order = PROMPTS[turn:] + PROMPTS[:turn]
        outputs = generate(device, sequences_of(order), NEW_TOKENS, 100)
        assert outputs == expected[turn:] + expected[:turn]
    device.cache.data.zero_()


def test_a_sequence_comes_back_with_its_output(pair):
    """After its pages were taken, prompt and output are run again, in chunks of any size, and it goes on."""
    reference, device = pair
    for chunk in (1000, 40, 1):
        for prompt in (PROMPTS[0], PROMPTS[3]):
            said = reference.tokens(tuple(prompt))
            back = Running(prompt, 1, [5, 3], output=said[:11])
            device.start([back.start()])
            run_chunks(device, [back], chunk)
            run_decoding(device, [back], NEW_TOKENS - 12)
            assert back.output == said


def test_prompts_join_while_others_decode(pair):
    """Prompt chunks and decode steps take turns."""
    reference, device = pair
    running = sequences_of(PROMPTS)
    device.start([sequence.start() for sequence in running[:2]])
    run_chunks(device, running[:2], 1000)
    device.start([sequence.start() for sequence in running[2:]])
    while any(sequence.has_chunks for sequence in running[2:]):
        left = [sequence for sequence in running[2:] if sequence.has_chunks]
        batch = batch_of([sequence.chunk(30) for sequence in left])
        device.forward(batch)
        if batch.chooses.any():
            for sequence, token in zip(
                [left[i] for i in np.flatnonzero(batch.chooses)], device.choose().wait().tokens, strict=True
            ):
                sequence.output.append(int(token))
        run_decoding(device, running[:2], 1)
    for sequence in running:
        run_decoding(device, [sequence], NEW_TOKENS - len(sequence.output))
        assert sequence.output == reference.tokens(tuple(sequence.prompt))


@pytest.mark.parametrize("chunk", [5, 30, 1000])
def test_prompts_and_decode_tokens_in_one_step(pair, chunk):
    reference, device = pair
    running = sequences_of([PROMPTS[3], PROMPTS[1], PROMPTS[0][:20], PROMPTS[0]])
    device.start([sequence.start() for sequence in running])
    run_chunks(device, running[:2], 1000)
    run_mixed(device, running[:2], running[2:], chunk)
    for sequence in running:
        assert len(sequence.output) <= NEW_TOKENS
        run_decoding(device, [sequence], NEW_TOKENS - len(sequence.output))
        assert sequence.output == reference.tokens(tuple(sequence.prompt))


def test_log_probabilities_and_masks(pair):
    reference, device = pair
    prompt = PROMPTS[3]
    sequence = Running(prompt, 2, [1])
    device.start([sequence.start()])
    device.forward(batch_of([sequence.chunk(1000)]))
    expected = torch.from_numpy(reference.logits(tuple(prompt))[-1]).log_softmax(-1)
    best = expected.topk(3)
    mask = np.full(10, 0xFFFFFFFF, np.uint32)
    mask[int(best.indices[0]) // 32] ^= np.uint32(1 << int(best.indices[0]) % 32)
    chosen = device.choose({2: mask}, num_best=3).wait()
    assert chosen.tokens.tolist() == [int(best.indices[1])]
    assert chosen.best_tokens.tolist() == [best.indices.tolist()]
    np.testing.assert_allclose(chosen.logprobs, [best.values[1]], rtol=1e-3)
    np.testing.assert_allclose(chosen.best_logprobs, [best.values], rtol=1e-3)


def test_sampling_does_not_depend_on_the_company(pair):
    _, device = pair
    options = SamplingOptions(temperature=1.0, seed=7)

    def of(slot, pages):
        return Running(PROMPTS[3], slot, pages, options)

    alone = generate(device, [of(0, [1])], NEW_TOKENS)[0]
    company = [Running(PROMPTS[2], 1, [5, 6, 7], SamplingOptions(temperature=2.0, seed=1)), of(3, [2])]
    assert generate(device, company, NEW_TOKENS)[1] == alone


def test_a_probe_runs_prompts_as_long_as_a_step(model_dir, tmp_path):
    """All their logits are seen, more than the rows that a step otherwise computes."""
    limits = {"max_batch_size": 1, "max_input_len": 600, "max_output_len": 8}
    qwen_model.build_engine(model_dir, output_dir=tmp_path / "engine", dtype="float32", **limits)
    config = EngineConfig.read(tmp_path / "engine")
    prompt = random_prompt(config.limits.step_tokens)
    probe, device = (load(tmp_path / "engine", config, "cpu") for load in (load_probe, load_device))
    pages = list(range(1, 11))
    for tokens, past in ((prompt, 0), ([5], len(prompt))):
        found = probe.run(tokens, past)["lm_head"]
        expected = prompt_logits(device, [*prompt[:past], *tokens], pages, chunk=200)[past:]
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
