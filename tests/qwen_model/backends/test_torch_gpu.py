"""The torch back end on a GPU: our kernels and CUDA graphs beside plain PyTorch, and beside transformers."""

import json

import pytest
import torch

import qwen_model
from qwen_model import SamplingOptions
from tests.qwen_model.model_files import hugging_face_model, qwen_v1, random_prompt, save_hugging_face, save_reference
from tests.qwen_model.overflow_checks import (
    LIMITS,
    check_that_overflow_is_an_error,
    check_that_there_is_room,
    save_overflowing_model,
)

pytestmark = pytest.mark.gpu

# Head sizes that the kernels have: 64 and 128.
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64, "vocab_size": 1000}
MODELS = {
    "qwen2": ("Qwen2ForCausalLM", {**SIZES, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3ForCausalLM", {**SIZES, "num_key_value_heads": 1, "head_dim": 128}),
    "llama": ("LlamaForCausalLM", {**SIZES, "num_key_value_heads": 4}),
    "llama-yarn": (
        "LlamaForCausalLM",
        {**SIZES, "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}, "num_key_value_heads": 2},
    ),
}
PROMPTS = [random_prompt(length, seed=length, vocab_size=1000) for length in (7, 1, 100, 33, 100, 64)]


def build(folder, dtype, plugin=True, **options):
    target = folder / f"{dtype}-{plugin}"
    qwen_model.build_engine(
        folder / "model",
        output_dir=target,
        dtype=dtype,
        rmsnorm_plugin=plugin,
        max_input_len=300,
        max_output_len=100,
        **options,
    )
    return target


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    architecture, changes = MODELS[request.param]
    reference = hugging_face_model(architecture, **changes)
    save_hugging_face(reference, folder / "model")
    return reference, folder


def token_ids(session, prompts, **options):
    return [output.output_ids for output in session.generate(prompts, max_new_tokens=64, **options).outputs]


@pytest.mark.parametrize("plugin", [False, True])
def test_float32_is_the_cpus(model, plugin):
    _, folder = model
    engine = build(folder, "float32", plugin)
    gpu, cpu = (qwen_model.load_engine(engine, device=device) for device in ("cuda", "cpu"))
    assert gpu.device.runs_ahead
    expected = token_ids(cpu, PROMPTS)
    assert token_ids(gpu, PROMPTS) == expected
    for prompt, ids in zip(PROMPTS, expected, strict=True):
        assert token_ids(gpu, prompt) == [ids]
    logits, exact = gpu.logits(PROMPTS[2]), cpu.logits(PROMPTS[2])
    assert abs(logits - exact).max() / abs(exact).max() < 1e-4


def test_float32_beams_are_the_cpus(model):
    _, folder = model
    engine = build(folder, "float32")
    gpu, cpu = (qwen_model.load_engine(engine, device=device) for device in ("cuda", "cpu"))
    for prompts in (PROMPTS[:1], PROMPTS[:2]):
        left, right = (session.generate(prompts, num_beams=4, max_new_tokens=32).outputs for session in (gpu, cpu))
        for one, other in zip(left, right, strict=True):
            assert [beam.output_ids for beam in one.beams] == [beam.output_ids for beam in other.beams]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_beside_transformers(model, dtype, record_property):
    """The same greedy tokens, up to where transformers' best two logits are nearer than the rounding errors."""
    reference, folder = model
    session = qwen_model.load_engine(build(folder, dtype), device="cuda")
    theirs = reference.to("cuda", getattr(torch, dtype))
    try:
        errors = []
        for prompt in PROMPTS:
            ids = torch.tensor([prompt], device="cuda")
            generated = theirs.generate(ids, max_new_tokens=64, do_sample=False)[0]
            with torch.no_grad():
                logits = theirs(generated[None]).logits[0].float().cpu()
            ours = torch.from_numpy(session.logits(generated.tolist()))
            errors.append(float((ours - logits).abs().max() / logits.abs().max()))
            best = logits.topk(2).values
            gaps = (best[:, 0] - best[:, 1])[len(prompt) - 1 : -1]
            tied = (gaps < 4 * (ours - logits).abs().amax(-1)[len(prompt) - 1 : -1]).tolist()
            sure = [*tied, True].index(True)
            assert token_ids(session, prompt)[0][:sure] == generated[len(prompt) :].tolist()[:sure]
        record_property("relative_error", max(errors))
        print(f"relative error of the logits, {dtype}: {max(errors):.2e}")
        assert max(errors) < {"float16": 1e-2, "bfloat16": 8e-2}[dtype]
    finally:
        reference.to("cpu", torch.float32)


def test_sampling_is_repeated_by_its_seed(model):
    """In float32: the second time, pages of prompts are there already, and what is left rounds in other kernels."""
    _, folder = model
    session = qwen_model.load_engine(build(folder, "float32"), device="cuda")
    options = SamplingOptions(temperature=1.2, top_k=50, top_p=0.9, repetition_penalty=1.2, seed=5)
    first = token_ids(session, PROMPTS, sampling=options)
    assert token_ids(session, PROMPTS, sampling=options) == first
    assert token_ids(session, PROMPTS, sampling=SamplingOptions(temperature=1.2, seed=6)) != first


def test_a_greedy_request_after_a_sampled_one(model):
    """A step's graph is for one kind of choice; what another left behind must leave no trace."""
    _, folder = model
    session = qwen_model.load_engine(build(folder, "float32"), device="cuda")
    greedy = token_ids(session, PROMPTS[:3])
    for options in ({"temperature": 2.0}, {"top_k": 5}, {"repetition_penalty": 1.5}, {"top_p": 0.3, "seed": 3}):
        token_ids(session, PROMPTS[:3], sampling=SamplingOptions(**options))
        assert token_ids(session, PROMPTS[:3]) == greedy


def test_graphs_are_captured_before_a_request_is_timed(model, monkeypatch):
    """By `prepare`: none is captured as the request runs, whatever its kind of choice."""
    _, folder = model
    session = qwen_model.load_engine(build(folder, "float16"), device="cuda")
    device = session.device
    run, captured = device.forward, []

    def watched(batch):
        before = set(device._graphs)
        run(batch)
        captured.append(set(device._graphs) - before)

    monkeypatch.setattr(device, "forward", watched)
    for options in ({}, {"temperature": 2.0}, {"repetition_penalty": 1.5}, {"top_p": 0.3, "seed": 3}):
        token_ids(session, PROMPTS[:2], sampling=SamplingOptions(**options))
    assert captured
    assert not any(captured)
    assert set(device._graphs) == {1, 2}


def test_repetition_penalty_is_the_cpus(model):
    """Greedy, or among the one token that top_p leaves; prompts' tokens count."""
    _, folder = model
    engine = build(folder, "float32")
    gpu, cpu = (qwen_model.load_engine(engine, device=device) for device in ("cuda", "cpu"))
    plain = token_ids(cpu, PROMPTS)
    for options in ({}, {"temperature": 0.8, "top_p": 1e-6}):
        sampling = SamplingOptions(repetition_penalty=1.4, **options)
        expected = token_ids(cpu, PROMPTS, sampling=sampling)
        assert token_ids(gpu, PROMPTS, sampling=sampling) == expected != plain


def test_batch_sizes_in_any_order(model):
    """The graphs of all sizes share their memory: each is replayed after others were captured and replayed."""
    _, folder = model
    engine = build(folder, "float32")
    gpu, cpu = (qwen_model.load_engine(engine, device=device) for device in ("cuda", "cpu"))
    expected = token_ids(cpu, PROMPTS)
    for count in (1, 3, 2, 1, 2, len(PROMPTS), 1, 3):
        assert token_ids(gpu, PROMPTS[:count]) == expected[:count]
        beams = [session.generate(PROMPTS[0], num_beams=2, max_new_tokens=16).outputs[0] for session in (gpu, cpu)]
        assert beams[0].output_ids == beams[1].output_ids


def test_qwen_v1_past_its_trained_length(tmp_path):
    reference, config = qwen_v1(hidden_size=128, num_attention_heads=2, kv_channels=64)
    save_reference(reference, config, tmp_path / "model")
    engine = build(tmp_path, "float32")
    gpu, cpu = (qwen_model.load_engine(engine, device=device) for device in ("cuda", "cpu"))
    prompts = [random_prompt(length, seed=length) for length in (10, 64, 65, 150, 290)]
    assert token_ids(gpu, prompts) == token_ids(cpu, prompts)


def test_a_head_size_without_kernels_runs_all_the_same(tmp_path):
    save_hugging_face(hugging_face_model("Qwen2ForCausalLM"), tmp_path / "model")
    engine = build(tmp_path, "float32", max_batch_size=2)
    gpu, cpu = (qwen_model.load_engine(engine, device=device) for device in ("cuda", "cpu"))
    prompts = [random_prompt(5), random_prompt(50)]
    assert token_ids(gpu, prompts) == token_ids(cpu, prompts)


@pytest.mark.parametrize("num_heads", [2, 8], ids=["kernels", "PyTorch"])  # there are no kernels for heads of 16
def test_overflow_is_an_error(tmp_path, num_heads):
    save_overflowing_model(tmp_path / "model", num_heads)
    for dtype, check in (("float16", check_that_overflow_is_an_error), ("bfloat16", check_that_there_is_room)):
        qwen_model.build_engine(tmp_path / "model", output_dir=tmp_path / dtype, dtype=dtype, **LIMITS)
        check(qwen_model.load_engine(tmp_path / dtype, device="cuda"))


def test_out_of_memory_is_said_before_loading(model, tmp_path):
    _, folder = model
    engine = build(folder, "float16", max_batch_size=4)
    path = engine / "config.json"
    values = json.loads(path.read_text())
    values["limits"]["max_output_len"] = 2**30
    path.write_text(json.dumps(values))
    with pytest.raises(qwen_model.QwenModelError, match=r"key-value cache has .* GiB, and one sequence of .* tokens"):
        qwen_model.load_engine(engine, device="cuda")
