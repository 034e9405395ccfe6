"""Serve /tokenize and /detokenize, as vLLM does."""

from __future__ import annotations

from starlette.responses import Response

from ..checkpoints.chat_template import ChatOptions
from .context import Context, json_response
from .errors import ApiError
from .schemas import DetokenizeRequest, TokenizeRequest


async def tokenize(context: Context, body: TokenizeRequest) -> Response:
    """Answer with the token ids of a text, or of a chat.

    Raises:
        ApiError: a field is wrong.
    """
    context.model.check_name(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", "prompt")
    tokens = await context.tokenizer_thread.run(lambda: _tokens(context, body))
    limit = context.model.config.limits.max_positions
    return json_response({"tokens": tokens, "count": len(tokens), "max_model_len": limit})


def _tokens(context: Context, body: TokenizeRequest) -> list[int]:
    tokenizer = context.model.tokenizer
    if body.prompt is not None:
        return tokenizer.encode(body.prompt, body.add_special_tokens)
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or []]
    options = ChatOptions(tools or None, body.chat_template_kwargs or {}, None, sanitize_control_tokens=True)
    return tokenizer.apply_chat_template(body.messages or [], body.add_generation_prompt, options)


async def detokenize(context: Context, body: DetokenizeRequest) -> Response:
    """Answer with the text of token ids.

    Raises:
        ApiError: a field is wrong.
    """
    context.model.check_name(body.model)
    most = context.model.config.model.vocab_size
    if any(token >= most for token in body.tokens):
        raise ApiError(400, f"tokens must be from 0 to {most - 1}", "tokens")
    text = await context.tokenizer_thread.run(
        lambda: context.model.tokenizer.decode(body.tokens, skip_special_tokens=False)
    )
    return json_response({"prompt": text})
