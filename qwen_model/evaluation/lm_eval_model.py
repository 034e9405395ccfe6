"""Let lm-eval (EleutherAI's lm-evaluation-harness) evaluate an engine: its model class `qwen_model`.

lm-eval finds the class through this package's entry point `lm_eval.models`; `qwen-model lm_eval` registers it for
versions without entry points (0.4.13 and older).
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from ..checkpoints.chat_template import ChatOptions
from ..common.errors import QwenModelError, shown
from ..engine import load_engine
from ..interface.sampling import SamplingOptions
from .perplexity import log_probabilities

LOG = logging.getLogger(__name__)
DEFAULT_NEW_TOKENS = 256  # of lm-eval's class for transformers
FIRST_SEED = 1234  # lm-eval's default
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
GREEDY_NAMES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
SAMPLING_NAMES = ("temperature", "top_k", "top_p", "min_p", *GREEDY_NAMES)

Scored = tuple[tuple[str, str] | None, list[int], list[int]]
"""A request of lm-eval: its two texts, the tokens of the context, and those of the continuation."""


@register_model("qwen_model")
class QwenModelLM(TemplateLM):
    """Score and generate with an engine; prompts are packed, never padded."""

    def __init__(
        self,
        engine_dir: str = "engine",
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        device: str | None = None,
        max_length: int | None = None,
        enable_thinking: bool | None = None,
    ):
        """Load an engine.

        batch_size: prompts at a time, at most the engine's limit, which "auto" is.
        max_batch_size: an upper limit of it.
        device: "cpu", "cuda:1"; None, and "cuda:0", lm-eval's own default: the first GPU if there is one, else the CPU.
        max_length: tokens of a prompt, at most the engine's max_input_len, the default. Longer ones lose tokens on
            their left, with a warning.
        enable_thinking: a variable of Qwen3's chat template.

        Raises:
            QwenModelError: the engine cannot be loaded or has no tokenizer, or an argument is wrong.
        """
        super().__init__()
        self._session = load_engine(engine_dir, device=None if device == "cuda:0" else device)
        if self._session.tokenizer is None:
            raise QwenModelError("lm-eval needs a tokenizer, and this engine has none")
        self._tokenizer = self._session.tokenizer
        self._engine_dir = str(engine_dir)
        limits = self._session.config.limits
        wanted = limits.max_batch_size if str(batch_size).startswith("auto") else _positive("batch_size", batch_size)
        most = limits.max_batch_size if max_batch_size is None else _positive("max_batch_size", max_batch_size)
        self.batch_size = min(wanted, most, limits.max_batch_size)
        given = limits.max_input_len if max_length is None else _positive("max_length", max_length)
        self.max_length = min(given, limits.max_input_len)
        variables = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self._chat_options = ChatOptions(template_kwargs=variables)

    @property
    def eot_token_id(self) -> int:
        """Return the tokenizer's end token."""
        return (*self._tokenizer.eos_token_ids, *self._session.config.end_token_ids)[0]

    @property
    def prefix_token_id(self) -> int:
        """Return what stands before a text without a context: the token that begins texts, else the end token."""
        return next(iter(self._tokenizer.encode("")), self.eot_token_id)

    @property
    def tokenizer_name(self) -> str:
        """Return what tells caches of requests apart."""
        return self._engine_dir.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text; one that begins with the token that begins texts gets no second one."""
        if add_special_tokens is None:
            prefix = self._tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
            add_special_tokens = not (prefix and string.startswith(prefix))
        return self._tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Take the name of one of the model's chat templates; return what caches tell templates apart by."""
        if isinstance(chat_template, str):
            self._chat_options = ChatOptions(template=chat_template, template_kwargs=self._chat_options.template_kwargs)
        return f"{chat_template} of {self._engine_dir}" if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation; without the generation prompt it ends inside the last message."""
        ids = self._tokenizer.apply_chat_template(chat_history, add_generation_prompt, self._chat_options)
        text = self._tokenizer.decode(ids, skip_special_tokens=False)
        if not add_generation_prompt:
            last = chat_history[-1]["content"].strip()
            text = text[: text.rindex(last) + len(last)]
        return text

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text, in windows of `max_length` tokens; each token is predicted once."""
        windows: list[Scored] = []
        counts = []
        for request in requests:
            found = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            disjoint = [make_disjoint_window(window) for window in found]
            windows += [(None, context, continuation) for context, continuation in disjoint]
            counts.append(len(disjoint))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        totals = []
        for request, count in zip(requests, counts, strict=True):
            totals.append(sum(next(scores)[0] for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Return log-probability of each continuation, and whether greedy decoding gives it.

        Requests that differ only in their last token, as in multiple choice, share one run of the network.
        """
        inputs = [self._input(request) for request in requests]
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, prompt in enumerate(inputs):
            groups.setdefault(tuple(prompt), []).append(index)
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for batch in self._batches(sorted(groups, key=len, reverse=True)):
                counts = [max(len(requests[index][2]) for index in groups[tokens]) for tokens in batch]
                found = self._session.last_logits([list(tokens) for tokens in batch], counts)
                for tokens, logits in zip(batch, found, strict=True):
                    for index in groups[tokens]:
                        continuation = requests[index][2]
                        answers[index] = _score(logits[-len(continuation) :], continuation)
                        if (texts := requests[index][0]) is not None:
                            self.cache_hook.add_partial("loglikelihood", texts, answers[index])
                    bar.update(len(groups[tokens]))
        return [answers[index] for index in range(len(requests))]

    def _input(self, request: Scored) -> list[int]:
        """Return what the network is given, all tokens but the last, cut on the left to `max_length`."""
        _, context, continuation = request
        if not continuation or len(continuation) > self.max_length:
            raise QwenModelError(
                f"a continuation has {len(continuation)} tokens, and must have 1 to {self.max_length}, the limit of "
                "the engine or of max_length"
            )
        return self._cut([*context, *continuation][:-1])

    def _cut(self, tokens: list[int]) -> list[int]:
        if len(tokens) > self.max_length:
            LOG.warning("a prompt of %d tokens is cut on the left to %d", len(tokens), self.max_length)
        return tokens[-self.max_length :]

    def _batches(self, inputs: Iterable[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Yield batches that together have no more tokens than the longest prompt, so that memory suffices."""
        batch: list[tuple[int, ...]] = []
        for tokens in inputs:
            if batch and (len(batch) == self.batch_size or sum(map(len, batch)) + len(tokens) > self.max_length):
                yield batch
                batch = []
            batch.append(tokens)
        if batch:
            yield batch

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text after each context, up to a stop string, an end token, or the most tokens that are asked for.

        Raises:
            QwenModelError: a request has an argument that is not known, or asks for more tokens than the engine gives.
        """
        contexts = [self._cut(self.tok_encode(request.args[0]) or [self.prefix_token_id]) for request in requests]
        settings = [_settings(request.args[1]) for request in requests]
        groups: dict[Hashable, list[int]] = {}
        for index, setting in enumerate(settings):
            groups.setdefault(repr(sorted(setting.items())), []).append(index)
        texts: dict[int, str] = {}
        seed = FIRST_SEED
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for group in groups.values():
                group.sort(key=lambda index: -len(contexts[index]))
                for start in range(0, len(group), self.batch_size):
                    batch = group[start : start + self.batch_size]
                    prompts = [contexts[index] for index in batch]
                    for index, text in zip(batch, self._generate(prompts, settings[batch[0]], seed), strict=True):
                        texts[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    seed += 1
                    bar.update(len(batch))
        return [texts[index] for index in range(len(requests))]

    def _generate(self, prompts: list[list[int]], settings: Mapping[str, Any], seed: int) -> list[str]:
        sampling = SamplingOptions(**settings["sampling"], seed=seed)
        result = self._session.generate(
            prompts, max_new_tokens=settings["max_new_tokens"], stop=settings["stop"], sampling=sampling
        )
        return [output.text or "" for output in result.outputs]


def _positive(name: str, value: Any) -> int:
    if not str(value).isdigit() or int(value) < 1:
        raise QwenModelError(f"{name} must be a positive integer, not {shown(value)}")
    return int(value)


def _score(logits: np.ndarray, continuation: list[int]) -> tuple[float, bool]:
    greedy = logits.argmax(-1).tolist() == continuation
    return float(log_probabilities(logits, continuation).sum()), greedy


def _settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a request's arguments, transformers' and lm-eval's names, to those of a session.

    Raises:
        QwenModelError: one is not known.
    """
    known = {"until", "do_sample", *LENGTH_NAMES, *SAMPLING_NAMES}
    if unknown := sorted(set(arguments) - known):
        raise QwenModelError(f"generation of an engine has no argument {', '.join(unknown)}; it has {sorted(known)}")
    until = arguments.get("until") or []
    stop = [text for text in ([until] if isinstance(until, str) else until) if text]
    lengths = [int(arguments[name]) for name in LENGTH_NAMES if arguments.get(name) is not None]
    sampling = {name: arguments[name] for name in SAMPLING_NAMES if arguments.get(name) is not None}
    if not arguments.get("do_sample", float(sampling.get("temperature", 0)) > 0):
        sampling = {name: value for name, value in sampling.items() if name in GREEDY_NAMES}
    return {"stop": stop, "max_new_tokens": (*lengths, DEFAULT_NEW_TOKENS)[0], "sampling": sampling}
