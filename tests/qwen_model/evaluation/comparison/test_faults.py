"""Every known fault, injected into one layer of an engine's operations: it is found, with its layer and its reason."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from qwen_model.backends.torch.operations import TorchOperations
from qwen_model.backends.torch.probe import TorchProbe
from qwen_model.evaluation.comparison.compare import compare_probe
from qwen_model.evaluation.comparison.make_reference import make_reference
from qwen_model.evaluation.comparison.reference import CheckpointModules
from tests.qwen_model.evaluation.comparison.models import device_with, save_engine, save_model
from tests.qwen_model.model_files import random_prompt

LAYER = 1  # of three
CHANGES = {
    "LlamaForCausalLM": {"attention_bias": True, "mlp_bias": True},
    "Qwen2ForCausalLM": {"num_key_value_heads": 6, "hidden_size": 96, "rms_norm_eps": 1e-5},
}


class Faulty(TorchOperations):
    """The operations that are right; tests replace methods of one layer."""

    def record(self, module, **changes):
        self.modules[module] = dataclasses.replace(self.modules[module], **changes)

    def only_in(self, module, name, function):
        """Call `function` in place of a method if it is called for this module or layer."""
        right = getattr(self, name)

        def called(x, given, *rest, **options):
            return (function if given == module else right)(x, given, *rest, **options)

        setattr(self, name, called)


def rows(module, order):
    """The rows of a weight, and of its bias, in another order."""

    def inject(ops):
        found = ops.modules[module]
        bias = None if found.bias is None else found.bias[order(found.weight, ops.config)]
        ops.record(module, weight=found.weight[order(found.weight, ops.config)], bias=bias)

    return inject


def halves_swapped(weight, config):
    half = len(weight) // 2
    return torch.cat([torch.arange(half, 2 * half), torch.arange(half)])


def halves_alternating(weight, config):
    """What gives right results where rows of gate and up are read in turn."""
    return torch.arange(len(weight)).view(-1, 2).T.flatten()


def sections(*order):
    def rows_of(weight, config):
        kv = config.num_kv_heads * config.head_size
        parts = dict(zip("qkv", torch.arange(len(weight)).split([len(weight) - 2 * kv, kv, kv]), strict=True))
        return torch.cat([parts[name] for name in order])

    return rows_of


def by_kv_head(weight, config):
    kv = config.num_kv_heads * config.head_size
    parts = torch.arange(len(weight)).split([len(weight) - 2 * kv, kv, kv])
    return torch.cat([part.view(config.num_kv_heads, -1) for part in parts], dim=1).flatten()


def transposed(module):
    return lambda ops: ops.record(module, weight=ops.modules[module].weight.T.reshape(ops.modules[module].weight.shape))


def without_bias(module):
    return lambda ops: ops.record(module, bias=None)


def other_weight(module, other):
    return lambda ops: ops.record(module, weight=ops.modules[other].weight, bias=ops.modules[other].bias)


def norm(module, function):
    """`function(ops, x, weight, residual)` in place of a norm."""

    def inject(ops):
        weight = ops.modules[module].weight
        ops.only_in(module, "norm", lambda x, name, residual=None, into=(): function(ops, x, weight, residual))

    return inject


def damaged(module, function):
    """`function(y)` of a linear layer's result."""

    def inject(ops):
        right = ops.linear
        ops.only_in(module, "linear", lambda x, *rest, **options: function(right(x, *rest, **options)))

    return inject


def rounded(module):
    """A product of numbers rounded to 11 bits."""

    def inject(ops):
        weight, bias = ops.modules[module].weight, ops.modules[module].bias

        def linear(x, *rest, **options):
            return F.linear(x.half().float(), weight.half().float(), bias)

        ops.only_in(module, "linear", linear)

    return inject


def normed(ops, h, weight, eps=None):
    return F.rms_norm(h, h.shape[-1:], weight, ops.config.norm_eps if eps is None else eps)


def activation(module, function):
    def inject(ops):
        weights = ops.modules[module]

        def linear(x, name, activation=None, into=(), reduce=False):
            gate, up = F.linear(x, weights.weight, weights.bias).chunk(2, dim=-1)
            return function(gate, up)

        ops.only_in(module, "linear", linear)

    return inject


def heads(function):
    """`function(ops, q, k)` in place of norms of heads and rotary embedding."""

    def inject(ops):
        right = ops.norm_and_rotate

        def norm_and_rotate(q, k, layer):
            return function(ops, q, k, right) if layer == LAYER else right(q, k, layer)

        ops.norm_and_rotate = norm_and_rotate

    return inject


def split(function):
    """`function(ops, q, k, v)` after qkv has been split into heads."""

    def inject(ops):
        attention, split_heads = ops.attention, ops.split_heads

        def attend(qkv, layer, into=()):
            ops.split_heads = (lambda qkv: function(ops, *split_heads(qkv))) if layer == LAYER else split_heads
            return attention(qkv, layer, into)

        ops.attention = attend

    return inject


def rotate(ops, x, table=None, shift=0, interleaved=False, backwards=False):
    table = ops.step.rotary_table if table is None else table
    cos, sin = table[ops.step.rotary_rows + shift].unsqueeze(1).chunk(2, dim=-1)
    sin = -sin if backwards else sin
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return (torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)).to(x.dtype)


def with_base(ops, base):
    from qwen_model.network.rotary import rotary_table

    rotary = dataclasses.replace(ops.config.rotary, base=base)
    return torch.from_numpy(rotary_table(dataclasses.replace(ops.config, rotary=rotary), 64).values)


def restarted(ops, x):
    """Rotate by the positions of a sequence that has no past."""
    if not ops.step.decoding:
        return rotate(ops, x)
    return rotate(ops, x, shift=-int(ops.step.past_lengths[0]))


def attention(function):
    """`function(ops, q, k, v)` in place of attention, [tokens, heads, head_size], with the past's keys and values."""

    def inject(ops):
        right = ops.attention

        def attend(qkv, layer, into=()):
            if layer != LAYER:
                return right(qkv, layer, into)
            right(qkv, layer, into)  # writes the cache
            q, k, v = ops.split_heads(qkv)
            q, _ = ops.norm_and_rotate(q, k, layer)
            length = ops.step.past_lengths[0] + len(q)
            k, v = (cached[:, :length].transpose(0, 1) for cached in ops.cache.read(layer, ops.step.pages)[0])
            return function(ops, q, k, v)

        ops.attention = attend

    return inject


def attended(ops, q, k, v, scale=None, group=None, future=False, itself=True):
    heads, kv_heads = ops.config.num_heads, ops.config.num_kv_heads
    order = torch.arange(heads) // (heads // kv_heads) if group is None else group
    past = len(k) - len(q)
    ages = past + torch.arange(len(q))[:, None] - torch.arange(len(k))
    mask = torch.ones_like(ages, dtype=torch.bool) if future else ages >= (0 if itself else 1)
    q, k, v = q.transpose(0, 1), k[:, order].transpose(0, 1), v[:, order].transpose(0, 1)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).nan_to_num().transpose(0, 1).flatten(1)


NAME = f"layers.{LAYER}"
QKV, OUTPUT = f"{NAME}.attention.qkv", f"{NAME}.attention.output"
GATE_UP, DOWN = f"{NAME}.mlp.gate_up", f"{NAME}.mlp.down"
NORM, NORM_2 = f"{NAME}.input_norm", f"{NAME}.post_attention_norm"
LLAMA, QWEN2, QWEN3, QWEN = "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "QWenLMHeadModel"
FAULTS = {
    "gate and up": (LLAMA, rows(GATE_UP, halves_swapped), GATE_UP, "gate and up were swapped"),
    "gate and up in turn": (LLAMA, rows(GATE_UP, halves_alternating), GATE_UP, "rows of gate and up alternated"),
    "gelu": (LLAMA, activation(GATE_UP, lambda gate, up: F.gelu(gate) * up), GATE_UP, "were gelu, not silu"),
    "relu": (LLAMA, activation(GATE_UP, lambda gate, up: F.relu(gate) * up), GATE_UP, "were relu, not silu"),
    "no silu": (LLAMA, activation(GATE_UP, lambda gate, up: gate * up), GATE_UP, "were none, not silu"),
    "no bias of gate-up": (LLAMA, without_bias(GATE_UP), GATE_UP, "the bias were missing"),
    "no bias of qkv": (LLAMA, without_bias(QKV), QKV, "the bias were missing"),
    "no bias of down": (LLAMA, without_bias(DOWN), DOWN, "the bias were missing"),
    "no bias of output": (LLAMA, without_bias(OUTPUT), OUTPUT, "the bias were missing"),
    "output transposed": (LLAMA, transposed(OUTPUT), OUTPUT, "the weight were transposed"),
    "down transposed": (LLAMA, transposed(DOWN), DOWN, "the weight were transposed"),
    "another layer's weight": (LLAMA, other_weight(DOWN, "layers.2.mlp.down"), DOWN, "that of layers.2.mlp.down"),
    "k, q, v": (QWEN2, rows(QKV, sections("k", "q", "v")), QKV, "in the order k, q, v"),
    "q, v, k": (LLAMA, rows(QKV, sections("q", "v", "k")), QKV, "in the order q, v, k"),
    "qkv by kv head": (LLAMA, rows(QKV, by_kv_head), QKV, "q, k and v alternated for each kv head"),
    "eps": (QWEN2, norm(NORM, lambda ops, x, w, r: (normed(ops, x + r, w, 1e-3), x + r)), NORM, "eps were 0.001, not"),
    "no residual": (LLAMA, norm(NORM, lambda ops, x, w, r: (normed(ops, x, w), x)), f"{NORM}.residual", "not added"),
    "no residual in the norm": (
        *(LLAMA, norm(NORM_2, lambda ops, x, w, r: (normed(ops, x, w), x + r))),
        *(NORM_2, "the residual were not added"),
    ),
    "no weight": (LLAMA, norm(NORM_2, lambda ops, x, w, r: (normed(ops, x + r, None), x + r)), NORM_2, "not applied"),
    "unit offset": (LLAMA, norm(NORM, lambda ops, x, w, r: (normed(ops, x + r, w + 1), x + r)), NORM, "1 were added"),
    "LayerNorm": (
        *(LLAMA, norm(NORM, lambda ops, x, w, r: (F.layer_norm(x + r, x.shape[-1:], w, eps=1e-6), x + r))),
        *(NORM, "LayerNorm"),
    ),
    "the other norm's weight": (LLAMA, other_weight(NORM, NORM_2), NORM, f"that of {NORM_2}"),
    "final norm's weight": (LLAMA, other_weight("final_norm", "layers.2.input_norm"), "final_norm", "layers.2.input"),
    "lm_head": (LLAMA, other_weight("lm_head", "embedding"), "lm_head", "the weight were that of embedding"),
    "embedding": (LLAMA, other_weight("embedding", "lm_head"), "embedding", "its table were that of lm_head"),
    "not rotated": (LLAMA, heads(lambda ops, q, k, right: (q, k)), f"{NAME}.attention.q", "were not applied"),
    "k not rotated": (
        *(LLAMA, heads(lambda ops, q, k, right: (rotate(ops, q), k))),
        *(f"{NAME}.attention.k", "the rotary embedding were not applied, but not all of"),
    ),
    "rotated twice": (
        *(LLAMA, heads(lambda ops, q, k, right: right(*right(q, k, LAYER), LAYER))),
        *(f"{NAME}.attention.q", "were applied twice"),
    ),
    "interleaved": (
        *(LLAMA, heads(lambda ops, q, k, right: [rotate(ops, x, interleaved=True) for x in (q, k)])),
        *(f"{NAME}.attention.q", "interleaved"),
    ),
    "backwards": (
        *(LLAMA, heads(lambda ops, q, k, right: [rotate(ops, x, backwards=True) for x in (q, k)])),
        *(f"{NAME}.attention.q", "turned backwards"),
    ),
    "position + 1": (
        *(LLAMA, heads(lambda ops, q, k, right: [rotate(ops, x, shift=1) for x in (q, k)])),
        *(f"{NAME}.attention.q", "+1 were added to positions"),
    ),
    "base": (
        *(LLAMA, heads(lambda ops, q, k, right: [rotate(ops, x, with_base(ops, 1e6)) for x in (q, k)])),
        *(f"{NAME}.attention.q", "the base of the rotary embedding were 1e+06, not 10000"),
    ),
    "positions begin again": (
        *(LLAMA, heads(lambda ops, q, k, right: [restarted(ops, x) for x in (q, k)])),
        *(f"{NAME}.attention.q", "positions began at 0 in a decode step"),
    ),
    "heads not normalised": (
        *(QWEN3, heads(lambda ops, q, k, right: [rotate(ops, x) for x in (q, k)])),
        *(f"{NAME}.attention.q", "q and k were not normalised"),
    ),
    "k's norm for q": (
        *(QWEN3, lambda ops: other_weight(f"{NAME}.attention.q_norm", f"{NAME}.attention.k_norm")(ops)),
        *(f"{NAME}.attention.q", "the weights of q_norm and k_norm were swapped"),
    ),
    "no logn": (
        *(QWEN, heads(lambda ops, q, k, right: (rotate(ops, q), right(q, k, LAYER)[1]))),
        *(f"{NAME}.attention.q", "were not multiplied by logn's factors"),
    ),
    "v rotated": (QWEN2, split(lambda ops, q, k, v: (q, k, rotate(ops, v))), f"{NAME}.attention.v", "v were rotated"),
    "v, k, q in attention": (QWEN2, split(lambda ops, q, k, v: (v, k, q)), f"{NAME}.attention.q", "order v, k, q"),
    "no scale": (
        *(LLAMA, attention(lambda *given: attended(*given, scale=1.0))),
        *(f"{NAME}.attention", "the softmax were not scaled"),
    ),
    "grouping": (
        *(LLAMA, attention(lambda *given: attended(*given, group=torch.arange(6) % 2))),
        *(f"{NAME}.attention", "wrong grouping of kv heads"),
    ),
    "not causal": (
        *(LLAMA, attention(lambda *given: attended(*given, future=True))),
        *(f"{NAME}.attention", "tokens saw those after them"),
    ),
    "blind to itself": (
        *(LLAMA, attention(lambda *given: attended(*given, itself=False))),
        *(f"{NAME}.attention", "a token did not see itself"),
    ),
    "no cache": (
        *(LLAMA, attention(lambda ops, q, k, v: attended(ops, q, k[-len(q) :], v[-len(q) :]))),
        *(f"{NAME}.attention", "the cache were not read"),
    ),
    "other weights": (
        *(LLAMA, lambda ops: ops.record(DOWN, weight=ops.modules[DOWN].weight.flip(0) * 1.5)),
        *(DOWN, "its weights were right, and they are not those of the reference"),
    ),
    "zeros": (LLAMA, damaged(DOWN, lambda y: y * 0), DOWN, "its numbers are all zero"),
    "NaN": (LLAMA, damaged(DOWN, lambda y: y.index_fill(1, torch.tensor([3]), torch.nan)), DOWN, "20 of its 1680 num"),
    "a factor": (LLAMA, damaged(DOWN, lambda y: y * 1.25), DOWN, "its numbers are 1.25 times the right ones"),
    "the last tokens": (
        *(LLAMA, damaged(DOWN, lambda y: torch.cat([y[:16], y[16:] * 0.5]))),
        *(DOWN, "it is wrong in tokens 16 to 19 of 20"),
    ),
    "a tile": (
        *(LLAMA, damaged(DOWN, lambda y: torch.cat([y[:, :64], y[:, 64:].flip(1)], 1))),
        *(DOWN, "columns 64 to 83 of 84"),
    ),
    "half precision": (LLAMA, rounded(DOWN), DOWN, "its error is that of products in TF32 or float16"),
    "something else": (LLAMA, damaged(DOWN, lambda y: y.square()), DOWN, "no known fault explains it"),
}
DTYPES = ("float32", "float16")
TOO_SMALL_FOR_FLOAT16 = ("eps", "half precision")
IN_A_DECODE_STEP = ("positions begin again", "no cache")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Make a checkpoint, its engines and its reference once for each architecture."""
    found = {}

    def make(architecture):
        if architecture not in found:
            folder = tmp_path_factory.mktemp(architecture)
            model_dir = save_model(architecture, folder / "model", seed=5, **CHANGES.get(architecture, {}))
            engines = {dtype: save_engine(model_dir, folder / dtype, dtype) for dtype in DTYPES}
            prompt = random_prompt(20, seed=1)
            found[architecture] = model_dir, engines, make_reference(model_dir, prompt, 2, list(engines))
        return found[architecture]

    return make


@pytest.mark.parametrize(
    ("fault", "dtype"),
    [(name, dtype) for dtype in DTYPES for name in FAULTS if dtype == "float32" or name not in TOO_SMALL_FOR_FLOAT16],
)
def test_a_fault_is_found(made, fault, dtype):
    architecture, inject, name, reason = FAULTS[fault]
    model_dir, engines, reference = made(architecture)
    device = device_with(engines[dtype], Faulty)
    inject(device.operations)
    read = CheckpointModules(model_dir, reference.model, "torch").arrays
    passes, finding = compare_probe(TorchProbe(device), reference, dtype, read)
    assert finding is not None
    assert (finding.name, finding.step) == (name, 1 if fault in IN_A_DECODE_STEP else 0)
    assert reason in finding.reason
    assert len(passes.chained) == 3


@pytest.mark.parametrize("architecture", [LLAMA, QWEN2, QWEN3, QWEN])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_fault_nothing_is_found(made, architecture, dtype):
    _, engines, reference = made(architecture)
    assert reference.difference is None
    probe = TorchProbe(device_with(engines[dtype], Faulty))
    assert compare_probe(probe, reference, dtype)[1] is None
