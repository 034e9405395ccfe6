"""Test how log-probabilities name tokens, parts of characters among them."""

from __future__ import annotations

from pathlib import Path

from qwen_model.checkpoints.tokenizer import load_tokenizer
from qwen_model.serving.logprobs import CompletionLogprobs, chat_logprobs
from qwen_model.serving.wire import Token

TEXT = "a😀b"
PARTS = [r"bytes:\xf0", r"bytes:\x9f", r"bytes:\x98", r"bytes:\x80"]


def test_parts_of_a_character_are_not_confused(packaged_engine: Path) -> None:
    tokenizer = load_tokenizer(packaged_engine)
    ids = tokenizer.encode(TEXT)
    logprobs = CompletionLogprobs(tokenizer)
    logprobs.add(ids[0], None, None)
    for token in ids[1:]:
        logprobs.add(token, -3.0, [(ids[1], -0.5), (ids[2], -1.0), (ids[3], -2.0)])
    found = logprobs.value
    assert found["tokens"] == ["a", *PARTS, "b"]
    assert found["text_offset"] == [0, 1, 1, 1, 1, 2]
    likely = {PARTS[0]: -0.5, PARTS[1]: -1.0, PARTS[2]: -2.0}
    assert found["top_logprobs"] == [None, likely, likely, likely, {**likely, PARTS[3]: -3.0}, {**likely, "b": -3.0}]


def test_chats_have_the_bytes_of_each_token(packaged_engine: Path) -> None:
    tokenizer = load_tokenizer(packaged_engine)
    tokens = [Token(0, token, None, -0.5, [(token, -0.5)]) for token in tokenizer.encode(TEXT)]
    content = chat_logprobs(tokenizer, tokens, 1)["content"]
    assert b"".join(bytes(each["bytes"]) for each in content).decode() == TEXT
    assert [each["token"] for each in content] == ["a", r"\xf0", r"\x9f", r"\x98", r"\x80", "b"]
    assert [each["top_logprobs"][0]["bytes"] for each in content] == [each["bytes"] for each in content]
