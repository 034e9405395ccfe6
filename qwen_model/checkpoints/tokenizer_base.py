"""Define what every tokenizer can do, and decode ids that come one at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

from ..common.errors import QwenModelError
from .chat_template import ChatOptions, Messages, normalized_messages

REPLACEMENT_CHARACTER = "\ufffd"


class Tokenizer(ABC):
    """Define what every tokenizer can do.

    Attributes:
        eos_token_ids: the ids that end a text according to the tokenizer's own configuration. A model's
            ``generation_config.json`` can name more.
        special_tokens: the ids of the tokens that ``decode`` leaves out, by their text.
        vocab_size: the number of tokens, special ones included. A model's embedding can have more rows.
    """

    eos_token_ids: tuple[int, ...]
    special_tokens: Mapping[str, int]
    vocab_size: int

    def encode(self, text: str, add_special_tokens: bool = True, parse_special_tokens: bool = True) -> list[int]:
        """Return the token ids of ``text``.

        Args:
            text: any valid Unicode.
            add_special_tokens: add what the tokenizer puts around a text (LLaMA's ``<s>``; Qwen adds nothing).
            parse_special_tokens: read ``<|im_end|>`` and the like in ``text`` as control tokens, the default of
                transformers and of Qwen v1's own tokenizer. False reads them as ordinary text: use it for text you
                do not trust.

        Raises:
            QwenModelError: ``text`` holds half of a surrogate pair, which is not valid Unicode, or the tokenizer's
                library fails.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise QwenModelError(f"the text is not valid Unicode: {error.reason} at character {error.start}") from error
        return self._encode(text, add_special_tokens, parse_special_tokens)

    @abstractmethod
    def _encode(self, text: str, add_special_tokens: bool, parse_special_tokens: bool) -> list[int]: ...

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ``ids``; bytes that are not UTF-8 become U+FFFD, and unknown ids are left out."""
        return self._decode([int(token_id) for token_id in ids], skip_special_tokens)

    @abstractmethod
    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes for which a token stands within a text, which may be a part of a character's UTF-8.

        Those of an unknown id are empty. Nothing is stripped: a token of LLaMA's that opens a word has its space.
        """

    def apply_chat_template(
        self, messages: Messages, add_generation_prompt: bool = True, options: ChatOptions | None = None
    ) -> list[int]:
        """Return the token ids of a conversation, as the model was trained to see it.

        Args:
            messages: ``{"role": "user", "content": "..."}`` and the like, oldest first; see ``normalized_messages``.
            add_generation_prompt: end with what opens the assistant's answer.
            options: tools, variables of the template and the like. None: none.

        Raises:
            QwenModelError: a message is malformed, the template refuses it, or the model has no chat template.
        """
        return self._chat_ids(normalized_messages(messages), add_generation_prompt, options or ChatOptions())

    @abstractmethod
    def _chat_ids(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool, options: ChatOptions
    ) -> list[int]: ...

    def chat_end_token_ids(self, options: ChatOptions | None = None) -> tuple[int, ...]:
        """Return the ids that end the assistant's turn in a chat: ``eos_token_ids``, and those of the template."""
        return tuple(dict.fromkeys((*self.eos_token_ids, *self._turn_end_ids(options or ChatOptions()))))

    @abstractmethod
    def _turn_end_ids(self, options: ChatOptions) -> tuple[int, ...]: ...

    def check_chat_templates(self) -> None:  # noqa: B027 (most have nothing to check)
        """Raise QwenModelError if one of the model's chat templates is not valid."""

    def stream_decoder(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """Return a decoder for ids that come one at a time."""
        return StreamDecoder(self, skip_special_tokens)


class StreamDecoder:
    """Decode ids one at a time into pieces of text, which together are what ``decode`` gives for all ids.

    A token can end inside a character (bytes of an emoji), and some tokenizers strip the first space of what they
    decode. So each piece is the difference of two decodings that start at the first token of the previous
    piece, and is held back while it ends in U+FFFD, which may be the first half of a character.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        """Start at the beginning of a text of ``tokenizer``."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids: list[int] = []  # from the first token of the last piece that was returned
        self._num_given = 0  # how many of them were returned
        self._given_length = 0  # the length of their text

    def push(self, token_id: int) -> str:
        """Take the next id; return the text that it completes, often a word, sometimes nothing."""
        self._ids.append(int(token_id))
        text = self._decode(self._ids)
        if len(text) <= self._given_length or text.endswith(REPLACEMENT_CHARACTER):
            return ""
        return self._give(text)

    def flush(self) -> str:
        """Return what is still held back, at the end of the text."""
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
