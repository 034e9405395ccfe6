"""The measure that quantization is judged by."""

import itertools
import json
import math

import numpy as np
import pytest

from qwen_model.common.errors import QwenModelError
from qwen_model.perplexity import main, measure_perplexity, next_token_nats


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory):
    pytest.importorskip("torch")
    from qwen_model import build_engine

    folder = tmp_path_factory.mktemp("perplexity") / "engine"
    build_engine(output_dir=folder, dtype="float32", max_input_len=64, max_output_len=8)
    return folder


@pytest.fixture(scope="module")
def session(engine_dir):
    from qwen_model import load_engine

    return load_engine(engine_dir, device="cpu")


@pytest.mark.parametrize(("length", "window"), [(2, 8), (9, 8), (10, 8), (40, 8), (5, 1)])
def test_each_token_but_the_first_is_predicted_once(length, window):
    random = np.random.default_rng(length)
    table = random.normal(size=(11, 11)) * 30  # logits that depend on the last token only: windows change nothing
    ids = random.integers(0, 11, length).tolist()
    seen = []

    def logits(inputs):
        assert 0 < len(inputs) <= window
        seen.extend(inputs)
        return table[inputs].astype(np.float32)

    probabilities = np.exp(table) / np.exp(table).sum(axis=1, keepdims=True)
    expected = -sum(math.log(probabilities[a, b]) for a, b in itertools.pairwise(ids))
    assert next_token_nats(logits, ids, window) == pytest.approx(expected, rel=1e-5)
    assert seen == ids[:-1]


def test_large_logits_do_not_overflow():
    scores = np.array([[1e4, -1e4, 0.0]], dtype=np.float32)
    assert next_token_nats(lambda inputs: scores, [0, 1]) == pytest.approx(2e4)


def test_text_and_window(session):
    text = "import os\n" * 40
    whole = measure_perplexity(session, text)
    assert whole.window == 64  # the engine's limit
    assert whole.bytes == len(text)
    assert whole.per_token < measure_perplexity(session, text, window=4).per_token


@pytest.mark.parametrize(
    ("text", "window", "message"), [("x" * 50, 65, "1 to 64"), ("x" * 50, 0, "1 to 64"), ("", None, "2 tokens")]
)
def test_errors(session, text, window, message):
    with pytest.raises(QwenModelError, match=message):
        measure_perplexity(session, text, window)


def test_command(engine_dir, tmp_path, capsys):
    text_file = tmp_path / "text.py"
    text_file.write_text("def f(x):\n    return x\n")
    main(["--engine-dir", str(engine_dir), "--text-file", str(text_file), "--json", "--device", "cpu"])
    result = json.loads(capsys.readouterr().out)
    assert result["bytes"] == 23
    assert 1 < result["per_token"] < 100
    with pytest.raises(QwenModelError, match="cannot be read"):
        main(["--engine-dir", str(engine_dir), "--text-file", str(tmp_path / "gone")])
