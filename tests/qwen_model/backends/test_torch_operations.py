"""Plain PyTorch attention beside float64: what the kernels are compared with must itself be right."""

import pytest
import torch

from qwen_model.backends.torch.operations import Batch, TorchOperations
from qwen_model.checkpoints.config import ModelConfig
from qwen_model.checkpoints.module_weights import ModuleWeights, WeightFormat
from qwen_model.checkpoints.rotary_config import RotaryConfig
from tests.qwen_plugins.decoder_reference import Case, relative_error


def attend(case: Case) -> torch.Tensor:
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
    # Attention with a mask computes with what is masked out: the executor's cache begins as zeros.
    case.cache = case.cache.nan_to_num(0.0)
    operations = TorchOperations(config, modules, case.cache[None], ["rms_norm"])
    past = torch.tensor(case.past_lengths, dtype=torch.int32)
    operations.batch = Batch(
        case.new_tokens,
        case.past_lengths,
        case.rotary_table,
        case.rotary_offsets,
        case.query_scale,
        past,
        max(case.past_lengths) > 0,
    )
    return operations.attention(case.qkv, 0)


@pytest.mark.parametrize("heads", [(6, 6), (6, 2), (5, 1)])
@pytest.mark.parametrize("lengths", [([0, 0, 0, 0], [5, 5, 1, 17]), ([1, 30, 7], [1, 1, 1]), ([9, 9], [1, 1])])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"logn": True}, {"rotary_dim": 10}], ids=str)
def test_attention(heads, lengths, options):
    case = Case(
        *heads,
        **{"head_size": 18, "rotary_dim": 18, **options},
        dtype=torch.float32,
        past_lengths=lengths[0],
        new_tokens=lengths[1],
        max_positions=40,
    )
    case.cache = case.cache.nan_to_num(0.0)
    expected, cache = case.reference()
    assert relative_error(attend(case), expected) < 2e-6
    assert relative_error(case.cache, cache) < 2e-6
