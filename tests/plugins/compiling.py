"""Compile the plug-ins together with a C++ test, for any version of TensorRT and without a GPU."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CPP_TESTS = Path(__file__).parent / "cpp"
CSRC = Path(__file__).parents[2] / "csrc"
MAJORS = (8, 10, 11)


def plugin_sources(major: int) -> list[Path]:
    """Return the sources of one plug-in library without the kernels."""
    plugins = CSRC / "plugins"
    entry_points = plugins / ("library_v2.cpp" if major == 8 else "library_v3.cpp")
    return [entry_points, *sorted(set(plugins.glob("**/*.cpp")) - set(plugins.glob("library_*.cpp")))]


def compile_command(major: int, official_headers: Path | None = None) -> list[str]:
    """Return the compiler with the options for one major version of TensorRT; skip the test without a compiler."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler: install g++ or name one in CXX")
    command = [compiler, "-std=c++17", f"-DQWEN_PLUGINS_TENSORRT_MAJOR={major}", f"-I{CSRC}"]
    command += ["-isystem", str(cuda_headers())]
    if official_headers is not None:
        command += ["-DQWEN_PLUGINS_OFFICIAL_TENSORRT_HEADERS", "-Wno-deprecated-declarations"]
        command += ["-isystem", str(official_headers)]
    return command


def cuda_headers() -> Path:
    """Return the folder of cuda_runtime_api.h and nvtx3, of a CUDA toolkit or of packages that pip installed."""
    candidates = [
        Path(os.environ[name]) / "include" for name in ("CUDAToolkit_ROOT", "CUDA_HOME") if name in os.environ
    ]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        dry_run = run([nvcc, "-dryrun", "-x", "cu", "/dev/null"]).stderr
        tops = [line.split("TOP=", 1)[1].strip() for line in dry_run.splitlines() if "TOP=" in line]
        candidates += [Path(top) / "include" for top in tops]
    try:
        import nvidia

        candidates += [Path(folder) / "cu13" / "include" for folder in nvidia.__path__]
    except ImportError:
        pass
    candidates.append(Path("/usr/local/cuda/include"))
    for folder in candidates:
        if (folder / "cuda_runtime_api.h").is_file() and (folder / "nvtx3" / "nvToolsExt.h").is_file():
            return folder
    pytest.skip(
        "no CUDA headers: install a CUDA toolkit, or pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-nvtx"
    )


def run(command: list[object], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)


def run_checked(command: list[object], **options: object) -> str:
    """Run a command and return its standard output; a failure fails the test."""
    result = run(command, **options)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}\n{result.stderr}"
    return result.stdout
