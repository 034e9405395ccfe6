"""The prompts that a benchmark runs: random ones, and conversations of ShareGPT."""

import json

import pytest

from qwen_model.common.errors import QwenModelError
from qwen_model.evaluation.records import read_records
from qwen_model.evaluation.workload import random_workload, share_gpt_workload
from qwen_model.interface.engine_config import Limits

LIMITS = Limits(max_batch_size=4, max_input_len=20, max_output_len=10)


@pytest.fixture
def tokenizer(tmp_path):
    """One token for each byte."""
    pytest.importorskip("tokenizers")
    from qwen_model.checkpoints.tokenizer import load_tokenizer
    from tests.qwen_model.conftest import save_byte_tokenizer

    (tmp_path / "tokenizer").mkdir()
    return load_tokenizer(save_byte_tokenizer(tmp_path / "tokenizer"))


def conversation(question, answer, asks="human", answers="gpt"):
    return {"conversations": [{"from": asks, "value": question}, {"from": answers, "value": answer}]}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_random_prompts_depend_on_seed_and_place_only():
    few = random_workload(100, 8, 5, num_prompts=3, seed=7).requests
    many = random_workload(100, 8, 5, num_prompts=6, seed=7).requests
    assert many[:3] == few
    assert {(len(request.prompt), request.new_tokens) for request in many} == {(8, 5)}
    assert random_workload(100, 8, 5, num_prompts=3, seed=8).requests != few


def test_excluded_tokens_are_not_drawn():
    drawn = random_workload(5, 200, 1, num_prompts=4, excluded=(0, 3)).requests
    assert {token for request in drawn for token in request.prompt} == {1, 2, 4}


def test_share_gpt(tokenizer, tmp_path):
    path = write(
        tmp_path / "share.json",
        [
            conversation("one?", "yes"),
            {"id": "no conversations"},
            conversation("", "an empty question"),
            {"conversations": [{"from": "gpt", "value": "I begin"}, *conversation("two?", "no way")["conversations"]]},
            "not an object",
            conversation("x" * 21, "too long a question"),
            conversation("long answer", "y" * 11),
            conversation("half a pair \ud800", "yes"),
            conversation("asked twice", "again", asks="human", answers="human"),
            {"conversations": [{"from": "human", "value": 5}, {"from": "gpt", "value": "five"}]},
        ],
    )
    found = share_gpt_workload(path, tokenizer, LIMITS, num_prompts=9)
    expected = {("one?", 3), ("two?", 6)}
    assert {(tokenizer.decode(request.prompt), request.new_tokens) for request in found.requests} == expected
    assert found.skipped == {"malformed": 6, "beyond the engine's limits": 2}


def test_share_gpt_is_drawn_with_the_seed(tokenizer, tmp_path):
    path = write(tmp_path / "share.json", [conversation(f"question {number}", "yes") for number in range(20)])
    first, same, other = (share_gpt_workload(path, tokenizer, LIMITS, 5, seed).requests for seed in (1, 1, 2))
    assert first == same != other
    assert len({tuple(request.prompt) for request in first}) == 5


def test_control_tokens_in_a_conversation_are_text(tokenizer, tmp_path):
    path = write(tmp_path / "share.json", [conversation("<|im_end|>", "ok")])
    (request,) = share_gpt_workload(path, tokenizer, LIMITS, 1).requests
    assert len(request.prompt) == len("<|im_end|>")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "no JSON objects"),
        ("[1, 2", "not a JSON list"),
        ("nothing\n", "no JSON objects"),
        ('[{"a": 1}]', "no conversation to use: 1 malformed"),
        (json.dumps([conversation("x" * 30, "y")]), "no conversation to use: 1 beyond the engine's limits"),
    ],
)
def test_data_sets_without_conversations(tokenizer, tmp_path, content, message):
    with pytest.raises(QwenModelError, match=message):
        share_gpt_workload(write(tmp_path / "share.json", content), tokenizer, LIMITS, 1)


def test_records_of_lists_and_lines(tmp_path):
    assert read_records(write(tmp_path / "list.json", ' [{"a": 1}, 2]')) == ([{"a": 1}], 1)
    assert read_records(write(tmp_path / "lines.jsonl", '{"a": 1}\n\n{"b": 2}\n{"c":\n')) == ([{"a": 1}, {"b": 2}], 1)


def test_records_that_cannot_be_read(tmp_path):
    with pytest.raises(QwenModelError, match="is not a file"):
        read_records(tmp_path / "gone.json")
    (tmp_path / "latin.jsonl").write_bytes(b'{"a": "\xe9"}\n')
    with pytest.raises(QwenModelError, match="not UTF-8"):
        read_records(tmp_path / "latin.jsonl")
