"""The TensorRT back end on TensorRT, CUDA and kernels in NumPy, beside the torch back end: logits, tokens, errors."""

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest

import qwen_model
from qwen_model.common.errors import OutOfMemoryError
from qwen_model.interface.engine_config import PLUGINS
from tests import stand_ins
from tests.qwen_model import model_files
from tests.qwen_model.conftest import save_byte_tokenizer
from tests.qwen_model.model_files import random_prompt
from tests.qwen_model.session_checks import check_streams, check_that_nothing_is_left_behind
from tests.qwen_model.tensorrt_reference import ARCHITECTURES, save_model
from tests.stand_ins import numpy_cuda, numpy_tensorrt

VERSIONS = ["8.6.0", "10.14.1", "11.1.0"]
LIMITS = {"max_batch_size": 6, "max_input_len": 60, "max_output_len": 30}


@pytest.fixture(params=VERSIONS)
def trt(request, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with stand_ins.installed(request.param) as module:
        yield module


def both(model_dir, tmp_path, **options):
    """A session of each back end."""
    settings = {"dtype": "float32", **LIMITS, **options}
    found = []
    for backend in ("torch", "tensorrt"):
        qwen_model.build_engine(model_dir, output_dir=tmp_path / backend, backend=backend, **settings)
        device = "cpu" if backend == "torch" else None
        found.append(qwen_model.load_engine(tmp_path / backend, device=device))
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("disabled", [(), ("rms_norm",), ("gemm",), ("rotary",), PLUGINS], ids="+".join)
def test_logits_and_tokens_are_those_of_the_torch_back_end(trt, architecture, disabled, tmp_path):
    expected, session = both(save_model(architecture, tmp_path / "model"), tmp_path, disable_plugins=disabled)
    used = {plugin.name for plugin in session.device.engine.network.plugins}
    assert ("RmsNorm" in used, "Gemm" in used) == ("rms_norm" not in disabled, "gemm" not in disabled)
    prompt = random_prompt(50)
    np.testing.assert_allclose(session.logits(prompt), expected.logits(prompt), atol=2e-4)
    prompts = [random_prompt(length, seed=length) for length in (1, 40, 7, 7)]
    ours, theirs = (which.generate(prompts, max_new_tokens=25) for which in (session, expected))
    assert [output.output_ids for output in ours.outputs] == [output.output_ids for output in theirs.outputs]
    for counts in ([1, 3, 7, 2], [1, 40, 7, 7]):
        found, wanted = (which.last_logits(prompts, counts) for which in (session, expected))
        for ours, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_rotary_embedding_in_native_layers(trt, architecture, tmp_path):
    session = both(save_model(architecture, tmp_path / "model"), tmp_path, disable_plugins=["rotary"])[1]
    layers = session.device.engine.network.layers
    attention = [layer for layer in layers if layer.name == "layers.0.attention"]
    assert len(attention[0].inputs) == 7 + (architecture == "QWenLMHeadModel")  # no rotary table; logn's factors


def test_the_benchmarks_engines_are_one_network(trt, monkeypatch):
    """With and without plug-ins for norms and rotary embedding: the same tokens, the packaged model's too."""
    from benchmarks import generate, generate_tensorrt

    small = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    monkeypatch.setattr(generate_tensorrt, "NUMBERS", 1 << 16)
    monkeypatch.setitem(generate.SHAPES, "small", {**small, "vocab_size": 300, "intermediate_size": 200})
    load = generate.Load(2, 20, 6)
    for shape in ("small", "packaged"):
        found = []
        for name in generate_tensorrt.IMPLEMENTATIONS:
            session = generate_tensorrt.new_session(name, shape, "float32", "cuda", load)
            prompts = load.prompts(session.config.model.vocab_size, seed=1)
            found.append((session.logits(prompts[0]), session.generate(prompts, max_new_tokens=6).outputs))
        for logits, outputs in found[1:]:
            np.testing.assert_allclose(logits, found[0][0], atol=2e-4)
            assert outputs == found[0][1]


@pytest.mark.parametrize("scaling", ["linear", "dynamic", "yarn"])
def test_rotary_scalings(trt, scaling, tmp_path):
    model_dir = tmp_path / "model"
    model_files.save_hugging_face(
        model_files.hugging_face_model(
            "Qwen2ForCausalLM", hidden_size=128, num_attention_heads=4, max_position_embeddings=32
        ),
        model_dir,
    )
    expected, session = both(model_dir, tmp_path, rotary_scaling={"rope_type": scaling, "factor": 4.0})
    prompts = [random_prompt(length, seed=length) for length in (50, 5, 33)]
    ours, theirs = (which.generate(prompts, max_new_tokens=20) for which in (session, expected))
    assert [output.output_ids for output in ours.outputs] == [output.output_ids for output in theirs.outputs]
    np.testing.assert_allclose(session.logits(prompts[0]), expected.logits(prompts[0]), atol=2e-4)


def test_logn_and_a_table_for_a_batch_of_long_prompts(trt, tmp_path):
    """Qwen v1 with transformers' dynamic scaling: in a batch each prompt has its own rotation and factors of q."""
    model_dir = save_model("QWenLMHeadModel", tmp_path / "model")
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    prompts = [random_prompt(length, seed=length) for length in (30, 5, 50)]  # trained for 24
    for session in both(model_dir, tmp_path, rotary_scaling=scaling):
        alone = [session.generate(prompt, max_new_tokens=12).outputs[0].output_ids for prompt in prompts]
        assert [output.output_ids for output in session.generate(prompts, max_new_tokens=12).outputs] == alone


@pytest.fixture
def sessions(trt, model_dir, tmp_path):
    """Of the torch and of the TensorRT back end, for the checkpoint that has a tokenizer and end tokens."""
    return both(model_dir, tmp_path)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = save_model("Qwen2ForCausalLM", tmp_path_factory.mktemp("models") / "model")
    save_byte_tokenizer(folder)
    return folder


def same(ours, theirs):
    assert [output.output_ids for output in ours.outputs] == [output.output_ids for output in theirs.outputs]
    assert [output.text for output in ours.outputs] == [output.text for output in theirs.outputs]


def test_streams_are_the_same(sessions):
    expected, session = sessions
    prompts = [random_prompt(9, seed=1), random_prompt(30, seed=2)]
    assert list(session.stream(prompts, max_new_tokens=12)) == list(expected.stream(prompts, max_new_tokens=12))
    check_streams(session, prompts, max_new_tokens=12)
    check_streams(session, prompts, max_new_tokens=12, sampling=qwen_model.SamplingOptions(temperature=1.5, seed=2))


def test_repetition_penalty_is_the_same(sessions):
    expected, session = sessions
    options = {"max_new_tokens": 20, "sampling": qwen_model.SamplingOptions(repetition_penalty=1.7)}
    prompts = [random_prompt(40, seed=1), random_prompt(3, seed=2)]
    same(session.generate(prompts, **options), expected.generate(prompts, **options))
    same(session.generate(prompts, max_new_tokens=20), expected.generate(prompts, max_new_tokens=20))


def test_sampling_repeats_with_its_seed(sessions):
    _, session = sessions
    prompts = [random_prompt(8, seed=1), random_prompt(20, seed=2)]

    def sampled(**options):
        sampling = qwen_model.SamplingOptions(temperature=1.5, **options)
        return [output.output_ids for output in session.generate(prompts, max_new_tokens=15, sampling=sampling).outputs]

    assert sampled(seed=1) == sampled(seed=1) != sampled(seed=2)
    greedy = [output.output_ids for output in session.generate(prompts, max_new_tokens=15).outputs]
    assert sampled(top_k=1) == sampled(top_p=1e-6) == greedy


def test_graphs_are_captured_before_a_request_is_timed(sessions, monkeypatch):
    """By `prepare`, for each number of sequences once, whatever the choice."""
    _, session = sessions
    device = session.device
    # Sets: graphs of other sessions may go when Python collects these.
    prepare, captured, before_all = device.prepare, [], set(numpy_cuda.device.graphs)

    def counting(num_sequences):
        before = set(numpy_cuda.device.graphs)
        prepare(num_sequences)
        captured.append(len(set(numpy_cuda.device.graphs) - before))

    monkeypatch.setattr(device, "prepare", counting)
    options = [{}, {"temperature": 1.5}, {"top_p": 0.5, "seed": 3}, {"repetition_penalty": 1.2}, {}]
    for each in options:
        session.generate(random_prompt(8), max_new_tokens=3, sampling=qwen_model.SamplingOptions(**each))
    assert captured == [1, 0, 0, 0, 0]
    session.generate(random_prompt(8), max_new_tokens=3, num_beams=2)
    assert sum(captured) == len(set(numpy_cuda.device.graphs) - before_all) == 2


@pytest.mark.parametrize("num_beams", [2, 3])
def test_beams_are_the_same(sessions, num_beams):
    expected, session = sessions
    prompts = [random_prompt(31, seed=1), random_prompt(5, seed=2)]
    ours, theirs = (which.generate(prompts, max_new_tokens=18, num_beams=num_beams) for which in (session, expected))
    same(ours, theirs)
    for output, other in zip(ours.outputs, theirs.outputs, strict=True):
        assert [beam.output_ids for beam in output.beams] == [beam.output_ids for beam in other.beams]
        np.testing.assert_allclose([b.score for b in output.beams], [b.score for b in other.beams], atol=1e-4)


@pytest.mark.parametrize("num_pages", [4, 7])
def test_many_prompts_in_little_memory(trt, model_dir, tmp_path, monkeypatch, num_pages):
    """They wait, run in chunks, share what they begin with, lose their pages and come back: the tokens are the same."""
    expected, _ = both(model_dir, tmp_path, max_num_tokens=25, max_input_len=100)
    shared = random_prompt(70, seed=7)
    prompts = [shared + random_prompt(length, seed=length) for length in (3, 20, 9)]
    prompts += [random_prompt(length, seed=length) for length in (60, 1, 33, 59, 60, 2, 48)]
    wanted = [expected.generate(prompt, max_new_tokens=30).outputs[0].output_ids for prompt in prompts]
    monkeypatch.setattr("qwen_model.backends.tensorrt.device.pool_pages", lambda *_: num_pages)
    session = qwen_model.load_engine(tmp_path / "tensorrt")
    assert session.device.num_pages == num_pages
    outputs = session.generate(prompts, max_new_tokens=30).outputs
    assert [output.output_ids for output in outputs] == wanted


def test_a_session_is_as_good_as_new_after_requests_that_fail_or_stop(sessions):
    expected, session = sessions
    prompts = [random_prompt(20, seed=3), random_prompt(11, seed=4)]
    check_that_nothing_is_left_behind(session, prompts)
    same(*(which.generate(prompts, max_new_tokens=10) for which in (session, expected)))


def test_memory_stays_as_it_is(sessions):
    _, session = sessions
    used = []
    for seed in range(5):
        prompts = [random_prompt(5 + 7 * seed, seed=seed)] * (1 + seed % 3)
        session.generate(prompts, max_new_tokens=8)
        session.generate(prompts[0], num_beams=2, max_new_tokens=4)
        session.logits(prompts[0])
        used.append(numpy_cuda.used_bytes())
    assert used[3:] == used[3:4] * 2


def test_a_long_prompts_logits_come_in_parts(trt, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("qwen_model.network.inputs.LOGIT_ROWS", 7)
    expected, session = both(model_dir, tmp_path)
    for length in (60, 50, 49, 1):
        prompt = random_prompt(length, seed=length)
        np.testing.assert_allclose(session.logits(prompt), expected.logits(prompt), atol=2e-4)
    prompts = [random_prompt(length, seed=length) for length in (60, 9)]
    found, wanted = (which.last_logits(prompts, [6, 3]) for which in (session, expected))
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_half_precision(trt, model_dir, tmp_path):
    dtype = "float16" if trt.__version__.startswith("8.") else "bfloat16"
    expected, session = both(model_dir, tmp_path, dtype=dtype)
    prompt = random_prompt(30)
    ours, theirs = session.logits(prompt), expected.logits(prompt)
    assert np.abs(ours - theirs).max() < (0.05 if dtype == "float16" else 0.4) * np.abs(theirs).max()


def build(model_dir, folder, **options):
    settings = {"backend": "tensorrt", "dtype": "float32", **LIMITS, **options}
    return qwen_model.build_engine(model_dir, output_dir=folder, **settings)


def test_the_folder_and_the_progress(trt, model_dir, tmp_path):
    steps = []
    summary = build(model_dir, tmp_path / "engine", progress=lambda *step: steps.append(step))
    names = {path.name for path in (tmp_path / "engine").iterdir()}
    assert names == {"config.json", "model.plan", "tokenizer.json", "tokenizer_config.json"}
    weights = [step for step in steps if step[0] == "weights"]
    assert weights[-1][1:] == (summary.weight_bytes, summary.weight_bytes)
    assert list(dict.fromkeys(step[0] for step in steps)) == ["GEMM kernels", "weights", "TensorRT", "plan"]
    assert summary.config.versions["tensorrt"] == trt.__version__
    assert summary.config.versions["gpu"] == "NumPy"


@pytest.mark.parametrize("limits", [(1, 60, 30), (1, 1, 1)], ids=str)
def test_engines_for_one_sequence(trt, model_dir, tmp_path, limits):
    """With one size in all profiles an input is static in TensorRT 8.6."""
    options = dict(zip(("max_batch_size", "max_input_len", "max_output_len"), limits, strict=True))
    expected, session = both(model_dir, tmp_path, **options)
    prompt, count = random_prompt(limits[1]), limits[2]
    ours, theirs = (which.generate([prompt], max_new_tokens=count).outputs for which in (session, expected))
    assert ours[0].output_ids == theirs[0].output_ids


def test_the_log_tells_the_phases_of_building_and_running(trt, model_dir, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "qwen_model"):
        build(model_dir, tmp_path / "engine")
        build(model_dir, tmp_path / "engine")
        qwen_model.load_engine(tmp_path / "engine").generate([random_prompt(5)], max_new_tokens=3)
    text = "\n".join(record.getMessage() for record in caplog.records)
    for part in (
        r"weights read, and a network of \d+ layers defined: [\d.]+ s, peak memory ",
        r"timing cache .*/tensorrt-.*-NumPy.timing: no timings yet",
        r"timing cache .*: now 8 bytes, 0 before",
        r"timing cache .*: 8 bytes of timings are used",
        r"timing cache .*: the builder measured nothing new",
        r"plan written: [\d.]+ MiB in ",
        r"runs on NumPy, compute capability ",
        r"key-value cache: \d+ pages of 64 tokens, [\d.]+ MiB; activations: .*; cuBLASLt: ",
        r"CUDA graph of 1 sequences captured: ",
        r"prefill: 5 tokens in ",
    ):
        assert re.search(part, text), part


def test_tensorrts_messages_are_passed_on(trt, caplog):
    from qwen_model.backends.tensorrt.compat import LOG

    LOG.take()
    with caplog.at_level(logging.DEBUG, "qwen_model.tensorrt"):
        for severity in (trt.ILogger.ERROR, trt.ILogger.INFO, trt.ILogger.VERBOSE):
            LOG.log(severity, f"100 % of {severity}")
    expected = [(logging.ERROR, "100 % of 1"), (logging.INFO, "100 % of 3"), (logging.DEBUG, "100 % of 4")]
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == expected
    assert {record.name for record in caplog.records} == {"qwen_model.tensorrt"}
    assert LOG.take() == "100 % of 1"


def default_caches(tmp_path):
    return list((tmp_path / "cache" / "qwen_model").glob("*.timing"))


def test_timing_caches_are_kept(trt, model_dir, tmp_path):
    build(model_dir, tmp_path / "engine")
    assert [path.read_bytes() for path in default_caches(tmp_path)] == [b"measured"]
    build(model_dir, tmp_path / "engine", timing_cache=tmp_path / "here" / "cache")
    assert (tmp_path / "here" / "cache").read_bytes() == b"measured"
    assert build(model_dir, tmp_path / "engine", timing_cache=tmp_path / "here" / "cache").warnings == ()


@pytest.mark.parametrize("content", [b"of another machine", b"damaged"])
def test_what_is_no_timing_cache_of_this_machine_is_not_lost(trt, model_dir, tmp_path, content):
    """A file that the user named may be anything; that in the cache folder is ours."""
    (tmp_path / "other").write_bytes(content)
    (warning,) = build(model_dir, tmp_path / "engine", timing_cache=tmp_path / "other").warnings
    assert "other is damaged, or of another GPU or TensorRT: it is not changed; give another file" in warning
    assert (tmp_path / "other").read_bytes() == content
    build(model_dir, tmp_path / "engine")
    (default,) = default_caches(tmp_path)
    default.write_bytes(content)
    (warning,) = build(model_dir, tmp_path / "engine").warnings
    assert "is damaged, or of another GPU or TensorRT: it is replaced" in warning
    assert default.read_bytes() == b"measured"


def test_timing_caches_that_cannot_be_kept(trt, model_dir, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(qwen_model.QwenModelError, match=r"timing cache .*file/cache cannot be read: Not a directory"):
        build(model_dir, tmp_path / "engine", timing_cache=tmp_path / "file" / "cache")
    with pytest.raises(
        qwen_model.QwenModelError, match=r"\(--timing-cache\) is for the tensorrt back end, not for torch"
    ):
        build(model_dir, tmp_path / "engine", timing_cache=tmp_path / "given", backend="torch")
    assert not (tmp_path / "engine").exists()

    def refuse(path, target):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", refuse)
        summary = build(model_dir, tmp_path / "engine", timing_cache=tmp_path / "given")
    assert summary.warnings == (f"the timing cache {tmp_path / 'given'} cannot be written: Permission denied",)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # the user's cache folder is not one
    assert build(model_dir, tmp_path / "engine").warnings == ()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert build(model_dir, tmp_path / "engine").warnings == ()


def no_home():
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("name", ["tensorrt", "gpu", "compute_capability", "qwen_plugins"])
def test_an_engine_for_something_else_says_so(trt, model_dir, tmp_path, name):
    engine = build(model_dir, tmp_path / "engine").engine_dir
    config = json.loads((engine / "config.json").read_text())
    here = config["versions"][name]
    config["versions"][name] = "another"
    (engine / "config.json").write_text(json.dumps(config))
    message = f"built for {name} another, here {here}: build it again here from its checkpoint"
    with pytest.raises(qwen_model.QwenModelError, match=message) as error:
        qwen_model.load_engine(engine)
    command = (
        "(qwen-model build --backend tensorrt --model-dir CHECKPOINT --dtype float32 --max-batch-size 6 "
        f"--max-input-len 60 --max-output-len 30 --max-num-tokens 360 --output-dir {engine})"
    )
    assert command in str(error.value)


def test_hardware_compatible_engines_run_on_other_gpus(trt, model_dir, tmp_path, monkeypatch):
    summary = build(model_dir, tmp_path / "engine", hardware_compatible=True)
    engine = summary.engine_dir
    assert "gpu" not in summary.config.versions
    assert not summary.config.gemm_kernels  # measured on this GPU
    assert build(model_dir, tmp_path / "other").config.gemm_kernels
    session = qwen_model.load_engine(engine)
    assert session.device.engine.config.hardware_compatibility_level == "ampere plus"
    expected = session.generate([1, 2, 3], max_new_tokens=5).outputs
    monkeypatch.setattr(numpy_cuda.device, "name", "another")
    monkeypatch.setattr(numpy_cuda.device, "capability", (12, 0))
    assert qwen_model.load_engine(engine).generate([1, 2, 3], max_new_tokens=5).outputs == expected
    monkeypatch.setattr(numpy_cuda.device, "capability", (7, 5))
    with pytest.raises(qwen_model.QwenModelError, match=r"compute capability 8\.0 or later; this one has 7\.5$"):
        qwen_model.load_engine(engine)
    config = json.loads((engine / "config.json").read_text())
    assert config["compute_capabilities"] == ["8.0+"]
    config["versions"]["tensorrt"] = "9.9"
    (engine / "config.json").write_text(json.dumps(config))
    with pytest.raises(qwen_model.QwenModelError, match=r"built for tensorrt 9\.9.*--hardware-compatible --output-dir"):
        qwen_model.load_engine(engine)


def test_inspect_a_plan(trt, model_dir, tmp_path, capsys, monkeypatch):
    """Without the engine's folder: also one that another program built, and kept no details of."""
    from qwen_model import inspect

    plan = build(model_dir, tmp_path / "engine").engine_dir / "model.plan"
    plan.rename(tmp_path / "any.plan")
    path = str(tmp_path / "any.plan")
    inspect.main([path])
    printed = capsys.readouterr().out
    assert f"loaded by  TensorRT {trt.__version__} on NumPy\n" in printed
    assert re.search(r"\ninput_ids +input +int32 +\[-1\]\n", printed)
    assert re.search(r"profile 1: .*\n(.*\n)*?input_ids +1 +60 +360\n", printed)
    assert re.search(r"\n +3 x +layers\.\*\.mlp\.down +Layer\n", printed)
    inspect.main([path, "--all"])
    assert re.search(r"\nlayers\.2\.mlp\.down +Layer\n", capsys.readouterr().out)
    inspect.main([path, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert {"name": "layers.2.mlp.down", "kind": "Layer"} in found["layers"]
    assert found["num_profiles"] == 2
    inspector = SimpleNamespace(get_engine_information=lambda kind: json.dumps({"Layers": ["only a name"]}))
    with monkeypatch.context() as patched:
        patched.setattr(numpy_tensorrt.Engine, "create_engine_inspector", lambda engine: inspector)
        inspect.main([path])
    assert "1 layers\n   1 x  only a name" in capsys.readouterr().out
    for option in (["--picture", "x.svg"], ["--sequences", "2"], ["--prompt-tokens", "2"]):
        with pytest.raises(qwen_model.QwenModelError, match=r"any\.plan is a plan, which is not run: --picture"):
            inspect.main([path, *option])
    (tmp_path / "text").write_text("no plan")
    with pytest.raises(qwen_model.QwenModelError, match=rf"TensorRT {trt.__version__} does not load .*text\. It says:"):
        inspect.main([str(tmp_path / "text")])
    (tmp_path / "empty").write_text("")
    with pytest.raises(qwen_model.QwenModelError, match="does not load"):
        inspect.main([str(tmp_path / "empty")])
    monkeypatch.setattr(numpy_cuda.device, "count", 0)
    with pytest.raises(qwen_model.QwenModelError, match="loads a plan on an NVIDIA GPU only: the driver finds none"):
        inspect.main([path])


def test_damaged_and_missing_plans(trt, model_dir, tmp_path):
    engine = build(model_dir, tmp_path / "engine").engine_dir
    (engine / "model.plan").write_bytes(b"something else")
    with pytest.raises(qwen_model.QwenModelError, match=r"model.plan is damaged(.|\n)*Serialization assertion"):
        qwen_model.load_engine(engine)
    (engine / "model.plan").write_bytes(b"")
    with pytest.raises(qwen_model.QwenModelError, match=r"model\.plan is damaged"):
        qwen_model.load_engine(engine)
    (engine / "model.plan").unlink()
    with pytest.raises(qwen_model.QwenModelError, match=r"model\.plan is missing"):
        qwen_model.load_engine(engine)


def test_limits_that_are_not_the_plans(trt, model_dir, tmp_path):
    engine = build(model_dir, tmp_path / "engine").engine_dir
    path, whole = engine / "config.json", (engine / "config.json").read_text()
    for name, value, tensor in (
        ("max_batch_size", 7, "input_ids"),
        ("max_input_len", 59, "last_token_ids"),
        ("max_output_len", 31, "rotary_table"),
        ("max_num_tokens", 300, "input_ids"),
    ):
        config = json.loads(whole)
        config["limits"][name] = value
        path.write_text(json.dumps(config))
        with pytest.raises(qwen_model.QwenModelError, match=rf"not built for what config.json says \({tensor} differs"):
            qwen_model.load_engine(engine)
    config = json.loads(whole)
    config["dtype"] = config["weight_format"]["kind"] = "float16"
    path.write_text(json.dumps(config))
    with pytest.raises(qwen_model.QwenModelError, match=r"not built for what config.json says \(past_key_value_0"):
        qwen_model.load_engine(engine)
    config = json.loads(whole)
    config["kv_cache_dtype"] = "int8"
    path.write_text(json.dumps(config))
    with pytest.raises(qwen_model.QwenModelError, match=r"not built for what config.json says \(past_key_value_0"):
        qwen_model.load_engine(engine)


def test_memory_that_is_not_enough(trt, model_dir, tmp_path, monkeypatch):
    """For the plan, the cache and buffers; for what only the plan says; and while the plan is read."""
    engine = build(model_dir, tmp_path / "engine").engine_dir
    message = r"not enough GPU memory: 0.00 GiB for the plan, .* key-value cache .* for steps and logits are needed"
    one_sequence = 3 * 2 * 3 * 2 * 64 * 32 * 4  # and the page that nobody has
    for total in (1 << 10, one_sequence + 1000):
        monkeypatch.setattr(numpy_cuda.device, "total_bytes", numpy_cuda.used_bytes() + total)
        with pytest.raises(OutOfMemoryError, match=message):
            qwen_model.load_engine(engine)
    monkeypatch.undo()
    monkeypatch.setattr(trt.Runtime, "deserialize_cuda_engine", with_activations(trt, 8 << 30))
    with pytest.raises(OutOfMemoryError, match=r"not enough GPU memory: 8.00 GiB for activations"):
        qwen_model.load_engine(engine)
    monkeypatch.undo()
    _, taken = numpy_cuda.allocate(numpy_cuda.device.total_bytes // 2 + 1)
    with pytest.raises(OutOfMemoryError, match=r"memory ran out while .*model.plan was loaded(.|\n)*OutOfMemory"):
        qwen_model.load_engine(engine)
    numpy_cuda.free(taken)


def test_what_tensorrt_refuses(sessions, trt, monkeypatch):
    """For lack of memory it is the user's to put right; else it is a mistake of ours. Then the session goes on."""
    from qwen_model.backends.tensorrt.compat import LOG

    _, session = sessions
    expected = session.generate([1, 2, 3], max_new_tokens=5).outputs
    context = type(session.device._prefill_context)
    for said, kind in (("Error Code 1: Cuda Runtime (out of memory)", OutOfMemoryError), ("x", RuntimeError)):

        def refuse(self, stream, said=said):
            LOG.log(trt.ILogger.ERROR, said)
            return False

        with monkeypatch.context() as patched:
            patched.setattr(context, "execute_async_v3", refuse)
            with pytest.raises(kind, match=re.escape(said)):
                session.generate([1, 2, 3], max_new_tokens=5)
        assert session.generate([1, 2, 3], max_new_tokens=5).outputs == expected


def with_activations(trt, num_bytes):
    """`deserialize_cuda_engine` of engines that need so much memory."""
    read = trt.Runtime.deserialize_cuda_engine

    def deserialize(runtime, plan):
        engine = read(runtime, plan)
        name = "device_memory_size" if trt.__version__.startswith("8.") else "device_memory_size_v2"
        setattr(engine, name, num_bytes)
        return engine

    return deserialize


def test_the_log_does_not_grow(trt):
    from qwen_model.backends.tensorrt.compat import LOG

    for number in range(1000):
        LOG.log(trt.ILogger.WARNING, f"message {number}")
    assert len(LOG.messages) < 200
    assert LOG.take().splitlines() == [f"message {number}" for number in range(992, 1000)]


def test_weights_that_float16_cannot_hold(trt, tmp_path):
    model = model_files.hugging_face_model("Qwen2ForCausalLM", hidden_size=128, num_attention_heads=4).bfloat16()
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = 2.0**20
    model_files.save_hugging_face(model, tmp_path / "model")
    for backend in ("torch", "tensorrt"):
        with pytest.raises(
            qwen_model.QwenModelError,
            match=r"layers\.1\.mlp\.down\.weight has numbers up to 1.05e\+06, which float16 cannot.*--dtype bfloat16",
        ):
            build(tmp_path / "model", tmp_path / "engine", backend=backend, dtype="float16")
    assert not (tmp_path / "engine").exists()


def test_devices(trt, model_dir, tmp_path, monkeypatch):
    engine = build(model_dir, tmp_path / "engine").engine_dir
    with pytest.raises(qwen_model.QwenModelError, match="'cuda' or 'cuda:N', not 'cpu'"):
        qwen_model.load_engine(engine, device="cpu")
    with pytest.raises(qwen_model.QwenModelError, match="'cuda:1' does not exist"):
        qwen_model.load_engine(engine, device="cuda:1")
    monkeypatch.setattr(numpy_cuda.device, "count", 0)
    with pytest.raises(qwen_model.QwenModelError, match="the driver finds none"):
        qwen_model.load_engine(engine)
    with pytest.raises(qwen_model.QwenModelError, match="the driver finds none"):
        build(model_dir, tmp_path / "other")


def test_what_this_back_end_cannot_build(trt, tmp_path):
    narrow = model_files.hugging_face_model("Qwen2ForCausalLM")
    model_files.save_hugging_face(narrow, tmp_path / "narrow")
    with pytest.raises(qwen_model.QwenModelError, match=r"head_size is 14; expected one of 32.*use the torch back end"):
        build(tmp_path / "narrow", tmp_path / "engine")
    if trt.__version__.startswith("8."):
        with pytest.raises(qwen_model.QwenModelError, match="has no bfloat16: use --dtype float32 or float16"):
            build(tmp_path / "narrow", tmp_path / "engine", dtype="bfloat16")
    (tmp_path / "narrow" / "model.safetensors").unlink()
    (tmp_path / "narrow" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(qwen_model.QwenModelError, match=r"only be read with PyTorch.*safetensors"):
        build(tmp_path / "narrow", tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_bfloat16_checkpoints_become_what_there_is(trt, tmp_path):
    model = model_files.hugging_face_model("Qwen2ForCausalLM", hidden_size=128, num_attention_heads=4).bfloat16()
    model_files.save_hugging_face(model, tmp_path / "model")
    summary = build(tmp_path / "model", tmp_path / "engine", dtype=None)
    assert summary.config.dtype == ("float16" if trt.__version__.startswith("8.") else "bfloat16")
    said = any("the checkpoint is bfloat16" in warning for warning in summary.warnings)
    assert said == trt.__version__.startswith("8.")
    assert len(qwen_model.load_engine(tmp_path / "engine").generate([1, 2, 3]).outputs[0].output_ids) == 30


def test_the_fastest_kernels_are_built_into_the_engine(trt, model_dir, tmp_path, capsys):
    from qwen_model import inspect

    engine = build(model_dir, tmp_path / "engine")
    kernels = engine.config.gemm_kernels.values()
    assert set(kernels) == {((12, "stream"), (384, "cublas_lt:2")), ((12, "stream"), (64, "cublas_lt:2"))}  # the head
    loaded = qwen_model.load_engine(engine.engine_dir)
    gemms = [plugin for plugin in loaded.device.engine.network.plugins if plugin.name == "Gemm"]
    assert [list(plugin.fields["kernels"]) for plugin in gemms[:4]] == [[12, 0x10000, 384, 0x40002]] * 4
    inspect.main([str(engine.engine_dir)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    first = next(index for index, line in enumerate(lines) if "layers.*.attention.qkv" in line)
    assert lines[first][-4:] == ["1", "to", "12", "stream"]
    assert lines[first + 1] == ["13", "to", "384", "cublas_lt:2"]
    assert lines[first + 2] == ["385", "to", "rules"]
    for options in ({"tuning": False}, {"disable_plugins": ["gemm"]}):
        engine = build(model_dir, tmp_path / "engine", **options)
        assert engine.config.gemm_kernels == {}
        plugins = qwen_model.load_engine(engine.engine_dir).device.engine.network.plugins
        assert not any("kernels" in plugin.fields for plugin in plugins)


def test_inspect_shows_no_layers_of_a_torch_engine(model_dir, tmp_path, capsys):
    from qwen_model import inspect

    build(model_dir, tmp_path / "torch", backend="torch")
    inspect.main([str(tmp_path / "torch")])
    assert "6 sequences" in capsys.readouterr().out
    inspect.main([str(tmp_path / "torch"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["linear_layers"], found["layers"]) == ([], {})  # on a CPU no kernel of ours runs
    with pytest.raises(qwen_model.QwenModelError, match="draws the layers of a TensorRT engine"):
        inspect.main([str(tmp_path / "torch"), "--picture", str(tmp_path / "x.svg")])


def test_inspect(trt, model_dir, tmp_path, capsys, monkeypatch):
    from qwen_model import inspect

    engine = str(build(model_dir, tmp_path / "engine").engine_dir)
    inspect.main([engine, "--picture", str(tmp_path / "picture.svg")])
    printed = capsys.readouterr().out
    assert "prefill of 1 x 60 tokens" in printed
    assert "layers.*.attention.qkv" in printed
    ElementTree.parse(tmp_path / "picture.svg")
    inspect.main([engine, "--picture", str(tmp_path / "picture.svg")])  # one of ours is replaced
    capsys.readouterr()
    (tmp_path / "logo.svg").write_text("<svg/>")
    inspect.main(["--engine-dir", engine, "--json", "--sequences", "3", "--prompt-tokens", "5"])
    found = json.loads(capsys.readouterr().out)
    assert found["tensors"][0]["name"] == "input_ids"
    assert "layers.2.mlp.down" in [layer["name"] for layer in found["layers"]["decode"]]
    monkeypatch.setattr("qwen_model.evaluation.inspection.load_engine", None)  # all of this is checked before
    for arguments, message in (
        (["--sequences", "9"], "--sequences must be 1 to 6"),
        (["--prompt-tokens", "61"], "must be 1 to 60"),
        (["--picture", "x.png"], "ends in .svg"),
        (["--picture", "nowhere/x.svg"], "there is no folder nowhere"),
        (["--picture", str(tmp_path / "logo.svg")], "logo.svg already exists and is no picture of this command"),
        (["--picture", str(tmp_path / ("n" * 300 + ".svg"))], "cannot be written: File name too long"),
        (["--engine-dir", engine], "give the engine once"),
    ):
        with pytest.raises(qwen_model.QwenModelError, match=message):
            inspect.main([engine, *arguments])
    assert (tmp_path / "logo.svg").read_text() == "<svg/>"


def test_the_commands(trt, model_dir, tmp_path, capsys):
    from qwen_model import build as build_command
    from qwen_model import perplexity, run

    engine, limits = str(tmp_path / "engine"), ["--max-input-len", "64", "--max-output-len", "16"]
    arguments = ["--backend", "tensorrt", "--model-dir", str(model_dir), "--output-dir", engine]
    build_command.main([*arguments, "--dtype", "float32", *limits])
    assert "back end    tensorrt, float32\n" in capsys.readouterr().out
    run.main(["--engine-dir", engine, "--json", "--max-new-tokens", "5", "abc", "de"])
    assert [len(output["output_ids"]) for output in json.loads(capsys.readouterr().out)["outputs"]] == [5, 5]
    run.main(["--engine-dir", engine, "--stream", "--max-new-tokens", "5", "abc"])
    (tmp_path / "text").write_text("a text " * 20)
    perplexity.main(["--engine-dir", engine, "--text-file", str(tmp_path / "text"), "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["window"] == 64
