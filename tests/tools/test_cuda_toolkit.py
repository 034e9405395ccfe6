"""Which CUDA compiler a build takes: pip's, or that of CUDAToolkit_ROOT, and what it says where that one won't do.

CMake is stopped by its own error at the latest where it runs the toolkit's nvcc, which is a script here.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

build = pytest.importorskip("scikit_build_core.build")

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A folder with an nvcc that only tells its version, 12.4, and the header that says which compilers it takes."""
    root = tmp_path / "cuda"
    (root / "bin").mkdir(parents=True)
    (root / "include" / "crt").mkdir(parents=True)
    write_nvcc(root, "12.4")
    write_host_config(root, newest_gcc=99, newest_clang=99)
    monkeypatch.setenv("CUDAToolkit_ROOT", str(root))
    return root


def write_nvcc(root: Path, version: str) -> None:
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "Cuda compilation tools, release {version}, V{version}.1"\n'
    )
    nvcc.chmod(0o755)


def write_host_config(root: Path, newest_gcc: int, newest_clang: int) -> None:
    (root / "include" / "crt" / "host_config.h").write_text(
        f"#error -- unsupported GNU version! gcc versions later than {newest_gcc} are not supported!\n"
        "#error -- unsupported HOS clang version! The version must be must be less than 2 and greater than 1\n"
        f"#error -- unsupported clang version! clang version must be less than {newest_clang + 1} and greater than 3\n"
    )


def configure(folder: Path) -> str:
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    command = [cmake, "-S", PROJECT, "-B", folder / "build", f"-DPython_EXECUTABLE={sys.executable}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    return " ".join((result.stdout + result.stderr).split())


def requirements(monkeypatch) -> list[str]:
    monkeypatch.chdir(PROJECT)
    return [name for name in build.get_requires_for_build_wheel({}) if name.startswith("nvidia")]


def test_the_compiler_comes_from_pip_unless_there_is_a_toolkit(monkeypatch):
    monkeypatch.delenv("CUDAToolkit_ROOT", raising=False)
    found = requirements(monkeypatch)
    assert found[0] == "nvidia-cuda-nvcc==13.0.*"
    assert all(name.endswith("==13.0.*") for name in found), "all of one release"
    monkeypatch.setenv("CUDAToolkit_ROOT", "/usr/local/cuda")
    assert requirements(monkeypatch) == []


@pytest.mark.parametrize(("version", "message"), [("12.3", "needs CUDA 12.4 or newer"), ("x", "does not run")])
def test_a_toolkit_that_will_not_do(toolkit, tmp_path, version, message):
    write_nvcc(toolkit, version)
    output = configure(tmp_path)
    assert message in output
    assert str(toolkit / "bin" / "nvcc") in output


def test_a_host_compiler_that_the_toolkit_does_not_take(toolkit, tmp_path):
    write_host_config(toolkit, newest_gcc=8, newest_clang=7)
    assert "CUDA 12.4 compiles with GCC 8 to 8, or Clang 7 to 7; found " in configure(tmp_path)
