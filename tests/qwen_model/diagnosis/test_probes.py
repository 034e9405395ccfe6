"""What the probes find where something is missing, broken or too old, each in a process that may die of it."""

import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import qwen_plugins
from qwen_model.common.extras import oldest_driver
from qwen_model.diagnosis.installation import run_probe
from qwen_model.diagnosis.probes import architectures, install_driver
from qwen_plugins.registration import PLUGIN_VERSIONS

DRIVER = """
#include <stdlib.h>
#include <string.h>
int cuDriverGetVersion(int* version) { *version = VERSION; return 0; }
int cuInit(unsigned flags) { CRASH; return STATUS; }
int cuGetErrorString(int status, const char** text) { *text = "forward compatibility"; return 0; }
int cuDeviceGetCount(int* count) { *count = 2; return 0; }
int cuDeviceGet(int* device, int index) { *device = index; return 0; }
int cuDeviceGetName(char* name, int size, int device) { strcpy(name, device ? "NVIDIA B" : "NVIDIA A"); return 0; }
int cuDeviceTotalMem_v2(size_t* bytes, int device) { *bytes = (size_t)24 << 30; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) { *value = attribute == 75 ? 8 : 6; return 0; }
"""
MANAGEMENT = """
#include <string.h>
int nvmlInit_v2() { return 0; }
int nvmlSystemGetDriverVersion(char* version, unsigned size) { strcpy(version, "470.57.02"); return 0; }
"""
TENSORRT = """
import types
__version__ = {version!r}
plugins = {plugins!r}
creators = [
    types.SimpleNamespace(name=name, plugin_version=version, plugin_namespace="qwen_plugins")
    for name, versions in plugins for version in versions
]
known = []
registry = types.SimpleNamespace(plugin_creator_list=known, load_library=lambda path: known.extend(creators))
get_plugin_registry = lambda: registry
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Put a module of this content before the installed ones."""
    monkeypatch.syspath_prepend(str(tmp_path / "fakes"))

    def write(name, content):
        folder = tmp_path / "fakes" / name
        folder.mkdir(parents=True)
        if content is not None:  # None: a folder without __init__.py
            (folder / "__init__.py").write_text(content)

    return write


def only_lack(found):
    (lack,) = found["lacks"]
    return lack["what"], lack["command"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            "raise ImportError('libtorch.so: undefined symbol: _ZN3c10')",
            "needs torch, which cannot be imported: libtorch",
        ),
        (
            "raise OSError('libcudart.so.13: cannot open shared object file')",
            "cannot be imported: libcudart.so.13: cannot",
        ),
        ("raise AttributeError('_ARRAY_API not found')", "cannot be imported: _ARRAY_API not found"),
        ("import os; os.abort()", "importing torch ended the process with SIGABRT"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "importing torch ended the process with SIGSEGV"),
        ("raise SystemExit('licence expired')", "importing torch fails: licence expired"),
    ],
)
def test_a_module_that_is_broken(fake, content, expected):
    fake("torch", content)
    what, command = only_lack(run_probe("module", "torch", "torch"))
    assert expected in what
    assert "\n" not in what
    assert command == "pip install --force-reinstall torch"


def test_a_module_of_which_a_folder_is_left(fake):
    fake("half_a_wheel", None)
    what, command = only_lack(run_probe("module", "half_a_wheel", "torch"))
    assert what.startswith("the torch back end needs half_a_wheel, of which only a part is installed, in /")
    assert command == "pip install --force-reinstall half_a_wheel"


def test_a_module_that_never_returns(fake):
    fake("torch", "import time; time.sleep(60)")
    start = time.monotonic()
    assert only_lack(run_probe("module", "torch", "torch", timeout=1))[0] == "importing torch took longer than 1 s"
    assert time.monotonic() - start < 30


def test_a_module_that_is_missing_says_what_the_back_end_says():
    what, command = only_lack(run_probe("module", "no_such_module", "torch"))
    assert what == "the torch back end needs no_such_module, which is not installed"
    assert command == 'pip install "qwen-plugins[torch]"'


def test_a_module_that_is_there():
    assert run_probe("module", "json", "torch") == {}


def test_the_cuda_runtime(fake, tmp_path):
    fake("cuda/bindings", "")
    (tmp_path / "fakes" / "cuda" / "__init__.py").write_text("")
    runtime = tmp_path / "fakes" / "cuda" / "bindings" / "runtime.py"
    runtime.write_text("cudaRuntimeGetVersion = lambda: (0, 13010)")
    assert run_probe("runtime") == {"installed": True, "version": "13.1"}
    runtime.write_text("import os; os.abort()")
    what, command = only_lack(run_probe("runtime"))
    assert what.startswith("importing cuda.bindings ended the process with SIGABRT")
    assert command == "pip install --force-reinstall cuda-bindings"


def test_what_a_module_prints_does_no_harm(fake):
    fake("torch", "print('{\"lacks\": 1}', end='')")
    assert run_probe("module", "torch", "torch") == {}


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    """Compiles the driver's libraries, and lets the probes find them."""
    compiler = shutil.which("cc") or pytest.skip("there is no C compiler")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))

    def build(version, status=0, crash=""):
        for name, source in (("libcuda.so.1", DRIVER), ("libnvidia-ml.so.1", MANAGEMENT)):
            (tmp_path / "library.c").write_text(source)
            defines = [f"-DVERSION={version}", f"-DSTATUS={status}", f"-DCRASH={crash}"]
            command = [compiler, "-shared", "-fPIC", *defines, "-o", tmp_path / name, tmp_path / "library.c"]
            subprocess.run(command, check=True)

    return build


def test_a_driver_with_gpus(libraries):
    libraries(13000)
    found = run_probe("driver")
    assert (found["version"], found["cuda"]) == ("470.57.02", "13.0")
    gpu = {"compute_capability": [8, 6], "memory_bytes": 24 << 30}
    assert found["gpus"] == [{"name": "NVIDIA A", **gpu}, {"name": "NVIDIA B", **gpu}]
    assert "lacks" not in found


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((11040,), "the NVIDIA driver, of CUDA 11.4, is older than 580, which CUDA 13 needs"),
        ((13000, 100), "the driver finds no GPU"),
        ((13000, 804), "the driver cannot start: forward compatibility"),
        ((13000, 0, "abort()"), "asking the NVIDIA driver ended the process with SIGABRT"),
    ],
)
def test_a_driver_that_cannot_be_used(libraries, settings, expected):
    libraries(*settings)
    assert expected in only_lack(run_probe("driver"))[0]


def test_kernels_built_with_cuda_12_run_with_older_drivers(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwen_plugins._core", SimpleNamespace(CUDA_VERSION=12080))
    assert oldest_driver() == "525, which CUDA 12 needs"
    assert install_driver().startswith("install driver 525 or later")
    monkeypatch.setitem(sys.modules, "qwen_plugins._core", None)  # a source tree
    assert oldest_driver() == "580, which CUDA 13 needs"
    monkeypatch.setitem(sys.modules, "qwen_plugins._core", SimpleNamespace(CUDA_VERSION=99000))  # not known
    assert oldest_driver() == "580, which CUDA 99 needs"


def test_no_driver(monkeypatch):
    if shutil.which("nvidia-smi"):
        pytest.skip("there is an NVIDIA driver")
    what, command = only_lack(run_probe("driver"))
    assert what.startswith("there is no NVIDIA driver (libcuda.so.1: cannot open shared object file")
    assert "driver 580 or later" in command


@pytest.mark.parametrize("kind", ["tensorrt", "tensorrt_lean", "tensorrt_rtx", "tensorrt_dispatch_bindings"])
def test_a_tensorrt_that_takes_the_plugins(fake, kind):
    needs_libraries()
    fake(kind, TENSORRT.format(version="8.6.1", plugins=list(PLUGIN_VERSIONS.items())))
    found = run_probe("tensorrt", kind.removesuffix("_bindings"))
    assert found == {
        "installed": True,
        "module": kind,
        "version": "8.6.1",
        "library": "libqwen_plugins_trt8.so",
        "registered": True,
    }


def needs_libraries():
    if not any((Path(folder) / "libqwen_plugins_trt8.so").is_file() for folder in qwen_plugins.__path__):
        pytest.skip("the package's libraries are not built")


def test_the_package_of_tensorrt_rtx(fake):
    fake("tensorrt_rtx", "raise ImportError('damaged')")
    found = run_probe("tensorrt", "tensorrt_rtx")
    assert only_lack(found)[1] == "pip install --force-reinstall tensorrt-rtx-cu13"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            TENSORRT.format(version="9.3.0", plugins=[]),
            "TensorRT 9.3.0 is not supported; qwen_plugins has plug-ins for",
        ),
        (
            TENSORRT.format(version="8.6.1", plugins=[("RmsNorm", ["1"])]),
            "TensorRT 8.6.1 did not take the plug-ins RmsNormQuant",
        ),
        (
            "raise ImportError('libnvinfer.so.8: no such file')",
            "the installed tensorrt cannot be imported: libnvinfer",
        ),
        ("", "the installed tensorrt cannot be imported: module 'tensorrt' has no attribute '__version__'"),
        ("import os; os.abort()", "importing tensorrt ended the process with SIGABRT"),
    ],
)
def test_a_tensorrt_that_does_not_take_the_plugins(fake, content, expected):
    needs_libraries()
    fake("tensorrt", content)
    found = run_probe("tensorrt", "tensorrt")
    assert expected in only_lack(found)[0]
    assert found["installed"]


def test_a_tensorrt_that_is_not_installed():
    assert run_probe("tensorrt", "tensorrt_of_nobody") == {"installed": False}


def test_our_kernels():
    needs_libraries()
    found = run_probe("kernels")
    names = [Path(library["file"]).name for library in found["libraries"]]
    assert f"libqwen_plugins_kernels-{qwen_plugins.__version__}.so" in names
    assert any(library["architectures"] for library in found["libraries"])
    assert "ublas" in found["cublas_lt"].lower()
    assert "lacks" not in found


def test_a_source_tree_without_kernels(tmp_path, monkeypatch):
    source = next(Path(folder) for folder in qwen_plugins.__path__ if (Path(folder) / "__init__.py").is_file())
    shutil.copytree(source, tmp_path / "qwen_plugins", ignore=shutil.ignore_patterns("*.so"))
    root = next(path for path in map(Path, sys.path) if (path / "qwen_model" / "diagnosis").is_dir())
    shutil.copytree(root / "qwen_model" / "common", tmp_path / "qwen_model" / "common")
    shutil.copytree(root / "qwen_model" / "diagnosis", tmp_path / "qwen_model" / "diagnosis")
    shutil.copy(root / "qwen_model" / "__init__.py", tmp_path / "qwen_model")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(path for path in sys.path if path.endswith("-packages"))])
    monkeypatch.chdir(tmp_path)
    if os.path.exists(sys.path[-1] + "/qwen_plugins"):
        pytest.skip("the package is installed beside the source tree")
    found = run_probe("kernels")
    assert only_lack(found) == ("qwen-plugins is not built: pip install .", "pip install .")
    assert found["libraries"] == []


def image(kind, architecture, content):
    return struct.pack("<HHIQ12xI32x", kind, 0x101, 64, len(content), architecture) + content


def test_the_architectures_of_a_library():
    """As nvcc lays out its images: a header for each translation unit, then machine code (2) and PTX (1)."""
    units = [
        image(2, 86, b"code" * 4) + image(2, 90, b""),
        image(1, 120, b"ptx"),
    ]
    library = b"\x7fELF".join(struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(unit)) + unit for unit in units)
    assert architectures(library) == ["8.6", "9.0", "12.0 and later"]
    assert architectures(b"no kernels") == []
    assert architectures(library[:20]) == []
