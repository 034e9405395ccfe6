"""The operands that KernelOperations passes: with the launchers on a CPU, it computes what PyTorch does."""

import dataclasses
import types

import numpy as np
import pytest
import torch

from qwen_model.backends.torch import kernel_operations
from qwen_model.backends.torch.operations import Step, TorchOperations
from qwen_model.backends.torch.paged_cache import PagedCache
from qwen_model.checkpoints.config import ModelConfig, RotaryConfig
from qwen_model.checkpoints.weights import network_modules
from tests.stand_ins import cpu_launch

CONFIG = ModelConfig(
    architecture="Qwen2ForCausalLM",
    vocab_size=50,
    hidden_size=48,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=32,
    max_positions=16,
    norm_eps=1e-5,
    rotary=RotaryConfig(dim=24),
    qkv_bias=True,
    tied_embedding=True,
)


@pytest.fixture(autouse=True)
def launchers_on_the_cpu(monkeypatch):
    monkeypatch.setattr(kernel_operations, "launch", cpu_launch)
    stream = types.SimpleNamespace(cuda_stream=cpu_launch.STREAM)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)


def step_of(lengths: list[int], past_lengths: list[int], query_scale: torch.Tensor | None) -> Step:
    """Of three sequences whose pages are not in order; the rows of logits are those of decode steps, or any two."""
    angles = torch.rand(300, CONFIG.rotary.dim // 2, generator=torch.Generator().manual_seed(1)) * 6
    decoding = lengths == [1, 1, 1]
    return Step(
        lengths,
        past_lengths,
        torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32),
        torch.tensor(past_lengths, dtype=torch.int32),
        torch.tensor([[5, 2], [7, 0], [3, 1]], dtype=torch.int32),
        torch.cat([angles.cos(), angles.sin()], -1),
        torch.tensor([20, 3, 0], dtype=torch.int32),
        query_scale,
        torch.arange(3, dtype=torch.int32) if decoding else torch.tensor([1, sum(lengths) - 1], dtype=torch.int32),
        decoding,
    )


def run(operations: TorchOperations, step: Step) -> list[torch.Tensor]:
    """The second decoder layer, the choice of the last tokens and the head; everything that they compute."""
    tokens = sum(step.lengths)
    operations.begin(step)
    x = operations.embedding((torch.arange(tokens) * 7 % 50).int(), "embedding")
    y, residual = operations.norm(x, "layers.1.input_norm")
    qkv = operations.linear(y, "layers.1.attention.qkv")
    context = operations.attention(qkv, 1)
    attended = operations.linear(context, "layers.1.attention.output", reduce=True)
    y, residual = operations.norm(attended, "layers.1.post_attention_norm", residual)
    gated = operations.linear(y, "layers.1.mlp.gate_up", activation="swiglu")
    x = operations.linear(gated, "layers.1.mlp.down", reduce=True)
    last, last_residual = operations.last_token(x, residual)
    return [qkv, context, gated, x, residual, last, last_residual, operations.linear(last, "lm_head")]


@pytest.mark.parametrize(
    "disabled", [(), ("rms_norm",), ("gemm",), ("rotary",), ("rms_norm", "gemm", "rotary")], ids=str
)
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_operations_are_those_of_pytorch(disabled, qk_norm, scaled):
    generator = torch.Generator().manual_seed(2)
    config = dataclasses.replace(CONFIG, qk_norm=qk_norm)
    modules = {
        name: module.map(lambda spec: torch.randn(spec.shape, generator=generator) * 0.3)
        for name, module in network_modules(config, "float32").items()
    }
    query_scale = 1 + torch.rand(300, generator=generator) if scaled else None
    caches = [PagedCache(config, 8, torch.float32, "auto", torch.device("cpu")) for _ in range(2)]
    plain = TorchOperations(config, modules, caches[0], ("rms_norm",))
    kernels = kernel_operations.KernelOperations(config, modules, caches[1], disabled, max_sequences=3)

    steps = ([60, 1, 70], [0, 0, 0]), ([1, 1, 1], [60, 1, 70]), ([5, 9, 2], [61, 2, 71]), ([1, 1, 1], [66, 11, 73])
    for lengths, past_lengths in steps:
        step = step_of(lengths, past_lengths, query_scale)
        for actual, expected in zip(run(kernels, step), run(plain, step), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(caches[1].data, caches[0].data, rtol=1e-4, atol=1e-4)
