"""Serve /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from .chat_api import usage_of
from .context import Context, json_response, new_id, now, sse, streamed, whole
from .errors import ApiError
from .generation import Generation, Job, Piece, ends_of, new_tokens, sampling_options
from .logprobs import CompletionLogprobs
from .schemas import CompletionRequest, StreamOptions
from .wire import Scored


async def prepare(context: Context, body: CompletionRequest, salt: str) -> Job:
    """Check a request, and encode its prompts.

    Raises:
        ApiError: a field is wrong.
    """
    model = context.model
    model.check_name(body.model)
    if body.suffix:
        raise ApiError(400, "suffix is not supported", "suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(400, "best_of must be n: more candidates than are returned are not supported", "best_of")
    prompts = await _prompts(context, body)
    most = new_tokens(body.max_tokens, prompts, model.config, "max_tokens")
    if most == 0 and not body.echo:
        raise ApiError(400, "max_tokens 0 needs echo: true, else nothing is returned", "max_tokens")
    ends, sampling = ends_of(body, model, (), most), sampling_options(body, model.config)
    return Job(prompts, body.n or 1, ends, sampling, body.logprobs, None, salt)


async def _prompts(context: Context, body: CompletionRequest) -> list[list[int]]:
    given: Any = body.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given:
        raise ApiError(400, "prompt must not be empty", "prompt")
    outputs, limit = len(given) * (body.n or 1), context.limits.max_waiting
    if outputs > limit:
        message = f"{len(given)} prompts with n {body.n or 1} ask for {outputs} outputs: at most {limit} may wait"
        raise ApiError(400, message, "n" if len(given) <= limit else "prompt")
    tokenizer = context.model.tokenizer
    return await context.tokenizer_thread.run(
        lambda: [tokenizer.encode(each) if isinstance(each, str) else each for each in given]
    )


async def completions(context: Context, body: CompletionRequest, request: Request) -> Response:
    """Answer a request.

    Raises:
        ApiError: it is refused.
    """
    job = await prepare(context, body, context.salt_of(request))
    generation = Generation(job, context.model, context.client, context.limits.timeout)
    if body.stream:
        return await streamed(request, _events(context, body, generation))
    return json_response(await whole(request, lambda: _completion(context, body, generation)))


class _Choice:
    """Collect a choice: its text, after the prompt's where that is echoed, and its log-probabilities."""

    def __init__(self, context: Context, body: CompletionRequest, prompt: list[int], scored: Scored | None):
        self._context = context
        self._logprobs = None if body.logprobs is None else CompletionLogprobs(context.model.tokenizer)
        self.text = ""
        self.reason: str | None = None
        if body.echo:
            self.text = context.model.tokenizer.decode(prompt, skip_special_tokens=False)
            self._echo(prompt, scored)

    def _echo(self, prompt: list[int], scored: Scored | None) -> None:
        if self._logprobs is None or scored is None:
            return
        self._logprobs.add(prompt[0], None, None)
        for token, logprob, best in zip(prompt[1:], scored.logprobs, scored.best, strict=True):
            self._logprobs.add(token, logprob, best)

    def take(self, piece: Piece) -> None:
        """Add a piece."""
        self.text += piece.text
        self.reason = piece.finish_reason
        if self._logprobs is not None:
            for token in piece.tokens:
                self._logprobs.add(token.token, token.logprob, token.best)

    def value(self, index: int) -> dict[str, Any]:
        """Return the choice so far, and begin anew: for the next event of a stream."""
        logprobs = None
        if self._logprobs is not None:
            logprobs = self._logprobs.value
            self._logprobs.clear()
        text, self.text = self.text, ""
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": self.reason}


async def _choices(context: Context, body: CompletionRequest, job: Job) -> list[_Choice]:
    """Return a choice for each output, with its prompt where that is echoed."""
    scores: list[Scored | None] = [None] * len(job.prompts)
    outputs = job.n if job.ends.max_new_tokens == 0 else 0  # that the engine hears of here alone
    if body.echo and (body.logprobs is not None or outputs):
        scores = await _scores(context, body, job, outputs)
    return [
        _Choice(context, body, prompt, scored)
        for prompt, scored in zip(job.prompts, scores, strict=True)
        for _ in range(job.n)
    ]


async def _scores(context: Context, body: CompletionRequest, job: Job, outputs: int) -> list[Scored | None]:
    """Return the log-probabilities of each prompt. If one fails, so does the request, and the others are ended."""
    timeout = context.limits.timeout
    asked = [context.client.score(prompt, body.logprobs, outputs, timeout) for prompt in job.prompts]
    tasks = list(map(asyncio.ensure_future, asked))
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def _pieces(generation: Generation) -> AsyncIterator[Piece]:
    """Yield the pieces of all choices; with max_tokens 0 each ends at once."""
    if generation.job.ends.max_new_tokens == 0:
        for index in range(len(generation.outputs)):
            yield Piece(index, finish_reason="length")
        return
    async for piece in generation.pieces():
        yield piece


def _head(context: Context) -> dict[str, Any]:
    return {"id": new_id("cmpl"), "object": "text_completion", "created": now(), "model": context.model.name}


async def _completion(context: Context, body: CompletionRequest, generation: Generation) -> dict[str, Any]:
    choices = await _choices(context, body, generation.job)
    async for piece in _pieces(generation):
        choices[piece.index].take(piece)
    values = [choice.value(index) for index, choice in enumerate(choices)]
    return {**_head(context), "choices": values, "usage": usage_of(generation)}


async def _events(context: Context, body: CompletionRequest, generation: Generation) -> AsyncIterator[bytes]:
    """Yield the chunks of a stream."""
    options = body.stream_options or StreamOptions()
    head = {**_head(context), **({"usage": None} if options.include_usage else {})}
    choices = await _choices(context, body, generation.job)
    async for piece in _pieces(generation):
        choice = choices[piece.index]
        choice.take(piece)
        if choice.text or piece.finish_reason is not None or body.logprobs is not None:
            usage = {"usage": usage_of(generation)} if options.every_usage else {}
            yield sse({**head, "choices": [choice.value(piece.index)], **usage})
    if options.include_usage:
        yield sse({**head, "choices": [], "usage": usage_of(generation)})
