"""Generate with a loaded engine: prompts in, tokens and text out, all at once or as a stream."""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoints.chat_template import ChatOptions
from ..common.errors import QwenModelError, shown
from ..interface.device import Device, FloatArray
from ..interface.engine_config import EngineConfig
from ..interface.sampling import MOST_BEST, SamplingOptions
from . import sequences
from .beam_search import beam_search, beam_sequence
from .growing_output import GrowingOutput, Timer
from .overflow import not_finite
from .results import BeamOutput, FinishReason, GenerationResult, Output, StreamEvent, Timing
from .scheduler import Scheduler

if TYPE_CHECKING:
    from ..checkpoints.tokenizer import Tokenizer

LOG = logging.getLogger(__name__)

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}
Prompt = str | Sequence[int] | Sequence[Message]  # text, token ids, or (with chat=True) a conversation
DEFAULT_NEW_TOKENS = 128


class Session:
    """Generate with a loaded engine. Requests may overlap, and come from several threads: they share the batches."""

    def __init__(self, config: EngineConfig, scheduler: Scheduler, tokenizer: Tokenizer | None = None):
        """Take a loaded engine; `load_engine` makes sessions. Without a tokenizer prompts are token ids only.

        scheduler: that of the engine's device; sessions may share it.
        """
        self.config = config
        self.scheduler = scheduler
        self.tokenizer = tokenizer

    @property
    def device(self) -> Device:
        """Return what runs the engine."""
        return self.scheduler.device

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        sampling: SamplingOptions | None = None,
        n: int = 1,
        logprobs: int | None = None,
        num_beams: int = 1,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        chat: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        sanitize_control_tokens: bool = False,
    ) -> GenerationResult:
        """Generate for one prompt or any number; a prompt is a string, a list of token ids or a list of messages.

        Prompts that the engine has no room for wait until others are done.

        max_new_tokens: None: 128, or the engine's limit if that is lower.
        sampling: exactly these options; SamplingOptions() is greedy. None: the checkpoint's generation_config.json,
            greedy if it does not sample; `config.sampling_defaults.options(temperature=0.3)` changes a part of that.
        n: outputs for each prompt, drawn independently.
        logprobs: also return the log-probability of each token, and of so many most likely ones, 0 to 128; None: none.
        num_beams: above 1: beam search as in transformers, which uses neither `sampling` nor the checkpoint's options.
        stop: generation ends, and the text is cut, before any of these strings. A string that is a special token, such
            as "<|im_end|>", ends generation at that token; one that has a special token inside is an error.
        stop_token_ids: generation also ends at these tokens; the text is that of the tokens before.
        chat: put each prompt, a user's message or a list of messages, into the model's chat template. Generation also
            ends at the end of the model's turn, whatever the checkpoint's end tokens are.
        tools: for the chat template: JSON schemas of functions, as OpenAI's and transformers' `tools`.
        chat_template: name of one of the model's templates, or Jinja source.
        chat_template_kwargs: variables of the chat template, such as {"enable_thinking": False} for Qwen3.
        sanitize_control_tokens: read control tokens in prompts, messages, tools and variables as ordinary text, as in
            transformers; those that a template writes stay control tokens.

        Raises:
            QwenModelError: an argument is wrong, before anything is computed; or logits are not finite.
        """
        chat_options = _chat_options(chat, tools, chat_template, chat_template_kwargs, sanitize_control_tokens)
        if _positive_integer("num_beams", num_beams) != 1:
            if _positive_integer("n", n) != 1 or logprobs is not None:
                raise QwenModelError(
                    "beam search gives one output for each prompt, and its score: it takes no n, logprobs"
                )
            return self._generate_beams(
                prompts, max_new_tokens, sampling, num_beams, stop, stop_token_ids, chat, chat_options
            )
        request = self._request(
            prompts, max_new_tokens, sampling, n, logprobs, stop, stop_token_ids, chat, chat_options
        )
        for _ in self._run(request, patient=True):
            pass
        return GenerationResult([output.output() for output in request.outputs], request.timing())

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        sampling: SamplingOptions | None = None,
        n: int = 1,
        logprobs: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        chat: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        sanitize_control_tokens: bool = False,
    ) -> Iterator[StreamEvent]:
        """Do as `generate`, and yield each token when it is computed. Arguments are checked at once.

        Other requests may be made meanwhile: the stream goes on while they run, and keeps what comes. Closing a stream
        ends what it has not yet generated.
        """
        chat_options = _chat_options(chat, tools, chat_template, chat_template_kwargs, sanitize_control_tokens)
        request = self._request(
            prompts, max_new_tokens, sampling, n, logprobs, stop, stop_token_ids, chat, chat_options
        )
        return self._run(request)

    def logits(self, input_ids: Sequence[int]) -> FloatArray:
        """Return the logits after each token of one prompt: float32 [tokens, vocab_size].

        Raises:
            QwenModelError: the prompt is wrong, or logits are not finite.
        """
        prompt = _plain(input_ids)
        return self.last_logits([prompt], [len(prompt) if isinstance(prompt, list) else 0])[0]

    def last_logits(self, prompts: Sequence[Sequence[int]], counts: Sequence[int]) -> list[FloatArray]:
        """Return the logits after each of the last `counts[i]` tokens of `prompts[i]`: float32 [counts[i], vocab_size].

        Raises:
            QwenModelError: a prompt or a count is wrong, or logits are not finite.
        """
        plain = [_plain(prompt) for prompt in prompts]
        for prompt in plain:
            if not _all_are(prompt, int):
                raise QwenModelError(f"input_ids must be a list of token ids, not {shown(prompt)}")
        self._check_prompts(plain)
        for prompt, count in zip(plain, counts, strict=True):
            if not 1 <= count <= len(prompt):
                raise QwenModelError(f"a prompt of {len(prompt)} tokens has no logits after its last {count}")
        scored = [sequences.Sequence(prompt, 0, logit_rows=count) for prompt, count in zip(plain, counts, strict=True)]
        self._check_fit(scored)
        with self.scheduler.lock:
            try:
                for sequence in scored:
                    self.scheduler.add(sequence)
                while any(sequence.finish_reason is None for sequence in scored):
                    self._step(patient=True)
            finally:
                for sequence in scored:
                    self.scheduler.cancel(sequence)
        found = [np.concatenate(sequence.logits) for sequence in scored]
        for index, logits in enumerate(found):
            if not np.isfinite(logits).all():
                raise not_finite(self.config, len(plain), index)
        return found

    def _request(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int | None,
        sampling: SamplingOptions | None,
        n: int,
        logprobs: int | None,
        stop: str | Sequence[str] | None,
        stop_token_ids: Sequence[int] | None,
        chat: bool,
        chat_options: ChatOptions,
    ) -> _Request:
        stops, ends = self._stops(stop, stop_token_ids)
        options = self._sampling(sampling)
        options.check_vocabulary(self.config.model.vocab_size)
        samples, num_best = _positive_integer("n", n), _num_best(logprobs, self.config.model.vocab_size)
        token_ids = self._token_ids(prompts, chat, chat_options)
        count = self._new_tokens(max_new_tokens)
        self._check_prompts(token_ids)
        ends |= self._end_token_ids(chat, chat_options)
        found: list[sequences.Sequence] = []
        for prompt in token_ids:
            first = len(found)
            for _ in range(samples):
                parent = found[first] if len(found) > first else None
                draws = len(found)
                found.append(sequences.Sequence(prompt, count, options, ends, draws, num_best, parent=parent))
        self._check_fit(found[::samples])
        outputs = [GrowingOutput(index, stops, self.tokenizer) for index in range(len(found))]
        return _Request(self, found, outputs, samples, Timer(token_ids, len(found)))

    def _sampling(self, options: SamplingOptions | None) -> SamplingOptions:
        if options is None:
            return self.config.sampling_defaults.options()
        if not isinstance(options, SamplingOptions):
            raise QwenModelError(f"sampling must be a SamplingOptions, not {shown(options)}")
        return options

    def _stops(
        self, stop: str | Sequence[str] | None, stop_token_ids: Sequence[int] | None
    ) -> tuple[tuple[str, ...], frozenset[int]]:
        """Return the strings that are searched in the text, and the tokens that end it."""
        stops, ends = _stop_strings(stop), self._stop_token_ids(stop_token_ids)
        if not stops:
            return (), ends
        if self.tokenizer is None:
            raise QwenModelError("stop strings need a tokenizer, and this engine has none")
        special = self.tokenizer.special_tokens
        for text in stops:
            inside = next((token for token in special if token in text), None)
            if text not in special and inside is not None:
                raise QwenModelError(
                    f"stop {text!r} would never be found: {inside} is a special token, which is left out of the text; "
                    f"give {inside} alone, or the text without it"
                )
        ends |= frozenset(special[text] for text in stops if text in special)
        return tuple(text for text in stops if text not in special), ends

    def _stop_token_ids(self, given: Sequence[int] | None) -> frozenset[int]:
        ids, size = [] if given is None else _plain(given), self.config.model.vocab_size
        if not _all_are(ids, int) or not all(0 <= token < size for token in ids):
            raise QwenModelError(f"stop_token_ids must be a list of token ids from 0 to {size - 1}, not {shown(given)}")
        return frozenset(ids)

    def _end_token_ids(self, chat: bool, chat_options: ChatOptions) -> frozenset[int]:
        """Return the engine's end tokens, and in a chat those that end the model's turn."""
        ends = frozenset(self.config.end_token_ids)
        return ends | frozenset(self.tokenizer.chat_end_token_ids(chat_options)) if chat and self.tokenizer else ends

    def _token_ids(self, prompts: Prompt | Sequence[Prompt], chat: bool, chat_options: ChatOptions) -> list[list[int]]:
        plain = _plain(prompts)
        if not isinstance(plain, (str, list)):
            raise QwenModelError(
                f"prompts must be strings, lists of token ids or lists of messages, not {shown(prompts)}"
            )
        one = isinstance(plain, str) or (len(plain) > 0 and isinstance(plain[0], (int, Mapping)))
        return [self._encode(prompt, chat, chat_options) for prompt in ([plain] if one else plain)]

    def _encode(self, given: Any, chat: bool, chat_options: ChatOptions) -> list[int]:
        prompt = _plain(given)
        if _all_are(prompt, int):
            if chat:
                raise QwenModelError("the chat template needs prompts that are strings or messages, not token ids")
            return prompt
        if not isinstance(prompt, str) and not _all_are(prompt, Mapping):
            raise QwenModelError(
                f"a prompt must be a string, a list of token ids or a list of messages, not {shown(given)}"
            )
        if self.tokenizer is None:
            raise QwenModelError("this engine has no tokenizer: give token ids (--input-ids) instead of text")
        if chat:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            return self.tokenizer.apply_chat_template(messages, True, chat_options)
        if not isinstance(prompt, str):
            raise QwenModelError("a list of messages needs chat=True")
        return self.tokenizer.encode(prompt, parse_special_tokens=not chat_options.sanitize_control_tokens)

    def _new_tokens(self, max_new_tokens: int | None) -> int:
        limit = self.config.limits.max_output_len
        if max_new_tokens is None:
            return min(limit, DEFAULT_NEW_TOKENS)
        if _positive_integer("max_new_tokens", max_new_tokens) > limit:
            raise QwenModelError(
                f"max_new_tokens {max_new_tokens} is more than the engine's limit of {limit}: "
                "build it with a larger --max-output-len"
            )
        return max_new_tokens

    def _check_prompts(self, prompts: list[list[int]]) -> None:
        limits = self.config.limits
        if not prompts:
            raise QwenModelError("no prompt was given")
        for index, prompt in enumerate(prompts):
            name = f"prompt {index}" if len(prompts) > 1 else "the prompt"
            if not prompt:
                raise QwenModelError(f"{name} has no tokens")
            if len(prompt) > limits.max_input_len:
                raise QwenModelError(
                    f"{name} has {len(prompt)} tokens, more than the engine's limit of {limits.max_input_len}: "
                    "build it with a larger --max-input-len"
                )
            largest = self.config.model.vocab_size - 1
            if min(prompt) < 0 or max(prompt) > largest:
                wrong = next(token for token in prompt if not 0 <= token <= largest)
                raise QwenModelError(f"{name} has the token id {wrong}; the vocabulary is 0 to {largest}")

    def _check_fit(self, found: list[sequences.Sequence]) -> None:
        for index, sequence in enumerate(found):
            self.scheduler.check(sequence, f"prompt {index}" if len(found) > 1 else "the prompt")

    def _run(self, request: _Request, patient: bool = False) -> Iterator[StreamEvent]:
        """Yield the events of a request. Whoever waits for one drives the scheduler, for all requests."""
        lock = self.scheduler.lock
        with lock:
            self.device.prepare(min(len(request.outputs), self.device.max_sequences))
            request.start()
        try:
            while not request.is_done or request.events:  # another thread's step appends events before it is done
                while request.events:
                    yield request.events.popleft()
                if request.error is not None:
                    raise request.error
                with lock:
                    if request.waits:
                        self._step(patient, request.timer)
        finally:
            with lock:
                request.cancel()
        _log_timing(request.timing())

    def _step(self, patient: bool, timer: Timer | None = None) -> None:
        """Run a step, and hand its events to the requests that they belong to. The caller holds the lock."""
        if not self.scheduler.has_work:
            raise QwenModelError("the request has ended: the device failed in another one")
        for event in self.scheduler.step(patient):
            if event.sequence.on_event is not None:
                event.sequence.on_event(event)
        if timer is not None:
            timer.step(self.scheduler.prompt_share)

    def _generate_beams(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int | None,
        sampling: SamplingOptions | None,
        num_beams: int,
        stop: str | Sequence[str] | None,
        stop_token_ids: Sequence[int] | None,
        chat: bool,
        chat_options: ChatOptions,
    ) -> GenerationResult:
        stops, ends = self._stops(stop, stop_token_ids)
        if stops or (sampling is not None and self._sampling(sampling).changes_logits):
            raise QwenModelError("beam search is greedy: it takes no stop strings and no sampling options")
        token_ids = self._token_ids(prompts, chat, chat_options)
        count = self._new_tokens(max_new_tokens)
        self._check_prompts(token_ids)
        if num_beams > self.device.max_sequences:
            raise QwenModelError(
                f"{num_beams} beams are {num_beams} sequences, more than the engine's limit of "
                f"{self.device.max_sequences}: build it with a larger --max-batch-size"
            )
        ends |= self._end_token_ids(chat, chat_options)
        if max(2, len(ends) + 1) > self.config.model.vocab_size:
            raise QwenModelError(f"beam search needs a vocabulary of more than {len(ends)} tokens")
        num_best = min(num_beams + len(ends), self.config.model.vocab_size)  # num_beams of a beam's own may go on
        if num_best > MOST_BEST:
            raise QwenModelError(f"num_beams and end tokens together must be at most {MOST_BEST}, not {num_best}")
        beams = [beam_sequence(prompt, count, num_best) for prompt in token_ids]
        self._check_fit(beams)
        timer = Timer(token_ids, len(token_ids))
        step = partial(self._step, patient=True, timer=timer)
        with self.scheduler.lock:
            self.device.prepare(min(len(token_ids) * num_beams, self.device.max_sequences))
            timer.start()
            found = beam_search(
                self.scheduler, beams, num_beams, ends, step, partial(not_finite, self.config, len(token_ids))
            )
        outputs = [self._beam_output([BeamOutput(beam.tokens, beam.score) for beam in beams], ends) for beams in found]
        timing = timer.timing(sum(len(output.output_ids) for output in outputs))
        _log_timing(timing)
        return GenerationResult(outputs, timing)

    def _beam_output(self, beams: list[BeamOutput], ends: frozenset[int]) -> Output:
        best = beams[0].output_ids
        ended = best[-1] in ends
        text = None if self.tokenizer is None else self.tokenizer.decode(best[:-1] if ended else best)
        return Output(best, text, "stop" if ended else "length", beams)


def _log_timing(timing: Timing) -> None:
    LOG.info(
        "prefill: %d tokens in %.4f s, %.0f tokens/s; decode: %d tokens in all after %.4f s more, %.1f tokens/s",
        timing.prompt_tokens,
        timing.prefill_seconds,
        timing.prefill_tokens_per_second,
        timing.generated_tokens,
        timing.decode_seconds,
        timing.decode_tokens_per_second,
    )


def _plain(values: Any) -> Any:
    """Convert arrays, tensors and sequences to lists, and NumPy's integers to Python's; keep other values."""
    if hasattr(values, "tolist"):
        return values.tolist()
    if isinstance(values, (str, bytes, bytearray)) or not isinstance(values, Sequence):
        return values
    if _types(values) <= {int, list, str}:
        return list(values)
    return [int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value for value in values]


def _types(values: Sequence[Any]) -> set[type]:
    """Return the types of the elements; for long prompts this is several times as fast as a check of each element."""
    return set(map(type, values))


def _all_are(values: Any, kind: type) -> bool:
    """Tell whether `values` is a list of `kind` only; True and False are not integers."""
    return isinstance(values, list) and all(issubclass(found, kind) and found is not bool for found in _types(values))


def _positive_integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise QwenModelError(f"{name} must be a positive integer, not {shown(value)}")
    return int(value)


def _num_best(logprobs: int | None, vocab_size: int) -> int | None:
    if logprobs is None:
        return None
    if isinstance(logprobs, bool) or not isinstance(logprobs, Integral) or not 0 <= logprobs <= MOST_BEST:
        raise QwenModelError(f"logprobs must be an integer from 0 to {MOST_BEST}, not {shown(logprobs)}")
    return min(int(logprobs), vocab_size)


def _stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or not all(isinstance(text, str) and text for text in stops):
        raise QwenModelError(f"stop must be a string or a list of strings, none of them empty, not {shown(stop)}")
    for text in stops:
        if re.search("[\ud800-\udfff]", text):
            raise QwenModelError(f"stop {text!r} would never be found: it holds half of a surrogate pair")
    return tuple(stops)


def _chat_options(
    chat: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    template: str | None,
    template_kwargs: Mapping[str, Any] | None,
    sanitize_control_tokens: bool,
) -> ChatOptions:
    for name, value in (("tools", tools), ("chat_template", template), ("chat_template_kwargs", template_kwargs)):
        if value is not None and not chat:
            raise QwenModelError(f"{name} is for the chat template, which needs chat=True")
    return ChatOptions(tools, {} if template_kwargs is None else template_kwargs, template, sanitize_control_tokens)


class _Request:
    """Hold what one call of a session generates: sequences, what became of each, and the events to yield."""

    def __init__(
        self,
        session: Session,
        found: list[sequences.Sequence],
        outputs: list[GrowingOutput],
        samples: int,
        timer: Timer,
    ):
        self.outputs = outputs
        self.events: deque[StreamEvent] = deque()
        self.error: QwenModelError | None = None
        self.timer = timer
        self._session = session
        self._sequences = found
        self._samples = samples  # of each prompt
        self._unfinished = len(found)

    @property
    def is_done(self) -> bool:
        return self._unfinished == 0

    @property
    def waits(self) -> bool:
        """Tell whether nothing has come that the caller could be given."""
        return not (self.is_done or self.events or self.error)

    def start(self) -> None:
        self.timer.start()
        for sequence, output in zip(self._sequences, self.outputs, strict=True):
            sequence.on_event = partial(self._take, output)
            self._session.scheduler.add(sequence)

    def cancel(self) -> None:
        for sequence in self._sequences:
            self._session.scheduler.cancel(sequence)

    def timing(self) -> Timing:
        return self.timer.timing(sum(output.num_tokens for output in self.outputs))

    def _take(self, output: GrowingOutput, event: sequences.Event) -> None:
        if output.finish_reason is not None or self.error is not None:
            return
        if event.finish_reason == "error":
            samples, num_prompts = self._samples, len(self.outputs) // self._samples
            self.error = not_finite(self._session.config, num_prompts, output.index // samples)
            return
        reason: FinishReason | None = event.finish_reason if event.finish_reason in ("stop", "length") else None
        self.events.append(output.push(event.token, reason, event.logprob))
        if output.finish_reason is not None:
            self._unfinished -= 1
            self._session.scheduler.cancel(event.sequence)  # a stop string may have ended it
