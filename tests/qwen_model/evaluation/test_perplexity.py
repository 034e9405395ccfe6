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


TEXT = "def add(one, other):\n    return one + other\n" * 12


@pytest.fixture(scope="module")
def quantized_dir(engine_dir):
    from qwen_model import build_engine

    folder = engine_dir.parent / "int4"
    build_engine(output_dir=folder, dtype="float32", max_input_len=64, max_output_len=8, quantization="int4")
    return folder


def expected_divergences(first, other, tokens):
    """In float64, of logits that PyTorch's own functions turn into distributions."""
    torch = pytest.importorskip("torch")
    p, q = (
        torch.cat([torch.from_numpy(session.logits(tokens[start : start + 64])) for start in range(0, 128, 64)])
        .double()
        .log_softmax(1)
        for session in (first, other)
    )
    nats = -q[range(128), tokens[1:129]].mean().item()
    return torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(1), nats, p.argmax(1) == q.argmax(1)


def test_engines_are_compared_with_the_first(session, engine_dir, quantized_dir, tmp_path, capsys):
    from qwen_model import load_engine

    (tmp_path / "text").write_text(TEXT)
    arguments = ["--compare", str(engine_dir), str(quantized_dir), str(engine_dir), "--text-file"]
    arguments += [str(tmp_path / "text"), "--tokens", "128", "--device", "cpu"]
    main([*arguments, "--json"])
    first, quantized, again = json.loads(capsys.readouterr().out)
    tokens = session.tokenizer.encode(TEXT)[:129]
    each, nats, same = expected_divergences(session, load_engine(quantized_dir, device="cpu"), tokens)
    assert quantized["engine"] == str(quantized_dir)
    assert quantized["perplexity"] == pytest.approx(math.exp(nats), rel=1e-5)
    assert quantized["mean_divergence"] == pytest.approx(each.mean().item(), rel=1e-3)
    assert quantized["largest_divergence"] == pytest.approx(each.max().item(), rel=1e-3)
    assert quantized["same_token"] == pytest.approx(same.double().mean().item())
    assert quantized["tokens"] == 128
    assert first == again
    assert (first["mean_divergence"], first["largest_divergence"], first["same_token"]) == (0, 0, 1)
    main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [str(engine_dir), "perplexity", f"{first['perplexity']:.4f}"]
    assert f"divergence {1000 * quantized['mean_divergence']:.3f}, at most" in lines[1]
    assert lines[3].startswith("over 128 tokens")


def test_options_of_a_comparison_are_checked_first(engine_dir, tmp_path, capsys):
    """A folder that is no engine is named before the first engine has been measured."""
    with pytest.raises(QwenModelError, match="missing is not an engine"):
        main(["--compare", str(engine_dir), str(tmp_path / "missing"), "--device", "cpu"])
    assert capsys.readouterr().out == ""
    with pytest.raises(QwenModelError, match=r"takes the place of --engine-dir: name .* there, as the first"):
        main(["--engine-dir", str(engine_dir), "--compare", str(engine_dir), "--device", "cpu"])
    with pytest.raises(QwenModelError, match="takes two engines or more"):
        main(["--compare", str(engine_dir), "--device", "cpu"])
    with pytest.raises(QwenModelError, match="--tokens is for --compare"):
        main(["--engine-dir", str(engine_dir), "--device", "cpu", "--tokens", "64"])


def test_engines_of_other_tokens_are_not_compared(engine_dir, tmp_path):
    from qwen_model import build_engine
    from tests.qwen_model.conftest import save_byte_tokenizer
    from tests.qwen_model.model_files import hugging_face_model, save_hugging_face

    model = save_byte_tokenizer(save_hugging_face(hugging_face_model("Qwen2ForCausalLM"), tmp_path / "model"))
    build_engine(model, output_dir=tmp_path / "engine", dtype="float32", max_input_len=64, max_output_len=8)
    with pytest.raises(QwenModelError, match=r"engine has other tokens than .*engine: only engines of one model"):
        main(["--compare", str(engine_dir), str(tmp_path / "engine"), "--device", "cpu", "--tokens", "64"])
