"""Load Hugging Face's tokenizers: ``tokenizer.json``, and what the files beside it add."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import QwenModelError, shown
from ..common.extras import import_extra
from ..common.files import is_file, read_json_object, read_text
from .chat_template import (
    REASONING_FIELDS,
    ChatOptions,
    check_chat_templates,
    check_plain_chat,
    choose_chat_template,
    literal_text,
    load_chat_templates,
    one_line,
    render_chat_template,
    text_after_answer,
    with_default_system_message,
)
from .control_tokens import contains, control_token_pattern, mark, split_at_marks
from .qwen_tiktoken import CHAT_END, CHAT_START
from .tokenizer_base import Tokenizer

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_JSON = "tokenizer.json"
LONG_TEXT = 1 << 14  # characters that take milliseconds
SPOKEN = ("content", *REASONING_FIELDS)
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
"""Stands for a byte in SentencePiece's vocabularies."""
WORD_START = "\u2581"
"""Stands for a space there."""


def _byte_level_alphabet() -> dict[str, int]:
    """Return the bytes by the characters that stand for them in byte-level vocabularies, as in GPT-2's."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTE_LEVEL = _byte_level_alphabet()


class HuggingFaceTokenizer(Tokenizer):
    """Run a ``tokenizer.json`` with the ``tokenizers`` library."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, named_tokens: Mapping[str, str], chat_templates: Mapping[str, str]
    ) -> None:
        """Wrap a tokenizer; ``named_tokens`` are those that its configuration names (``eos_token``, ...)."""
        # A file may have been saved with truncation or padding: transformers ignores both, and so do we.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # of the tokenizer's setting of special tokens
        self._named_tokens = named_tokens
        self._chat_templates = chat_templates
        self._added = {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items()}
        self.special_tokens = {
            token.content: index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special
        }
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
        eos_token = named_tokens.get("eos_token")
        self.eos_token_ids = () if eos_token is None else (self._id_of(eos_token),)

    def to_json(self) -> str:
        """Return the content of a ``tokenizer.json`` of this tokenizer."""
        content: str = self._tokenizer.to_str()
        return content

    def _has_chatml(self) -> bool:
        return all(self._tokenizer.token_to_id(token) is not None for token in (CHAT_START, CHAT_END))

    def _id_of(self, token: str) -> int:
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise QwenModelError(f"tokenizer_config.json names {token!r}, which {TOKENIZER_JSON} does not have")
        return token_id

    def _encode(self, text: str, add_special_tokens: bool, parse_special_tokens: bool) -> list[int]:
        with self._lock, _one_error(f"{TOKENIZER_JSON} cannot encode the text"):
            self._tokenizer.encode_special_tokens = not parse_special_tokens
            if len(text) < LONG_TEXT:
                return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
            # A batch leaves the interpreter's lock to other threads, and its fast form computes no offsets.
            return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        known = ids if not ids or min(ids) >= 0 else [token_id for token_id in ids if token_id >= 0]
        with _one_error(f"{TOKENIZER_JSON} cannot decode the tokens"):
            return self._tokenizer.decode(known, skip_special_tokens=skip_special_tokens)

    @cached_property
    def _is_byte_level(self) -> bool:
        return "ByteLevel(" in repr(self._tokenizer.decoder)  # also where it is one of a sequence

    def token_bytes(self, token_id: int) -> bytes:
        """See `Tokenizer.token_bytes`."""
        piece = self._tokenizer.id_to_token(token_id) if token_id >= 0 else None
        if piece is None:
            return b""
        if piece in self._added:
            return piece.encode()
        if self._is_byte_level and all(character in BYTE_LEVEL for character in piece):
            return bytes(BYTE_LEVEL[character] for character in piece)
        if BYTE_PIECE.fullmatch(piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(WORD_START, " ").encode()

    def check_chat_templates(self) -> None:
        """Raise QwenModelError if one of the model's chat templates is not valid."""
        check_chat_templates(self._chat_templates)

    def _chat_ids(self, messages: list[dict[str, Any]], add_generation_prompt: bool, options: ChatOptions) -> list[int]:
        template = self._template(options)
        if template is None:
            check_plain_chat(messages, options)
            template, messages = CHATML_TEMPLATE, with_default_system_message(messages)
        if not options.sanitize_control_tokens:
            text = render_chat_template(template, messages, add_generation_prompt, self._named_tokens, options)
            return self.encode(text, add_special_tokens=False)
        return self._sanitized_chat_ids(template, messages, add_generation_prompt, options)

    def _template(self, options: ChatOptions) -> str | None:
        """Return the source of the template; None: plain ChatML."""
        if self._chat_templates or options.template is not None:
            return choose_chat_template(self._chat_templates, options)
        if self._has_chatml():
            return None
        raise QwenModelError(
            "the model has no chat template: neither chat_template.jinja nor chat_template in "
            f"tokenizer_config.json is there, and its vocabulary has no {CHAT_START}"
        )

    def _turn_end_ids(self, options: ChatOptions) -> tuple[int, ...]:
        """Return the id of the token that the template writes after an answer, if it writes a token there."""
        template = self._template(options) or CHATML_TEMPLATE
        after = text_after_answer(template, self._named_tokens).lstrip()
        token = max((token for token in self._added if after.startswith(token)), key=len, default=None)
        return () if token is None else (self._added[token],)

    def _sanitized_chat_ids(
        self, template: str, messages: list[dict[str, Any]], add_generation_prompt: bool, options: ChatOptions
    ) -> list[int]:
        """Encode as transformers does with ``sanitize_control_tokens``, except for the assistant's ``</think>``.

        Control tokens are the special ones, which are left out of decoded text, and added tokens that the template
        writes, such as ``<tool_call>``. In the assistant's own messages the latter stay as they are, since templates
        look for them there.
        """
        special, every = control_token_pattern(self.special_tokens), self._control_tokens_of(template)
        try:
            text_only = not contains([messages, options.tools, options.template_kwargs], every)
            if not text_only:
                messages = [_marked(message, special, every) for message in messages]
                options = ChatOptions(mark(options.tools, every), mark(options.template_kwargs, every))
        except RecursionError:
            raise QwenModelError("the messages, tools or chat_template_kwargs are nested too deeply") from None
        text = render_chat_template(template, messages, add_generation_prompt, self._named_tokens, options)
        if text_only:
            return self._encode_with_added_tokens(text)
        ids: list[int] = []
        for index, (piece, marked) in enumerate(split_at_marks(text, every)):
            ids += self._encode_piece(piece, marked, at_start=index == 0)
        return ids

    def _control_tokens_of(self, template: str) -> re.Pattern[str]:
        written = literal_text(template)
        return control_token_pattern(
            token for token in self._added if token in self.special_tokens or (token in written and not token.isspace())
        )

    def _encode_piece(self, piece: str, as_text: bool, at_start: bool) -> list[int]:
        """Encode a piece of a text; `as_text`: it is a control token, to be encoded as ordinary text.

        All pieces but the first are encoded after a new line: some tokenizers put a space before what they are given.
        """
        encode = self._encode_without_added_tokens if as_text else self._encode_with_added_tokens
        if at_start:
            ids = encode(piece)
        else:
            new_line, ids = self._encode_with_added_tokens("\n"), encode("\n" + piece)
            ids = ids[len(new_line) :] if ids[: len(new_line)] == new_line else encode(piece)
        if as_text and self._added[piece] in ids:
            raise QwenModelError(
                f"{piece!r} cannot be kept as text: the tokenizer makes the token even of its characters"
            )
        return ids

    def _encode_with_added_tokens(self, text: str) -> list[int]:
        return self.encode(text, add_special_tokens=False)

    def _encode_without_added_tokens(self, text: str) -> list[int]:
        """Encode without any added token; the library's switch, which ``encode`` uses, leaves out special ones only."""
        if self._tokenizer.normalizer is not None:
            text = self._tokenizer.normalizer.normalize_str(text)
        words = [text]
        if self._tokenizer.pre_tokenizer is not None:
            words = [word for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in self._tokenizer.model.tokenize(word)]


def _marked(message: dict[str, Any], special: re.Pattern[str], every: re.Pattern[str]) -> dict[str, Any]:
    """Return a message with marks around its control tokens; in the assistant's text, only around special tokens."""
    marked: dict[str, Any] = mark(message, every)
    if message["role"] == "assistant":
        marked.update((key, mark(message[key], special)) for key in SPOKEN if key in message)
    return marked


def load_hugging_face_tokenizer(model_dir: Path) -> HuggingFaceTokenizer:
    """Return the tokenizer of a folder with a ``tokenizer.json``.

    Raises:
        QwenModelError: one of its files cannot be read, or its tokens contradict it.
    """
    library = import_extra("tokenizers", TOKENIZER_JSON)
    path = model_dir / TOKENIZER_JSON
    content = read_text(path)
    with _one_error(f"{path} is not a tokenizer that the tokenizers library {library.__version__} reads"):
        tokenizer = library.Tokenizer.from_str(content)
    config, special_tokens_map, added_tokens = (
        read_json_object(path) if is_file(path) else {}
        for path in (
            model_dir / name for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
        )
    )
    if "added_tokens_decoder" not in config:  # as older versions of transformers saved them
        config = {**config, **special_tokens_map}
    with _one_error(f"the tokens of {model_dir / 'tokenizer_config.json'} cannot be added to {TOKENIZER_JSON}"):
        named = _add_tokens(tokenizer, config, added_tokens)
        return HuggingFaceTokenizer(tokenizer, named, load_chat_templates(model_dir, config))


@contextmanager
def _one_error(message: str) -> Iterator[None]:
    """Turn whatever a library raises into a QwenModelError; a panic of Rust is not an ``Exception``."""
    try:
        yield
    except (QwenModelError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise QwenModelError(f"{message}: {one_line(error)}") from error


def _add_tokens(tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any], older: Mapping[str, Any]) -> dict[str, str]:
    """Add tokens that only the configuration has, as transformers does; return the text of the named ones.

    Args:
        tokenizer: that of ``tokenizer.json``, which is changed.
        config: ``tokenizer_config.json``, with ``added_tokens_decoder`` or what ``special_tokens_map.json`` adds.
        older: ``added_tokens.json``: ids by token.
    """
    named, others = _special_tokens(config)
    texts = {name: _content(value) for name, value in named.items()}
    tokens = _given_tokens(tokenizer, config, older, set(texts.values()))
    for token in tokens:
        token.special = token.special or token.content in texts.values()
    known = {token.content for token in (*tokenizer.get_added_tokens_decoder().values(), *tokens)}
    if tokenizer.token_to_id(texts.get("eos_token", "")) is None:
        named.pop("eos_token", None)  # not added: a model cannot say a token that it was not trained with
    for token in (_added_token(value, special=True) for value in (*named.values(), *others)):
        if token.content not in known:
            known.add(token.content)
            tokens.append(token)
    tokenizer.add_tokens(tokens)
    return texts


def _special_tokens(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """Return the named special tokens and the others, each a string or the fields of an added token."""
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    others = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(others, Mapping):
        named, others = {**named, **others}, []
    if not isinstance(others, list):
        raise QwenModelError(f"tokenizer_config.json: special tokens must be a list, not {shown(others)}")
    return {name: value for name, value in named.items() if isinstance(_content(value), str)}, others


def _given_tokens(
    tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any], older: Mapping[str, Any], named_texts: set[str]
) -> list[tokenizers.AddedToken]:
    """Return the added tokens with their flags, in the order of their ids."""
    if "added_tokens_decoder" in config:
        by_id = {int(index): _added_token(value) for index, value in config["added_tokens_decoder"].items()}
    else:
        by_id = {int(index): _added_token(token, special=token in named_texts) for token, index in older.items()}
        by_id.update(tokenizer.get_added_tokens_decoder())
    return [token for _, token in sorted(by_id.items())]


def _added_token(value: Any, special: bool = False) -> tokenizers.AddedToken:
    library = import_extra("tokenizers", TOKENIZER_JSON)
    if isinstance(value, str):
        return library.AddedToken(value, special=special, normalized=not special)
    flags = {
        name: value[name] for name in ("single_word", "lstrip", "rstrip", "normalized", "special") if name in value
    }
    return library.AddedToken(value["content"], **{"special": special, **flags})


def _content(value: Any) -> Any:
    return value.get("content") if isinstance(value, Mapping) else value
