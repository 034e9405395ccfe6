"""The operands that KernelOperations passes: with the launchers on a CPU, it computes what PyTorch does."""

import dataclasses
import types

import pytest
import torch

from qwen_model.backends.torch import kernel_operations
from qwen_model.backends.torch.operations import Batch, TorchOperations
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


def batch_of(lengths: list[int], past_lengths: list[int], query_scale: torch.Tensor | None) -> Batch:
    angles = torch.rand(40, CONFIG.rotary.dim // 2, generator=torch.Generator().manual_seed(1)) * 6
    return Batch(
        lengths,
        past_lengths,
        torch.cat([angles.cos(), angles.sin()], -1),
        torch.tensor([20, 3, 0], dtype=torch.int32),
        query_scale,
        torch.tensor(past_lengths, dtype=torch.int32),
        decoding=any(past_lengths),
    )


def run(operations: TorchOperations, batch: Batch) -> list[torch.Tensor]:
    """The second decoder layer, the choice of the last tokens and the head; everything that they compute."""
    tokens = sum(batch.lengths)
    operations.begin(batch)
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
    query_scale = 1 + torch.rand(40, generator=generator) if scaled else None
    caches = [torch.zeros(CONFIG.num_layers, 4, 2, CONFIG.num_kv_heads, 16, CONFIG.head_size) for _ in range(2)]
    plain = TorchOperations(config, modules, caches[0], ("rms_norm",))
    kernels = kernel_operations.KernelOperations(config, modules, caches[1], disabled)

    for batch in (batch_of([5, 1, 3], [0, 0, 0], query_scale), batch_of([1, 1, 1], [5, 1, 3], query_scale)):
        for actual, expected in zip(run(kernels, batch), run(plain, batch), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(caches[1], caches[0], rtol=1e-4, atol=1e-4)
