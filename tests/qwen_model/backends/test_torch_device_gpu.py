"""The torch Device on a GPU: kernels and CUDA graphs beside plain PyTorch on the CPU."""

import dataclasses

import numpy as np
import pytest
import torch

from qwen_model.backends.torch.device import TorchDevice
from qwen_model.checkpoints.config import read_config
from qwen_model.checkpoints.weights import weight_groups
from qwen_model.interface.engine_config import Limits
from qwen_model.interface.sampling import SamplingOptions
from tests.qwen_model.backends.device_runs import (
    Running,
    batch_of,
    generate,
    prompt_logits,
    run_chunks,
    run_decoding,
    run_mixed,
)
from tests.qwen_model.model_files import random_prompt
from tests.qwen_plugins.gemm_reference import launch_layer, runs_hopper_kernels

pytestmark = pytest.mark.gpu

LIMITS = Limits(max_batch_size=20, max_input_len=400, max_output_len=100, max_num_tokens=2000)
VALUES = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}
MODELS = {
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "num_key_value_heads": 1},
    "llama-dynamic": {
        "architectures": ["LlamaForCausalLM"],
        "num_key_value_heads": 4,
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
        "max_position_embeddings": 100,
    },
}
PROMPTS = [random_prompt(length, seed=length, vocab_size=1000) for length in (7, 1, 100, 33, 129, 64, 300)]
NEW_TOKENS = 70


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    """A configuration and weights that make attention far from uniform."""
    config = read_config({**VALUES, **MODELS[request.param]})
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for group in weight_groups(config, "float32"):
        for spec in group.specs:
            if len(spec.shape) > 1:
                weight = torch.randn(spec.shape, generator=generator) * 1.3 / spec.shape[1] ** 0.5
            else:
                weight = torch.rand(spec.shape, generator=generator) + 0.3
            weights[spec.name] = weight
    return config, weights


def device_on(model, place, dtype=torch.float32, **options):
    config, weights = model
    weights = {name: weight.to(place, dtype) for name, weight in weights.items()}
    return TorchDevice(config, LIMITS, weights, num_pages=90, **options)


def sequences(count=7, first_page=1, sampling=None):
    found, page = [], first_page
    for index, prompt in enumerate(PROMPTS[:count]):
        pages = list(range(page, page + -(-(len(prompt) + NEW_TOKENS) // 64)))
        found.append(Running(prompt, 19 - index, pages[::-1], sampling or SamplingOptions()))
        page += len(pages)
    return found


@pytest.fixture(scope="module")
def pair(model):
    return device_on(model, "cuda"), device_on(model, "cpu")


def test_float32_gives_the_cpus_tokens(pair):
    gpu, cpu = pair
    assert gpu.runs_ahead
    expected = generate(cpu, sequences(), NEW_TOKENS)
    for chunk in (1000, 64, 50, 1):
        assert generate(gpu, sequences(first_page=30), NEW_TOKENS, chunk) == expected


def test_every_number_of_sequences(pair):
    """The graphs of all sizes share their memory, and are padded; slots and pages are used again."""
    gpu, cpu = pair
    gpu.prepare(3)
    expected = generate(cpu, sequences(), NEW_TOKENS)
    for count in (1, 3, 2, 7, 5, 1, 6):
        assert generate(gpu, sequences(count, first_page=1 + count), NEW_TOKENS) == expected[:count]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("chunk", [7, 40, 1000])
def test_prompts_and_decode_tokens_in_one_step(pair, count, chunk):
    """The first `count` sequences decode while the prompts of the others are run; then all decode."""
    gpu, cpu = pair
    expected = generate(cpu, sequences(), NEW_TOKENS)
    found = sequences(first_page=30)
    gpu.start([sequence.start() for sequence in found])
    run_chunks(gpu, found[:count], 1000)
    run_mixed(gpu, found[:count], found[count:], chunk)
    run_decoding(gpu, found, NEW_TOKENS - len(found[0].output))
    for sequence, tokens in zip(found, expected, strict=True):
        length = min(len(tokens), len(sequence.output))
        assert length > NEW_TOKENS - 50
        assert sequence.output[:length] == tokens[:length]


@pytest.mark.parametrize("kind", ["auto", "int8", "fp8"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_mixed_step_is_two_steps(model, dtype, kind):
    """Log-probabilities of a step of both beside those of a decode step and a step of prompts."""
    gpu = device_on(model, "cuda", getattr(torch, dtype), kv_cache_dtype=kind)
    found = []
    for mixed in (False, True):
        running = sequences(5)
        gpu.start([sequence.start() for sequence in running])
        run_chunks(gpu, running[:3], 1000)
        rows = [sequence.decode() for sequence in running[:3]], [each.chunk(30) for each in running[3:]]
        chosen = []
        for step in [([*rows[0], *rows[1]], 3)] if mixed else [(rows[0], 0), (rows[1], 0)]:
            batch = batch_of(*step)
            gpu.forward(batch)
            if batch.chooses.any():
                chosen.append(gpu.choose(num_best=5).wait())
        found.append(np.concatenate([each.best_logprobs for each in chosen]))
    tolerance = 0.05 if dtype == "float16" else 0.4
    np.testing.assert_allclose(*found, atol=tolerance * (1 if kind == "auto" else 3))


def test_what_a_request_left_behind_is_not_read(pair):
    gpu, cpu = pair
    gpu.cache.data[:, 1:] = torch.nan
    assert generate(gpu, sequences(), NEW_TOKENS, 77) == generate(cpu, sequences(), NEW_TOKENS)


def test_copies_and_given_tokens(pair):
    """A fork has a copy of two pages, and its token is given, that of its neighbour is not."""
    gpu, cpu = pair
    found = []
    for device in (gpu, cpu):
        first = Running(PROMPTS[2], 3, [5, 6, 7])
        device.start([first.start()])
        run_chunks(device, [first], 1000)
        device.copy_pages([(5, 8), (6, 9)])
        other = (first.output[0] + 1) % 1000
        fork = Running([*PROMPTS[2], other], 4, [8, 9, 10], past=first.past)
        device.start([fork.start()])
        chosen = []
        for rows in ([first.decode(), fork.chunk(1)], [fork.decode(), first.decode()]):
            device.forward(batch_of(rows))
            chosen.append(device.choose(num_best=5).wait())
        found.append(chosen)
    for on_gpu, on_cpu in zip(*found, strict=True):
        assert on_gpu.tokens.tolist() == on_cpu.tokens.tolist()
        assert on_gpu.best_tokens.tolist() == on_cpu.best_tokens.tolist()
        np.testing.assert_allclose(on_gpu.best_logprobs, on_cpu.best_logprobs, atol=1e-3)
        assert abs(on_gpu.best_logprobs[0] - on_gpu.best_logprobs[1]).max() > 1e-2  # they are not the same


@pytest.mark.parametrize("kind", ["auto", "int8", "fp8"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_logits(model, dtype, kind):
    """Of prompts in chunks, beside the CPU in float32; and those of decode steps."""
    gpu = device_on(model, "cuda", getattr(torch, dtype), kv_cache_dtype=kind)
    cpu = device_on(model, "cpu", kv_cache_dtype=kind)
    tolerances = {"float32": (1e-4, 2e-2), "float16": (2e-2, 6e-2), "bfloat16": (1.5e-1, 1.5e-1)}
    tolerance = tolerances[dtype][kind != "auto"]  # in 8 bits, rounding errors move some numbers to the next code
    prompt, pages = PROMPTS[-1], [3, 9, 1, 7, 2]
    expected = prompt_logits(cpu, prompt, pages)
    for chunk in (1000, 100, 64, 1):
        found = prompt_logits(gpu, prompt, pages, chunk, count=40 if chunk == 1 else 1000)
        error = np.abs(found - expected[: len(found)]).max() / np.abs(expected).max()
        print(f"{dtype} {kind} chunks of {chunk}: {error:.1e}")
        assert error < tolerance


def test_decode_graphs_are_what_chunks_of_one_token_are(pair):
    """Log-probabilities of a captured step beside the logits of a prompt: the same network."""
    gpu, _ = pair
    sequence = Running(PROMPTS[2], 0, [4, 2, 8])
    gpu.start([sequence.start()])
    run_chunks(gpu, [sequence], 1000)
    gpu.forward(batch_of([sequence.decode()]))
    chosen = gpu.choose(num_best=5).wait()
    # Of the same prompt, whose length decides how a dynamic rotary embedding is stretched.
    logits = prompt_logits(gpu, PROMPTS[2], [11, 12, 13], output=sequence.output)[-1]
    best = torch.from_numpy(logits).log_softmax(-1).topk(5)
    assert chosen.best_tokens.tolist() == [best.indices.tolist()]
    np.testing.assert_allclose(chosen.best_logprobs, [best.values], atol=1e-3)
    assert chosen.tokens.tolist() == [int(best.indices[0])]


def test_sampling_does_not_depend_on_the_company(pair):
    gpu, _ = pair
    options = SamplingOptions(temperature=1.3, top_p=0.95, seed=3)
    alone = [generate(gpu, [each], NEW_TOKENS)[0] for each in sequences(4, sampling=options)]
    assert generate(gpu, sequences(4, sampling=options), NEW_TOKENS) == alone
    other = dataclasses.replace(options, seed=4)
    assert generate(gpu, sequences(4, sampling=other), NEW_TOKENS) != alone


def choices(device, running, chunk=64, steps=NEW_TOKENS):
    """Tokens and log-probabilities of every choice for the first of some sequences."""
    device.start([sequence.start() for sequence in running])
    found = []

    def choose(rows):
        device.forward(batch_of(rows))
        if any(row.chooses for row in rows):
            chosen = device.choose(num_best=20).wait()
            if rows[0].slot == running[0].slot and rows[0].chooses:
                found.append((chosen.best_tokens[0], chosen.best_logprobs[0]))

    while any(sequence.has_chunks for sequence in running):
        choose([sequence.chunk(chunk) for sequence in running if sequence.has_chunks])
    for step in range(steps):
        choose([sequence.decode() for sequence in running[: 1 + step % len(running)]])
    return [np.array(each) for each in zip(*found, strict=True)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["auto", "int8", "fp8"])
def test_deterministic_choices_are_the_same_bits_in_any_company(model, dtype, kind):
    device = device_on(model, "cuda", getattr(torch, dtype), kv_cache_dtype=kind, deterministic=True)
    for index in (2, 4, 1):
        order = [index, *(other for other in range(len(PROMPTS)) if other != index)]
        company = sequences()
        alone = choices(device, [company[index]])
        together = choices(device, [sequences()[other] for other in order])
        for one, other in zip(alone, together, strict=True):
            assert np.array_equal(one, other)


@pytest.mark.parametrize("shape", [(4608, 3584, ""), (3584, 3584, ""), (37888, 3584, "swiglu"), (152064, 3584, "")])
def test_fixed_kernels_give_rows_the_same_bits(shape):
    """Of the linear layers of a 7B model, whose tiles are divided otherwise for each number of rows."""
    from qwen_model.backends.torch.fixed_kernels import tiled_kernels
    from qwen_plugins import launch

    if not runs_hopper_kernels():
        pytest.skip("elsewhere the plain kernel is the fixed one")
    out_features, in_features, activation = shape
    generator = torch.Generator("cuda").manual_seed(0)
    kernels = tiled_kernels(
        out_features, activation == "swiglu", torch.cuda.get_device_properties(0).multi_processor_count
    )
    most_rows = kernels[-1][0]
    x = torch.randn(most_rows, in_features, device="cuda", generator=generator).half()
    weight = (torch.randn(out_features, in_features, device="cuda", generator=generator) / 60).half()
    layer = launch.LinearLayer(
        weight=weight.data_ptr(),
        bias=0,
        in_features=in_features,
        out_features=out_features,
        activation=launch.Activation.swiglu if activation else launch.Activation.none,
        dtype=launch.DataType.float16,
        constant_weight=True,
        kernels=kernels,
    )

    def product(rows):
        y = rows.new_empty(len(rows), layer.columns)
        launch_layer(layer, rows, y)
        return y

    whole = product(x)
    exact = torch.nn.functional.linear(x, weight)
    if not activation:
        assert (whole - exact).abs().max() < 0.05
    for count in (1, 2, 8, 16, 17, 64, 65, 100, most_rows - 1):
        for first in (0, most_rows - count):
            assert torch.equal(product(x[first : first + count]), whole[first : first + count])
