"""Engines of a real TensorRT, beside what the torch back end made of the same checkpoints.

    python -m tests.qwen_model.tensorrt_reference FOLDER                                 # where there is PyTorch
    QWEN_MODEL_REFERENCE=FOLDER pytest tests/qwen_model/backends/test_tensorrt_gpu.py    # where there is TensorRT

The second needs neither PyTorch nor onnx: FOLDER has the exported networks, too.
"""

import json
import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import qwen_model
from tests.qwen_model import overflow_checks
from tests.qwen_model.session_checks import check_streams, check_that_nothing_is_left_behind
from tests.qwen_model.tensorrt_reference import (
    ARCHITECTURES,
    BEAM_TOKENS,
    LIMITS,
    LOGITS_OF,
    NEW_TOKENS,
    NUM_BEAMS,
    PROMPT_LENGTHS,
    QUANTIZED,
    QUANTIZED_X,
)

REFERENCE = os.environ.get("QWEN_MODEL_REFERENCE")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.tensorrt,
    pytest.mark.skipif(REFERENCE is None, reason="QWEN_MODEL_REFERENCE does not name the torch back end's results"),
]
MODELS = [*ARCHITECTURES, "packaged"]
# Of log-probabilities and logits, beside their size: what the order of sums in the type comes to over the layers.
TOLERANCES = {"float32": 2e-3, "float16": 0.06}


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Builds an engine when it is first asked for, and loads it each time."""
    folder = tmp_path_factory.mktemp("engines")

    def load(model, dtype, network="plugins"):
        engine = folder / f"{model}-{dtype}-{network}"
        if not engine.exists():
            file = Path(REFERENCE) / f"{model}-{dtype}.onnx"
            with parsing(file) if network == "onnx" else nullcontext():
                qwen_model.build_engine(
                    None if model == "packaged" else Path(REFERENCE) / model,
                    output_dir=engine,
                    backend="tensorrt",
                    dtype=dtype,
                    rmsnorm_plugin=network != "native norms",
                    timing_cache=folder / "timing",
                    **LIMITS,
                )
        return qwen_model.load_engine(engine)

    return load


@contextmanager
def parsing(file):
    """Let the back end take its network from an exported file, by TensorRT's own parser."""
    import tensorrt as trt

    from qwen_model.backends.tensorrt import back_end, compat

    def parse(network, config, *_):
        parser = trt.OnnxParser(network, compat.LOG)
        assert parser.parse_from_file(str(file)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
        outputs = [network.get_output(i) for i in range(network.num_outputs)]
        for tensor in outputs:
            compat.set_tensor_type(tensor, compat.dtypes()[config.dtype], network)
        for tensor in (*outputs, *(network.get_input(i) for i in range(network.num_inputs))):
            tensor.allowed_formats = 1 << int(trt.TensorFormat.LINEAR)

    with mock.patch.object(back_end, "_define", parse):
        yield


def reference(model, dtype):
    arrays = dict(np.load(Path(REFERENCE) / f"{model}-{dtype}.npz"))
    return arrays, [arrays[f"prompt_{i}"].tolist() for i in range(len(PROMPT_LENGTHS))]


def assert_same_but_for_ties(tokens, expected, scores, tolerance):
    """A prompt's tokens [steps], up to the first that the reference found as good as its own.

    expected, scores: [more steps, CANDIDATES].
    """
    for step, ours in enumerate(tokens):
        if ours == expected[step, 0]:
            continue
        place = np.flatnonzero(expected[step] == ours)
        assert len(place), f"token {step}: {ours} is not among the likeliest"
        gap = scores[step, 0] - scores[step, place[0]]
        assert gap <= tolerance, f"token {step}: {ours} is {gap} less likely"
        break


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("network", ["plugins", "native norms", "onnx"])
def test_logits_and_greedy_tokens(engines, model, dtype, network):
    arrays, prompts = reference(model, dtype)
    session = engines(model, dtype, network)
    tolerance = TOLERANCES[dtype]
    logits, expected = session.logits(prompts[LOGITS_OF]), arrays["logits"]
    np.testing.assert_allclose(logits, expected, atol=tolerance * max(1.0, np.abs(expected).max() / 4))
    outputs = session.generate(prompts, max_new_tokens=NEW_TOKENS).outputs
    for i, output in enumerate(outputs):
        assert len(output.output_ids) == NEW_TOKENS or output.finish_reason == "stop"
        assert_same_but_for_ties(output.output_ids, arrays["tokens"][:, i], arrays["scores"][:, i], tolerance)


@pytest.mark.parametrize("last", [2, 10**9], ids=["few rows", "every row"])
def test_last_logits_of_a_batch(engines, last):
    _, prompts = reference("Qwen2ForCausalLM", "float32")
    session = engines("Qwen2ForCausalLM", "float32")
    counts = [min(last, len(prompt)) for prompt in prompts]
    for prompt, count, logits in zip(prompts, counts, session.last_logits(prompts, counts), strict=True):
        np.testing.assert_allclose(logits, session.logits(prompt)[-count:], atol=TOLERANCES["float32"])


@pytest.mark.parametrize("model", ["Qwen2ForCausalLM", "packaged"])
def test_beams(engines, model):
    arrays, prompts = reference(model, "float32")
    outputs = engines(model, "float32").generate(prompts[1:3], max_new_tokens=BEAM_TOKENS, num_beams=NUM_BEAMS).outputs
    assert [output.output_ids for output in outputs] == [arrays[f"beams_{i}"].tolist() for i in range(2)]


def test_every_batch_size_gives_what_one_prompt_gives(engines):
    _, prompts = reference("Qwen2ForCausalLM", "float32")
    session = engines("Qwen2ForCausalLM", "float32")
    alone = [session.generate(prompt, max_new_tokens=20).outputs[0].output_ids for prompt in prompts]
    for count in range(1, len(prompts) + 1):
        together = session.generate(prompts[:count], max_new_tokens=20).outputs
        assert [output.output_ids for output in together] == alone[:count]


def test_more_prompts_than_slots(engines):
    """They join when others are done; the shared beginning of some is in the cache already."""
    _, prompts = reference("packaged", "float32")
    session = engines("packaged", "float32")
    many = [(prompts[2][:70] + prompt)[:80] for prompt in prompts for _ in range(4)] + prompts
    together = session.generate(many, max_new_tokens=40).outputs
    alone = [session.generate(prompt, max_new_tokens=40).outputs[0] for prompt in many]
    assert [output.output_ids for output in together] == [output.output_ids for output in alone]


@pytest.mark.parametrize("name", list(QUANTIZED))
def test_quantized_weights(name, tmp_path):
    """Of a checkpoint that both back ends read, with a head of int8 beside it."""
    model, tolerance = f"packaged-{name}", TOLERANCES["float16"]
    arrays, prompts = reference(model, "float16")
    options = {"backend": "tensorrt", "dtype": "float16", "head_quantization": "int8", **LIMITS}
    qwen_model.build_engine(Path(REFERENCE) / model, output_dir=tmp_path / "engine", **options)
    session = qwen_model.load_engine(tmp_path / "engine")
    logits, expected = session.logits(prompts[LOGITS_OF]), arrays["logits"]
    np.testing.assert_allclose(logits, expected, atol=tolerance * max(1.0, np.abs(expected).max() / 4))
    for i, output in enumerate(session.generate(prompts, max_new_tokens=NEW_TOKENS).outputs):
        assert_same_but_for_ties(output.output_ids, arrays["tokens"][:, i], arrays["scores"][:, i], tolerance)


@pytest.mark.parametrize("name", list(QUANTIZED_X))
def test_quantized_x(name, tmp_path):
    """The kernels are the same, but not the choice of GEMM kernels: a rounding error moves a number to another code."""
    arrays, prompts = reference(f"packaged-{name}", "float16")
    options = {"backend": "tensorrt", "dtype": "float16", "head_quantization": "int8", **LIMITS}
    summary = qwen_model.build_engine(
        Path(REFERENCE) / f"packaged-{name}", output_dir=tmp_path / "engine", tuning=False, **options
    )
    assert any(each.activation for each in summary.config.weight_formats.values())
    session = qwen_model.load_engine(tmp_path / "engine")
    logits, expected = session.logits(prompts[LOGITS_OF]), arrays["logits"]
    assert np.abs(logits - expected).mean() < 0.02 * expected.std()
    for i, output in enumerate(session.generate(prompts, max_new_tokens=NEW_TOKENS).outputs):
        assert_same_but_for_ties(output.output_ids, arrays["tokens"][:, i], arrays["scores"][:, i], 0.4)


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_caches_of_8_bits(kv_cache_dtype, tmp_path):
    arrays, prompts = reference("packaged", "float16")
    options = {"backend": "tensorrt", "dtype": "float16", "kv_cache_dtype": kv_cache_dtype, **LIMITS}
    qwen_model.build_engine(output_dir=tmp_path / "engine", **options)
    session = qwen_model.load_engine(tmp_path / "engine")
    logits, expected = session.logits(prompts[LOGITS_OF]), arrays["logits"]
    difference = np.abs(logits - expected).mean() / expected.std()
    assert 0 < difference < {"int8": 0.02, "fp8": 0.06}[kv_cache_dtype]
    outputs = session.generate(prompts, max_new_tokens=NEW_TOKENS).outputs
    alone = [session.generate(prompt, max_new_tokens=NEW_TOKENS).outputs[0].output_ids for prompt in prompts]
    same = [output.output_ids == ids for output, ids in zip(outputs, alone, strict=True)]
    assert sum(same) >= len(same) - 1  # kernels differ by the number of rows


def test_sampling(engines):
    _, prompts = reference("packaged", "float16")
    session = engines("packaged", "float16")

    def sampled(**options):
        sampling = qwen_model.SamplingOptions(temperature=1.2, **options)
        return [output.output_ids for output in session.generate(prompts, max_new_tokens=24, sampling=sampling).outputs]

    greedy = [output.output_ids for output in session.generate(prompts, max_new_tokens=24).outputs]
    assert sampled(seed=1, top_p=0.9) == sampled(seed=1, top_p=0.9) != sampled(seed=2, top_p=0.9)
    assert sampled(top_k=1) == greedy
    penalised = session.generate(
        prompts, max_new_tokens=24, sampling=qwen_model.SamplingOptions(repetition_penalty=1e4)
    ).outputs
    for output in penalised:  # nothing comes twice
        assert len(set(output.output_ids)) == len(output.output_ids)


@pytest.mark.parametrize(("model", "dtype"), [("Qwen2ForCausalLM", "float32"), ("packaged", "float16")])
def test_streams(engines, model, dtype):
    _, prompts = reference(model, dtype)
    session = engines(model, dtype)
    check_streams(session, prompts, max_new_tokens=24)
    check_streams(session, prompts[:2], max_new_tokens=24, sampling=qwen_model.SamplingOptions(top_k=40, seed=3))


@pytest.mark.parametrize(("model", "dtype"), [("Qwen2ForCausalLM", "float32"), ("packaged", "float16")])
def test_requests_that_fail_or_stop_leave_nothing_behind(engines, model, dtype):
    _, prompts = reference(model, dtype)
    check_that_nothing_is_left_behind(engines(model, dtype), prompts[1:4])


@pytest.mark.parametrize("model", ["Qwen2ForCausalLM", "packaged"])
def test_hardware_compatible_engines(engines, model, tmp_path):
    """For any GPU from Ampere on: here the tokens of the engine for this one."""
    import tensorrt as trt

    _, prompts = reference(model, "float16")
    model_dir = None if model == "packaged" else Path(REFERENCE) / model
    options = {"backend": "tensorrt", "dtype": "float16", "hardware_compatible": True, **LIMITS}
    qwen_model.build_engine(model_dir, output_dir=tmp_path / "engine", **options)
    session = qwen_model.load_engine(tmp_path / "engine")
    assert session.device.engine.hardware_compatibility_level == trt.HardwareCompatibilityLevel.AMPERE_PLUS
    expected = engines(model, "float16")
    np.testing.assert_allclose(
        session.logits(prompts[LOGITS_OF]), expected.logits(prompts[LOGITS_OF]), atol=TOLERANCES["float16"]
    )
    ours, theirs = (each.generate(prompts, max_new_tokens=16).outputs for each in (session, expected))
    assert [output.output_ids for output in ours] == [output.output_ids for output in theirs]


def test_inspect_a_plan_without_its_folder(engines, tmp_path, capsys):
    """One of this package, and one that TensorRT built of layers of its own, and kept no details of."""
    import tensorrt as trt

    from qwen_model import inspect
    from qwen_model.backends.tensorrt.compat import LOG, create_network

    options = {"backend": "tensorrt", "dtype": "float16", **LIMITS}
    engine = qwen_model.build_engine(output_dir=tmp_path / "engine", **options).engine_dir
    inspect.main([str(engine / "model.plan")])
    printed = capsys.readouterr().out
    assert "layers.*.attention.qkv" in printed
    assert "profile 1: smallest, usual and largest shapes" in printed
    builder = trt.Builder(LOG)
    network = create_network(builder)
    x = network.add_input("x", trt.float32, (-1, 8))
    network.mark_output(network.add_unary(x, trt.UnaryOperation.EXP).get_output(0))
    config = builder.create_builder_config()
    config.set_tactic_sources(0)
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, 8), (2, 8), (4, 8))
    config.add_optimization_profile(profile)
    (tmp_path / "other.plan").write_bytes(builder.build_serialized_network(network, config))
    inspect.main([str(tmp_path / "other.plan"), "--all"])
    assert "1x8  2x8  4x8" in capsys.readouterr().out


def test_overflow_is_an_error(tmp_path):
    model = overflow_checks.save_overflowing_model(tmp_path / "model")
    for dtype, check in (
        ("float16", overflow_checks.check_that_overflow_is_an_error),
        ("float32", overflow_checks.check_that_there_is_room),
    ):
        options = {"backend": "tensorrt", "dtype": dtype, **overflow_checks.LIMITS}
        qwen_model.build_engine(model, output_dir=tmp_path / dtype, **options)
        check(qwen_model.load_engine(tmp_path / dtype))


def test_an_engine_runs_in_another_process(engines, tmp_path):
    _, prompts = reference("packaged", "float16")
    tokens = engines("packaged", "float16").generate(prompts[1], max_new_tokens=16).outputs[0].output_ids
    engine = tmp_path / "engine"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}

    def run(*arguments):
        command = [sys.executable, "-m", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout

    limits = ["--max-input-len", "80", "--max-output-len", "16", "--max-batch-size", "2"]
    options = ["--backend", "tensorrt", "--rmsnorm-plugin", "--dtype", "float16", *limits]
    run("qwen_model.build", *options, "--output-dir", str(engine))
    ids = ",".join(map(str, prompts[1]))
    found = json.loads(run("qwen_model.run", "--engine-dir", str(engine), "--input-ids", ids, "--json"))
    assert found["outputs"][0]["output_ids"] == tokens
    assert "layers.*.attention" in run("qwen_model.inspect", str(engine))
