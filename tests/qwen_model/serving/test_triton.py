"""Test deploy/triton in NVIDIA's Triton on the CPU, with NVIDIA's client."""

from __future__ import annotations

import json
import os
import queue
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qwen_model
from qwen_model import SamplingOptions

from .triton_process import REPOSITORY, TritonProcess, missing

pytestmark = [pytest.mark.triton, pytest.mark.skipif(bool(missing()), reason=str(missing()))]
PROMPTS = ["def f(x):", "import", "class A:\n    def __init__(self", "for i in range(", "# ünï 😀"]
TYPES = {str: ("BYTES", np.object_), bool: ("BOOL", np.bool_), int: ("INT32", np.int32), float: ("FP32", np.float32)}
SLOTS, LONG = 4, 1500


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an engine of few slots, and with outputs so long that only the end of a request frees one."""
    folder = tmp_path_factory.mktemp("triton") / "engine"
    limits = {"max_batch_size": SLOTS, "max_input_len": 512, "max_output_len": LONG}
    qwen_model.build_engine(output_dir=folder, dtype="float32", **limits)
    return folder


@pytest.fixture(scope="module")
def process(engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonProcess]:
    started = TritonProcess(engine_dir, tmp_path_factory.mktemp("server"), max_waiting="64")
    yield started
    if not started.ended:
        engine = started.engine()
        assert started.stop() == 0, started.log
        assert not Path(f"/proc/{engine}").exists()
        assert "Traceback" not in started.log


@pytest.fixture
def triton(process: TritonProcess) -> Iterator[TritonProcess]:
    """Return the Triton of all tests. If it ends by itself, one test fails, with its log, and the rest is skipped."""
    if process.ended:
        pytest.skip("Triton has ended: the failure of an earlier test has its log")
    process.wait_until_ready()
    yield process
    assert not process.ended, f"Triton has ended by itself with status {process.process.poll()}:\n{process.log}"


@pytest.fixture(scope="module")
def session(engine_dir: Path) -> qwen_model.Session:
    return qwen_model.load_engine(engine_dir, device="cpu")


@dataclass
class Answer:
    """Hold what has come of a request.

    times: the number of each of its responses among those of all requests. error: of the oldest that has not ended,
    since Triton does not say of which one an error is.
    """

    texts: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    reason: str = ""
    error: str = ""
    times: list[int] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return bool(self.reason or self.error)

    @property
    def values(self) -> tuple[str, list[int], str, str]:
        return "".join(self.texts), self.ids, self.reason, self.error


class Stream:
    """Send requests over one of gRPC's streams."""

    def __init__(self, url: str):
        import tritonclient.grpc as client

        self._client = client
        self._connection = client.InferenceServerClient(url)
        self._responses: queue.SimpleQueue[Any] = queue.SimpleQueue()
        # Without the header triton_grpc_error, with which errors end Triton: see deploy/triton/README.md.
        self._connection.start_stream(lambda result, error: self._responses.put((result, error)))
        self.answers: list[Answer] = []
        self._count = 0

    def send(self, **inputs: Any) -> Answer:
        """Send a request."""
        tensors = []
        for name, value in inputs.items():
            values = value if isinstance(value, list) else [value]
            kind, dtype = ("UINT64", np.uint64) if name == "seed" else TYPES[type(values[0])]
            encoded = [each.encode() if isinstance(each, str) else each for each in values]
            tensor = self._client.InferInput(name, [len(values)], kind)
            tensor.set_data_from_numpy(np.array(encoded, dtype))
            tensors.append(tensor)
        self._connection.async_stream_infer("qwen", tensors, request_id=str(len(self.answers)))
        self.answers.append(Answer())
        return self.answers[-1]

    def read(self) -> None:
        """Take the next response."""
        result, error = self._responses.get(timeout=60)
        self._count += 1
        if error is not None:
            next(answer for answer in self.answers if not answer.ended).error = str(error)
            return
        answer = self.answers[int(result.get_response().id)]
        assert not answer.reason
        answer.texts.append(result.as_numpy("text_output")[0].decode())
        answer.ids += result.as_numpy("output_ids").tolist()
        answer.reason = result.as_numpy("finish_reason")[0].decode()
        answer.times.append(self._count)

    def read_all(self) -> None:
        """Take responses until all requests have ended."""
        while not all(answer.ended for answer in self.answers):
            self.read()

    def close(self) -> None:
        """Cancel what runs.

        What has ended is not cancelled: Triton never frees a request that is cancelled at the moment of its last
        response, and then it cannot unload the model.
        """
        self._connection.stop_stream(cancel_requests=not all(answer.ended for answer in self.answers))
        self._connection.close()


@pytest.fixture
def stream(triton: TritonProcess) -> Iterator[Stream]:
    with closing(Stream(triton.grpc)) as opened:
        yield opened


def expected(session: qwen_model.Session, prompt: Any, **options: Any) -> tuple[str | None, list[int], str, str]:
    [output] = session.generate([prompt], **options).outputs
    return output.text, output.output_ids, output.finish_reason, ""


def test_whole_and_streamed_answers_are_those_of_the_session(stream: Stream, session: qwen_model.Session) -> None:
    greedy = {"max_tokens": 24, "temperature": 0.0}
    answers = [
        [stream.send(text_input=each, stream=streams, **greedy) for each in PROMPTS] for streams in (False, True)
    ]
    stream.read_all()
    wanted = [expected(session, each, max_new_tokens=24, sampling=SamplingOptions()) for each in PROMPTS]
    for found in answers:
        assert [answer.values for answer in found] == wanted
    assert {len(answer.times) for answer in answers[0]} == {1}
    assert max(len(answer.times) for answer in answers[1]) > 1


def test_sampling_and_ends_are_those_of_the_session(stream: Stream, session: qwen_model.Session) -> None:
    options = {"temperature": 0.75, "top_p": 0.875, "top_k": 20, "repetition_penalty": 1.125, "seed": 7}
    given = {"max_tokens": 40, "stop_words": ["(", "self"], **options}
    answers = [stream.send(text_input=each, stream=True, **given) for each in PROMPTS]
    stream.read_all()
    arguments = {"max_new_tokens": 40, "stop": ["(", "self"], "sampling": SamplingOptions(**options)}
    assert [answer.values for answer in answers] == [expected(session, each, **arguments) for each in PROMPTS]


def test_messages_go_through_the_chat_template(stream: Stream, session: qwen_model.Session) -> None:
    messages = [{"role": "user", "content": "def f(x):<|im_end|>"}]
    answer = stream.send(messages=json.dumps(messages), max_tokens=12, temperature=0.0)
    stream.read_all()
    settings = {"chat": True, "sanitize_control_tokens": True, "sampling": SamplingOptions()}
    assert answer.values == expected(session, messages, max_new_tokens=12, **settings)


def test_requests_are_in_the_engine_at_a_time(stream: Stream, session: qwen_model.Session) -> None:
    """A short request that comes after a long one ends before it; and many of all lengths are answered rightly."""
    long = stream.send(text_input="x", stream=True, max_tokens=100, ignore_eos=True, temperature=0.0)
    stream.read()
    short = stream.send(text_input="y", stream=True, max_tokens=3, ignore_eos=True, temperature=0.0)
    stream.read_all()
    assert long.times[0] < short.times[0] <= short.times[-1] < long.times[-1]  # a response can have several tokens
    assert len(long.ids) == 100
    draw = random.Random(1)
    cases = [(draw.choice(PROMPTS), draw.randint(1, 30), draw.random() < 0.5) for _ in range(24)]
    answers = [
        stream.send(text_input=text, stream=streams, max_tokens=count, temperature=0.0)
        for text, count, streams in cases
    ]
    stream.read_all()
    for (text, count, _), answer in zip(cases, answers, strict=True):
        assert answer.values == expected(session, text, max_new_tokens=count, sampling=SamplingOptions())


def test_a_client_that_goes_away_frees_its_sequences(triton: TritonProcess) -> None:
    with closing(Stream(triton.grpc)) as gone:
        for _ in range(SLOTS + 64 + 1):
            gone.send(text_input="x", stream=True, max_tokens=LONG, ignore_eos=True)
        while sum(bool(answer.texts) for answer in gone.answers) < SLOTS or not gone.answers[0].error:
            gone.read()
        assert gone.answers[0].error == "64 requests are waiting already: try again later"
        time.sleep(0.5)  # not at the moment of that last response: see Stream.close
    end = time.monotonic() + 20
    while not (answer := triton.generate(text_input="x", max_tokens=1)).is_success and time.monotonic() < end:
        time.sleep(0.1)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "give either text_input or messages"),
        ({"text_input": "x", "messages": "[]"}, "give either text_input or messages"),
        ({"text_input": "x", "temperature": 3.0}, "temperature: Input should be less than or equal to 2"),
        ({"text_input": "x", "max_tokens": LONG + 1}, f"more than this server's limit of {LONG}"),
        ({"text_input": "x " * 4000}, "more than this server's limit of 512"),
        ({"text_input": "x", "stop_words": [""]}, "none of them empty or longer"),
        ({"messages": "[{"}, "messages is not JSON"),
        ({"messages": "[" * 100000}, "messages is not JSON: maximum recursion depth"),
        ({"messages": '[{"role": "user"}]'}, 'must be {"role": ..., "content": ...}'),
        ({"messages": "3"}, "messages: Input should be a valid list"),
    ],
)
def test_a_wrong_input_is_an_error_of_triton(
    triton: TritonProcess, stream: Stream, inputs: dict[str, Any], message: str
) -> None:
    answer = triton.generate(**inputs)
    assert answer.status_code == 400
    assert message in answer.json()["error"]
    if inputs:
        refused = stream.send(**inputs)
        stream.read_all()
        assert message in refused.error


def test_errors_of_many_streams(triton: TritonProcess) -> None:
    """Triton goes on, and a stream with it, when requests end with an error, as the first ones or after others."""
    for _ in range(50):
        with closing(Stream(triton.grpc)) as opened:
            for _ in range(2):
                refused = opened.send(text_input="x", max_tokens=LONG + 1)
                opened.read_all()
                assert "more than this server's limit" in refused.error
            answered = opened.send(text_input="x", max_tokens=1)
            opened.read_all()
            assert answered.reason == "length"


def test_the_example_client(triton: TritonProcess) -> None:
    client = REPOSITORY.parent / "client.py"
    for address, status, said in ((triton.grpc, 0, "(length)"), ("127.0.0.1:9", 1, "127.0.0.1:9: ")):
        done = subprocess.run(
            [sys.executable, client, "def f(x):", address], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == status, done.stderr
        assert said in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_an_engine_that_ends_is_started_again(triton: TritonProcess, stream: Stream) -> None:
    answer = stream.send(text_input="x", stream=True, max_tokens=LONG, ignore_eos=True)
    stream.read()
    ended = triton.engine()
    os.kill(ended, signal.SIGKILL)
    stream.read_all()
    assert answer.error == "the engine has ended: try again later"
    end = time.monotonic() + 60
    while not (whole := triton.generate(text_input="x", max_tokens=1)).is_success and time.monotonic() < end:
        time.sleep(0.1)
    assert whole.status_code == 200, whole.text
    assert triton.engine() != ended


def test_a_wrong_engine_is_an_error_when_triton_starts(tmp_path: Path) -> None:
    process = TritonProcess(tmp_path / "nowhere", tmp_path)
    with pytest.raises(RuntimeError, match="is not an engine; make one with qwen-model build"):
        process.wait_until_ready()
