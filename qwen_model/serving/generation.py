"""Turn a request into sequences of the engine, and what comes back into pieces of text."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from ..checkpoints.tokenizer import Tokenizer
from ..common.errors import QwenModelError
from ..engine.growing_output import GrowingOutput
from ..interface.engine_config import EngineConfig
from ..interface.sampling import SamplingOptions
from .engine_client import EngineClient, Subscription
from .errors import ApiError
from .schemas import SamplingFields
from .wire import Add, Token

R = TypeVar("R")
LARGEST_SEED = 2**63
MOST_DIGITS = 18  # of a token id
MOST_STOPS, LONGEST_STOP = 16, 1024  # each token is looked at beside every beginning of every stop string


@dataclass(frozen=True)
class ServerModel:
    """Hold what an HTTP process knows of the engine."""

    name: str
    config: EngineConfig
    tokenizer: Tokenizer
    created: int  # seconds since 1970

    def check_name(self, given: str | None) -> None:
        """Raise ApiError if a request names another model."""
        if given is not None and given != self.name:
            message = f"the model {given!r:.100} does not exist: this server has {self.name!r}"
            raise ApiError(404, message, "model", code="model_not_found")


class TokenizerThread:
    """Run tokenizers and chat templates in one thread of their own: long prompts take milliseconds."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    async def run(self, function: Callable[[], R]) -> R:
        """Return what the function returns.

        Raises:
            ApiError: it raises QwenModelError or RecursionError.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, function)
        except QwenModelError as error:
            raise ApiError(400, str(error)) from error
        except RecursionError as error:
            raise ApiError(400, "a field of the request is nested too deeply") from error


@dataclass(frozen=True)
class Ends:
    """Say where an output ends: at tokens, at strings, at a number of tokens."""

    token_ids: frozenset[int]
    strings: tuple[str, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Job:
    """Hold what is generated for one request.

    prompts: each is continued `n` times. num_best: see `wire.Add`. salt: see `wire.Add`.
    """

    prompts: Sequence[list[int]]
    n: int
    ends: Ends
    sampling: SamplingOptions
    num_best: int | None = None
    grammar: str | None = None
    salt: str = ""


@dataclass
class Piece:
    """Hold what a choice of an index has gained: tokens, and the text that is certain now."""

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None


def sampling_options(body: SamplingFields, config: EngineConfig) -> SamplingOptions:
    """Return how tokens are chosen: the request's fields, and the checkpoint's generation_config.json for the others.

    Raises:
        ApiError: a field is out of its range.
    """
    seed = None if body.seed is None else body.seed % LARGEST_SEED
    bias = {}
    for token, value in (body.logit_bias or {}).items():
        if not token.isdecimal() or len(token) > MOST_DIGITS or int(token) >= config.model.vocab_size:
            raise ApiError(
                400, f"logit_bias names the token {token!r:.40}, which the model does not have", "logit_bias"
            )
        bias[int(token)] = value
    try:
        return config.sampling_defaults.options(
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=None if body.top_k is None else max(body.top_k, 0),
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            logit_bias=bias or None,
            seed=seed,
        )
    except QwenModelError as error:
        raise ApiError(400, str(error)) from error


def ends_of(body: SamplingFields, model: ServerModel, turn_ends: Sequence[int], max_new_tokens: int) -> Ends:
    """Return where the outputs of a request end.

    turn_ends: the tokens that end the model's turn in a chat.

    Raises:
        ApiError: a stop string or a stop token is wrong.
    """
    given = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(given) > MOST_STOPS or not all(0 < len(text) <= LONGEST_STOP for text in given):
        message = (
            f"stop must be a string or at most {MOST_STOPS} strings, none of them empty or longer than {LONGEST_STOP}"
        )
        raise ApiError(400, f"{message} characters", "stop")
    tokens = frozenset(body.stop_token_ids or ())
    if not all(0 <= token < model.config.model.vocab_size for token in tokens):
        raise ApiError(400, f"stop_token_ids must be from 0 to {model.config.model.vocab_size - 1}", "stop_token_ids")
    special = model.tokenizer.special_tokens
    tokens |= frozenset(special[text] for text in given if text in special)
    if not body.ignore_eos:
        tokens |= frozenset(model.config.end_token_ids) | frozenset(turn_ends)
    return Ends(tokens, tuple(text for text in given if text not in special), max_new_tokens)


def new_tokens(asked: int | None, prompts: Sequence[Sequence[int]], config: EngineConfig, param: str) -> int:
    """Return the most new tokens of a request, within the engine's limits.

    Raises:
        ApiError: a prompt is too long or empty, or more tokens are asked for than the engine gives.
    """
    limits = config.limits
    for prompt in prompts:
        if not prompt:
            raise ApiError(400, "the prompt has no tokens", "prompt")
        if len(prompt) > limits.max_input_len:
            message = f"the prompt has {len(prompt)} tokens, more than this server's limit of {limits.max_input_len}"
            raise ApiError(
                400, message, "messages" if param != "max_tokens" else "prompt", code="context_length_exceeded"
            )
        if min(prompt) < 0 or max(prompt) >= config.model.vocab_size:
            raise ApiError(400, f"token ids of a prompt must be from 0 to {config.model.vocab_size - 1}", "prompt")
    if asked is not None and asked > limits.max_output_len:
        raise ApiError(400, f"{param} is {asked}, more than this server's limit of {limits.max_output_len}", param)
    return limits.max_output_len if asked is None else asked


class Generation:
    """Follow the choices of a job: prompt i's are i * n, ..., i * n + n - 1."""

    def __init__(self, job: Job, model: ServerModel, client: EngineClient, timeout: float):
        """Take a job, and the most seconds that it may take."""
        self.job = job
        self._timeout = timeout
        self._model = model
        self._client = client
        count = len(job.prompts) * job.n
        self.outputs = [GrowingOutput(index, job.ends.strings, model.tokenizer) for index in range(count)]
        self.cached_tokens = 0

    @property
    def prompt_tokens(self) -> int:
        """Return the number of tokens of all prompts."""
        return sum(map(len, self.job.prompts))

    @property
    def completion_tokens(self) -> int:
        """Return the number of tokens of all outputs so far."""
        return sum(output.num_tokens for output in self.outputs)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield what each choice gains, until all have ended. If the caller stops, the engine stops, too.

        Raises:
            ApiError: the engine refuses the request or has ended, or the time is over.
        """
        async with Subscription(self._client, self._timeout) as subscription:
            choices: dict[int, int] = {}
            parent = 0
            for index, add in enumerate(self._adds()):
                add.parent = 0 if index % self.job.n == 0 else parent
                number = subscription.add(add)
                parent = add.parent or number
                choices[number] = index
            left = len(choices)
            while left:
                for piece in self._next(await subscription.tokens(), choices, subscription):
                    left -= piece.finish_reason is not None
                    yield piece

    def _adds(self) -> list[Add]:
        job = self.job
        sampling = dataclasses.asdict(job.sampling)
        sampling["logit_bias"] = {str(token): value for token, value in job.sampling.logit_bias.items()}
        if sampling["seed"] is None:
            sampling["seed"] = secrets.randbits(63)
        ends = sorted(job.ends.token_ids)
        most = job.ends.max_new_tokens
        return [
            Add(0, prompt, most, ends, sampling, place * job.n + i, job.num_best, job.grammar, job.salt)
            for place, prompt in enumerate(job.prompts)
            for i in range(job.n)
        ]

    def _next(self, tokens: list[Token], choices: dict[int, int], subscription: Subscription) -> list[Piece]:
        """Join the tokens that have come of each choice to one piece."""
        pieces: dict[int, Piece] = {}
        for token in tokens:
            index = choices[token.id]
            output = self.outputs[index]
            if output.finish_reason is not None:  # tokens behind a stop string
                continue
            self.cached_tokens += token.cached or 0
            event = output.push(token.token, token.finish_reason)
            piece = pieces.setdefault(index, Piece(index))
            piece.text += event.text
            piece.tokens.append(token)
            piece.finish_reason = event.finish_reason
            if event.finish_reason is not None:
                subscription.cancel(token.id, stopped=True)
        return list(pieces.values())
