"""Read articles with their summaries, and make prompts that ask for a summary."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.chat_template import ChatOptions
from ..checkpoints.tokenizer import Tokenizer
from ..common.errors import QwenModelError
from ..common.extras import import_extra
from .records import is_unicode, read_records

PACKAGED = Path(__file__).parent / "data" / "articles.jsonl"
CNN_DAILYMAIL_VERSION = "3.0.0"  # the configuration that published results are of
SYSTEM = "You summarize articles. Answer with a short summary of the article that the user gives, and nothing else."
REQUEST = "\n\nTL;DR:"


@dataclass(frozen=True)
class Article:
    """Hold an article and a summary that a person wrote, a sentence on each line."""

    text: str
    summary: str


def load_articles(dataset: str | None = None) -> tuple[list[Article], int]:
    """Return the articles, and how many entries were left out because they lack an article or a summary.

    dataset: a file of JSON objects with `article` and `highlights`, or the name of a data set of the Hugging Face hub
        with these columns, such as abisee/cnn_dailymail, of which the test split is taken. None: those of the package.

    Raises:
        QwenModelError: there is no such file or data set, or it has no article.
    """
    name = dataset or str(PACKAGED)
    entries, malformed = _from_hub(name) if _is_hub_name(name) else read_records(Path(name))
    found = [_article(entry) for entry in entries]
    articles = [article for article in found if article is not None]
    if not articles:
        raise QwenModelError(f'{name} has no articles: expected objects with "article" and "highlights"')
    return articles, malformed + len(found) - len(articles)


def _is_hub_name(name: str) -> bool:
    """Tell whether this names a data set of the hub: it is no file, and does not look like one."""
    path = Path(name)
    return not path.exists() and path.suffix not in (".json", ".jsonl") and 1 <= len(path.parts) <= 2


def _from_hub(name: str) -> tuple[list[Any], int]:
    datasets = import_extra("datasets", f"the data set {name}, which is no file,", "datasets")
    version = CNN_DAILYMAIL_VERSION if name.rpartition("/")[2] == "cnn_dailymail" else None
    try:
        return list(datasets.load_dataset(name, version, split="test")), 0
    except Exception as error:  # the library raises errors of many others
        reason = " ".join(str(error).split()) or type(error).__name__
        raise QwenModelError(f"{name} is no file, and the hub's data set cannot be loaded: {reason[:300]}") from error


def _article(entry: dict[str, Any]) -> Article | None:
    text, summary = entry.get("article"), entry.get("highlights")
    if not isinstance(text, str) or not isinstance(summary, str) or not text.strip() or not summary.strip():
        return None
    if not is_unicode(text) or not is_unicode(summary):
        return None
    return Article(text.strip(), summary.strip())


def choose(articles: Sequence[Article], count: int, seed: int) -> list[Article]:
    """Draw `count` articles, and keep their order; all of them if there are no more."""
    if count >= len(articles):
        return list(articles)
    places = random.Random(seed).sample(range(len(articles)), count)
    return [articles[place] for place in sorted(places)]


def summary_prompt(article: str, tokenizer: Tokenizer, max_tokens: int, chat: bool = True) -> tuple[list[int], bool]:
    """Return the tokens of a prompt that asks for a summary, and whether the article had to be cut.

    An article that is too long loses its last tokens; what the prompt has around it stays whole.

    chat: ask through the model's chat template. Else the article is followed by "TL;DR:", for base models.

    Raises:
        QwenModelError: `max_tokens` leaves no room for an article.
    """
    prompt = _prompt(article, tokenizer, chat)
    if len(prompt) <= max_tokens:
        return prompt, False
    tokens = tokenizer.encode(article, add_special_tokens=False, parse_special_tokens=False)
    kept = len(tokens)
    while len(prompt) > max_tokens:
        kept -= len(prompt) - max_tokens  # once more if tokens at the edges join differently, or a character was cut
        if kept < 1:
            raise QwenModelError(f"prompts of {max_tokens} tokens, the engine's limit, have no room for an article")
        text = tokenizer.decode(tokens[:kept], skip_special_tokens=False)
        prompt = _prompt(text.rstrip("\ufffd"), tokenizer, chat)
    return prompt, True


def _prompt(article: str, tokenizer: Tokenizer, chat: bool) -> list[int]:
    text = article + REQUEST
    if not chat:
        return tokenizer.encode(text, parse_special_tokens=False)
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, True, ChatOptions(sanitize_control_tokens=True))
