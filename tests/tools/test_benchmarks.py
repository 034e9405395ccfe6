"""Every benchmark starts, and where it cannot measure it says in one line what it needs."""

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
NEED_A_GPU = [
    "attention",
    "decode_timeline",
    "gemm",
    "gemm_eight_bit",
    "gemm_quantized",
    "gemm_sweep",
    "rms_norm",
    "sampling",
]
NEED_TENSORRT = ["tensorrt_gemm", "tensorrt_rms_norm", "tensorrt_timeline"]


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    """Run a benchmark's command line, which exits, and return what it exits with."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as exit_info:
        importlib.import_module(f"benchmarks.{name}").main()
    return exit_info.value.code


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(name, monkeypatch, "--help") == 0
    assert capsys.readouterr().out.startswith("usage:")


@pytest.mark.parametrize("name", NEED_A_GPU)
def test_without_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(name, monkeypatch) == "this benchmark needs an NVIDIA GPU: PyTorch finds none"


@pytest.mark.parametrize("name", NEED_TENSORRT)
def test_without_tensorrt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    message = run(name, monkeypatch)
    assert isinstance(message, str)
    assert message.startswith('this benchmark needs TensorRT: pip install "qwen-plugins[tensorrt]"')
    assert "\n" not in message
