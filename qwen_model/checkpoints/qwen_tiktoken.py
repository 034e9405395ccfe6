"""Load Qwen v1's tokenizer from its file ``qwen.tiktoken``."""

from __future__ import annotations

import base64
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..common.errors import QwenModelError, shown
from ..common.extras import import_extra
from ..common.files import read_text
from .chat_template import ChatOptions, check_plain_chat, with_default_system_message
from .tokenizer_base import Tokenizer

END_OF_TEXT, CHAT_START, CHAT_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
QWEN_NUM_EXTRA_TOKENS = 205
QWEN_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LONG_WHITESPACE = 100_000
"""Characters of white space, over which tiktoken's regular expression backtracks; it fails after a million steps."""


class QwenTiktokenTokenizer(Tokenizer):
    """Run Qwen v1's ``qwen.tiktoken`` with the ``tiktoken`` library, as Qwen's own tokenizer does.

    Control tokens in a text are read as such (see ``encode``); in the messages of a chat they are ordinary text.
    """

    def __init__(self, ranks: dict[bytes, int]) -> None:
        """Make the tokenizer of these ``ranks``; the special tokens' ids follow them."""
        extras = (f"<|extra_{number}|>" for number in range(QWEN_NUM_EXTRA_TOKENS))
        names = (END_OF_TEXT, CHAT_START, CHAT_END, *extras)
        self.special_tokens = {name: len(ranks) + index for index, name in enumerate(names)}
        self._ranks = ranks
        self.encoding = self._tiktoken(QWEN_SPLIT_PATTERN, self.special_tokens)
        self.vocab_size = len(ranks) + len(names)
        self.eos_token_ids = (self.special_tokens[END_OF_TEXT], self.special_tokens[CHAT_END])

    def _tiktoken(self, pattern: str, special_tokens: dict[str, int]) -> Any:
        tiktoken = import_extra("tiktoken", "Qwen v1's tokenizer")
        return tiktoken.Encoding("qwen", pat_str=pattern, mergeable_ranks=self._ranks, special_tokens=special_tokens)

    def _encode(self, text: str, add_special_tokens: bool, parse_special_tokens: bool) -> list[int]:
        text = unicodedata.normalize("NFC", text)
        if _has_long_whitespace(text):
            return self._encode_piece_by_piece(text, parse_special_tokens)
        if parse_special_tokens:
            return self.encoding.encode(text, allowed_special="all", disallowed_special=())
        return self.encoding.encode_ordinary(text)

    def _encode_piece_by_piece(self, text: str, parse_special_tokens: bool) -> list[int]:
        """Return the ids of a text split by ``regex``, which tiktoken depends on: slower, but without a limit."""
        regex = import_extra("regex", "a text with long white space")
        whole = self._tiktoken(r"[\s\S]+", {})  # does not split
        control = re.compile(f"({'|'.join(map(re.escape, self.special_tokens))})" if parse_special_tokens else "((?!))")
        ids: list[int] = []
        for index, part in enumerate(control.split(text)):
            if index % 2 == 1:
                ids.append(self.special_tokens[part])
            else:
                for piece in regex.finditer(QWEN_SPLIT_PATTERN, part):
                    ids += whole.encode_ordinary(piece.group())
        return ids

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        end = len(self._ranks) if skip_special_tokens else self.vocab_size
        return self.encoding.decode([token_id for token_id in ids if 0 <= token_id < end], errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """See `Tokenizer.token_bytes`."""
        found: bytes = self.encoding.decode_single_token_bytes(token_id) if 0 <= token_id < self.vocab_size else b""
        return found

    def _chat_ids(self, messages: list[dict[str, Any]], add_generation_prompt: bool, options: ChatOptions) -> list[int]:
        check_plain_chat(messages, options)
        if options.template is not None:
            raise QwenModelError("Qwen v1's tokenizer writes ChatML itself: it takes no chat_template")
        start, end = self.special_tokens[CHAT_START], self.special_tokens[CHAT_END]
        new_line = self.encode("\n")
        ids: list[int] = []
        for message in with_default_system_message(messages):
            if not isinstance(message["role"], str) or not isinstance(message["content"], str):
                raise QwenModelError(f"role and content of a message must be strings, given: {shown(message)}")
            role = self.encode(message["role"], parse_special_tokens=False)
            content = self.encode(message["content"], parse_special_tokens=False)
            ids += [start, *role, *new_line, *content, end, *new_line]
        if add_generation_prompt:
            ids += [start, *self.encode("assistant"), *new_line]
        return ids

    def _turn_end_ids(self, options: ChatOptions) -> tuple[int, ...]:
        """Return both of ChatML's tokens, as Qwen's own chats do: the model may go on to the next turn."""
        return self.special_tokens[CHAT_END], self.special_tokens[CHAT_START]


def _has_long_whitespace(text: str) -> bool:
    if len(text) < LONG_WHITESPACE:
        return False
    return any(end - start >= LONG_WHITESPACE for start, end in _whitespace(text))


def _whitespace(text: str) -> Iterator[tuple[int, int]]:
    return (match.span() for match in re.finditer(r"\s+", text))


def load_qwen_tiktoken(path: Path) -> QwenTiktokenTokenizer:
    """Return the tokenizer of a ``qwen.tiktoken``.

    Raises:
        QwenModelError: the file cannot be read (see `read_text`), a line is not a token in base64 and its rank, ranks
            don't count up from 0 without a gap (the special tokens' ids follow them), or a byte has no token.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise QwenModelError(
                f"{path}, line {number}: expected a base64 token and its rank, found {shown(line)}"
            ) from error
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise QwenModelError(f"{path}: the {len(ranks)} ranks must be 0, 1, 2, ... without a gap or a double")
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise QwenModelError(f"{path} is incomplete: it has no token for the byte 0x{missing:02x}")
    return QwenTiktokenTokenizer(ranks)
