"""Serve /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..checkpoints.chat_template import ChatOptions
from ..common.errors import QwenModelError
from .context import Context, json_response, new_id, now, sse, streamed, whole
from .errors import ApiError
from .generation import Generation, Job, Piece, ends_of, new_tokens, sampling_options
from .grammar import JSON_OBJECT, call_schema, json_grammar
from .logprobs import chat_logprobs
from .reasoning import START, ReasoningParser
from .schemas import ChatRequest, NamedTool, ResponseFormat, StreamOptions
from .tool_calls import OPEN, Delta, ToolCallParser

FORCED_CALL = f"{OPEN}\n"
"""Is put behind the prompt where a tool must be called; the grammar of the call follows."""


@dataclass
class ChatJob:
    """Hold a chat's job, and how its outputs are read.

    starts_with: what the prompt's end has opened already: "<think>" or "<tool_call>"; "" for neither.
    """

    job: Job
    tools: list[dict[str, Any]]
    starts_with: str
    reads_calls: bool


async def prepare(context: Context, body: ChatRequest, salt: str) -> ChatJob:
    """Check a request, and make its prompt.

    Raises:
        ApiError: a field is wrong.
    """
    model = context.model
    model.check_name(body.model)
    _check_together(body)
    tools = [] if body.tool_choice == "none" else [tool.model_dump(exclude_none=True) for tool in body.tools or []]
    grammar, forced = _grammar(body, tools)
    prompt, turn_ends, starts_with = await context.tokenizer_thread.run(partial(_render, context, body, tools, forced))
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    job = Job(
        [prompt],
        body.n or 1,
        ends_of(body, model, turn_ends, new_tokens(asked, [prompt], model.config, name)),
        sampling_options(body, model.config),
        (body.top_logprobs or 0) if body.logprobs else None,
        grammar,
        salt,
    )
    return ChatJob(job, tools, starts_with, reads_calls=bool(tools))


def _check_together(body: ChatRequest) -> None:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    needs_tools = body.tool_choice not in (None, "none", "auto")
    if needs_tools and not body.tools:
        raise ApiError(400, "tool_choice needs tools", "tool_choice")
    kind = body.response_format.type if body.response_format else "text"
    if kind != "text" and needs_tools:
        raise ApiError(400, "response_format cannot be combined with a tool_choice that demands a call", "tool_choice")


def _grammar(body: ChatRequest, tools: list[dict[str, Any]]) -> tuple[str | None, bool]:
    """Return the grammar that the output must follow, and whether it is that of a tool call."""
    functions = [tool["function"] for tool in tools]
    if isinstance(body.tool_choice, NamedTool):
        name = body.tool_choice.function.name
        functions = [function for function in functions if function["name"] == name]
        if not functions:
            raise ApiError(400, f"tool_choice names {name!r:.100}, which is not among the tools", "tool_choice")
    if isinstance(body.tool_choice, NamedTool) or body.tool_choice == "required":
        return _compiled("tools", call_schema(functions)), True
    return _format_grammar(body.response_format), False


def _format_grammar(wanted: ResponseFormat | None) -> str | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return _compiled("response_format", JSON_OBJECT)
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise ApiError(400, "response_format of type json_schema needs json_schema.schema", "response_format")
    return _compiled("response_format", wanted.json_schema.schema_)


def _compiled(param: str, schema: Mapping[str, Any] | bool) -> str:
    try:
        return json_grammar(schema)
    except (QwenModelError, ValueError, RecursionError) as error:
        raise ApiError(400, f"{param}: {error}", param) from error


def _render(
    context: Context, body: ChatRequest, tools: list[dict[str, Any]], forced: bool
) -> tuple[list[int], tuple[int, ...], str]:
    """Return the prompt's tokens, the tokens that end the model's turn, and what the prompt's end has opened."""
    tokenizer = context.model.tokenizer
    options = ChatOptions(tools or None, body.chat_template_kwargs or {}, None, sanitize_control_tokens=True)
    prompt = tokenizer.apply_chat_template(body.messages, True, options)
    if forced:
        prompt = prompt + tokenizer.encode(FORCED_CALL, add_special_tokens=False)
        return prompt, tokenizer.chat_end_token_ids(options), OPEN
    end = tokenizer.decode(prompt[-8:], skip_special_tokens=False).rstrip()
    return prompt, tokenizer.chat_end_token_ids(options), START if end.endswith(START) else ""


@dataclass
class Change:
    """Hold what a piece adds to a choice."""

    reasoning: str = ""
    content: str = ""
    calls: list[Delta] = field(default_factory=list)


class ChoiceReader:
    """Read the text of one choice: reasoning, content and tool calls."""

    def __init__(self, chat: ChatJob):
        self._reasoning = ReasoningParser(inside=chat.starts_with == START)
        self._calls = ToolCallParser(chat.tools) if chat.reads_calls else None
        if self._calls is not None and chat.starts_with == OPEN:
            self._calls.push(FORCED_CALL)
        self._plain = chat.job.grammar is not None  # no tags in structured output

    @property
    def has_calls(self) -> bool:
        """Tell whether there was a tool call."""
        return self._calls is not None and self._calls.num_calls > 0

    def read(self, piece: Piece) -> Change:
        """Return what a piece adds; with its last piece the choice gives what was held back."""
        ends = piece.finish_reason is not None
        if self._plain:
            return self._answer("", piece.text, ends)
        divided = self._reasoning.push(piece.text)
        reasoning, answer = divided.reasoning, divided.answer
        if ends:
            rest = self._reasoning.flush()
            reasoning, answer = reasoning + rest.reasoning, answer + rest.answer
        return self._answer(reasoning, answer, ends)

    def _answer(self, reasoning: str, answer: str, ends: bool) -> Change:
        if self._calls is None:
            return Change(reasoning, answer)
        deltas = self._calls.push(answer) + (self._calls.flush() if ends else [])
        content = "".join(delta.content for delta in deltas)
        return Change(reasoning, content, [delta for delta in deltas if delta.index is not None])

    def finish_reason(self, piece: Piece) -> str | None:
        """Return OpenAI's reason."""
        return "tool_calls" if piece.finish_reason == "stop" and self.has_calls else piece.finish_reason


def usage_of(generation: Generation) -> dict[str, Any]:
    """Return the `usage` of a request."""
    prompt, completion = generation.prompt_tokens, generation.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
    }


async def chat_completions(context: Context, body: ChatRequest, request: Request) -> Response:
    """Answer a request.

    Raises:
        ApiError: it is refused.
    """
    chat = await prepare(context, body, context.salt_of(request))
    generation = Generation(chat.job, context.model, context.client, context.limits.timeout)
    if body.stream:
        return await streamed(request, _events(context, body, chat, generation))
    return json_response(await whole(request, lambda: _completion(context, chat, generation)))


async def _completion(context: Context, chat: ChatJob, generation: Generation) -> dict[str, Any]:
    messages = [_Message(chat) for _ in range(chat.job.n)]
    async for piece in generation.pieces():
        messages[piece.index].take(piece)
    choices = []
    for index, message in enumerate(messages):
        logprobs = None
        if chat.job.num_best is not None:
            logprobs = chat_logprobs(context.model.tokenizer, message.tokens, chat.job.num_best)
        choices.append(
            {"index": index, "message": message.value(), "logprobs": logprobs, "finish_reason": message.reason}
        )
    return {
        "id": new_id("chatcmpl"),
        "object": "chat.completion",
        "created": now(),
        "model": context.model.name,
        "choices": choices,
        "usage": usage_of(generation),
    }


class _Message:
    """Collect the message of one choice."""

    def __init__(self, chat: ChatJob):
        self._reader = ChoiceReader(chat)
        self._change = Change()
        self.tokens: list[Any] = []
        self.reason: str | None = None

    def take(self, piece: Piece) -> None:
        change = self._reader.read(piece)
        self._change.reasoning += change.reasoning
        self._change.content += change.content
        self._change.calls += change.calls
        self.tokens += piece.tokens
        self.reason = self._reader.finish_reason(piece)

    def value(self) -> dict[str, Any]:
        calls: list[dict[str, Any]] = []
        for delta in self._change.calls:
            if delta.name is not None:
                calls.append(_call(delta.name, ""))
            calls[-1]["function"]["arguments"] += delta.arguments
        content = self._change.content
        message: dict[str, Any] = {"role": "assistant", "content": None if calls and not content else content}
        if self._change.reasoning:
            message["reasoning_content"] = message["reasoning"] = self._change.reasoning
        return {**message, "tool_calls": calls} if calls else message


def _call(name: str, arguments: str) -> dict[str, Any]:
    return {"id": new_id("call"), "type": "function", "function": {"name": name, "arguments": arguments}}


async def _events(context: Context, body: ChatRequest, chat: ChatJob, generation: Generation) -> AsyncIterator[bytes]:
    """Yield the chunks of a stream."""
    options = body.stream_options or StreamOptions()
    chunk: dict[str, Any] = {
        "id": new_id("chatcmpl"),
        "object": "chat.completion.chunk",
        "created": now(),
        "model": context.model.name,
        **({"usage": None} if options.include_usage else {}),
    }
    readers = [ChoiceReader(chat) for _ in range(chat.job.n)]
    opened: set[int] = set()

    def event(index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        usage = {"usage": usage_of(generation)} if options.every_usage else {}
        return sse({**chunk, "choices": [choice], **usage})

    async for piece in generation.pieces():
        index, reader = piece.index, readers[piece.index]
        if index not in opened:
            opened.add(index)
            yield event(index, {"role": "assistant", "content": ""})
        logprobs = None
        if chat.job.num_best is not None:
            logprobs = chat_logprobs(context.model.tokenizer, piece.tokens, chat.job.num_best)
        for delta in _deltas(reader.read(piece)):
            yield event(index, delta, logprobs=logprobs)
            logprobs = None
        if piece.finish_reason is not None or logprobs is not None:
            yield event(index, {}, reader.finish_reason(piece), logprobs)
    if options.include_usage:
        yield sse({**chunk, "choices": [], "usage": usage_of(generation)})


def _deltas(change: Change) -> list[dict[str, Any]]:
    """Return the deltas of a change, in the order in which a model writes."""
    deltas: list[dict[str, Any]] = []
    if change.reasoning:
        deltas.append({"reasoning_content": change.reasoning, "reasoning": change.reasoning})
    if change.content:
        deltas.append({"content": change.content})
    for call in change.calls:
        value = {"index": call.index, "function": {"arguments": call.arguments}}
        if call.name is not None:
            value = {"index": call.index, **_call(call.name, call.arguments)}
        deltas.append({"tool_calls": [value]})
    return deltas
