"""Plain PyTorch attention beside float64: what the kernels are compared with must itself be right."""

import dataclasses

import pytest
import torch

from qwen_model.backends.torch.operations import Step, TorchOperations
from qwen_model.backends.torch.paged_cache import PagedCache
from qwen_model.checkpoints.config import ModelConfig
from qwen_model.checkpoints.module_weights import ModuleWeights, WeightFormat
from qwen_model.checkpoints.rotary_config import RotaryConfig
from tests.qwen_plugins.decoder_reference import Case, relative_error

MAX_POSITIONS = 128  # of two pages


def operations_of(case: Case, kind: str) -> TorchOperations:
    config = ModelConfig(
        architecture="Qwen2ForCausalLM",
        vocab_size=1,
        hidden_size=case.num_heads * case.head_size,
        intermediate_size=1,
        num_layers=1,
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        head_size=case.head_size,
        max_positions=case.max_positions,
        norm_eps=case.norm_eps,
        rotary=RotaryConfig(dim=case.rotary_dim),
    )
    norms = {"q_norm": case.q_norm, "k_norm": case.k_norm} if case.qk_norm else {}
    modules = {f"layers.0.attention.{name}": ModuleWeights(w, WeightFormat("float32")) for name, w in norms.items()}
    sequences = len(case.past_lengths)
    cache = PagedCache(config, 2 * sequences + 1, torch.float32, kind, torch.device("cpu"))
    operations = TorchOperations(config, modules, cache, ["rms_norm"])
    operations.step = Step(
        case.new_tokens,
        case.past_lengths,
        case.cu_seqlens,
        torch.tensor(case.past_lengths, dtype=torch.int32),
        torch.randperm(2 * sequences, generator=torch.Generator().manual_seed(1)).int().view(sequences, 2) + 1,
        case.rotary_table,
        case.rotary_offsets,
        case.query_scale,
        torch.zeros(1, dtype=torch.int32),
        all(new == 1 for new in case.new_tokens),
    )
    for sequence, past in enumerate(case.past_lengths):
        positions = torch.arange(past)
        pages = operations.step.pages[sequence, positions // 64]
        k, v = case.cache[sequence, :, :, :past].transpose(1, 2)
        cache.write(0, k, v, pages, positions % 64)
    return operations


@pytest.mark.parametrize("heads", [(6, 6), (6, 2), (5, 1)])
@pytest.mark.parametrize(
    "lengths",
    [([0, 0, 0, 0], [5, 5, 1, 70]), ([1, 80, 7], [1, 1, 1]), ([9, 9], [1, 1]), ([0, 60, 64, 3], [8, 7, 1, 1])],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"logn": True}, {"rotary_dim": 10}], ids=str)
@pytest.mark.parametrize("kind", ["auto", "int8", "fp8"])
def test_attention(heads, lengths, options, kind):
    """With 8 bits: that of the numbers that the cache then has; those are within half a step of the exact ones."""
    sizes = {"head_size": 18, "rotary_dim": 18, **options}
    case = Case(*heads, **sizes, dtype=torch.float32, past_lengths=lengths[0], new_tokens=lengths[1], max_positions=128)
    operations = operations_of(case, kind)
    context = operations.attention(case.qkv, 0)
    expected, exact = case.reference()
    cached = operations.cache.read(0, operations.step.pages)
    largest_error = 0.0
    for sequence, (past, new) in enumerate(zip(*lengths, strict=True)):
        found, wanted = cached[sequence, :, :, : past + new].double(), exact[sequence, :, :, : past + new]
        # Half of 1 / 127; half of the step of fp8 between 256 and 448, of 448.
        largest_error = max(largest_error, float(((found - wanted).abs() / wanted.abs().amax(-1, keepdim=True)).max()))
    assert largest_error < {"auto": 1e-6, "int8": 0.5 / 127 + 1e-6, "fp8": 16 / 448 + 1e-6}[kind]
    if kind == "auto":
        assert relative_error(context, expected) < 2e-6
        return
    assert largest_error > 1e-3
    of_codes = dataclasses.replace(case)
    of_codes._prepared = lambda: (case._prepared()[0], *_new_tokens(case, cached))  # type: ignore[method-assign]
    of_codes.cache = cached
    assert relative_error(context, of_codes.reference()[0]) < 2e-6


def _new_tokens(case: Case, cached: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Keys and values of the new tokens as the cache has them: [tokens, kv_heads, head_size] each."""
    k, v = cached.unbind(1)
    return tuple(part[case.sequences, :, case.positions].double() for part in (k, v))
