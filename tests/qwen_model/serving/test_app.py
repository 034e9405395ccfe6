"""Test what guards the server, its errors, and its other paths, over a stub of the engine."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from qwen_model.serving.context import ServerLimits
from qwen_model.serving.wire import Add, Cancel, Failed, Frame

from .served import NAME, REPLY, Served

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "hot"),
        ("temperature", -1),
        ("temperature", 3),
        ("top_p", 0),
        ("top_p", True),
        ("top_k", 1.5),
        ("min_p", 2),
        ("max_tokens", 0),
        ("max_tokens", "many"),
        ("max_tokens", 1 << 40),
        ("max_completion_tokens", -1),
        ("n", 0),
        ("n", 1000),
        ("stop", 3),
        ("stop", [""]),
        ("stop", "x" * 1025),
        ("stop", ["x"] * 17),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [1 << 40]),
        ("seed", 1 << 70),
        ("presence_penalty", 3),
        ("logit_bias", {"1": 200}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"99999999": 1}),
        ("logit_bias", {"9" * 5000: 1}),
        ("logit_bias", [1]),
        ("top_logprobs", 3),
        ("logprobs", 5),
        ("response_format", {"type": "xml"}),
        ("response_format", {"type": "json_schema"}),
        ("tools", [{"type": "retrieval"}]),
        ("tool_choice", "required"),
        ("stream", "yes"),
        ("messages", []),
        ("messages", "hi"),
        ("chat_template_kwargs", []),
    ],
)
def test_a_wrong_field_is_named(served: Served, field: str, value: Any) -> None:
    response = served.post("/v1/chat/completions", **{"messages": HELLO, field: value})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"].split(".")[0] == field
    assert error["type"] == "invalid_request_error"
    assert served.engine.requests == []


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"3", b'{"messages": [{"role": "user"}]}', b'{"messages": [3]}'],
)
def test_a_body_that_is_none_is_an_error(served: Served, body: bytes) -> None:
    response = served.http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"]


@pytest.mark.parametrize("depth", [100, 600, 950, 3000])
@pytest.mark.parametrize("field", ["messages", "tools", "response_format", "chat_template_kwargs", "x"])
def test_fields_that_are_nested_deeply(served: Served, field: str, depth: int) -> None:
    nested: Any = '{"a": ' * depth + "1" + "}" * depth
    value = {
        "messages": '[{"role": "user", "content": "x", "more": %s}]',
        "tools": '[{"type": "function", "function": {"name": "f", "parameters": %s}}]',
        "response_format": '{"type": "json_schema", "json_schema": {"name": "x", "schema": %s}}',
        "chat_template_kwargs": '{"x": %s}',
        "x": "%s",
    }[field] % nested
    messages = "" if field == "messages" else '"messages": [{"role": "user", "content": "x"}], '
    body = f'{{{messages}"{field}": {value}}}'
    response = served.http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 400), response.text


@pytest.mark.parametrize(
    ("path", "field", "value", "expected"),
    [
        (
            "completions",
            "prompt",
            ["a", [1, 2]],
            "a string or a list of integers or a list of strings or a list of lists",
        ),
        ("completions", "prompt", 3, "given: 3"),
        ("completions", "stop", [1], "expected a string or a list of strings, given: [1]"),
        ("chat/completions", "tool_choice", "maybe", "'none', 'auto', 'required' or "),
        ("chat/completions", "tool_choice", {"type": "function", "function": {}}, '{"type": "function"'),
        ("responses", "input", 3, "a string or a list of objects"),
        ("responses", "tool_choice", 3, "'required' or an object"),
    ],
)
def test_a_union_says_which_forms_it_takes(served: Served, path: str, field: str, value: Any, expected: str) -> None:
    body = {"completions": {"prompt": "a"}, "responses": {"input": "a"}}.get(path, {"messages": HELLO})
    error = served.post(f"/v1/{path}", **{**body, field: value}).json()["error"]
    assert error["param"] == field
    assert expected in error["message"]


@pytest.mark.parametrize(("count", "n", "param"), [(1025, 1, "prompt"), (500_000, None, "prompt"), (1024, 128, "n")])
def test_more_outputs_than_may_wait_are_refused_at_once(served: Served, count: int, n: int | None, param: str) -> None:
    response = served.post("/v1/completions", prompt=["a"] * count, n=n)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert f"{count} prompts with n {n or 1} ask for {count * (n or 1)} outputs" in response.json()["error"]["message"]
    assert served.engine.requests == []


def test_outputs_of_a_prompt_share_the_pages_of_the_first(served: Served) -> None:
    served.post("/v1/completions", prompt=["a", "b"], n=3)
    adds = [request for request in served.engine.requests if isinstance(request, Add)]
    first, second = adds[0].id, adds[3].id
    assert [request.parent for request in adds] == [0, first, first, 0, second, second]


def test_a_wrong_schema_is_named_as_the_client_wrote_it(served: Served) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": 3}}
    error = served.post("/v1/chat/completions", messages=HELLO, response_format=wanted).json()["error"]
    assert error["param"] == "response_format.json_schema.schema"
    assert "an object or true or false" in error["message"]


@pytest.mark.parametrize("content_type", [None, "application/x-www-form-urlencoded", "text/plain"])
def test_a_body_of_another_type_is_told_which_header_it_needs(served: Served, content_type: str | None) -> None:
    """JSON under these types is what a page of another site could send without asking first."""
    headers = {} if content_type is None else {"Content-Type": content_type}
    response = served.http.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)
    assert response.status_code == 400
    assert "Content-Type: application/json" in response.json()["error"]["message"]
    assert served.engine.requests == []


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses"])
@pytest.mark.parametrize(
    "field",
    [
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "structured_outputs",
        "structural_tag",
        "use_beam_search",
        "chat_template",
    ],
)
def test_fields_that_are_known_but_not_supported_are_refused(served: Served, path: str, field: str) -> None:
    body = {"completions": {"prompt": "a"}, "responses": {"input": "a"}}.get(path, {"messages": HELLO})
    response = served.post(f"/v1/{path}", **body, **{field: {"x": 1}})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field
    for unset in (None, False):
        assert served.post(f"/v1/{path}", **body, **{field: unset}).status_code == 200


def test_a_name_that_is_not_this_servers_is_refused_without_a_key(serve_stub: Callable[..., Served]) -> None:
    """Else a page whose own name leads here (DNS rebinding) could use the server."""
    served = serve_stub(hosts=("Model.example",))

    def status(host: str, path: str = "/v1/models", server: Served = served, **headers: str) -> int:
        return server.http.get(path, headers={"Host": host, **headers}).status_code

    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "[evil]"):
        assert status(host) == 403, host
    assert status("evil.example", "/") == 403
    assert status("evil.example", "/health") == 200
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000", "10.0.0.7:8000", "model.EXAMPLE:80", "LOCALHOST."):
        assert status(host) == 200, host
    guarded = serve_stub(api_keys=("secret",))
    assert status("any.example", server=guarded, Authorization="Bearer secret") == 200


def test_unknown_fields_are_ignored(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    body = {"messages": HELLO, "a_new_field": {"x": 1}}
    assert served.post("/v1/chat/completions", **body).status_code == 200
    assert served.post("/v1/chat/completions", **body).status_code == 200
    assert caplog.text.count("a_new_field") == 1


def test_prompts_that_are_too_long(served: Served) -> None:
    limit = served.context.model.config.limits.max_input_len
    response = served.post("/v1/completions", prompt=[1] * (limit + 1))
    assert response.status_code == 400
    assert str(limit) in response.json()["error"]["message"]
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_another_model(served: Served) -> None:
    response = served.post("/v1/chat/completions", model="gpt-4", messages=HELLO)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert served.http.get("/v1/models/gpt-4").status_code == 404
    assert served.http.get(f"/v1/models/{NAME}").json()["id"] == NAME
    assert [model["id"] for model in served.http.get("/v1/models").json()["data"]] == [NAME]


def test_errors_of_paths_and_methods(served: Served) -> None:
    assert served.http.get("/nothing").json()["error"]["code"] == "not_found"
    assert served.http.get("/v1/completions").status_code == 405


def test_tokens_and_text(served: Served) -> None:
    tokens = served.post("/tokenize", prompt="def f(x):").json()
    assert tokens["count"] == len(tokens["tokens"])
    assert served.post("/detokenize", tokens=tokens["tokens"]).json() == {"prompt": "def f(x):"}
    chat = served.post("/tokenize", messages=HELLO).json()["tokens"]
    assert chat == served.context.model.tokenizer.apply_chat_template(HELLO)
    assert served.post("/tokenize").status_code == 400
    assert served.post("/detokenize", tokens=[1 << 40]).status_code == 400


def test_state(served: Served) -> None:
    assert served.http.get("/health").status_code == 200
    assert served.http.get("/health/live").status_code == 200
    assert served.http.get("/version").json()["version"]
    assert served.http.get("/metrics").text.startswith("# TYPE")


def test_completions(served: Served) -> None:
    answer = served.openai().completions.create(model=NAME, prompt=["a", "b"], n=2, max_tokens=100)
    assert [choice.text for choice in answer.choices] == [REPLY] * 4
    chunks = list(served.openai().completions.create(model=NAME, prompt="a", max_tokens=100, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == REPLY


def test_echo_with_log_probabilities_of_the_prompt(served: Served) -> None:
    answer = served.openai().completions.create(model=NAME, prompt="def f", max_tokens=0, echo=True, logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert answer.choices[0].text == "def f"
    assert "".join(logprobs.tokens) == "def f"
    assert logprobs.token_logprobs[0] is None
    assert set(logprobs.token_logprobs[1:]) == {-0.5}
    assert logprobs.text_offset == [0, *[len("".join(logprobs.tokens[:i])) for i in range(1, len(logprobs.tokens))]]


def test_where_one_prompt_is_refused_the_scores_of_the_others_are_ended(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(request: Any) -> list[Frame]:
        return [Frame([], [Failed(request.id, 429, "full")])] if len(served.engine.requests) == 2 else []

    monkeypatch.setattr(served.engine, "_answer", answer)
    response = served.post("/v1/completions", prompt=["a", "b"], max_tokens=0, echo=True, logprobs=1)
    assert response.status_code == 429
    deadline = time.monotonic() + 10
    while len(served.engine.requests) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    first, _, last = served.engine.requests
    assert isinstance(last, Cancel)
    assert last.id == first.id


def test_responses(served: Served) -> None:
    client = served.openai()
    answer = client.responses.create(model=NAME, input="Hello", instructions="Be brief.")
    assert answer.output_text == REPLY
    assert answer.status == "completed"
    with client.responses.stream(model=NAME, input="Hello") as stream:
        events = list(stream)
        assert stream.get_final_response().output_text == REPLY
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_responses_with_a_tool_call(served: Served) -> None:
    served.engine.reply = lambda request: '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    tool = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}
    answer = served.openai().responses.create(model=NAME, input="Hello", tools=[tool])
    call = answer.output[0]
    assert (call.type, call.name, call.arguments) == ("function_call", "f", '{"a": 1}')
    conversation = [
        {"role": "user", "content": "Hello"},
        call.to_dict(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "2"},
    ]
    served.engine.reply = lambda request: "It is 2."
    assert served.openai().responses.create(model=NAME, input=conversation, tools=[tool]).output_text == "It is 2."


def test_the_api_key_guards_all_but_health(serve_stub: Callable[..., Served]) -> None:
    served = serve_stub(api_keys=("secret", "another"))
    for path in ("/", "/v1/models", "/metrics", "/version", "/openapi.json", "/nothing"):
        assert served.http.get(path).status_code == 401, path
    assert served.http.get("/health").status_code == 200
    assert served.http.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert served.http.get("/v1/models", headers={"Authorization": "Bearer another"}).status_code == 200
    basic = base64.b64encode(b"anyone:secret").decode()
    assert served.http.get("/", headers={"Authorization": f"Basic {basic}"}).status_code == 200


def test_prefixes_are_shared_within_a_key_alone(serve_stub: Callable[..., Served]) -> None:
    served = serve_stub(api_keys=("a", "b"))
    for key in ("a", "a", "b"):
        headers = {"Authorization": f"Bearer {key}"}
        assert served.http.post("/v1/completions", json={"prompt": "x"}, headers=headers).status_code == 200
    salts = [request.salt for request in served.engine.requests]  # type: ignore[union-attr]
    assert salts[0] == salts[1] != salts[2]


def test_a_body_that_is_too_large(serve_stub: Callable[..., Served]) -> None:
    served = serve_stub(limits=ServerLimits(max_body_bytes=1000))
    assert served.post("/v1/completions", prompt="x" * 1000).status_code == 413
    chunks = (b"x" * 100 for _ in range(20))
    assert served.http.post("/v1/completions", content=chunks).status_code == 413
    assert served.post("/v1/completions", prompt="x").status_code == 200


def test_the_engine_refuses(served: Served) -> None:
    served.engine.refusal = (429, "too many requests wait")
    response = served.post("/v1/completions", prompt="x")
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) > 0
    assert served.post("/v1/completions", prompt="x", stream=True).status_code == 429


def test_the_engine_ends(served: Served) -> None:
    import json

    served.engine.holds = True
    with served.http.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True}) as response:
        lines = (line for line in response.iter_lines() if line)
        assert "choices" in json.loads(next(lines).removeprefix("data: "))
        served.engine.end()
        assert json.loads(next(lines).removeprefix("data: "))["error"]["type"] == "server_error"
    assert served.http.get("/health").status_code == 503
    assert served.http.get("/health/live").status_code == 200
    assert served.post("/v1/completions", prompt="x").status_code == 503


def test_the_time_limit(serve_stub: Callable[..., Served]) -> None:
    served = serve_stub(limits=ServerLimits(timeout=0.3))
    served.engine.holds = True
    assert served.post("/v1/completions", prompt="x").status_code == 408
    assert "408" not in served.post("/v1/completions", prompt="x", stream=True).text


def test_cors_is_off_unless_allowed(serve_stub: Callable[..., Served]) -> None:
    origin = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in serve_stub().http.options("/v1/completions", headers=origin).headers
    allowed = serve_stub(origins=("https://example.org",)).http.options("/v1/completions", headers=origin)
    assert allowed.headers["access-control-allow-origin"] == "https://example.org"


def test_the_page_has_a_policy_and_names_no_other_host(served: Served) -> None:
    for path in ("/", "/page.js", "/page.css"):
        response = served.http.get(path)
        assert response.status_code == 200
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert "https://" not in response.text
        assert "innerHTML" not in response.text


def test_the_openapi_document(served: Served) -> None:
    document = httpx.get(f"{served.url}/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models"} <= set(document["paths"])
