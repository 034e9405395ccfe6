"""Which GPU a TensorRT session is on, and GPUs that cannot be used, on the stand-ins in NumPy."""

import threading

import pytest

import qwen_model
from tests import stand_ins
from tests.qwen_model.model_files import random_prompt
from tests.qwen_model.tensorrt_reference import save_model
from tests.stand_ins import numpy_cuda

PROMPTS = [random_prompt(20, seed=1), random_prompt(7, seed=2)]


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """On a machine with two GPUs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(numpy_cuda.device, "count", 2)
    model_dir = save_model("Qwen2ForCausalLM", tmp_path / "model")
    limits = {"max_batch_size": 6, "max_input_len": 60, "max_output_len": 30}
    with stand_ins.installed("10.14.1"):
        folder = tmp_path / "engine"
        qwen_model.build_engine(model_dir, output_dir=folder, backend="tensorrt", dtype="float32", **limits)
        yield folder
    numpy_cuda.thread.device = 0


def everything(session):
    """What a session is asked, all of which goes to its device."""
    sampling = qwen_model.SamplingOptions(temperature=1.2, repetition_penalty=1.3, seed=1)
    return [
        session.generate(PROMPTS, max_new_tokens=8).outputs,
        session.generate(PROMPTS, max_new_tokens=8, sampling=sampling).outputs,
        session.generate(PROMPTS, max_new_tokens=8, num_beams=3).outputs,
        list(session.stream(PROMPTS, max_new_tokens=8)),
        session.logits(PROMPTS[0]).tolist(),
        sorted(session.device.measure_layers(PROMPTS, 2)),
    ]


def test_two_sessions_keep_to_their_devices(engine):
    second = qwen_model.load_engine(engine, device="cuda:1")
    assert numpy_cuda.thread.device == 0  # as before
    first = qwen_model.load_engine(engine)
    expected = everything(first)
    assert everything(second) == expected
    assert numpy_cuda.thread.device == 0
    numpy_cuda.thread.device = 1  # as other libraries may do between two calls
    assert everything(first) == everything(second) == expected
    assert numpy_cuda.thread.device == 1
    mixed = zip(*(session.stream(PROMPTS, max_new_tokens=8) for session in (first, second)), strict=True)
    assert [event for event, _ in mixed] == expected[3]


def test_a_session_in_another_thread(engine):
    """Whose present device is the first one, whatever it was where the engine was loaded."""
    session = qwen_model.load_engine(engine, device="cuda:1")
    expected, found = everything(session), []

    def work():
        found.append(everything(session))
        found.append(numpy_cuda.thread.device)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [expected, 0]


def test_a_request_that_fails_leaves_the_present_device(engine, monkeypatch):
    from qwen_model.backends.tensorrt import cuda_runtime

    session = qwen_model.load_engine(engine, device="cuda:1")
    expected = session.generate(PROMPTS, max_new_tokens=8).outputs
    launch, graphs = session.device._sampler.choose, set(numpy_cuda.device.graphs)

    def fail(*arguments):
        raise ValueError("in the middle of a step")

    monkeypatch.setattr(session.device._sampler, "choose", fail)
    with pytest.raises(ValueError, match="middle"):
        session.generate(PROMPTS[0], max_new_tokens=8)
    with cuda_runtime.on_device(1), pytest.raises(ValueError, match="middle"):
        cuda_runtime.Graph(session.device.stream, fail)  # in a capture
    assert (numpy_cuda.thread.device, set(numpy_cuda.device.graphs) - graphs) == (0, set())
    monkeypatch.setattr(session.device._sampler, "choose", launch)
    assert session.generate(PROMPTS, max_new_tokens=8).outputs == expected


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("cudaErrorNoDevice", "the driver finds none"),
        (
            "cudaErrorInsufficientDriver",
            r"no NVIDIA driver, or one older than 580.*cudaErrorInsufficientDriver: as the",
        ),
        ("cudaErrorDevicesUnavailable", r"the driver gives none \(cudaErrorDevicesUnavailable: as the stand-in says"),
    ],
)
def test_why_there_is_no_device(engine, monkeypatch, error, message):
    monkeypatch.setattr(numpy_cuda.device, "count_error", numpy_cuda.cudaError_t[error])
    with pytest.raises(qwen_model.QwenModelError, match=f"needs an NVIDIA GPU, for building too: .*{message}"):
        qwen_model.load_engine(engine)
