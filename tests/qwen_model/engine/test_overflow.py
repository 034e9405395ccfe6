"""Logits that are not finite: the torch back end on a CPU, and the TensorRT back end on stand-ins."""

import numpy as np
import pytest
import torch

import qwen_model
from qwen_model import QwenModelError, SamplingOptions
from qwen_model.backends.torch.sampling import TorchSampler
from qwen_model.interface.device import NO_TOKEN, Start
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
    session.device.runs_ahead = runs_ahead
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
    session.device.operations.modules["lm_head"].weight[7] = torch.nan
    with pytest.raises(QwenModelError, match=r"logits of the prompt .*float32.*weights may be damaged"):
        session.generate([1, 2], max_new_tokens=3)


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
        sampler = TorchSampler(9, 40, torch.device("cpu"))
        sampler.start([Start(slot, SamplingOptions(**options), slot, [0, 7, 39]) for slot in range(9)])
        slots = np.arange(9, dtype=np.int32)
        variant = sampler.variant(slots)
        return [sampler.choose(rows, torch.from_numpy(slots), variant).tolist() for _ in range(3)]

    expected = choose(logits)
    damaged = logits.clone()
    for row, place in ((0, 0), (2, 11), (4, 40 - len(values)), (7, 0)):
        place = min(place, 40 - len(values))
        damaged[row, place : place + len(values)] = torch.tensor(values, dtype=dtype)
    for tokens, found in zip(expected, choose(damaged), strict=True):
        assert NO_TOKEN not in tokens
        assert not set(tokens[3:]) & set(range(5))
        assert found == [NO_TOKEN if row in (0, 2, 4, 7) else token for row, token in enumerate(tokens)]
