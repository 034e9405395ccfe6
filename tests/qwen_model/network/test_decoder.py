"""What the network says about its modules: they exist, and each linear layer is named where its input is computed."""

import dataclasses

import pytest

from qwen_model.checkpoints.rotary_config import RotaryConfig
from qwen_model.checkpoints.weights import network_modules
from qwen_model.network.decoder import decoder
from tests.qwen_model.small_config import small_config

CONFIG = small_config(architecture="Qwen3ForCausalLM", rotary=RotaryConfig(dim=32), qkv_bias=True, qk_norm=True)


@dataclasses.dataclass(frozen=True)
class Value:
    """The columns of a tensor, and the linear layers that may read it."""

    columns: int
    into: tuple[str, ...] = ()


class Recorder:
    """Operations that compute shapes, and record modules and the linear layers with a sum over devices."""

    def __init__(self, config):
        self.modules = network_modules(config, "float16")
        self.config = config
        self.used, self.reduced = [], []

    def shape(self, module):
        self.used.append(module)
        return self.modules[module].weight.shape

    def embedding(self, input_ids, module):
        return Value(self.shape(module)[1])

    def norm(self, x, module, residual=None, into=()):
        assert self.shape(module) == (x.columns,)
        return Value(x.columns, into), Value(x.columns)

    def linear(self, x, module, activation=None, into=(), reduce=False):
        assert module in x.into
        rows, columns = self.shape(module)
        assert columns == x.columns
        self.reduced += [module] if reduce else []
        return Value(rows // 2 if activation == "swiglu" else rows, into)

    def attention(self, qkv, layer, into=()):
        config = self.config
        assert qkv.columns == (config.num_heads + 2 * config.num_kv_heads) * config.head_size
        self.used += [f"layers.{layer}.attention.{name}" for name in ("q_norm", "k_norm")]
        return Value(config.num_heads * config.head_size, into)

    def last_token(self, x, residual):
        return x, residual


@pytest.mark.parametrize("tied", [False, True])
def test_modules(tied):
    config = dataclasses.replace(CONFIG, tied_embedding=tied)
    operations = Recorder(config)
    assert decoder(operations, config, "input_ids") == Value(config.vocab_size)
    assert operations.used == [*dict.fromkeys(operations.used)]
    assert set(operations.used) == operations.modules.keys()
    divided = [name for name, module in operations.modules.items() if module.weight.axis == 1]
    assert operations.reduced == divided
    assert (operations.modules["lm_head"] is operations.modules["embedding"]) == tied
