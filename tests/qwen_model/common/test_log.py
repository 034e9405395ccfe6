"""The log: quiet in a library, on standard error in the commands, as detailed as was asked for."""

import logging
import os
import subprocess
import sys

import pytest

import qwen_model
from qwen_model import build, run
from qwen_model.command_line import run_command
from qwen_model.common.errors import QwenModelError
from qwen_model.common.log import LEVELS, PACKAGES, TENSORRT, Stopwatch, format_bytes, show_log


@pytest.fixture(autouse=True)
def loggers_as_before():
    loggers = [logging.getLogger(name) for name in (*PACKAGES, TENSORRT)]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:] = handlers


def messages(caplog):
    return [record.getMessage() for record in caplog.records]


def test_the_library_adds_no_handler_that_prints(engine_dir):
    program = (
        "import logging, qwen_model, qwen_plugins\n"
        f"qwen_model.load_engine({str(engine_dir)!r}, device='cpu').generate([[1, 2]], max_new_tokens=2)\n"
        "logging.getLogger('qwen_model.engine').warning('not to be seen')\n"
        "logging.getLogger('qwen_plugins').warning('not to be seen')\n"
    )
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "QWEN_MODEL_LOG": "debug"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_program_that_sets_up_logging_sees_ours(engine_dir, caplog):
    with caplog.at_level(logging.INFO, "qwen_model"):
        qwen_model.load_engine(engine_dir, device="cpu").generate([[1, 2, 3]], max_new_tokens=4)
    text = "\n".join(messages(caplog))
    for part in ("Qwen2ForCausalLM in float32 for the back end torch", "runs on cpu: as was asked for", "weights read"):
        assert part in text
    assert "prefill: 3 tokens in " in text
    assert "decode: 4 tokens in all" in text


def test_a_stream_and_beams_are_timed_too(engine_dir, caplog):
    session = qwen_model.load_engine(engine_dir, device="cpu")
    with caplog.at_level(logging.INFO, "qwen_model"):
        assert len(list(session.stream([[1, 2, 3]], max_new_tokens=4))) <= 4
        session.generate([[1, 2, 3]], max_new_tokens=4, num_beams=2)
    assert [message[:16] for message in messages(caplog)] == ["prefill: 3 token"] * 2


@pytest.mark.parametrize("how", ["option", "variable"])
def test_commands_show_the_log_when_asked(how, model_dir, tmp_path, capsys, monkeypatch):
    arguments = ["--model-dir", str(model_dir), "--output-dir", str(tmp_path / "engine")]
    if how == "variable":
        monkeypatch.setenv("QWEN_MODEL_LOG", "INFO")
    build.main(arguments + (["--verbose"] if how == "option" else []))
    lines = capsys.readouterr().err.splitlines()
    for part in ("back end torch imported", "opened and checked", "weights read, converted and written", "MiB in "):
        assert any(part in line for line in lines), part
    assert all(" info qwen_model." in line for line in lines)


def test_commands_are_quiet_by_default_but_for_warnings(model_dir, tmp_path, capsys):
    build.main(["--model-dir", str(model_dir), "--output-dir", str(tmp_path / "a")])
    assert capsys.readouterr().err == ""
    limits = ["--max-input-len", "400", "--max-output-len", "400"]
    build.main(["--model-dir", str(model_dir), "--output-dir", str(tmp_path / "b"), *limits])
    assert capsys.readouterr().err.startswith("warning: sequences of up to 800 tokens are longer than ")


def test_a_wrong_level_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("QWEN_MODEL_LOG", "loud")
    with pytest.raises(SystemExit) as exit_:
        run_command(run.main, ["Hi"])
    assert exit_.value.code == 1
    assert capsys.readouterr().err == (f"error: QWEN_MODEL_LOG must be one of {', '.join(LEVELS)}, not 'loud'\n")
    with pytest.raises(QwenModelError, match="not 'loud'"):
        show_log()


@pytest.mark.parametrize(
    ("variable", "verbose", "shown"),
    [
        ("", False, ["warning"]),
        ("", True, ["info", "warning", "tensorrt"]),
        ("error", True, ["info", "warning", "tensorrt"]),
        ("warning", False, ["warning", "tensorrt"]),
        ("debug", False, ["debug", "info", "warning", "tensorrt"]),
        ("error", False, []),
    ],
)
def test_what_each_level_shows(variable, verbose, shown, capsys, monkeypatch):
    monkeypatch.setenv("QWEN_MODEL_LOG", variable)
    show_log(verbose)
    show_log(verbose)  # a second call shows nothing twice
    logger = logging.getLogger("qwen_model.engine")
    for level in ("debug", "info", "warning"):
        getattr(logger, level)("said")
    logging.getLogger(TENSORRT).warning("said by TensorRT")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(shown)
    for line, what in zip(lines, shown, strict=True):
        if what == "warning":
            assert line == "warning: said"
        elif what == "tensorrt":
            assert line.endswith(f" warning {TENSORRT}: said by TensorRT")
        else:
            assert line.endswith(f" {what} qwen_model.engine: said")


def test_a_stopwatch_times_each_lap(caplog):
    logger = logging.getLogger("qwen_model.test")
    with caplog.at_level(logging.INFO, "qwen_model"):
        watch = Stopwatch(logger)
        watch.lap("weights", 3 << 20)
        watch.lap("plan")
    first, second = messages(caplog)
    assert first.startswith("weights: 3.0 MiB in 0.00 s, peak memory ")
    assert second.startswith("plan: 0.00 s, peak memory ")


def test_sizes_are_readable():
    assert [format_bytes(number) for number in (0, 1 << 19, 3 << 29)] == ["0.0 MiB", "0.5 MiB", "1.50 GiB"]
