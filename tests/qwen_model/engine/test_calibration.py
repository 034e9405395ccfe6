"""Texts to calibrate on, and what quantized inputs cost the packaged model where a few of them are large."""

import json

import numpy as np
import pytest

import qwen_model
from qwen_model import QwenModelError
from qwen_model.checkpoints.tokenizer import load_tokenizer
from qwen_model.engine.calibration import PIECES, calibration_pieces
from qwen_model.evaluation.divergence import compare_predictions
from qwen_model.interface.engine_config import EngineConfig
from qwen_model.packaged_model import held_out_text, packaged_model_dir

CHATS = [
    [{"role": "user", "content": f"What does {name} do?"}, {"role": "assistant", "content": f"It is {name}. " * 20}]
    for name in ("open", "print", "len")
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(packaged_model_dir())


def test_a_text_a_line(tmp_path, tokenizer):
    """Short texts are put together, long ones are cut, and none of their tokens are lost."""
    lines = ["import os", "def f(x): return x * " + " * ".join(map(str, range(400))), *["pass"] * 300]
    (tmp_path / "texts").write_text("\n".join(lines))
    pieces = calibration_pieces(tokenizer, tmp_path / "texts", 100)
    assert {len(piece) for piece in pieces[:-1]} == {100}
    assert tokenizer.decode([token for piece in pieces for token in piece]) == "\n".join(lines)


def test_chats_a_line(tmp_path, tokenizer):
    """Each begins a piece, in the form of the chat template."""
    texts = [json.dumps({"messages": messages}) for messages in CHATS] + ["", json.dumps({"text": "x = 1\n" * 60})]
    (tmp_path / "chats").write_text("\n".join(texts))
    pieces = calibration_pieces(tokenizer, tmp_path / "chats", 120)
    expected = [tokenizer.apply_chat_template(messages, False)[:120] for messages in CHATS]
    assert pieces == [*expected, tokenizer.encode("x = 1\n" * 60)[:120]]


def test_a_line_of_json_has_what_else_could_end_a_line(tmp_path, tokenizer):
    text = "x = 1 # a\u2028b\u0085c\n" * 60
    content = json.dumps({"text": text}, ensure_ascii=False) + "\r\n"
    (tmp_path / "texts.jsonl").write_text(content * 2, encoding="utf-8", newline="")
    assert calibration_pieces(tokenizer, tmp_path / "texts.jsonl", 200) == [tokenizer.encode(text)[:200]] * 2


def test_pieces_from_everywhere_of_a_long_text(tokenizer):
    every = calibration_pieces(tokenizer, None, 512)
    some = calibration_pieces(tokenizer, None, 128)
    assert PIECES / 2 < len(some) <= PIECES
    assert sum(map(len, every)) > 2 * sum(map(len, some))
    assert some[-1] not in some[:-1]


def test_pieces_begin_as_the_tokenizer_begins_texts(tmp_path):
    class Llama:
        def encode(self, text, add_special_tokens=True, parse_special_tokens=True):
            return [1] * add_special_tokens + [ord(letter) for letter in text]

    (tmp_path / "texts").write_text("some text\n" * 60)
    pieces = calibration_pieces(Llama(), tmp_path / "texts", 64)
    assert all(piece[0] == 1 and 1 not in piece[1:] and len(piece) <= 64 for piece in pieces)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("texts", "short", r"needs at least 256 tokens, and .*texts has 2"),
        ("texts", "", "needs at least 256 tokens, and .*texts has 0"),
        ("chats.jsonl", '{"messages": [}', r"line 1 of .*chats\.jsonl"),
        ("chats.jsonl", '{"messages": [{"role": "user"}]}', r"line 1 of .*chats\.jsonl: "),
        ("chats.jsonl", '{"text": "x"}\n{"prompt": "x"}', r'line 2 of .*chats\.jsonl must have "messages", a list'),
        ("chats.jsonl", "not JSON", r"line 1 of .*chats\.jsonl"),
        ("chats.jsonl", '{"text": "\\ud800"}', r"line 1 of .*chats\.jsonl: the text is not valid Unicode"),
        (
            "chats.json",
            '[{"text": "one"}, {"text": "two"}]',
            r"line 1 of .*chats\.json must hold a JSON object, not list",
        ),
    ],
)
def test_texts_that_cannot_be(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(QwenModelError, match=message) as error:
        calibration_pieces(tokenizer, tmp_path / name, 512)
    assert len(str(error.value).splitlines()) == 1


def test_lines_of_json_end_at_newlines_alone(tmp_path, tokenizer):
    text = "one two\u2028three\x85four" * 100
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps({'text': text}, ensure_ascii=False)}\r\n" * 2, newline="")
    assert calibration_pieces(tokenizer, tmp_path / "chats.jsonl", 512) == [tokenizer.encode(text)[:512]] * 2


def build(folder, model_dir=None, **options):
    return qwen_model.build_engine(
        model_dir, output_dir=folder, dtype="float32", max_batch_size=1, max_input_len=128, max_output_len=8, **options
    )


def test_an_alpha_of_0_is_among_the_options_of_an_engine(tmp_path, model_dir):
    (tmp_path / "texts").write_text("one two three four\n" * 40)
    options = {"quantization": "smoothquant", "alpha": 0.0, "calibration": tmp_path / "texts"}
    summary = build(tmp_path / "engine", model_dir, **options)
    assert "--quantization smoothquant --alpha 0.0 --calibration" in summary.config.build_command(tmp_path / "engine")


def test_the_options_of_an_engine_that_is_built(tmp_path, model_dir):
    """The command that builds it again; a warning where nobody gave texts; each phase is reported."""
    (tmp_path / "texts").write_text("one two three four\n" * 40)
    phases = []
    options = {"quantization": "smoothquant", "per_channel": True, "alpha": "auto"}
    summary = build(
        tmp_path / "engine",
        model_dir,
        **options,
        calibration=tmp_path / "texts",
        progress=lambda phase, done, total: phases.append((phase, done, total)),
    )
    command = f"--quantization smoothquant --per-channel --alpha auto --calibration {tmp_path / 'texts'}"
    assert command in EngineConfig.read(tmp_path / "engine").build_command(tmp_path / "engine")
    assert {each.text for each in summary.config.weight_formats.values()} == {"int8, a scale per output, x per tensor"}
    assert [done for phase, done, _ in phases if phase == "calibration"] == list(range(12))
    assert not summary.warnings
    for options, count in (
        ({"quantization": "smoothquant"}, 1),
        ({"quantization": "smoothquant", "per_token": True, "alpha": "none"}, 0),
        ({"quantization": "fp8"}, 0),
    ):
        warnings = [each for each in build(tmp_path / "engine", model_dir, **options).warnings if "calibrat" in each]
        assert len(warnings) == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_token": True}, r"per_token \(--per-token\) is for quantization smoothquant, not 'auto'"),
        ({"quantization": "int8", "alpha": 0.5}, r"^alpha \(--alpha\) is for quantization smoothquant, not 'int8'"),
        (
            {"quantization": "fp8", "per_channel": True},
            r"^per_channel \(--per-channel\) is for quantization smoothquant",
        ),
        ({"quantization": "smoothquant", "alpha": "half"}, "alpha must be 0 to 1, auto or none, not 'half'"),
        ({"quantization": "smoothquant", "alpha": -0.1}, "alpha must be 0 to 1, auto or none, not -0.1"),
        ({"quantization": "smoothquant", "group_size": 32}, r"group_size .* for quantization int4"),
        ({"quantization": "smoothquant", "activation_aware": True}, "is for quantization int8 or int4, not 'smooth"),
        (
            {"quantization": "smoothquant", "per_token": True, "alpha": "none", "calibration": "texts"},
            r"calibration \(--calibration\) has nothing to find with per_token .* and alpha \(--alpha\) none",
        ),
        (
            {"quantization": "fp8", "per_token": True, "calibration": "texts"},
            r"calibration \(--calibration\) has nothing to find with per_token \(--per-token\), for quantization fp8",
        ),
        ({"calibration": "texts"}, r"calibration \(--calibration\) is for activation_aware .* not 'auto'"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, model_dir, options, message):
    with pytest.raises(QwenModelError, match=message):
        build(tmp_path / "engine", model_dir, **options)
    assert not (tmp_path / "engine").exists()


def test_a_plan_says_what_an_engine_on_a_gpu_has(tmp_path, model_dir, capsys):
    from qwen_model import build as command

    plan = ["--model-dir", str(model_dir), "--plan", "--quantization", "fp8"]
    command.main([*plan, "--dtype", "bfloat16"])
    assert capsys.readouterr().out.startswith("type        bfloat16\nweights     12 x fp8")
    with pytest.raises(QwenModelError, match="nothing cannot be read"):
        command.main([*plan, "--calibration", str(tmp_path / "nothing")])


METHODS = {
    "plain": {},
    "not smoothed": {"quantization": "smoothquant", "alpha": "none"},
    "smoothed": {"quantization": "smoothquant"},
    "per token and channel": {"quantization": "smoothquant", "per_token": True, "per_channel": True},
    "fp8": {"quantization": "fp8"},
    "fp8, calibrated": {"quantization": "fp8", "calibration": True},
}


def test_quality_with_outliers(tmp_path):
    """The packaged model, whose function the outliers leave as it is; benchmarks.quantization measures it with more."""
    from benchmarks.quantization import with_outliers

    text = held_out_text()
    (tmp_path / "texts").write_text(text[:8000])
    folder = with_outliers(packaged_model_dir(), tmp_path / "outliers")
    for name, method in METHODS.items():
        options = {**method, "calibration": tmp_path / "texts"} if "smooth" in name or "calibrat" in name else method
        build(tmp_path / name, folder, **options)
    engines = [str(tmp_path / name) for name in METHODS]
    found = list(
        compare_predictions(
            engines, lambda engine: qwen_model.load_engine(engine, device="cpu"), text[110_000:112_500], tokens=512
        )
    )
    plain = found[0].perplexity
    lost = {name: each.perplexity / plain - 1 for name, each in zip(METHODS, found, strict=True)}
    divergence = {name: each.mean_divergence for name, each in zip(METHODS, found, strict=True)}
    assert lost["not smoothed"] > 2
    assert abs(lost["smoothed"]) < 0.03
    for name in ("per token and channel", "fp8", "fp8, calibrated"):
        assert abs(lost[name]) < 0.012, name
        assert divergence[name] < 0.006, name
    assert divergence["per token and channel"] < divergence["smoothed"] < 0.01 * divergence["not smoothed"]
    assert np.isfinite(list(divergence.values())).all()
