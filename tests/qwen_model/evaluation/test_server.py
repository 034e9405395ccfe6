"""A server that is driven over HTTP: what is sent, what is timed, and what becomes of its faults."""

import socket

import pytest

from qwen_model.common.errors import QwenModelError
from qwen_model.evaluation.server import Server
from qwen_model.evaluation.throughput import measure_server
from qwen_model.evaluation.workload import Request
from tests.qwen_model.evaluation import fake_server


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One token for each byte."""
    pytest.importorskip("tokenizers")
    from qwen_model.checkpoints.tokenizer import load_tokenizer
    from tests.qwen_model.conftest import save_byte_tokenizer

    return load_tokenizer(save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def request(tokenizer, text="hello", new_tokens=4):
    return Request(tokenizer.encode(text), new_tokens)


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_a_request_and_its_times(tokenizer, endpoint):
    with fake_server.running() as server:
        record = Server(server.url, tokenizer, endpoint).send(request(tokenizer))
    ((path, body),) = server.bodies
    assert record.error is None
    assert (record.prompt_tokens, record.generated_tokens, len(record.arrivals)) == (5, 4, 4)
    assert record.first_token_seconds >= fake_server.GAP
    assert record.arrivals[-1] - record.sent >= 4 * fake_server.GAP
    assert min(record.gaps) > 0
    asked = {"model": fake_server.MODEL, "max_tokens": 4, "temperature": 0, "stream": True, "ignore_eos": True}
    assert asked.items() <= body.items()
    if endpoint == "chat":
        assert (path, body["messages"]) == ("/v1/chat/completions", [{"role": "user", "content": "hello"}])
    else:
        assert (path, body["prompt"]) == ("/v1/completions", "hello")


def test_without_usage_the_tokenizer_counts(tokenizer):
    with fake_server.running(usage=False) as server:
        record = Server(f"{server.url}/v1/", tokenizer, model="mine", ignore_eos=False).send(
            request(tokenizer, "hi", 3)
        )
    assert (record.prompt_tokens, record.generated_tokens) == (2, 6)  # each event has two bytes, which are two tokens
    assert server.bodies[0][1]["model"] == "mine"
    assert "ignore_eos" not in server.bodies[0][1]


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("error", "HTTP 500: the engine is on fire"),
        ("hang up at once", "Remote end closed connection without response"),
        ("hang up", "the server closed the connection before the end of the answer (after 2 events)"),
        ("error in the stream", "no memory (after 2 events)"),
        ("other events", "the server sent an event that is not one of the API: {'choices': ['ab']}"),
        ("not JSON", "the server sent b'<html>' where a JSON object is expected"),
    ],
)
def test_faults_are_in_the_record_and_in_the_row(tokenizer, fault, error):
    with fake_server.running(fault) as server:
        target = Server(server.url, tokenizer)
        record = target.send(request(tokenizer))
        rows = measure_server("fake", target, [(2, [request(tokenizer)] * 3)], None, 0, lambda heading: None)
    assert record.error == error
    assert (rows[0].rates, rows[0].failed) == (None, 3)
    assert rows[0].note == f"3 of 3 requests failed: {record.error}"


def test_nobody_listens(tokenizer):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(QwenModelError, match=r"does not name its model .*refused.*--model"):
            Server(url, tokenizer)
        assert "refused" in Server(url, tokenizer, model="m").send(request(tokenizer)).error


def test_a_server_that_is_silent_times_out(tokenizer):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        target = Server(f"http://127.0.0.1:{silent.getsockname()[1]}", tokenizer, model="m", timeout=0.1)
        assert "timed out" in target.send(request(tokenizer)).error


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://host:port"])
def test_addresses_that_are_none(tokenizer, url):
    with pytest.raises(QwenModelError, match=r"begins with http:// or https://|no valid port"):
        Server(url, tokenizer, model="m")


def test_a_server_without_models(tokenizer):
    with fake_server.running("no models") as server, pytest.raises(QwenModelError, match="does not name its model"):
        Server(server.url, tokenizer)
