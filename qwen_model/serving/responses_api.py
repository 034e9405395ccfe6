"""Serve /v1/responses: text and tool calls, through the chat; the server keeps no state of a conversation."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from .chat_api import Change, ChatJob, ChoiceReader, prepare
from .context import Context, json_response, new_id, now, sse, streamed, whole
from .errors import ApiError
from .field_errors import wrong_value
from .generation import Generation
from .schemas import ChatRequest, ResponsesRequest


def chat_request(body: ResponsesRequest) -> ChatRequest:
    """Return the chat that a request asks for.

    Raises:
        ApiError: something of it is not supported, or wrong.
    """
    if body.previous_response_id is not None:
        message = "this server keeps no responses: send the whole conversation as input"
        raise ApiError(400, message, "previous_response_id")
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    for item in items:
        _add_item(messages, item)
    values: dict[str, Any] = {
        "model": body.model,
        "messages": messages,
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "tools": [_tool(tool) for tool in body.tools] if body.tools else None,
        "tool_choice": _tool_choice(body.tool_choice),
        "response_format": _format(body.text),
        "chat_template_kwargs": body.chat_template_kwargs,
    }
    given = {name: value for name, value in values.items() if value is not None}
    try:
        return ChatRequest.model_validate(given)
    except ValidationError as error:
        raise wrong_value(error.errors(), given) from error


def _add_item(messages: list[dict[str, Any]], item: Mapping[str, Any]) -> None:
    kind = item.get("type", "message")
    if kind == "message":
        messages.append({"role": _role(item), "content": _text(item.get("content"))})
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments", "{}")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        if messages and messages[-1].get("tool_calls"):
            messages[-1]["tool_calls"].append(call)
        else:
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
    elif kind == "function_call_output":
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": _text(item.get("output"))})
    elif kind != "reasoning":
        raise ApiError(400, f"items of type {kind!r:.60} are not supported", "input")


def _role(item: Mapping[str, Any]) -> Any:
    return "system" if item.get("role") == "developer" else item.get("role")


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ApiError(400, "the content of an item must be text", "input")
    return "\n".join(map(str, texts))


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise ApiError(400, f"tools of type {tool.get('type')!r:.60} are not supported", "tools")
    return {
        "type": "function",
        "function": {key: value for key, value in tool.items() if key not in ("type", "strict")},
    }


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, Mapping):
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _format(text: Mapping[str, Any] | None) -> dict[str, Any] | None:
    wanted = (text or {}).get("format")
    if not isinstance(wanted, Mapping):
        return None
    if wanted.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {key: value for key, value in wanted.items() if key != "type"}}
    return {"type": wanted.get("type")}


async def responses(context: Context, body: ResponsesRequest, request: Request) -> Response:
    """Answer a request.

    Raises:
        ApiError: it is refused.
    """
    chat = await prepare(context, chat_request(body), context.salt_of(request))
    generation = Generation(chat.job, context.model, context.client, context.limits.timeout)
    answer = _Answer(context, body, chat, generation)
    if body.stream:
        return await streamed(request, _events(answer), done=b"")
    return json_response(await whole(request, lambda: _response(answer)))


async def _response(answer: _Answer) -> dict[str, Any]:
    async for _ in answer.events():
        pass
    return answer.value()


async def _events(answer: _Answer) -> AsyncIterator[bytes]:
    """Yield the events of a stream, numbered."""
    number = 0
    async for event in answer.events():
        yield sse({**event, "sequence_number": number}, event["type"])
        number += 1


class _Answer:
    """Collect the items of a response, and tell of each change."""

    def __init__(self, context: Context, body: ResponsesRequest, chat: ChatJob, generation: Generation):
        self._body, self._generation = body, generation
        self._reader = ChoiceReader(chat)
        self._model = context.model.name
        self._id, self._created = new_id("resp"), now()
        self._items: list[dict[str, Any]] = []
        self._status = "in_progress"
        self._length_reached = False

    def value(self) -> dict[str, Any]:
        """Return the response as it is now."""
        body, generation = self._body, self._generation
        usage = None
        if self._status != "in_progress":
            usage = {
                "input_tokens": generation.prompt_tokens,
                "input_tokens_details": {"cached_tokens": generation.cached_tokens},
                "output_tokens": generation.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": generation.prompt_tokens + generation.completion_tokens,
            }
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": self._status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self._length_reached else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self._model,
            "output": self._items,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "truncation": "disabled",
            "metadata": dict(body.metadata or {}),
            "usage": usage,
        }

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Generate, and yield OpenAI's events."""
        yield {"type": "response.created", "response": self.value()}
        async for piece in self._generation.pieces():
            for event in self._take(self._reader.read(piece)):
                yield event
            self._length_reached = piece.finish_reason == "length"
        for event in self._close():
            yield event
        self._status = "incomplete" if self._length_reached else "completed"
        yield {"type": f"response.{self._status}", "response": self.value()}

    def _take(self, change: Change) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        if change.reasoning:
            events += self._open("reasoning")
            self._items[-1]["content"][0]["text"] += change.reasoning
            events.append(self._event("response.reasoning_text.delta", delta=change.reasoning, content_index=0))
        if change.content:
            events += self._open("message")
            self._items[-1]["content"][0]["text"] += change.content
            events.append(self._event("response.output_text.delta", delta=change.content, content_index=0, logprobs=[]))
        for call in change.calls:
            if call.name is not None:
                events += self._open("function_call", call.name)
            if call.arguments:
                self._items[-1]["arguments"] += call.arguments
                events.append(self._event("response.function_call_arguments.delta", delta=call.arguments))
        return events

    def _event(self, kind: str, **values: Any) -> dict[str, Any]:
        item = self._items[-1]
        return {"type": kind, "item_id": item["id"], "output_index": len(self._items) - 1, **values}

    def _open(self, kind: str, name: str | None = None) -> list[dict[str, Any]]:
        """Begin an item, unless one of its kind is open."""
        if name is None and self._items and self._items[-1]["type"] == kind:
            return []
        events = self._close()
        item: dict[str, Any]
        if kind == "function_call":
            item = {"id": new_id("fc"), "call_id": new_id("call"), "name": name, "arguments": ""}
        else:
            part = "output_text" if kind == "message" else "reasoning_text"
            content: dict[str, Any] = {"type": part, "text": ""}
            item = {"id": new_id("msg" if kind == "message" else "rs"), "content": [content]}
            if kind == "message":
                content |= {"annotations": [], "logprobs": []}
                item["role"] = "assistant"
            else:
                item["summary"] = []
        self._items.append({"type": kind, "status": "in_progress", **item})
        index = len(self._items) - 1
        events.append({"type": "response.output_item.added", "output_index": index, "item": self._items[-1]})
        if kind == "message":
            part = self._items[-1]["content"][0]
            events.append(self._event("response.content_part.added", content_index=0, part=part))
        return events

    def _close(self) -> list[dict[str, Any]]:
        """End the item that is open."""
        if not self._items or self._items[-1]["status"] == "completed":
            return []
        item = self._items[-1]
        item["status"] = "completed"
        events = []
        if item["type"] == "function_call":
            events.append(
                self._event("response.function_call_arguments.done", arguments=item["arguments"], name=item["name"])
            )
        elif item["type"] == "message":
            part = item["content"][0]
            text = part["text"]
            events.append(self._event("response.output_text.done", text=text, content_index=0, logprobs=[]))
            events.append(self._event("response.content_part.done", part=part, content_index=0))
        events.append({"type": "response.output_item.done", "output_index": len(self._items) - 1, "item": item})
        return events
