"""The operands that KernelOperations passes: with the launchers on a CPU, it computes what PyTorch does."""

import dataclasses
import types

import numpy as np
import pytest
import torch

from qwen_model.backends.torch import kernel_operations
from qwen_model.backends.torch.eight_bit import QuantizedTensor
from qwen_model.backends.torch.operations import Step, TorchOperations
from qwen_model.backends.torch.paged_cache import PagedCache
from qwen_model.checkpoints.weights import network_modules
from tests.qwen_model.backends.test_eight_bit import random_module
from tests.qwen_model.eight_bit_networks import SCHEMES
from tests.qwen_model.small_config import small_config
from tests.stand_ins import cpu_launch

CONFIG = small_config(qkv_bias=True, tied_embedding=True)


@pytest.fixture(autouse=True)
def launchers_on_the_cpu(monkeypatch):
    monkeypatch.setattr(kernel_operations, "launch", cpu_launch)
    stream = types.SimpleNamespace(cuda_stream=cpu_launch.STREAM)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(kernel_operations, "kernel_format", cpu_launch.kernel_format)


def step_of(
    lengths: list[int], past_lengths: list[int], query_scale: torch.Tensor | None, num_decoding: int = 0
) -> Step:
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
        num_decoding,
        torch.tensor(np.cumsum([0, *lengths[num_decoding:]]), dtype=torch.int32) if num_decoding else None,
    )


def run(operations: TorchOperations, step: Step) -> list[torch.Tensor]:
    """The second decoder layer, the choice of the last tokens and the head; everything that they compute."""
    tokens = sum(step.lengths)
    operations.begin(step)
    x = operations.embedding((torch.arange(tokens) * 7 % 50).int(), "embedding")
    first, residual = operations.norm(x, "layers.1.input_norm", into=("layers.1.attention.qkv",))
    qkv = operations.linear(first, "layers.1.attention.qkv")
    context = operations.attention(qkv, 1, into=("layers.1.attention.output",))
    last, last_residual = operations.last_token(context, residual)
    attended = operations.linear(context, "layers.1.attention.output", reduce=True)
    y, residual = operations.norm(attended, "layers.1.post_attention_norm", residual, into=("layers.1.mlp.gate_up",))
    gated = operations.linear(y, "layers.1.mlp.gate_up", activation="swiglu", into=("layers.1.mlp.down",))
    x = operations.linear(gated, "layers.1.mlp.down", reduce=True)
    normed, _ = operations.norm(x, "final_norm", residual, into=("lm_head",))
    logits = operations.linear(normed, "lm_head")
    results = [first, qkv, context, last, last_residual, y, gated, x, residual, normed, logits]
    return [each.codes.float() * each.scales if isinstance(each, QuantizedTensor) else each for each in results]


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

    steps = (
        ([60, 1, 70], [0, 0, 0]),
        ([1, 1, 1], [60, 1, 70]),
        ([5, 9, 2], [61, 2, 71]),
        ([1, 1, 1], [66, 11, 73]),
        ([1, 3, 8], [67, 12, 74], 1),
        ([1, 1, 9], [68, 15, 82], 2),
    )
    for lengths, past_lengths, *num_decoding in steps:
        step = step_of(lengths, past_lengths, query_scale, *num_decoding)
        for actual, expected in zip(run(kernels, step), run(plain, step), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(caches[1].data, caches[0].data, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "disabled", [(), ("rms_norm",), ("gemm",), ("rotary",), ("rms_norm", "gemm", "rotary")], ids=str
)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("left", ["", "layers.1.mlp.gate_up", "layers.1.mlp.down"], ids=lambda left: left or "all")
def test_operations_with_quantized_x_are_those_of_pytorch(disabled, scheme, left):
    """left: a linear layer that is not quantized, whose neighbours are."""
    generator = torch.Generator().manual_seed(2)
    modules = {}
    for name, module in network_modules(CONFIG, "float32").items():
        modules[name] = module.map(lambda spec: torch.randn(spec.shape, generator=generator) * 0.3)
        if name.startswith("layers.1.") and len(module.shape) == 2 and name != left:
            modules[name] = random_module(scheme, *module.shape, generator)
            modules[name].scales.mul_(0.3 * 0.02 * (1 if scheme.kind == "int8" else 0.7))
    caches = [PagedCache(CONFIG, 8, torch.float32, "auto", torch.device("cpu")) for _ in range(2)]
    plain = TorchOperations(CONFIG, modules, caches[0], ("rms_norm",))
    kernels = kernel_operations.KernelOperations(CONFIG, modules, caches[1], disabled, max_sequences=3)

    for lengths, past_lengths, num_decoding in (
        ([5, 1, 9], [0, 0, 0], 0),
        ([1, 1, 1], [5, 1, 9], 0),
        ([1, 1, 4], [6, 2, 10], 2),
    ):
        step = step_of(lengths, past_lengths, None, num_decoding)
        for actual, expected in zip(run(kernels, step), run(plain, step), strict=True):
            assert float((actual - expected).square().mean().sqrt()) < 0.01 * float(expected.square().mean().sqrt())
