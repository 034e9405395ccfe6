"""How an installation is judged, what the command prints, and its exit status."""

import json
import os
import subprocess
import sys

import pytest

from qwen_model import doctor
from qwen_model.diagnosis import installation
from qwen_model.diagnosis.installation import TENSORRTS, Lack, examine
from qwen_model.diagnosis.report import text

GPU = {"name": "NVIDIA A", "compute_capability": [9, 0], "memory_bytes": 80 << 30}
GOOD = {
    ("driver",): {"version": "580.1", "cuda": "13.0", "gpus": [GPU]},
    ("kernels",): {
        "libraries": [{"file": "/x/libqwen_plugins_kernels-1.so", "architectures": ["8.0", "9.0", "12.0 and later"]}],
        "cublas_lt": "libcublasLt.so.13",
    },
    ("runtime",): {"installed": True, "version": "13.0"},
    ("torch",): {"installed": True, "version": "2.9", "cuda": "13.0", "gpus": 1},
    ("tensorrt", "tensorrt"): {
        "installed": True,
        "module": "tensorrt",
        "version": "11.1",
        "library": "libqwen_plugins_trt11.so",
        "registered": True,
    },
}


def lack(what, command="mend"):
    return {"lacks": [{"what": what, "command": command}]}


@pytest.fixture
def found(monkeypatch):
    """What each probe finds: all is well, unless a test changes it."""
    found = dict(GOOD)

    def run_probe(*probe, timeout):
        return found.get(probe, {"installed": False} if probe[0] == "tensorrt" else {})

    monkeypatch.setattr(installation, "run_probe", run_probe)
    return found


def test_where_all_is_well(found):
    result = examine()
    assert result.can_run
    assert {name: (status.runs_on, status.lacks) for name, status in result.back_ends.items()} == {
        "torch": (["GPU", "CPU"], []),
        "tensorrt": (["GPU"], []),
    }
    lines = text(result).splitlines()
    for line in (
        "driver             580.1, CUDA 13.0",
        "GPU 0              NVIDIA A, compute capability 9.0, 80.0 GiB",
        "library            libqwen_plugins_kernels-1.so, compute capability 8.0, 9.0, 12.0 and later",
        "CUDA runtime       13.0 of cuda-bindings",
        "PyTorch            2.9, CUDA 13.0, 1 GPUs",
        "tensorrt           11.1, plug-ins of libqwen_plugins_trt11.so registered",
        "tensorrt_lean      not installed",
        "The torch back end can run on the GPU and the CPU.",
        "The tensorrt back end can run on the GPU.",
    ):
        assert line in lines


def test_tensorrt_rtx_builds_without_a_gpu_and_runs_on_rtx_cards(found):
    found["tensorrt", "tensorrt_rtx"] = {"installed": True, "module": "tensorrt_rtx", "registered": True}
    status = examine().back_ends["tensorrt-rtx"]
    assert (status.runs_on, status.builds) == ([], True)
    assert "the GPUs here have 9.0" in status.lacks[0].what
    found["driver",] = {**found["driver",], "gpus": [{**found["driver",]["gpus"][0], "compute_capability": [8, 9]}]}
    assert "The tensorrt-rtx back end can build engines here and run on the GPU." in text(examine())
    found["driver",] = lack("no driver")
    found["torch",] = lack("no torch")
    found["module", "torch", "torch"] = lack("no torch")
    found["module", "tensorrt", "tensorrt"] = lack("no tensorrt")
    result = examine()
    assert result.can_run
    assert "The tensorrt-rtx back end can build engines here. What keeps it from the GPU:" in text(result)
    found["tensorrt", "tensorrt_rtx"] = {"installed": True, **lack("it does not register")}
    assert not examine().can_run


@pytest.mark.parametrize(
    ("changes", "torch", "tensorrt"),
    [
        ({("driver",): lack("no driver")}, (["CPU"], ["no driver"]), ([], ["no driver"])),
        ({("kernels",): lack("not built")}, (["CPU"], ["not built"]), ([], ["not built"])),
        ({("launch",): lack("no image")}, (["CPU"], ["no image"]), (["GPU"], [])),
        ({("module", "torch", "torch"): lack("broken")}, ([], ["broken"]), (["GPU"], [])),
        ({("module", "safetensors", "torch"): lack("broken")}, ([], ["broken"]), (["GPU"], [])),
        ({("module", "tensorrt", "tensorrt"): lack("none")}, (["GPU", "CPU"], []), ([], ["none"])),
        ({("tensorrt", "tensorrt"): lack("refused")}, (["GPU", "CPU"], []), ([], ["refused"])),
        ({("tensorrt", "tensorrt_rtx"): lack("refused")}, (["GPU", "CPU"], []), (["GPU"], [])),
        ({("back_end", "tensorrt"): lack("no GPU")}, (["GPU", "CPU"], []), ([], ["no GPU"])),
        ({("back_end", "torch"): lack("no NumPy")}, ([], ["no NumPy"]), (["GPU"], [])),
        ({("torch",): {"installed": True, "gpus": 0, **lack("CPU wheel")}}, (["CPU"], ["CPU wheel"]), (["GPU"], [])),
    ],
)
def test_what_each_back_end_lacks(found, changes, torch, tensorrt):
    found.update(changes)
    status = examine().back_ends
    assert (status["torch"].runs_on, [lack.what for lack in status["torch"].lacks]) == torch
    assert (status["tensorrt"].runs_on, [lack.what for lack in status["tensorrt"].lacks]) == tensorrt


@pytest.mark.parametrize(
    ("capability", "runs"), [([8, 0], True), ([8, 9], True), ([7, 5], False), ([10, 0], False), ([12, 1], True)]
)
def test_the_kernels_must_be_compiled_for_the_gpu(found, capability, runs):
    found["driver",] = {"version": "580.1", "cuda": "13.0", "gpus": [{**GPU, "compute_capability": capability}]}
    major, minor = capability
    expected = Lack(
        f"the kernels are compiled for compute capability 12.0 and later, 8.0, 9.0, and not for {major}.{minor} of the "
        "NVIDIA A",
        f"pip install . -C cmake.define.CMAKE_CUDA_ARCHITECTURES={major}{minor}-real",
    )
    for name, status in examine().back_ends.items():
        assert status.lacks == ([] if runs else [expected]), name
        assert ("GPU" in status.runs_on) == runs


def test_the_text_names_what_mends_it(found):
    found["module", "torch", "torch"] = lack("the torch back end needs torch", "pip install torch")
    found["tensorrt", "tensorrt"] = {"installed": True, **lack("importing tensorrt ended the process")}
    found["kernels",] = {"libraries": [], **lack("not built")}
    found["driver",] = lack("no driver")
    printed = text(examine())
    assert (
        "The torch back end cannot run:\n  - the torch back end needs torch\n    mend it: pip install torch" in printed
    )
    assert "tensorrt           broken: importing tensorrt ended the process\n" in printed
    assert "library            none: not built\n" in printed
    assert "driver             none: no driver\n" in printed


def test_the_exit_status_and_json(found, capsys):
    doctor.main(["--json"])
    printed = json.loads(capsys.readouterr().out)
    assert set(printed["tensorrt"]) == set(TENSORRTS)
    assert printed["back_ends"]["torch"] == {"runs_on": ["GPU", "CPU"], "lacks": [], "builds": False}
    assert printed["driver"]["gpus"] == [GPU]
    found["module", "torch", "torch"] = found["module", "tensorrt", "tensorrt"] = lack("none")
    with pytest.raises(SystemExit) as exit_:
        doctor.main([])
    assert exit_.value.code == 1
    assert "cannot run" in capsys.readouterr().out


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "1e300"])
def test_a_timeout_that_is_none(seconds, capsys):
    with pytest.raises(SystemExit) as exit_:
        doctor.main(["--timeout", seconds])
    assert exit_.value.code == 2
    assert "expected a number from" in capsys.readouterr().err


def test_nothing_that_is_broken_stops_it(tmp_path):
    """All of these at once: an ABI mismatch, an abort, an import that never ends, no NumPy."""
    for name, content in {
        "torch": "raise ImportError('undefined symbol: _ZN3c10')",
        "tensorrt": "import os; os.abort()",
        "numpy": "raise RuntimeError('module was compiled against another version')",
        "cuda": "import time; time.sleep(60)",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(content)
    paths = [str(tmp_path), *(os.path.abspath(path) for path in sys.path if path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "qwen_model.doctor", "--timeout", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    for part in (
        "the torch back end needs torch, which cannot be imported: undefined symbol: _ZN3c10",
        "importing tensorrt ended the process with SIGABRT",
        "importing cuda.bindings took longer than 8 s",
        "The torch back end cannot run:",
        "The tensorrt back end cannot run:",
    ):
        assert part in done.stdout
