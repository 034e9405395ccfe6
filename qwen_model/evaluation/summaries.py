"""Compare the summaries of an engine and of its original with those that people wrote: ROUGE, time and tokens."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoints.tokenizer import Tokenizer
from ..common.extras import import_extra
from ..engine.session import Session
from ..interface.sampling import SamplingOptions
from .articles import Article
from .load import Progress
from .markdown import markdown_table
from .original import Original

ROUGE = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}

Generate = Callable[[Sequence[list[int]]], list[list[int]]]
"""Returns the new tokens of each prompt of a batch."""


@dataclass(frozen=True)
class Summaries:
    """Hold what one implementation wrote.

    output_ids: the new tokens of each article, the end token included. texts: their text.
    seconds: the time of all batches, after one that is not measured.
    rouge: F-measures in percent, the means over the articles, by the names of `ROUGE`.
    """

    implementation: str
    output_ids: list[list[int]]
    texts: list[str]
    seconds: float
    prompt_tokens: int
    generated_tokens: int
    rouge: dict[str, float]


def engine_generate(session: Session, max_new_tokens: int, num_beams: int, end_token_ids: Sequence[int]) -> Generate:
    """Return a function that generates with an engine, greedily or with beams."""

    def generate(prompts: Sequence[list[int]]) -> list[list[int]]:
        result = session.generate(
            list(prompts),
            max_new_tokens=max_new_tokens,
            sampling=SamplingOptions(),
            num_beams=num_beams,
            stop_token_ids=end_token_ids,
        )
        return [output.output_ids for output in result.outputs]

    return generate


def original_generate(
    original: Original, max_new_tokens: int, num_beams: int, end_token_ids: Sequence[int]
) -> Generate:
    """Return a function that generates with transformers, greedily or with beams."""
    return lambda prompts: original.generate(prompts, max_new_tokens, end_token_ids, num_beams)


def summarize(
    implementation: str,
    generate: Generate,
    prompts: Sequence[list[int]],
    articles: Sequence[Article],
    tokenizer: Tokenizer,
    batch_size: int,
    end_token_ids: Sequence[int],
    progress: Progress | None = None,
) -> Summaries:
    """Summarize all articles and score the summaries.

    Raises:
        QwenModelError: rouge-score is not installed.
    """
    batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    generate(batches[0])  # libraries initialise themselves in their first call
    outputs: list[list[int]] = []
    began = time.perf_counter()
    for batch in batches:
        outputs += generate(batch)
        if progress is not None:
            progress(len(outputs), len(prompts))
    seconds = time.perf_counter() - began
    texts = [tokenizer.decode(_without_end(ids, end_token_ids)).strip() for ids in outputs]
    return Summaries(
        implementation,
        outputs,
        texts,
        seconds,
        sum(map(len, prompts)),
        sum(map(len, outputs)),
        rouge(texts, [article.summary for article in articles]),
    )


def _without_end(ids: list[int], end_token_ids: Sequence[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] in end_token_ids else ids


def rouge(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return the means of the F-measures, in percent, without stemming; for ROUGE-Lsum a line is a sentence.

    Raises:
        QwenModelError: rouge-score is not installed.
    """
    scores = [_scorer().score(reference, text) for text, reference in zip(texts, references, strict=True)]
    return {name: 100 * statistics.fmean(score[name].fmeasure for score in scores) for name in ROUGE}


def check_rouge() -> None:
    """Raise QwenModelError if rouge-score is not installed: found out before the work, not after it."""
    _scorer()


def _scorer() -> Any:
    import_extra("rouge_score", "ROUGE", "eval")
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(list(ROUGE), use_stemmer=False)


def losses(engine: Summaries, original: Summaries) -> dict[str, float]:
    """Return how much lower each ROUGE of the engine is than the original's; negative where it is higher."""
    return {name: original.rouge[name] - engine.rouge[name] for name in ROUGE}


def table(found: Sequence[Summaries]) -> str:
    """Return a Markdown table, a row for each implementation; with two, also the differences."""
    heads = ["implementation", *ROUGE.values(), "seconds", "tokens", "tokens/s", "same outputs"]
    rows = []
    for summaries in found:
        same = sum(a == b for a, b in zip(summaries.output_ids, found[0].output_ids, strict=True))
        rows.append(
            [
                summaries.implementation,
                *(f"{summaries.rouge[name]:.2f}" for name in ROUGE),
                f"{summaries.seconds:.2f}",
                str(summaries.generated_tokens),
                f"{summaries.generated_tokens / summaries.seconds:.1f}",
                "" if summaries is found[0] else f"{same} of {len(summaries.texts)}",
            ]
        )
    if len(found) == 2:
        lost = losses(*found)
        rows.append(["difference", *(f"{0.0 - lost[name]:+.2f}" for name in ROUGE), "", "", "", ""])
    return markdown_table(heads, rows)
