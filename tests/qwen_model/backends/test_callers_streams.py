"""Threads that use one device, each on a CUDA stream of its own: on stand-ins for streams, and on a GPU."""

from __future__ import annotations

import threading
from itertools import cycle

import numpy as np
import pytest
import torch

import qwen_model
from qwen_model.backends.torch.back_end import load_device
from qwen_model.backends.torch.device import CallersStreams
from qwen_model.interface.engine_config import EngineConfig
from tests.qwen_model.backends.device_runs import Running, batch_of, generate
from tests.qwen_model.model_files import hugging_face_model, random_prompt, save_hugging_face

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "head_dim": 64, "vocab_size": 1000}
PROMPTS = [random_prompt(length, seed=length, vocab_size=1000) for length in (7, 40, 100, 33)]


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    save_hugging_face(hugging_face_model("Qwen2ForCausalLM", num_key_value_heads=1, **SIZES), folder / "model")
    limits = {"max_batch_size": 8, "max_input_len": 200, "max_output_len": 100}
    qwen_model.build_engine(folder / "model", output_dir=folder / "engine", dtype="float32", **limits)
    return folder / "engine"


def running():
    return [Running(prompt, slot, [3 * slot + 1, 3 * slot + 2, 3 * slot + 3]) for slot, prompt in enumerate(PROMPTS)]


class Stream:
    def __init__(self):
        self.done = []

    def wait_stream(self, other):
        self.done.append(other)

    def synchronize(self):
        self.done.append("host")


def test_a_stream_waits_for_the_one_before_it(monkeypatch):
    first, second = Stream(), Stream()
    current = first
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    streams = CallersStreams(torch.device("cuda", 0))
    streams.follow()
    streams.finish()
    assert first.done == second.done == []  # with one stream there is nothing to wait for
    current = second
    streams.follow()
    streams.follow()
    assert (first.done, second.done) == ([], [first])
    streams.finish()
    assert second.done == [first, "host"]
    current = first
    streams.follow()
    streams.finish()
    assert (first.done, second.done) == ([second], [first, "host"])


def test_whatever_a_device_launches_is_in_order(engine_dir):
    device = load_device(engine_dir, EngineConfig.read(engine_dir), "cpu")
    assert device.streams is None
    calls = []

    class Streams:
        def follow(self):
            calls.append("follow")

    class Recorded:
        def __getattr__(self, name):
            def called(*arguments, **options):
                device.streams = Streams()
                calls.append(name)
                return getattr(device, name)(*arguments, **options)

            return called

    generate(Recorded(), running(), 5)
    Recorded().prepare(2)
    Recorded().copy_pages([(1, 5)])
    Recorded().logits(batch_of([running()[0].chunk(5)]), np.zeros(1, np.int32))
    Recorded().run_observed(PROMPTS[0], 0, lambda name, result: result)
    names = [name for name in calls if name != "follow"]
    assert set(names) == {"start", "forward", "choose", "prepare", "copy_pages", "logits", "run_observed"}
    assert calls == [word for name in names for word in (name, "follow")]


@pytest.mark.gpu
def test_calls_on_several_streams(engine_dir):
    """Each stream is behind with other work when a call comes: without order a step would overtake the one before."""
    config = EngineConfig.read(engine_dir)
    gpu, cpu = (load_device(engine_dir, config, place) for place in ("cuda", "cpu"))
    streams = cycle([torch.cuda.Stream(), torch.cuda.default_stream(), torch.cuda.Stream()])

    class Wandering:
        def __getattr__(self, name):
            def called(*arguments, **options):
                with torch.cuda.stream(next(streams)):
                    torch.cuda._sleep(1_000_000)
                    return getattr(gpu, name)(*arguments, **options)

            return called

    expected = generate(cpu, running(), 60)
    for _ in range(3):
        assert generate(Wandering(), running(), 60) == expected


@pytest.mark.gpu
def test_threads_with_streams_of_their_own_share_a_session(engine_dir):
    session = qwen_model.load_engine(engine_dir, device="cuda")
    cpu = qwen_model.load_engine(engine_dir, device="cpu")
    expected = [output.output_ids for output in cpu.generate(PROMPTS, max_new_tokens=60).outputs]
    found: dict[int, list[list[int]]] = {}

    def work(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(4):
                torch.cuda._sleep(2_000_000 * index)
                result = session.generate(PROMPTS[index], max_new_tokens=60)
                found.setdefault(index, []).append(result.outputs[0].output_ids)

    session.device.prepare(len(PROMPTS))
    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {index: [ids] * 4 for index, ids in enumerate(expected)}
