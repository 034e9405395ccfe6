"""Engines that compute with our kernels' operations, the launchers on a CPU: q is not seen, and nothing is off."""

import types

import pytest
import torch

from qwen_model.backends.torch import kernel_operations
from qwen_model.backends.torch.probe import TorchProbe
from qwen_model.evaluation.comparison.compare import compare_probe
from qwen_model.evaluation.comparison.make_reference import make_reference
from tests.qwen_model.evaluation.comparison.models import device_with, save_engine
from tests.qwen_model.model_files import random_prompt
from tests.qwen_model.tensorrt_reference import ARCHITECTURES, save_model
from tests.stand_ins import cpu_launch


@pytest.fixture(autouse=True)
def launchers_on_the_cpu(monkeypatch):
    monkeypatch.setattr(kernel_operations, "launch", cpu_launch)
    monkeypatch.setattr(kernel_operations, "kernel_format", cpu_launch.kernel_format)
    stream = types.SimpleNamespace(cuda_stream=cpu_launch.STREAM)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)


def probe_of(engine_dir):
    return TorchProbe(device_with(engine_dir, kernel_operations.KernelOperations, max_sequences=2))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_is_off(architecture, tmp_path):
    model_dir = save_model(architecture, tmp_path / "model")
    reference = make_reference(model_dir, random_prompt(20), 2, ["float32"])
    probe = probe_of(save_engine(model_dir, tmp_path / "engine", "float32"))
    passes, finding = compare_probe(probe, reference, "float32")
    assert finding is None
    assert "layers.0.attention.k" in passes.isolated[0]
    assert "layers.0.attention.q" not in passes.isolated[0]
