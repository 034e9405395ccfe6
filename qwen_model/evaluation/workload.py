"""Choose the requests of a benchmark: random prompts, or conversations of ShareGPT."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.errors import QwenModelError
from ..interface.engine_config import Limits
from .records import is_unicode, read_records

if TYPE_CHECKING:
    from ..checkpoints.tokenizer import Tokenizer

ASKS, ANSWERS = ("human", "user"), ("gpt", "assistant", "chatgpt", "bing", "bard")


@dataclass(frozen=True)
class Request:
    """Hold a prompt, and how many tokens are generated for it, whatever they are."""

    prompt: list[int]
    new_tokens: int


@dataclass(frozen=True)
class Workload:
    """Hold the requests, in their order, and what they are.

    description: for headings, such as "16 random prompts of 128 tokens".
    skipped: how many entries of the data set were left out, by the reason.
    """

    requests: list[Request]
    description: str
    skipped: dict[str, int] = field(default_factory=dict)


def random_workload(
    vocab_size: int,
    prompt_tokens: int,
    new_tokens: int,
    num_prompts: int,
    seed: int = 0,
    excluded: Collection[int] = (),
) -> Workload:
    """Draw prompts of random tokens. A prompt depends on the seed and its place, not on the number of prompts.

    excluded: tokens that are not drawn, such as special tokens, at which a server may end.
    """
    kept = np.setdiff1d(np.arange(vocab_size), np.array(sorted(excluded), dtype=np.int64))
    drawn = kept[np.random.default_rng(seed).integers(0, len(kept), (num_prompts, prompt_tokens))]
    requests = [Request(prompt, new_tokens) for prompt in drawn.tolist()]
    return Workload(
        requests, f"{num_prompts} random prompts of {prompt_tokens} tokens, {new_tokens} new tokens each, seed {seed}"
    )


def share_gpt_workload(path: Path, tokenizer: Tokenizer, limits: Limits, num_prompts: int, seed: int = 0) -> Workload:
    """Draw questions from a file in ShareGPT's format; as many tokens are generated as the answer there has.

    Entries are `{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}`. The first
    question that is followed by an answer is taken. Malformed entries, and those beyond `limits`, are left out and
    counted. If there are fewer than `num_prompts`, all are taken.

    Raises:
        QwenModelError: the file cannot be read, or no entry is left.
    """
    entries, malformed = read_records(path)
    pairs = [_question_and_answer(entry) for entry in entries]
    skipped = Counter({"malformed": malformed + pairs.count(None)})
    usable = [pair for pair in pairs if pair is not None]
    random.Random(seed).shuffle(usable)
    requests: list[Request] = []
    for question, answer in usable:
        if len(requests) == num_prompts:
            break
        prompt = tokenizer.encode(question, parse_special_tokens=False)
        new_tokens = len(tokenizer.encode(answer, add_special_tokens=False, parse_special_tokens=False))
        if not (0 < len(prompt) <= limits.max_input_len and 0 < new_tokens <= limits.max_output_len):
            skipped["beyond the engine's limits"] += 1
            continue
        requests.append(Request(prompt, new_tokens))
    skipped = +skipped  # without zeros
    if not requests:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise QwenModelError(f"{path} has no conversation to use: {reasons}")
    return Workload(requests, f"{len(requests)} prompts of {path.name}, seed {seed}", dict(skipped))


def _question_and_answer(entry: dict[str, Any]) -> tuple[str, str] | None:
    """Return the first question that is followed by an answer; None if the entry has none."""
    turns = entry.get("conversations")
    if not isinstance(turns, list):
        return None
    for question, answer in pairwise(turns):
        if (asked := _said(question, ASKS)) and (answered := _said(answer, ANSWERS)):
            return asked, answered
    return None


def _said(turn: Any, speakers: Sequence[str]) -> str:
    """Return what a turn says; "" if it is not by one of these speakers, or malformed."""
    if not isinstance(turn, dict) or turn.get("from") not in speakers or not isinstance(turn.get("value"), str):
        return ""
    return str(turn["value"]) if is_unicode(turn["value"]) else ""
