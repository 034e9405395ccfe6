"""Test the server as a user starts it: its processes, the engine on the CPU, and clients that nobody here wrote."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import qwen_model
from qwen_model import SamplingOptions

from .served import NAME
from .server_process import ServerProcess

pytestmark = pytest.mark.server
HELLO = [{"role": "user", "content": "def f(x):"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "size": {"type": "integer", "minimum": 0, "maximum": 999},
        "color": {"enum": ["red", "green"]},
    },
    "required": ["name", "size", "color"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
MANY = 900  # connections, fewer than the files that a process may usually open
PROMPTS = ["def f(x):", "import", "class A:\n    def __init__(self", "for i in range(", "# The"]


@pytest.fixture(scope="module")
def server(packaged_engine: Path) -> Iterator[ServerProcess]:
    running = ServerProcess(packaged_engine)
    yield running
    assert running.wait_for(running.is_idle), running.metrics()
    assert running.stop() == 0
    assert "Traceback" not in running.log


@pytest.fixture(scope="module")
def session(packaged_engine: Path) -> qwen_model.Session:
    return qwen_model.load_engine(packaged_engine, device="cpu")


def test_greedy_text_is_that_of_the_session(server: ServerProcess, session: qwen_model.Session) -> None:
    expected = [output.text for output in session.generate(PROMPTS, max_new_tokens=24).outputs]
    answer = server.openai().completions.create(model=NAME, prompt=PROMPTS, max_tokens=24, temperature=0)
    assert [choice.text for choice in answer.choices] == expected


@pytest.mark.parametrize("include_usage", [True, False])
def test_a_stream_gives_the_whole_answers_text(server: ServerProcess, include_usage: bool) -> None:
    request = {"model": NAME, "messages": HELLO, "max_tokens": 30, "temperature": 0, "stop": ["\n\n\n"]}
    whole = server.openai().chat.completions.create(**request)
    chunks = list(
        server.openai().chat.completions.create(**request, stream=True, stream_options={"include_usage": include_usage})
    )
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    assert choices[-1].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == (whole.usage if include_usage and whole.usage else None) or not include_usage
    if include_usage:
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_n_samples_and_their_seed(server: ServerProcess) -> None:
    def texts() -> list[str]:
        request = {"prompt": "def", "max_tokens": 12, "temperature": 1.0, "seed": 5, "n": 4}
        return [choice.text for choice in server.openai().completions.create(model=NAME, **request).choices]

    first = texts()
    assert first == texts()
    assert len(set(first)) > 1


def test_log_probabilities_of_output_and_prompt(server: ServerProcess) -> None:
    request = {"model": NAME, "prompt": "def f(x):", "temperature": 0, "logprobs": 3}
    answer = server.openai().completions.create(**request, max_tokens=6)
    text = "def f(x):" + answer.choices[0].text
    scored = server.openai().completions.create(**{**request, "prompt": text}, max_tokens=0, echo=True)
    chosen, echoed = answer.choices[0].logprobs, scored.choices[0].logprobs
    assert "".join(echoed.tokens) == text
    if echoed.tokens[-len(chosen.tokens) :] == chosen.tokens:  # else the text is divided in another way
        assert echoed.token_logprobs[-len(chosen.tokens) :] == pytest.approx(chosen.token_logprobs, abs=1e-3)
    for token, logprob, best in zip(chosen.tokens, chosen.token_logprobs, chosen.top_logprobs, strict=True):
        assert best[token] == logprob == max(best.values())


def test_stop_strings(server: ServerProcess) -> None:
    request = {"model": NAME, "prompt": "def f(x):", "temperature": 0, "max_tokens": 40}
    text = server.openai().completions.create(**request).choices[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    answer = server.openai().completions.create(**request, stop=stop)
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 40


@pytest.mark.parametrize(("temperature", "seed"), [(0, 0), (1, 1), (1, 2)])
def test_structured_output_follows_its_schema(server: ServerProcess, temperature: float, seed: int) -> None:
    answer = server.openai().chat.completions.create(
        model=NAME,
        messages=HELLO,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        temperature=temperature,
        seed=seed,
        max_tokens=500,  # so small a model likes white space
    )
    assert answer.choices[0].finish_reason == "stop"
    value = json.loads(answer.choices[0].message.content)
    assert set(value) == {"name", "size", "color"}
    assert isinstance(value["name"], str)
    assert 0 <= value["size"] <= 999
    assert value["color"] in ("red", "green")


def test_a_schema_that_is_none_is_refused(server: ServerProcess) -> None:
    for schema in ({"type": "nothing"}, {"$ref": "#/nowhere"}, {"type": "string", "pattern": "("}):
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        response = server.post("/v1/chat/completions", messages=HELLO, response_format=wanted)
        assert response.status_code == 400, response.text
    assert server.http.get("/health").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_demanded_tool_call(server: ServerProcess, stream: bool) -> None:
    request = {"model": NAME, "messages": HELLO, "tools": [WEATHER], "tool_choice": "required", "max_tokens": 100}
    answer = server.openai().chat.completions.create(**request, stream=stream)
    if stream:
        deltas = [call for chunk in answer for call in chunk.choices[0].delta.tool_calls or []]
        name, arguments = deltas[0].function.name, "".join(delta.function.arguments or "" for delta in deltas)
    else:
        assert answer.choices[0].finish_reason == "tool_calls"
        function = answer.choices[0].message.tool_calls[0].function
        name, arguments = function.name, function.arguments
    assert name == "weather"
    assert json.loads(arguments)["city"] in ("Paris", "Rome")


def test_a_client_that_is_killed_frees_its_sequences(server: ServerProcess) -> None:
    code = f"""
import urllib.request, json
body = json.dumps({{"prompt": "x", "max_tokens": 500, "n": 3, "stream": True, "ignore_eos": True}}).encode()
headers = {{"Content-Type": "application/json"}}
for line in urllib.request.urlopen(urllib.request.Request("{server.url}/v1/completions", body, headers)):
    print(line, flush=True)
"""
    client = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert client.stdout is not None
    client.stdout.readline()
    assert server.metrics()["vllm:num_requests_running"] == 3
    client.kill()
    client.wait()
    assert server.wait_for(server.is_idle, 10)
    assert server.metrics()['vllm:request_success_total{finished_reason="cancelled"}'] >= 3


def test_half_sent_bodies_and_idle_connections(server: ServerProcess) -> None:
    address = (httpx.URL(server.url).host, httpx.URL(server.url).port)
    idle = [socket.create_connection(address) for _ in range(MANY)]
    half = [socket.create_connection(address) for _ in range(20)]
    for connection in half:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    assert server.post("/v1/completions", prompt="x", max_tokens=2).status_code == 200
    for connection in (*idle, *half):
        connection.close()
    assert server.post("/v1/completions", prompt="x", max_tokens=2).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": ' + b"[" * 100 + b"]" * 100 + b"}",
        b'{"prompt": "x", "x": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}",
        b'{"prompt": "x", "max_tokens": NaN}',
        b'{"prompt": "x", "temperature": 1e999}',
    ],
)
def test_bodies_that_are_wrong(server: ServerProcess, body: bytes) -> None:
    response = server.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 400), response.text  # U+D800 and deep unknown fields may be taken
    assert response.status_code == 200 or response.json()["error"]["message"]
    assert "Traceback" not in response.text


def test_concurrent_requests_give_what_they_give_alone(server: ServerProcess, session: qwen_model.Session) -> None:
    draw = random.Random(0)
    requests = [_random_request(draw) for _ in range(100)]
    server.wait_for(server.is_idle)
    engine = min(server.children())
    before = None
    for _ in range(2):
        with ThreadPoolExecutor(40) as pool:
            answers = list(pool.map(lambda request: _stream(server, *request), requests))
        assert server.wait_for(server.is_idle, 20), server.metrics()
        if before is not None:
            assert server.rss(engine) < before * 1.2 + (32 << 20)
        before = server.rss(engine)
    for (request, leaves_after), (text, usage, reason) in zip(requests, answers, strict=True):
        expected = _alone(session, request)
        if leaves_after is not None:
            assert expected.text.startswith(text)
        else:
            assert text == expected.text, request
            assert reason == expected.finish_reason
            assert usage["completion_tokens"] == len(expected.output_ids)
            assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def _random_request(draw: random.Random) -> tuple[dict[str, Any], int | None]:
    """Return a request, and after how many events its client leaves."""
    request: dict[str, Any] = {"prompt": draw.choice(PROMPTS), "max_tokens": draw.randint(1, 40), "temperature": 0}
    if draw.random() < 0.5:
        request |= {"temperature": draw.choice([0.5, 1.0]), "seed": draw.randrange(1000)}
        request |= {"top_p": draw.choice([0.8, 1.0]), "top_k": draw.choice([-1, 20])}
    if draw.random() < 0.3:
        request |= {"presence_penalty": 0.5, "frequency_penalty": 0.2}
    if draw.random() < 0.4:
        request["stop"] = draw.choice([["self"], ["\n    ", "("]])
    return request, draw.randint(1, 5) if draw.random() < 0.15 else None


def _stream(
    server: ServerProcess, request: dict[str, Any], leaves_after: int | None
) -> tuple[str, dict[str, Any] | None, str | None]:
    """Return text, usage and finish reason of one stream."""
    body = {**request, "stream": True, "stream_options": {"include_usage": True}}
    text, usage, reason = "", None, None
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as response:
        assert response.status_code == 200
        for number, line in enumerate(filter(None, response.iter_lines())):
            if number == leaves_after:
                break
            if line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            usage = event["usage"] or usage
            for choice in event["choices"]:
                assert reason is None
                text += choice["text"]
                reason = choice["finish_reason"]
    return text, usage, reason


def _alone(session: qwen_model.Session, request: dict[str, Any]) -> qwen_model.Output:
    """Return what the session gives for a request."""
    names = ("temperature", "seed", "top_p", "presence_penalty", "frequency_penalty")
    options = {name: request[name] for name in names if name in request}
    options["top_k"] = max(request.get("top_k", 0), 0)
    [output] = session.generate(
        [request["prompt"]],
        max_new_tokens=request["max_tokens"],
        sampling=SamplingOptions(**options),
        stop=request.get("stop", ()),
    ).outputs
    return output


# What /metrics counts.


def _counted(server: ServerProcess, path: str, **body: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the answer to a request, and what the metrics of an idle server have gained by it."""
    assert server.wait_for(server.is_idle)
    before = server.metrics()
    answer = server.post(path, **body)
    assert answer.status_code == 200, answer.text
    assert server.wait_for(server.is_idle)
    gained = {name: value - before.get(name, 0) for name, value in server.metrics().items()}
    kinds = ("vllm:request_success_total", "vllm:prompt_tokens_total", "vllm:generation_tokens_total")
    kinds += ("vllm:request_prompt_tokens_count", "vllm:request_generation_tokens_count")
    return answer.json(), {name.removeprefix("vllm:"): gained[name] for name in gained if name.startswith(kinds)}


@pytest.mark.parametrize("logprobs", [None, 0, 2])
@pytest.mark.parametrize("max_tokens", [0, 3])
def test_an_echoed_prompt_is_counted_once_for_each_output(
    server: ServerProcess, max_tokens: int, logprobs: int | None
) -> None:
    request = {"prompt": ["def f(x):", "import"], "n": 2, "max_tokens": max_tokens, "echo": True}
    answer, counted = _counted(server, "/v1/completions", **request, ignore_eos=True, logprobs=logprobs)
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 4
    assert counted['request_success_total{finished_reason="length"}'] == 4
    assert counted["prompt_tokens_total"] == 2 * answer["usage"]["prompt_tokens"]
    assert counted["generation_tokens_total"] == answer["usage"]["completion_tokens"] == 4 * max_tokens
    assert counted["request_prompt_tokens_count"] == counted["request_generation_tokens_count"] == 4


def test_an_output_that_a_stop_string_ends_is_counted_as_stopped(server: ServerProcess) -> None:
    request = {"prompt": "def f(x):", "temperature": 0, "max_tokens": 40}
    text = server.post("/v1/completions", **request).json()["choices"][0]["text"]
    answer, counted = _counted(server, "/v1/completions", **request, stop=text[4:7])
    assert answer["choices"][0]["finish_reason"] == "stop"
    ended = {name: value for name, value in counted.items() if name.startswith("request_success_total") and value}
    assert ended == {'request_success_total{finished_reason="stop"}': 1}


# Servers that end.


def test_sigterm_lets_requests_end(packaged_engine: Path) -> None:
    server = ServerProcess(packaged_engine)
    with server.http.stream("POST", "/v1/completions", json=_endless(max_tokens=60)) as response:
        lines = filter(None, response.iter_lines())
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        rest = list(lines)
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert server.stop() == 0


def test_the_engine_is_killed(packaged_engine: Path) -> None:
    server = ServerProcess(packaged_engine)
    engine = next(pid for pid, part in server.children().items() if part == "engine")
    with server.http.stream("POST", "/v1/completions", json=_endless()) as response:
        lines = filter(None, response.iter_lines())
        next(lines)
        os.kill(engine, signal.SIGKILL)
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]
    assert events[-1]["error"]["type"] == "server_error"
    assert server.process.wait(30) != 0
    assert "engine has ended" in server.log


def test_an_http_process_is_killed(packaged_engine: Path) -> None:
    server = ServerProcess(packaged_engine)
    os.kill(next(pid for pid, part in server.children().items() if part == "http"), signal.SIGKILL)
    assert server.process.wait(30) != 0
    assert "has ended" in server.log


def test_the_command_is_killed(packaged_engine: Path) -> None:
    server = ServerProcess(packaged_engine)
    children = list(server.children())
    server.process.kill()
    server.process.wait(30)
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < deadline, "the other processes go on"
        time.sleep(0.05)


def test_api_key_of_the_environment_and_a_full_queue(packaged_engine: Path) -> None:
    server = ServerProcess(packaged_engine, "--max-waiting", "64", environment={"QWEN_MODEL_API_KEY": "secret"})
    try:
        assert server.http.get("/v1/models").status_code == 401
        server.http.headers["Authorization"] = "Bearer secret"
        assert server.http.get("/v1/models").status_code == 200
        threads = [
            threading.Thread(target=lambda: server.post("/v1/completions", prompt="x", max_tokens=20, n=64))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        statuses = {server.post("/v1/completions", prompt="x", max_tokens=1).status_code for _ in range(5)}
        for thread in threads:
            thread.join()
        assert 429 in statuses or server.metrics()["qwen_model:requests_refused_total"] > 0
    finally:
        server.stop()


def _endless(**options: Any) -> dict[str, Any]:
    return {"prompt": "x", "max_tokens": 500, "stream": True, "ignore_eos": True, **options}


def test_lm_eval_scores_lines_through_the_server(server: ServerProcess, packaged_engine: Path) -> None:
    """lm-eval's `local-completions` gives the log-likelihoods of its own class on this engine."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity", reason="needs lm-eval[api]")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from qwen_model.evaluation.lm_eval_model import QwenModelLM
    from qwen_model.packaged_model import held_out_text

    lines = [line for line in held_out_text().splitlines() if " " in line.strip()][:20]
    pairs = [(line.rpartition(" ")[0], " " + line.rpartition(" ")[2]) for line in lines]
    pairs += [(line, " = 1") for line in lines]
    instances = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    theirs = LocalCompletionsAPI(
        model=NAME,
        base_url=f"{server.url}/v1/completions",
        tokenizer=str(packaged_engine),
        tokenizer_backend="huggingface",
        batch_size=4,
        max_length=512,
    )
    found = theirs.loglikelihood(instances, disable_tqdm=True)
    expected = QwenModelLM(str(packaged_engine), device="cpu").loglikelihood(instances, disable_tqdm=True)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-4, abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
