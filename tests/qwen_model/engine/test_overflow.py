"""Logits that are not finite: the torch back end on a CPU, and the TensorRT back end on stand-ins."""

import numpy as np
import pytest
import torch

import qwen_model
from qwen_model import QwenModelError, SamplingOptions
from qwen_model.backends.torch.sampling import TorchSampler
from qwen_model.engine.beam_search import beam_search
from qwen_model.interface.executor import NO_TOKEN
from tests import stand_ins
from tests.qwen_model.overflow_checks import (
    CHOICES,
    LIMITS,
    check_that_overflow_is_an_error,
    check_that_there_is_room,
    save_overflowing_model,
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_overflowing_model(tmp_path_factory.mktemp("overflow") / "model")


def load(model_dir, folder, dtype, backend):
    qwen_model.build_engine(model_dir, output_dir=folder, dtype=dtype, backend=backend, **LIMITS)
    return qwen_model.load_engine(folder, device="cpu" if backend == "torch" else None)


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_overflow_is_an_error(model_dir, tmp_path, runs_ahead):
    session = load(model_dir, tmp_path / "engine", "float16", "torch")
    session.executor.runs_ahead = runs_ahead
    check_that_overflow_is_an_error(session)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_types_have_room(model_dir, tmp_path, dtype):
    check_that_there_is_room(load(model_dir, tmp_path / "engine", dtype, "torch"))


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("version", ["8.6.0", "11.1.0"])
def test_overflow_in_tensorrt(model_dir, tmp_path, monkeypatch, version):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with stand_ins.installed(version):
        check_that_overflow_is_an_error(load(model_dir, tmp_path / "float16", "float16", "tensorrt"))
        check_that_there_is_room(load(model_dir, tmp_path / "float32", "float32", "tensorrt"))


def test_damaged_weights_in_a_type_that_has_room(model_dir, tmp_path):
    session = load(model_dir, tmp_path / "engine", "float32", "torch")
    session.executor.operations.modules["lm_head"].weight[7] = torch.nan
    with pytest.raises(QwenModelError, match=r"logits of the prompt .*float32.*weights may be damaged"):
        session.generate([1, 2], max_new_tokens=3)


END = 30


class BeamExecutor:
    """Gives beam candidates without a model: of two prompts the first ends at once, and `bad` is NaN after that."""

    def __init__(self, bad):
        self.bad = bad
        self.step = 0

    def begin_beams(self, prompts, num_beams):
        pass

    def decode_beams(self, rows, tokens):
        pass

    def beam_candidates(self, scores, count):
        self.step += 1
        sums = np.tile(np.array([-1.0, -1.5] + [-60.0] * (count - 2), np.float32) * self.step, (2, 1))
        if self.step > 1:
            sums[self.bad] = np.nan
        beams, tokens = np.tile(np.arange(count) % 2, (2, 1)), np.tile(np.arange(count), (2, 1))
        tokens[0, :2] = END
        return sums, beams, tokens


@pytest.mark.parametrize("bad", [0, 1])
def test_beams_of_a_prompt_that_is_done_may_overflow(bad):
    def search():
        return beam_search(
            BeamExecutor(bad), [[1], [2]], 2, 4, frozenset([END]), lambda index: QwenModelError(f"bad prompt {index}")
        )

    if bad == 0:
        first, second = search()
        assert [beam.tokens for beam in first] == [[END], [END]]
        assert [beam.tokens for beam in second] == [[0, 0, 0, 0], [1, 1, 1, 1]]
    else:
        with pytest.raises(QwenModelError, match="bad prompt 1"):
            search()


NOT_FINITE = {"nan": [torch.nan], "inf": [torch.inf], "both": [torch.nan, torch.inf], "all -inf": [-torch.inf] * 40}


@pytest.mark.parametrize("options", CHOICES, ids=str)
@pytest.mark.parametrize("values", NOT_FINITE.values(), ids=NOT_FINITE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_sampler(dtype, values, options):
    """Rows that are not finite get no token; in others a few may be -infinity."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(9, 40, generator=generator).to(dtype)
    logits[3:, :5] = -torch.inf

    def choose(rows):
        sampler = TorchSampler(SamplingOptions(**options), [[0, 7, 39]] * 9, 40, torch.device("cpu"))
        return [sampler(rows).tolist() for _ in range(3)]

    expected = choose(logits)
    damaged = logits.clone()
    for row, place in ((0, 0), (2, 11), (4, 40 - len(values)), (7, 0)):
        place = min(place, 40 - len(values))
        damaged[row, place : place + len(values)] = torch.tensor(values, dtype=dtype)
    for tokens, found in zip(expected, choose(damaged), strict=True):
        assert NO_TOKEN not in tokens
        assert not set(tokens[3:]) & set(range(5))
        assert found == [NO_TOKEN if row in (0, 2, 4, 7) else token for row, token in enumerate(tokens)]
