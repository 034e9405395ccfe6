"""The sampler of the TensorRT back end on kernels in NumPy: what it uploads, beside the float64 reference."""

import dataclasses
import math
import random

import numpy as np
import pytest

from qwen_model import QwenModelError, SamplingOptions
from qwen_model.interface.device import NO_TOKEN, Start
from qwen_model.interface.kernel_sampling import sequence_starts
from tests import stand_ins
from tests.qwen_plugins import sampling_reference as reference

SLOTS, VOCABULARY = 9, 41


class Run:
    """A sampler and the operands of its launches, with the host's arrays in device memory."""

    def __init__(self):
        from qwen_model.backends.tensorrt import cuda_runtime as cuda
        from qwen_model.backends.tensorrt.sampling import SlotSampler

        self.cuda, self.stream = cuda, cuda.Stream()
        self.sampler = SlotSampler(SLOTS, VOCABULARY, "float32", self.stream)

    def uploaded(self, array, dtype):
        array = np.asarray(array, dtype)
        memory = self.cuda.DeviceArray(array.shape, dtype)
        memory.upload(array, self.stream)
        return memory

    def choose(self, logits, slots, masks=None):
        self.sampler.set_masks(masks or {})
        tokens, count = self.cuda.DeviceArray((len(slots),), np.int32), len(slots)
        variant = self.sampler.variant(np.array(slots, np.int32), masked=bool(masks))
        of_rows, rows = self.uploaded(slots, np.int32), self.uploaded(logits, np.float32)
        self.sampler.choose(rows.address, of_rows.address, count, variant, tokens.address)
        return tokens.download(self.stream).tolist()

    def logprobs(self, logits, tokens, num_best):
        count = len(tokens)
        own = self.cuda.DeviceArray((count,), np.float32)
        ids = self.cuda.DeviceArray((count, num_best), np.int32)
        best = self.cuda.DeviceArray((count, num_best), np.float32)
        rows, chosen = self.uploaded(logits, np.float32), self.uploaded(tokens, np.int32)
        results = (own.address, ids.address, best.address)
        self.sampler.logprobs(rows.address, chosen.address, count, num_best, *results)
        return [array.download(self.stream) for array in (own, ids, best)]


@pytest.fixture
def run():
    with stand_ins.installed("10.14.1"):
        yield Run()


def test_greedy_until_a_sequence_starts(run):
    logits = np.random.default_rng(0).normal(size=(3, VOCABULARY))
    assert not run.sampler.variant(np.arange(SLOTS + 1, dtype=np.int32))
    assert run.choose(logits, [4, 0, SLOTS]) == logits.argmax(-1).tolist()


def test_mixtures_of_options(run):
    rng = random.Random(1)
    starts = {}
    for step in range(10):
        new = rng.sample(range(SLOTS), 3)
        for slot in new:
            options = SamplingOptions(
                temperature=rng.choice([None, 0.7]),
                min_p=rng.choice([0.0, 0.2]),
                repetition_penalty=rng.choice([1.0, 1.5]),
                frequency_penalty=rng.choice([0.0, 1.0]),
                logit_bias=rng.choice([{}, {3: 5.0, 1: -2.0}]),
            )
            starts[slot] = Start(slot, options, 0, [1, 2, 2], [3, 3])
        run.sampler.start([starts[slot] for slot in new])
        slots = rng.sample(sorted(starts), len(starts))
        logits = np.random.default_rng(step).normal(size=(len(slots), VOCABULARY)).astype(np.float32) * 2
        masks = {slots[0]: reference.mask_of([5, 9, 40], VOCABULARY)} if step % 2 else {}
        for slot, row, token in zip(slots, logits, run.choose(logits, slots, masks), strict=True):
            (described,) = sequence_starts([starts[slot]], VOCABULARY)
            assert reference.probabilities(row, described, masks.get(slot))[token] > 0
            starts[slot] = dataclasses.replace(starts[slot], output=[*starts[slot].output, token])


def test_a_sequence_that_comes_back_draws_as_if_it_had_stayed(run):
    logits = np.zeros((2, VOCABULARY))
    options = SamplingOptions(temperature=1.0, seed=4)
    run.sampler.start([Start(0, options, 2, [1])])
    stayed = [run.choose(logits[:1], [0])[0] for _ in range(6)]
    run.sampler.start([Start(7, options, 2, [1], stayed[:3])])
    assert [run.choose(logits, [3, 7])[1] for _ in range(3)] == stayed[3:]
    assert len(set(stayed)) > 1


def test_a_mask_that_allows_nothing_and_logits_that_are_not_finite(run):
    logits = np.random.default_rng(0).normal(size=(3, VOCABULARY))
    logits[2, 5] = math.nan
    tokens = run.choose(logits, [0, 1, 2], {0: reference.mask_of([], VOCABULARY)})
    assert tokens == [NO_TOKEN, logits[1].argmax(), NO_TOKEN]
    assert run.choose(logits, [0, 1, 2])[0] == logits[0].argmax()


def test_a_bias_outside_of_the_vocabulary(run):
    with pytest.raises(QwenModelError, match="logit_bias: token 41 is not in the vocabulary of 41 tokens"):
        run.sampler.start([Start(0, SamplingOptions(logit_bias={41: 1.0}), 0, [])])


def test_logprobs(run):
    logits = np.random.default_rng(0).normal(size=(2, VOCABULARY)).astype(np.float32)
    own, ids, best = run.logprobs(logits, [4, NO_TOKEN], 3)
    assert own[0] == pytest.approx(reference.logprobs(logits[0])[4], abs=1e-5)
    assert math.isnan(own[1])
    for row in range(2):
        assert ids[row].tolist() == reference.best_tokens(logits[row], 3).tolist()
        np.testing.assert_allclose(best[row], reference.logprobs(logits[row])[ids[row]], atol=1e-5)
