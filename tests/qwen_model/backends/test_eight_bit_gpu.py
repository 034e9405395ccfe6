"""Engines with quantized x and weights on a GPU: the logits and tokens of the CPU's, whatever the scheduler does."""

import dataclasses
import re

import pytest
import torch
from safetensors.torch import load_file

import qwen_model
from qwen_model.backends.torch import eight_bit
from qwen_model.backends.torch.device import TorchDevice
from qwen_model.backends.torch.eight_bit import QuantizedTensor
from qwen_model.backends.torch.fixed_kernels import tiled_kernels
from qwen_model.checkpoints.config import read_config
from qwen_model.checkpoints.weights import network_modules
from qwen_model.engine.scheduler import Scheduler
from qwen_model.interface.engine_config import EngineConfig, Limits
from qwen_model.interface.weight_formats import kernel_format
from qwen_model.packaged_model import held_out_text
from qwen_model.tuning.choice import MANY_ROWS
from qwen_model.tuning.linear_layers import linear_layers
from qwen_plugins import launch
from tests.qwen_model.backends.device_runs import Running, generate
from tests.qwen_model.backends.test_eight_bit import random_codes, random_module
from tests.qwen_model.eight_bit_networks import SCHEMES, distance, quantize_layers, set_exact, write_engine
from tests.qwen_model.model_files import hugging_face_model, random_prompt, save_hugging_face
from tests.qwen_plugins.gemm_reference import launch_layer, runs_hopper_kernels

pytestmark = pytest.mark.gpu

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64, "vocab_size": 1000}
MODELS = {
    "qwen2": ("Qwen2ForCausalLM", {**SIZES, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3ForCausalLM", {**SIZES, "head_dim": 128, "num_key_value_heads": 1}),
    # Nothing but the plain kernels takes rows of 172 codes.
    "odd sizes": (
        "LlamaForCausalLM",
        {**SIZES, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 172},
    ),
}
PROMPTS = [random_prompt(length, seed=length, vocab_size=1000) for length in (7, 1, 100, 33, 130, 64, 280)]
NEW_TOKENS = 50
VALUES = {
    **SIZES,
    "architectures": ["Qwen2ForCausalLM"],
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}
LIMITS = {"max_batch_size": 16, "max_input_len": 300, "max_output_len": 100}


@pytest.fixture(scope="module", params=[(model, scheme) for model in MODELS for scheme in SCHEMES], ids=str)
def network(request, tmp_path_factory):
    """Make a model of transformers with quantized layers, its scheme, and a folder with the checkpoint before."""
    name, scheme = request.param
    architecture, changes = MODELS[name]
    if SCHEMES[scheme].blocks and name == "odd sizes":
        pytest.skip("its layers' blocks cannot be joined")
    folder = tmp_path_factory.mktemp("network")
    reference = hugging_face_model(architecture, **changes)
    save_hugging_face(reference, folder / "model")
    quantize_layers(reference, SCHEMES[scheme], PROMPTS[-1])
    return reference, SCHEMES[scheme], folder


def engine_of(network, dtype, **options):
    reference, scheme, folder = network
    target = folder / "_".join([dtype, *map(str, options.values())])
    if not target.exists():
        write_engine(reference, scheme, folder / "model", target, dtype=dtype, **LIMITS, **options)
    return target


def logits_of(reference, tokens):
    with torch.no_grad():
        return reference(torch.tensor([tokens])).logits[0]


def test_float32_logits_are_the_plain_networks(network):
    """Until a rounding error moves a number of x to the next code, which later tokens and layers multiply.

    Tensor cores round sums of fp8 to 14 bits: here the plain kernels sum.
    """
    reference, _, _ = network
    session = session_of(network, "float32", plain=True)
    expected = logits_of(reference, PROMPTS[-1])
    set_exact(reference, True)
    not_quantized = logits_of(reference, PROMPTS[-1])
    set_exact(reference, False)
    found = torch.from_numpy(session.logits(PROMPTS[-1]))
    errors = (found - expected).abs().amax(1) / expected.abs().max()
    assert errors.min() < 1e-4
    assert distance(found, expected) < 0.8 * distance(not_quantized, expected)


@pytest.mark.parametrize("disabled", [("gemm",), ("rms_norm",), ("rms_norm", "gemm", "rotary")], ids=str)
def test_pytorchs_own_operations_are_near_the_plain_network(network, disabled):
    reference, _, _ = network
    session = session_of(network, "float16", disabled_plugins=disabled)
    found = torch.from_numpy(session.logits(PROMPTS[-1]))
    expected = logits_of(reference, PROMPTS[-1])
    set_exact(reference, True)
    not_quantized = logits_of(reference, PROMPTS[-1])
    set_exact(reference, False)
    near = max(distance(not_quantized, expected), 0.01 * float(expected.std()))
    assert distance(found, expected) < 1.5 * near


@pytest.mark.parametrize("cache", ["auto", "fp8"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_are_near_the_plain_network(network, dtype, cache):
    """As near as quantizing x is, or rounding to bfloat16."""
    reference, _, _ = network
    session = qwen_model.load_engine(engine_of(network, dtype, kv_cache_dtype=cache), device="cuda", tuning=False)
    expected = logits_of(reference, PROMPTS[-1])
    set_exact(reference, True)
    not_quantized = logits_of(reference, PROMPTS[-1])
    set_exact(reference, False)
    near = max(distance(not_quantized, expected), (0.01 if dtype == "float16" else 0.04) * float(expected.std()))
    near = max(near, 0.0 if cache == "auto" else 0.1 * float(expected.std()))
    found = torch.from_numpy(session.logits(PROMPTS[-1]))
    print(f"{dtype} {cache}: {distance(found, expected) / float(expected.std()):.1e}, near is {near:.1e}")
    assert distance(found, expected) < 1.5 * near
    exact = dtype == "float16" and cache == "auto"
    check_but_for_ties(reference, session, share=0.7 if exact else 0.5, margin=0.25)


def check_but_for_ties(reference, session, share, margin, prompts=PROMPTS):
    """Most tokens are the plain network's choice after the same tokens, and the others are near it."""
    outputs = session.generate(prompts, max_new_tokens=NEW_TOKENS).outputs
    chosen, total = 0, 0
    for prompt, output in zip(prompts, outputs, strict=True):
        logits = logits_of(reference, [*prompt, *output.output_ids])[len(prompt) - 1 : -1]
        behind = logits.max(-1).values - logits[range(NEW_TOKENS), output.output_ids]
        assert float(behind.max()) < margin * float(logits.abs().max())
        chosen, total = chosen + int((behind == 0).sum()), total + NEW_TOKENS
    assert chosen > share * total


def session_of(network, dtype, num_pages=90, plain=False, **options):
    """Return a session with so many pages for the cache; plain: the plain kernels compute all linear layers."""
    engine = engine_of(network, dtype)
    weights: dict[str, torch.Tensor] = {}
    for path in sorted((engine / "weights").iterdir()):
        weights |= load_file(path, device="cuda")
    config = EngineConfig.read(engine)
    formats = config.weight_formats
    if plain:
        shapes = linear_layers(config.model, dtype, formats).values()
        options["gemm_kernels"] = {shape.text: ((MANY_ROWS, "plain"),) for shape in shapes}
    device = TorchDevice(config.model, config.limits, weights, num_pages=num_pages, weight_formats=formats, **options)
    return qwen_model.Session(config, Scheduler(device))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_deterministic_tokens_are_the_same_in_any_company(network, dtype):
    """No rounding error moves a number to another code: neither beside others nor with pages that are there already."""
    session = session_of(network, dtype, deterministic=True)

    def tokens(prompts):
        return [output.output_ids for output in session.generate(prompts, max_new_tokens=NEW_TOKENS).outputs]

    together = tokens(PROMPTS)
    assert tokens(PROMPTS[::-1]) == together[::-1]
    for index in (0, 2, 6):
        assert tokens([PROMPTS[index]]) == [together[index]]


def test_prefixes_and_preemption(network):
    """Pages of prompts are used again, and a pool that is too small for all sequences takes those of some."""
    reference, _, _ = network
    session = session_of(network, "float32", num_pages=8, plain=True)
    prompts = [random_prompt(60, seed=seed, vocab_size=1000) for seed in range(4)]  # all have one page, and need two
    for _ in range(2):
        check_but_for_ties(reference, session, 0.85, 0.1, [*prompts, PROMPTS[-1]])
    assert session.scheduler.num_preemptions > 0


def test_static_scales_cost_no_launch():
    """A step of the network in 16 bits and one with static scales have as many kernels."""
    if not runs_hopper_kernels():
        pytest.skip("elsewhere cuBLASLt multiplies codes, and another kernel quantizes y")
    plain = launches(None)
    for name in ("fp8 static", "int8 static"):
        assert launches(SCHEMES[name]) <= plain


def launches(scheme):
    """Return the number of kernels of steps of random weights."""
    config = read_config(VALUES)
    linear = [name for name in network_modules(config, "float16") if re.match(r"layers.*(attention\.|mlp\.)", name)]
    formats = {} if scheme is None else dict.fromkeys(linear, scheme.format)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, module in network_modules(config, "float16", formats).items():
        if name in formats:
            found = random_module(scheme, *module.shape, generator)
            weights |= {f"{name}.weight": found.weight, f"{name}.scales": found.scales * 1e-3}
            weights[f"{name}.input_scale"] = found.input_scale
        for spec in module.tensors:
            weights.setdefault(spec.name, torch.full(spec.shape, 0.01, dtype=torch.float16))
    weights = {name: tensor.cuda() for name, tensor in weights.items()}
    device = TorchDevice(config, Limits(4, 300, 100), weights, num_pages=30, weight_formats=formats)
    generate(device, [Running(PROMPTS[2], 0, [1, 2, 3])], 4)  # steps are captured
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        generate(device, [Running(PROMPTS[2], 0, [1, 2, 3])], 4)
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if "Memcpy" not in event.key)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("shape", [(4608, 3584, ""), (3584, 18944, ""), (37888, 3584, "swiglu")], ids=str)
def test_fixed_kernels_give_rows_the_same_bits(scheme, shape):
    """Of the linear layers of a 7B model, whose tiles are divided otherwise for each number of rows."""
    out_features, in_features, activation = shape
    if not runs_hopper_kernels():
        pytest.skip("elsewhere the plain kernel is the fixed one")
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    kernels = tiled_kernels(out_features, activation == "swiglu", multiprocessors, scheme.kind)
    most_rows = kernels[-1][0]
    generator = torch.Generator().manual_seed(0)
    module = random_module(scheme, out_features, in_features, generator).map(torch.Tensor.cuda)
    codes = random_codes(scheme, most_rows, in_features, generator).cuda()
    scales = torch.rand(most_rows, 1, generator=generator).cuda() + 0.1
    bias = torch.zeros(out_features, dtype=torch.bfloat16, device="cuda")
    layer = launch.LinearLayer(
        weight=module.weight.data_ptr(),
        weight_format=kernel_format(module.format).for_launch(),
        scales=module.scales.data_ptr(),
        input_scale=module.input_scale.data_ptr() if scheme.static else 0,
        bias=bias.data_ptr(),
        in_features=in_features,
        out_features=out_features,
        activation=launch.Activation.swiglu if activation else launch.Activation.none,
        dtype=launch.DataType.bfloat16,
        constant_weight=True,
        kernels=kernels,
    )

    def product(rows):
        x, x_scales = codes[rows], scales[rows]
        y = torch.empty(len(x), layer.columns, dtype=torch.bfloat16, device="cuda")
        launch_layer(layer, x, y, None if scheme.static else x_scales)
        return y

    whole = product(slice(None))
    if not activation:
        of_x = QuantizedTensor(codes, module.input_scale if scheme.static else scales)
        expected = eight_bit.linear(of_x, dataclasses.replace(module, bias=None))
        assert distance(whole, expected) < 0.01 * float(expected.std())
    for count in (1, 2, 8, 16, 17, 64, 65, 100, most_rows - 1):
        for first in (0, most_rows - count):
            rows = slice(first, first + count)
            assert torch.equal(product(rows), whole[rows])


@pytest.mark.parametrize(
    "options",
    [
        {"quantization": "fp8"},
        {"quantization": "smoothquant", "per_token": True, "per_channel": True},
        {"quantization": "smoothquant"},
    ],
    ids=str,
)
def test_the_packaged_model_with_measured_kernels(tmp_path, monkeypatch, options):
    """The codes of an engine's weights are those that the CPU computes with; many sequences give what one gives."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sizes = {"max_batch_size": 24, "max_input_len": 640, "max_output_len": NEW_TOKENS, "max_num_tokens": 2048}
    qwen_model.build_engine(output_dir=tmp_path / "engine", dtype="bfloat16", **sizes, **options)
    gpu, cpu = (qwen_model.load_engine(tmp_path / "engine", device=device) for device in ("cuda", "cpu"))
    assert any("x per t" in shape for shape in gpu.device.gemm_kernels)
    tokens = gpu.tokenizer.encode(held_out_text()[:20_000])
    found, expected = (torch.from_numpy(session.logits(tokens[:200])) for session in (gpu, cpu))
    assert distance(found, expected) < 0.1 * float(expected.std())
    prompts = [tokens[index * 50 : index * 50 + 100] for index in range(20)]
    many = [output.output_ids for output in gpu.generate(prompts, max_new_tokens=16).outputs]
    alone = [gpu.generate(prompt, max_new_tokens=16).outputs[0].output_ids for prompt in prompts]
    assert sum(one == other for one, other in zip(many, alone, strict=True)) > 10
