"""The TensorRT Device on TensorRT, CUDA and kernels in NumPy.

Steps over pages give what transformers and plain writings of other models do, by the tests of the torch Device, and
what that Device does, also with caches of 8 bits.
"""

import numpy as np
import pytest

import qwen_model
from qwen_model.engine.back_ends import back_end
from qwen_model.interface.engine_config import EngineConfig
from qwen_model.interface.memory import page_bytes
from qwen_model.interface.sampling import SamplingOptions
from tests import stand_ins
from tests.qwen_model.backends.device_runs import Running, generate, prompt_logits, run_chunks, run_decoding
from tests.qwen_model.backends.test_torch_device import (  # noqa: F401 (they run with this module's `pair`)
    PROMPTS,
    ROPE,
    Reference,
    test_a_sequence_comes_back_with_its_output,
    test_chunks_of_every_size,
    test_copied_pages,
    test_log_probabilities_and_masks,
    test_logits_of_rows,
    test_pages_in_any_order,
    test_prompts_join_while_others_decode,
    test_sampling_does_not_depend_on_the_company,
    test_shared_pages,
)
from tests.qwen_model.model_files import (
    hugging_face_model,
    qwen_v1,
    save_hugging_face,
    save_reference,
)
from tests.qwen_model.tensorrt_reference import ARCHITECTURES, save_model
from tests.stand_ins import numpy_cuda

VERSIONS = ["8.6.0", "10.14.1", "11.1.0"]
LIMITS = {"max_batch_size": 5, "max_input_len": 160, "max_output_len": 40, "max_num_tokens": 300}
PAGES = [[3, 9], [7], [12, 4, 6], [5]]
NEW_TOKENS = 12
HEADS = {"hidden_size": 128, "num_attention_heads": 4}


def reference_model(name, folder):
    """A model with heads of a size that the plug-in has, saved in the folder."""
    if name == "qwen-v1":
        model, config = qwen_v1(hidden_size=96, num_attention_heads=3, kv_channels=32)
        save_reference(model, config, folder)
        return model
    changes = {"rope_parameters": ROPE, "max_position_embeddings": 48} if name == "llama-dynamic" else {}
    model = hugging_face_model("Qwen2ForCausalLM" if name == "qwen2" else "LlamaForCausalLM", **HEADS, **changes)
    save_hugging_face(model, folder)
    return model


@pytest.fixture(scope="module", params=["8.6.0 qwen2", "10.14.1 llama-dynamic", "11.1.0 qwen-v1"])
def pair(request, tmp_path_factory):
    version, name = request.param.split()
    folder = tmp_path_factory.mktemp(name)
    model = reference_model(name, folder / "model")
    limits = {"max_batch_size": 5, "max_input_len": 160, "max_output_len": 40}
    with pytest.MonkeyPatch.context() as patched, stand_ins.installed(version):
        patched.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        settings = {"backend": "tensorrt", "dtype": "float32", **limits}
        qwen_model.build_engine(folder / "model", output_dir=folder / "engine", **settings)
        yield Reference(model), load(folder / "engine")


def load(folder, **options):
    config = EngineConfig.read(folder)
    return back_end(config.backend).load_device(folder, config, "cpu" if config.backend == "torch" else None, **options)


@pytest.fixture(params=VERSIONS)
def trt(request, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with stand_ins.installed(request.param) as module:
        yield module


def both(model_dir, folder, **options):
    """The Device of each back end."""
    found = []
    for name in ("torch", "tensorrt"):
        settings = {"backend": name, "dtype": "float32", **LIMITS, **options}
        qwen_model.build_engine(model_dir, output_dir=folder / name, **settings)
        found.append(load(folder / name))
    return found


def sequences():
    return [Running(prompt, slot, list(pages)) for slot, (prompt, pages) in enumerate(zip(PROMPTS, PAGES, strict=True))]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("options", [{}, {"disable_plugins": ["rotary"]}], ids=str)
def test_tokens_and_logits_are_those_of_the_torch_device(trt, architecture, options, tmp_path):
    theirs, ours = both(save_model(architecture, tmp_path / "model"), tmp_path, **options)
    assert generate(ours, sequences(), NEW_TOKENS, chunk=50) == generate(theirs, sequences(), NEW_TOKENS)
    for prompt in PROMPTS[1:3]:
        found = prompt_logits(ours, prompt, [8, 2, 10], chunk=60)
        np.testing.assert_allclose(found, prompt_logits(theirs, prompt, [1, 2, 3]), atol=2e-4)


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_8_bit_caches_hold_what_those_of_the_torch_device_do(trt, kv_cache_dtype, tmp_path):
    model_dir = save_model("Qwen2ForCausalLM", tmp_path / "model")
    theirs, ours = both(model_dir, tmp_path, kv_cache_dtype=kv_cache_dtype)
    exact = both(model_dir, tmp_path)[1]
    for prompt in PROMPTS[1:3]:
        found, expected, wide = (
            prompt_logits(device, prompt, [8, 2, 10], chunk=60) for device in (ours, theirs, exact)
        )
        # A number beside the middle of two codes may become either.
        assert np.abs(found - expected).mean() < 0.05 * np.abs(found - wide).mean()
    own = page_bytes(ours.config.model, "float32", kv_cache_dtype)
    assert own * 3 < page_bytes(ours.config.model, "float32")
    assert ours._cache[0].num_bytes * ours.config.model.num_layers == ours.num_pages * own


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_model("Qwen2ForCausalLM", tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def device(trt, model_dir, tmp_path):
    qwen_model.build_engine(model_dir, output_dir=tmp_path / "e", backend="tensorrt", dtype="float32", **LIMITS)
    return load(tmp_path / "e")


def test_the_cache_takes_the_memory_that_is_left(trt, model_dir, tmp_path, monkeypatch):
    limits = {**LIMITS, "max_batch_size": 200}
    qwen_model.build_engine(model_dir, output_dir=tmp_path / "e", backend="tensorrt", dtype="float32", **limits)
    total = 60 << 20
    monkeypatch.setattr(numpy_cuda.device, "total_bytes", total)
    before, found = numpy_cuda.used_bytes(), []
    for utilization in (0.5, 0.9):
        loaded = load(tmp_path / "e", gpu_memory_utilization=utilization)
        used = numpy_cuda.used_bytes() - before
        assert used == pytest.approx(utilization * total - before, rel=0.02)
        found.append(loaded.num_pages)
        del loaded
    size = page_bytes(EngineConfig.read(tmp_path / "e").model, "float32")
    assert found[1] - found[0] == pytest.approx(0.4 * total / size, abs=1.5)
    for wrong in (0, 1.5, "much", True):
        with pytest.raises(qwen_model.QwenModelError, match="gpu_memory_utilization must be a number above 0 and at"):
            load(tmp_path / "e", gpu_memory_utilization=wrong)
    with pytest.raises(qwen_model.QwenModelError, match="one sequence of 200 tokens needs"):
        load(tmp_path / "e", gpu_memory_utilization=before / total + 0.02)


def test_no_more_pages_than_sequences_can_have(device):
    assert device.num_pages == 5 * 4 + 1


def test_deterministic_engines_are_those_of_torch(device, tmp_path):
    with pytest.raises(qwen_model.QwenModelError, match="for --deterministic build one for the torch back end"):
        load(tmp_path / "e", deterministic=True)


def test_graphs_of_a_few_sizes(device):
    """They are captured once, before they are timed or when they are first needed."""
    captured = []
    for count in (3, 4, 2, 5, 1):
        before = set(numpy_cuda.device.graphs)
        device.prepare(count)
        captured.append(len(set(numpy_cuda.device.graphs) - before))
    assert captured == [3, 0, 0, 1, 0]  # of 1, 2 and 4, then of 5


def test_preparing_changes_nothing_of_running_sequences(trt, device):
    expected = generate(device, sequences(), NEW_TOKENS)
    running = sequences()[:2]
    device.start([sequence.start() for sequence in running])
    run_chunks(device, running, 40)
    run_decoding(device, running, 3)
    device.prepare(5)
    run_decoding(device, running, NEW_TOKENS - 4)
    assert [sequence.output for sequence in running] == expected[:2]


def test_memory_stays_as_it_is(device):
    used = []
    for turn in range(4):
        sampled = [Running(PROMPTS[0], 0, [3, 9], SamplingOptions(temperature=1.0, repetition_penalty=1.2))]
        generate(device, sampled if turn % 2 else sequences(), 8)
        prompt_logits(device, PROMPTS[2], [1, 2, 8])
        used.append(numpy_cuda.used_bytes())
    assert used[2:] == used[2:3] * 2


def test_nothing_of_a_page_that_others_left_is_read(device):
    expected = generate(device, sequences(), NEW_TOKENS)
    for cache in device._cache:
        cache.fill(0xFF, device.stream)  # NaN
    assert generate(device, sequences(), NEW_TOKENS) == expected


def test_a_present_that_is_not_its_past(device):
    """It would be a copy of the pool, and of every other sequence in it."""
    _, other = numpy_cuda.allocate(device._cache[0].num_bytes)
    device._prefill_context.set_tensor_address("present_key_value_0", other)
    with pytest.raises(AssertionError, match="the cache was not changed in place"):
        prompt_logits(device, PROMPTS[1], [1])
    numpy_cuda.free(other)


def test_layers_of_too_many_prompts(device):
    times = device.measure_layers([[1, 2, 3]] * 4, 2)
    assert set(times) == {"prefill", "decode"}
    assert "layers.0.attention" in times["decode"]
    with pytest.raises(qwen_model.QwenModelError, match="prompts of 320 tokens in all are too many for one step"):
        device.measure_layers([[1] * 160] * 2, 2)


def test_nan_is_no_token_and_harms_nobody(device):
    """The sequence goes on with some token; the others get theirs."""
    expected = generate(device, sequences(), NEW_TOKENS)
    running = sequences()
    device.start([sequence.start() for sequence in running])
    run_chunks(device, running, 1000)
    device._logits.fill(0xFF, device.stream)
    device._to_choose = np.array([0], np.int32), device._to_choose[1]
    assert device.choose().wait().tokens.tolist() == [-1]
    run_decoding(device, running, NEW_TOKENS - 1)
    assert [each.output for each in running[1:]] == expected[1:]
