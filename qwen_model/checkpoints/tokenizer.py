"""Text to token ids and back, for Hugging Face's ``tokenizer.json`` and for Qwen v1's ``qwen.tiktoken``.

``load_tokenizer(model_dir)`` picks the one that the folder holds. transformers is not needed: it would cost
seconds of start-up for what ``tokenizers`` and ``tiktoken`` do.
"""

from __future__ import annotations

import base64
import shutil
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import QwenModelError
from ..common.extras import import_extra
from ..common.files import read_json_object
from .chat_template import (
    check_messages,
    load_chat_template,
    render_chat_template,
    with_default_system_message,
)

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_JSON = "tokenizer.json"
QWEN_TIKTOKEN = "qwen.tiktoken"
TOKENIZER_FILES = (
    TOKENIZER_JSON,
    QWEN_TIKTOKEN,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
END_OF_TEXT, CHAT_START, CHAT_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
QWEN_NUM_EXTRA_TOKENS = 205
QWEN_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
REPLACEMENT_CHARACTER = "\ufffd"

Messages = Sequence[Mapping[str, Any]]


class Tokenizer(ABC):
    """What every tokenizer can do.

    Attributes:
        eos_token_ids: the ids that end a text according to the tokenizer's own configuration. A model's
            ``generation_config.json`` can name more.
        vocab_size: how many tokens there are, special ones included. A model's embedding can have more rows.
    """

    eos_token_ids: tuple[int, ...]
    vocab_size: int

    def encode(self, text: str, add_special_tokens: bool = True, parse_special_tokens: bool = True) -> list[int]:
        """The token ids of ``text``.

        Args:
            text: any valid Unicode.
            add_special_tokens: add what the tokenizer puts around a text (LLaMA's ``<s>``; Qwen adds nothing).
            parse_special_tokens: read ``<|im_end|>`` and the like in ``text`` as the control tokens they name,
                the default of transformers and of Qwen v1's own tokenizer. False takes them as ordinary text:
                use it for text you do not trust.

        Raises:
            QwenModelError: ``text`` holds half of a surrogate pair, which is no Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise QwenModelError(f"the text is not valid Unicode: {error.reason} at character {error.start}") from error
        return self._encode(text, add_special_tokens, parse_special_tokens)

    @abstractmethod
    def _encode(self, text: str, add_special_tokens: bool, parse_special_tokens: bool) -> list[int]: ...

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD, and ids of no token become nothing."""
        return self._decode([int(token_id) for token_id in ids], skip_special_tokens)

    @abstractmethod
    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...

    def apply_chat_template(self, messages: Messages, add_generation_prompt: bool = True) -> list[int]:
        """The token ids of a conversation, as the model was trained to see it.

        Args:
            messages: of ``{"role": "user", "content": "..."}``, oldest first.
            add_generation_prompt: end with what opens the assistant's answer.

        Raises:
            QwenModelError: a message is none, the template refuses it, or the model is not made for chats.
        """
        check_messages(messages)
        return self._chat_ids(messages, add_generation_prompt)

    @abstractmethod
    def _chat_ids(self, messages: Messages, add_generation_prompt: bool) -> list[int]: ...

    def stream_decoder(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder for ids that come one at a time."""
        return StreamDecoder(self, skip_special_tokens)


class StreamDecoder:
    """Gives a growing text out piece by piece; the pieces together are what ``decode`` gives for all ids.

    A token can end inside a character (bytes of an emoji), and some tokenizers strip the first space of what they
    decode. So each piece is the difference of two decodings that start at the same token, the first of the piece
    before, and nothing is given out while it ends in U+FFFD: that may be the first half of a character.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        """Decodes with ``tokenizer``, from the beginning of a text."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids: list[int] = []  # from the first token of the last piece that was given out
        self._num_given = 0  # how many of them are given out already
        self._given_length = 0  # the length of their text

    def push(self, token_id: int) -> str:
        """Takes the next id; gives the text that is certain now, often one word, sometimes nothing."""
        self._ids.append(int(token_id))
        text = self._decode(self._ids)
        if len(text) <= self._given_length or text.endswith(REPLACEMENT_CHARACTER):
            return ""
        return self._give(text)

    def flush(self) -> str:
        """Gives what is still held back, at the end of the text."""
        text = self._decode(self._ids)
        return self._give(text) if len(text) > self._given_length else ""

    def _give(self, text: str) -> str:
        piece = text[self._given_length :]
        self._ids = self._ids[self._num_given :]
        self._num_given = len(self._ids)
        self._given_length = len(self._decode(self._ids))
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)


class HuggingFaceTokenizer(Tokenizer):
    """``tokenizer.json``, by the ``tokenizers`` library."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, special_tokens: Mapping[str, str], chat_template: str | None
    ) -> None:
        """Wraps a tokenizer; ``special_tokens`` are those that its configuration names (``eos_token``, ...)."""
        # A file may have been saved with a length to cut or fill up to: transformers ignores it, and so do we.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens
        self._chat_template = chat_template
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
        eos_token = special_tokens.get("eos_token")
        self.eos_token_ids = () if eos_token is None else (self._id_of(eos_token),)
        if chat_template is None and self._has_chatml():  # a turn ends there
            self.eos_token_ids = tuple(dict.fromkeys((*self.eos_token_ids, self._id_of(CHAT_END))))

    def _has_chatml(self) -> bool:
        return all(self._tokenizer.token_to_id(token) is not None for token in (CHAT_START, CHAT_END))

    def _id_of(self, token: str) -> int:
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise QwenModelError(f"tokenizer_config.json names {token!r}, which {TOKENIZER_JSON} does not have")
        return token_id

    def _encode(self, text: str, add_special_tokens: bool, parse_special_tokens: bool) -> list[int]:
        self._tokenizer.encode_special_tokens = not parse_special_tokens
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def _chat_ids(self, messages: Messages, add_generation_prompt: bool) -> list[int]:
        if self._chat_template is not None:
            template = self._chat_template
        elif self._has_chatml():
            template, messages = CHATML_TEMPLATE, with_default_system_message(messages)
        else:
            raise QwenModelError(
                "the model has no chat template: neither chat_template.jinja nor chat_template in "
                f"tokenizer_config.json is there, and its vocabulary has no {CHAT_START}"
            )
        text = render_chat_template(template, messages, add_generation_prompt, self._special_tokens)
        return self.encode(text, add_special_tokens=False)


class QwenTiktokenTokenizer(Tokenizer):
    """Qwen v1's ``qwen.tiktoken``, by the ``tiktoken`` library, as Qwen's own tokenizer does it.

    Control tokens in a text count as such (see ``encode``); in the messages of a chat they are ordinary text.
    """

    def __init__(self, ranks: dict[bytes, int]) -> None:
        """Makes the tokenizer of these ``ranks``; the special tokens' ids follow them."""
        tiktoken = import_extra("tiktoken", "Qwen v1's tokenizer")
        extras = (f"<|extra_{number}|>" for number in range(QWEN_NUM_EXTRA_TOKENS))
        names = (END_OF_TEXT, CHAT_START, CHAT_END, *extras)
        self._special_ids = {name: len(ranks) + index for index, name in enumerate(names)}
        self._first_special_id = len(ranks)
        self._encoding = tiktoken.Encoding(
            "qwen", pat_str=QWEN_SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=self._special_ids
        )
        self.vocab_size = len(ranks) + len(names)
        self.eos_token_ids = (self._special_ids[END_OF_TEXT], self._special_ids[CHAT_END])

    def _encode(self, text: str, add_special_tokens: bool, parse_special_tokens: bool) -> list[int]:
        text = unicodedata.normalize("NFC", text)
        if parse_special_tokens:
            return self._encoding.encode(text, allowed_special="all", disallowed_special=())
        return self._encoding.encode_ordinary(text)

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        end = self._first_special_id if skip_special_tokens else self.vocab_size
        return self._encoding.decode([token_id for token_id in ids if 0 <= token_id < end], errors="replace")

    def _chat_ids(self, messages: Messages, add_generation_prompt: bool) -> list[int]:
        start, end = self._special_ids[CHAT_START], self._special_ids[CHAT_END]
        new_line = self.encode("\n")
        ids: list[int] = []
        for message in with_default_system_message(messages):
            if not isinstance(message["role"], str) or not isinstance(message["content"], str):
                raise QwenModelError(f"role and content of a message must be texts, given: {message!r}")
            role = self.encode(message["role"], parse_special_tokens=False)
            content = self.encode(message["content"], parse_special_tokens=False)
            ids += [start, *role, *new_line, *content, end, *new_line]
        if add_generation_prompt:
            ids += [start, *self.encode("assistant"), *new_line]
        return ids


def has_tokenizer(folder: Path) -> bool:
    """Whether there are a tokenizer's files in a checkpoint's or an engine's folder."""
    return any((folder / name).is_file() for name in (TOKENIZER_JSON, QWEN_TIKTOKEN))


def load_tokenizer(model_dir: str | Path) -> Tokenizer:
    """The tokenizer of the model or engine in ``model_dir``.

    Raises:
        QwenModelError: the folder holds no tokenizer, or one that cannot be read.
    """
    model_dir = Path(model_dir)
    if (model_dir / TOKENIZER_JSON).is_file():
        return _load_hugging_face_tokenizer(model_dir)
    if (model_dir / QWEN_TIKTOKEN).is_file():
        return QwenTiktokenTokenizer(_read_tiktoken_file(model_dir / QWEN_TIKTOKEN))
    message = f"{model_dir} holds no tokenizer: looked for {TOKENIZER_JSON} and {QWEN_TIKTOKEN}"
    if any((model_dir / name).is_file() for name in ("tokenizer.model", "vocab.json")):
        message += (
            f"; transformers makes {TOKENIZER_JSON} from the older files that are there: "
            "AutoTokenizer.from_pretrained(model_dir).save_pretrained(model_dir)"
        )
    raise QwenModelError(message)


def copy_tokenizer_files(model_dir: str | Path, engine_dir: str | Path) -> list[str]:
    """Copies what ``load_tokenizer`` reads, so that an engine needs its checkpoint no more; gives the files' names.

    A checkpoint without a tokenizer gives an empty list: its engine takes token ids only.
    """
    present = [name for name in TOKENIZER_FILES if (Path(model_dir) / name).is_file()]
    for name in present:
        shutil.copyfile(Path(model_dir) / name, Path(engine_dir) / name)
    return present


def _load_hugging_face_tokenizer(model_dir: Path) -> HuggingFaceTokenizer:
    tokenizers = import_extra("tokenizers", TOKENIZER_JSON)
    path = model_dir / TOKENIZER_JSON
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise QwenModelError(
            f"{path} is no tokenizer that the tokenizers library {tokenizers.__version__} reads"
        ) from error
    config, special = (
        read_json_object(path) if path.is_file() else {}
        for path in (model_dir / "tokenizer_config.json", model_dir / "special_tokens_map.json")
    )
    special_tokens = _special_tokens({**special, **config})
    return HuggingFaceTokenizer(tokenizer, special_tokens, load_chat_template(model_dir, config))


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """``bos_token``, ``eos_token`` and the like, each given as a string or as the fields of an AddedToken."""
    tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"):
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _read_tiktoken_file(path: Path) -> dict[bytes, int]:
    """The lines of base64 token and rank; ranks count up from 0 without a gap, for the special ids follow them."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise QwenModelError(
                f"{path}, line {number}: expected a base64 token and its rank, found {line!r}"
            ) from error
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise QwenModelError(f"{path}: the {len(ranks)} ranks must be 0, 1, 2, ... without a gap or a double")
    return ranks
