"""Test /v1/chat/completions with OpenAI's client, over a stub of the engine."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from qwen_model.serving.wire import Add, Cancel

from .served import NAME, REPLY, Served

HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def asked(served: Served) -> list[Add]:
    return [request for request in served.engine.requests if isinstance(request, Add)]


def test_a_whole_answer(served: Served) -> None:
    answer = served.openai().chat.completions.create(model=NAME, messages=HELLO)
    assert answer.choices[0].message.content == REPLY
    assert answer.choices[0].finish_reason == "stop"
    count = len(served.context.model.tokenizer.encode(REPLY)) + 1
    assert answer.usage.completion_tokens == count
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + count
    prompt = served.context.model.tokenizer.apply_chat_template(HELLO)
    assert asked(served)[0].prompt == prompt
    assert answer.usage.prompt_tokens == len(prompt)


def test_a_stream_gives_the_same_text(served: Served) -> None:
    stream = served.openai().chat.completions.create(
        model=NAME, messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == REPLY
    assert "�" not in text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(served.context.model.tokenizer.encode(REPLY)) + 1
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_every_chunk_of_a_stream_may_have_the_usage_so_far(served: Served, path: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    prompt = {"messages": HELLO} if "chat" in path else {"prompt": "Hello"}
    lines = served.post(path, **prompt, max_tokens=64, stream=True, stream_options=options).text.splitlines()
    chunks = [json.loads(line[len("data: ") :]) for line in lines if line.startswith("data: {")]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert 0 < counts[0] <= counts[-1] == len(served.context.model.tokenizer.encode(REPLY)) + 1
    alone = {"continuous_usage_stats": True}
    text = served.post(path, **prompt, stream=True, stream_options=alone).text
    assert '"usage"' not in text


def test_the_async_client(served: Served) -> None:
    import openai

    async def text(client: openai.AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(model=NAME, messages=HELLO, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def three() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(text(client) for _ in range(3)))

    assert asyncio.run(three()) == [REPLY] * 3


def test_n_choices_draw_differently(served: Served) -> None:
    answer = served.openai().chat.completions.create(model=NAME, messages=HELLO, n=3, seed=7, temperature=0.5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [request.draws for request in asked(served)] == [0, 1, 2]
    assert {request.sampling["seed"] for request in asked(served)} == {7}


def test_log_probabilities(served: Served) -> None:
    answer = served.openai().chat.completions.create(model=NAME, messages=HELLO, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    assert content[0].logprob == -0.5
    assert [top.logprob for top in content[0].top_logprobs] == [-0.5, -1.0]


def test_stop_strings_end_the_sequence(served: Served) -> None:
    answer = served.openai().chat.completions.create(model=NAME, messages=HELLO, stop=["</b>"])
    assert answer.choices[0].message.content == "I <b>think"
    assert answer.choices[0].finish_reason == "stop"


def test_max_tokens(served: Served) -> None:
    answer = served.openai().chat.completions.create(model=NAME, messages=HELLO, max_completion_tokens=2)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 2


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls(served: Served, stream: bool) -> None:
    served.engine.reply = lambda request: "Let me look.\n" + CALL
    message = chat(served, stream, tools=[WEATHER])
    assert message["content"] == "Let me look."
    assert message["finish_reason"] == "tool_calls"
    assert [(call["name"], json.loads(call["arguments"])) for call in message["calls"]] == [
        ("weather", {"city": "Paris"})
    ]
    assert asked(served)[0].grammar is None


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_demanded_tool_call_follows_a_grammar(served: Served, stream: bool, choice: Any) -> None:
    served.engine.reply = lambda request: '{"name": "weather", "arguments": {"city": "Rome"}}'
    message = chat(served, stream, tools=[WEATHER], tool_choice=choice)
    assert [(call["name"], call["arguments"]) for call in message["calls"]] == [("weather", '{"city": "Rome"}')]
    assert not message["content"]
    request = asked(served)[0]
    assert request.grammar is not None
    assert served.context.model.tokenizer.decode(request.prompt, skip_special_tokens=False).endswith("<tool_call>\n")


def test_tool_choice_none_hides_the_tools(served: Served) -> None:
    message = chat(served, False, tools=[WEATHER], tool_choice="none")
    assert message["content"] == REPLY
    assert asked(served)[0].prompt == served.context.model.tokenizer.apply_chat_template(HELLO)


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning(served: Served, stream: bool) -> None:
    served.engine.reply = lambda request: "<think>\nTwo and two.\n</think>\n\n4"
    message = chat(served, stream)
    assert message["reasoning"] == "Two and two."
    assert message["content"] == "4"


def test_structured_output_has_a_grammar(served: Served) -> None:
    served.engine.reply = lambda request: '{"a": 1}'
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    chat(served, False, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    chat(served, False, response_format={"type": "json_object"})
    grammars = [request.grammar for request in asked(served)]
    assert all(grammars)
    assert grammars[0] != grammars[1]


def test_control_tokens_of_users_stay_text(served: Served) -> None:
    served.openai().chat.completions.create(model=NAME, messages=[{"role": "user", "content": "<|im_end|>"}])
    special = served.context.model.tokenizer.special_tokens["<|im_end|>"]
    plain = served.context.model.tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    assert asked(served)[0].prompt.count(special) == plain.count(special)


def test_a_client_that_leaves_cancels(served: Served) -> None:
    served.engine.holds = True
    stream = served.openai().chat.completions.create(model=NAME, messages=HELLO, stream=True, n=2)
    next(stream)
    stream.close()
    cancelled = wait_for(lambda: {each.id for each in served.engine.requests if isinstance(each, Cancel)}, 2)
    assert cancelled == {request.id for request in asked(served)}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_first_token_cancels(served: Served, stream: bool) -> None:
    import httpx

    served.engine.silent = True
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v1/chat/completions", json={"messages": HELLO, "stream": stream}, timeout=0.5)
    assert wait_for(lambda: {each.id for each in served.engine.requests if isinstance(each, Cancel)}, 1)


def wait_for(found: Any, count: int) -> Any:
    import time

    for _ in range(200):
        if len(found()) >= count:
            break
        time.sleep(0.02)
    return found()


def chat(served: Served, stream: bool, **options: Any) -> dict[str, Any]:
    """Return content, reasoning, calls and finish reason of one answer, whole or streamed."""
    answer = served.openai().chat.completions.create(model=NAME, messages=HELLO, stream=stream, **options)
    if not stream:
        message = answer.choices[0].message
        return {
            "content": message.content,
            "reasoning": getattr(message, "reasoning_content", None),
            "calls": [
                {"name": call.function.name, "arguments": call.function.arguments} for call in message.tool_calls or []
            ],
            "finish_reason": answer.choices[0].finish_reason,
        }
    found: dict[str, Any] = {"content": "", "reasoning": "", "calls": [], "finish_reason": None}
    for chunk in answer:
        choice = chunk.choices[0]
        found["content"] += choice.delta.content or ""
        found["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
        for call in choice.delta.tool_calls or []:
            if call.function.name:
                found["calls"].append({"name": call.function.name, "arguments": ""})
            found["calls"][call.index]["arguments"] += call.function.arguments or ""
        found["finish_reason"] = choice.finish_reason or found["finish_reason"]
    return found
