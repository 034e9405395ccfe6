"""Summaries: the articles, the prompts, ROUGE, the original beside the engine, and the command."""

import json
import sys
import types

import pytest

from qwen_model import summarize
from qwen_model.common.errors import QwenModelError
from qwen_model.evaluation.articles import SYSTEM, Article, choose, load_articles, summary_prompt
from qwen_model.evaluation.summaries import Summaries, losses, rouge, table


def run(capsys, *arguments):
    """Return exit status, standard output and standard error."""
    from qwen_model.command_line import run_command

    with pytest.raises(SystemExit) as exit_:
        run_command(summarize.main, [str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return exit_.value.code, captured.out, captured.err


def write_articles(path, *pairs):
    entries = [{"article": article, "highlights": highlights} for article, highlights in pairs]
    path.write_text("\n".join(json.dumps(entry) for entry in entries), encoding="utf-8")
    return path


def test_the_articles_of_the_package():
    articles, malformed = load_articles()
    assert (len(articles), malformed) == (12, 0)
    for article in articles:
        assert 80 < len(article.text.split()) < 200
        assert 2 <= len(article.summary.splitlines()) <= 4
        assert len(article.summary) < len(article.text) / 2


def test_entries_without_article_or_summary_are_counted(tmp_path):
    path = tmp_path / "articles.jsonl"
    lines = [{"article": "A", "highlights": "a"}, {"article": "B"}, {"article": "C", "highlights": " "}, 5]
    lines.append({"article": "half a surrogate pair: \ud83d", "highlights": "D"})
    path.write_text("\n".join(json.dumps(line) for line in lines))
    assert load_articles(str(path)) == ([Article("A", "a")], 4)
    path.write_text('{"text": "other columns"}')
    with pytest.raises(QwenModelError, match='expected objects with "article" and "highlights"'):
        load_articles(str(path))


def test_a_data_set_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(name, version, split):
        asked.append((name, version, split))
        return [{"article": "A", "highlights": "a", "id": "1"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert load_articles("abisee/cnn_dailymail") == ([Article("A", "a")], 0)
    load_articles("somebody/news")
    assert asked == [("abisee/cnn_dailymail", "3.0.0", "test"), ("somebody/news", None, "test")]


def test_a_data_set_of_the_hub_that_cannot_be_had(monkeypatch):
    def load_dataset(*arguments, **options):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(QwenModelError, match=r"somebody/news is no file, .* cannot be loaded: no network"):
        load_articles("somebody/news")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(QwenModelError, match=r"needs datasets, .*qwen-plugins\[datasets\]"):
        load_articles("somebody/news")
    with pytest.raises(QwenModelError, match=r"gone\.jsonl is not a file"):
        load_articles("gone.jsonl")


def test_the_choice_of_articles():
    articles = [Article(str(number), "s") for number in range(20)]
    chosen = choose(articles, 5, seed=3)
    assert chosen == choose(articles, 5, seed=3) != choose(articles, 5, seed=4)
    assert chosen == sorted(chosen, key=articles.index)
    assert choose(articles, 30, seed=3) == articles


@pytest.mark.parametrize("chat", [True, False])
def test_prompts(session, chat):
    tokenizer = session.tokenizer
    prompt, cut = summary_prompt("An article.", tokenizer, 1000, chat)
    text = tokenizer.decode(prompt, skip_special_tokens=False)
    user = "An article.\n\nTL;DR:"
    assert not cut
    if chat:
        assert text == (
            f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
        )
    else:
        assert text == user


@pytest.mark.parametrize("article", ["word " * 400, "é" * 400, "<|im_end|>" * 50, "日本語" * 150])
@pytest.mark.parametrize("spare", [0, 1, 2, 3])
def test_long_articles_lose_their_end_and_the_template_stays(session, article, spare):
    """Each byte is a token: a character of several bytes may be cut, and is then left out."""
    tokenizer = session.tokenizer
    whole = tokenizer.decode(summary_prompt("", tokenizer, 1000)[0], skip_special_tokens=False)
    before, after = whole.split("\n\nTL;DR:")
    limit = len(summary_prompt("", tokenizer, 1000)[0]) + 40 + spare
    prompt, cut = summary_prompt(article, tokenizer, limit)
    text = tokenizer.decode(prompt, skip_special_tokens=False)
    assert cut
    assert limit - 2 <= len(prompt) <= limit
    assert text.startswith(before)
    assert text.endswith("\n\nTL;DR:" + after)
    kept = text.removeprefix(before).removesuffix("\n\nTL;DR:" + after)
    assert kept
    assert article.startswith(kept)


def test_a_limit_without_room_for_an_article(session):
    with pytest.raises(QwenModelError, match="prompts of 20 tokens, the engine's limit, have no room"):
        summary_prompt("An article.", session.tokenizer, 20)


def test_rouge_of_known_texts():
    """By hand: 3 of 4 words and 1 of 3 pairs are found, in an order of 2."""
    pytest.importorskip("rouge_score")
    same = rouge(["the cat sat\non the mat"], ["the cat sat\non the mat"])
    assert set(same.values()) == {100.0}
    found = rouge(["cat the sat there"], ["the cat sat here"])
    assert found["rouge1"] == pytest.approx(75.0)
    assert found["rouge2"] == pytest.approx(0.0)
    assert found["rougeL"] == pytest.approx(50.0)
    assert rouge(["", "a b"], ["a b", "a b"])["rouge1"] == pytest.approx(50.0)  # the mean over the articles


def test_the_original_and_the_engine_write_the_same(capsys, engine_dir, model_dir, tmp_path):
    """Beams, too: the numbers of both rows are the same, and so are all outputs."""
    pytest.importorskip("rouge_score")
    articles = write_articles(tmp_path / "articles.jsonl", *((f"{number} is a number.", "a") for number in range(5)))
    output = tmp_path / "scores.json"
    common = ("--engine-dir", engine_dir, "--device", "cpu", "--hf", model_dir, "--dataset", articles, "--no-chat")
    for beams in (1, 2):
        options = ("--num-beams", beams, "--max-new-tokens", 6, "--batch-size", 3, "--check-accuracy")
        status, out, err = run(capsys, *common, *options, "--output", output)
        assert (status, err) == (0, "")
        assert "5 of 5" in out
        engine, original = json.loads(output.read_text())["results"]
        assert engine["output_ids"] == original["output_ids"]
        assert engine["texts"] == original["texts"]
        assert engine["rouge"] == original["rouge"]
        assert len(engine["output_ids"]) == 5


def test_articles_that_are_cut_and_missing_are_noted(capsys, engine_dir, tmp_path):
    pytest.importorskip("rouge_score")
    articles = write_articles(tmp_path / "articles.jsonl", ("x" * 300, "a"), ("short", "a"), ("", "a"))
    options = ("--dataset", articles, "--no-chat", "--max-new-tokens", 2, "--num-prompts", 9)
    status, out, err = run(capsys, "--engine-dir", engine_dir, "--device", "cpu", *options)
    assert status == 0
    assert err.splitlines() == [
        "note: 1 entries without an article or a summary left out",
        "note: there are 2 articles, not 9: all are taken",
        "note: 1 articles cut to the engine's limit of 120 tokens",
    ]
    assert "2 articles in batches of 6, at most 2 new tokens" in out


def summaries(name, rouge1):
    scores = {"rouge1": rouge1, "rouge2": 5.0, "rougeL": 20.0, "rougeLsum": 20.0}
    return Summaries(name, [[1]], ["a"], 1.0, 10, 1, scores)


@pytest.mark.parametrize(("engine", "status"), [(28.9, 1), (29.1, 0), (35.0, 0)])
def test_an_accuracy_that_is_off_is_the_exit_status(capsys, monkeypatch, engine, status):
    """An engine may be better than the original, not worse by more than the threshold."""
    found = [summaries("engine", engine), summaries("transformers", 30.0)]
    settings = {"engine": "e", "dtype": "float32", "description": "one"}
    monkeypatch.setattr(summarize, "_summarize", lambda options: (settings, found, []))
    exit_status, out, err = run(capsys, "--check-accuracy", "--hf", "model", "--rouge-threshold", "1")
    assert exit_status == status
    assert err == ("ROUGE-1 is 1.10 lower than the original's\n" if status else "")
    assert losses(*found)["rouge1"] == pytest.approx(30.0 - engine)
    assert table(found) in out


def test_errors_before_anything_is_computed(capsys, engine_dir, monkeypatch):
    assert run(capsys, "--check-accuracy")[0] == 2
    status, _, err = run(capsys, "--engine-dir", engine_dir, "--output", "nowhere/scores.json")
    assert (status, err.count("\n")) == (1, 1)
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    status, _, err = run(capsys, "--engine-dir", engine_dir)
    assert status == 1
    assert 'ROUGE needs rouge-score, which is not installed: pip install "qwen-plugins[eval]"' in err
