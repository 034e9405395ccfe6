"""What the package's shared libraries export and need, read from their ELF files, and that they share their kernels."""

import re
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import qwen_plugins
from tools.compare_machine_code import sections

KERNELS = f"libqwen_plugins_kernels-{qwen_plugins.__version__}.so"
ENTRY_POINTS = {
    "libqwen_plugins_trt8.so": {"setLoggerFinder", "getPluginCreators"},
    "libqwen_plugins_trt10.so": {"setLoggerFinder", "getCreators"},
    "libqwen_plugins_trt11.so": {"setLoggerFinder", "getCreators"},
}
# What any Linux has; everything else would be a library that users have to install.
SYSTEM_LIBRARIES = {
    "ld-linux-x86-64.so.2",
    "libc.so.6",
    "libdl.so.2",
    "libgcc_s.so.1",
    "libm.so.6",
    "libpthread.so.0",
    "librt.so.1",
    "libstdc++.so.6",
}
DT_NEEDED, DT_SONAME, DT_RUNPATH = 1, 14, 29  # tags of ELF's dynamic section


@dataclass(frozen=True)
class Library:
    exports: set[str]
    needed: set[str]
    soname: str
    runpath: str


def read(path: Path) -> Library:
    content = {section.name: section.content for section in sections(path.read_bytes())}
    strings = content[".dynstr"]

    def text(offset: int) -> str:
        return strings[offset : strings.index(b"\0", offset)].decode()

    exports = {
        text(name)
        for name, info, _, section, _, _ in struct.iter_unpack("<IBBHQQ", content[".dynsym"])
        if section != 0 and info >> 4 != 0  # defined here, not local
    }
    by_tag: dict[int, list[str]] = {DT_NEEDED: [], DT_SONAME: [], DT_RUNPATH: []}
    for tag, value in struct.iter_unpack("<QQ", content[".dynamic"]):
        if tag in by_tag:
            by_tag[tag].append(text(value))
    return Library(exports, set(by_tag[DT_NEEDED]), "".join(by_tag[DT_SONAME]), "".join(by_tag[DT_RUNPATH]))


@pytest.fixture(scope="module")
def folder() -> Path:
    for candidate in map(Path, qwen_plugins.__path__):
        if (candidate / "libqwen_plugins_trt8.so").is_file():
            if not any("kernels" in name for name in read(candidate / "libqwen_plugins_trt8.so").needed):
                pytest.skip("built with QWEN_PLUGINS_STATIC_KERNELS")
            return candidate
    pytest.skip("the package's libraries are not built")


def extension(folder: Path) -> Path:
    return next(folder.glob("_core.*.so"))


def function_name(symbol: str) -> str:
    """The name of a function of the namespace qwen_plugins."""
    mangled = re.fullmatch(r"_ZN12qwen_plugins(\d+)(.*)", symbol)
    assert mangled, symbol
    return mangled[2][: int(mangled[1])]


def test_the_kernels_export_their_launchers_and_nothing_else(folder: Path) -> None:
    kernels = read(folder / KERNELS)

    assert kernels.soname == KERNELS
    assert kernels.needed <= SYSTEM_LIBRARIES
    assert {function_name(symbol) for symbol in kernels.exports} == {
        "copy_async",
        "cublas_lt_status",
        "cublas_lt_version",
        "has_hopper_kernels",
        "decode_attention_workspace_bytes",
        "describe_device",
        "error_string",
        "gemm_candidates",
        "gemm_choice_by_rules",
        "gemm_choice_from_name",
        "gemm_choice_name",
        "gemm_workspace_bytes",
        "launch_decode_attention",
        "launch_gather_rows",
        "launch_gemm",
        "launch_logprobs",
        "launch_prefill_attention",
        "launch_quantize",
        "launch_rms_norm",
        "launch_rms_norm_quant",
        "launch_sampling",
        "launch_start_sampling",
        "launch_swiglu",
        "measure_gemm",
        "pack_weight",
        "sampling_workspace_bytes",
        "synchronize",
        "unpack_weight",
    }


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_a_plugin_library_exports_its_entry_points_and_needs_the_kernels(folder: Path, name: str) -> None:
    library = read(folder / name)

    assert library.exports == ENTRY_POINTS[name]
    assert library.needed - SYSTEM_LIBRARIES == {KERNELS}  # and no library of TensorRT or CUDA
    assert library.runpath == "$ORIGIN"
    assert (folder / name).stat().st_size < 400_000  # it links no CUDA runtime of its own


def test_the_library_with_the_name_that_tensorrt_rtx_looks_for(folder: Path) -> None:
    library = read(folder / "libqwen_plugins_tensorrt_rtx_name.so")

    assert library.soname == "libtensorrt_rtx.so"
    assert library.needed - SYSTEM_LIBRARIES == {"libtensorrt_rtx.so.1"}
    assert library.runpath == ""


def test_the_extension_module_needs_the_kernels(folder: Path) -> None:
    library = read(extension(folder))

    assert "PyInit__core" in library.exports
    assert not any(name.startswith("_ZN12qwen_plugins") for name in library.exports)
    assert library.needed - SYSTEM_LIBRARIES == {KERNELS}
    assert library.runpath == "$ORIGIN"


def test_one_process_loads_the_kernels_once(folder: Path) -> None:
    """As with `import qwen_plugins` beside TensorRT: all with RTLD_LOCAL, so that none lends symbols to another."""
    libraries = [str(path) for path in (folder / "libqwen_plugins_trt8.so", folder / "libqwen_plugins_trt10.so")]
    program = (
        "import ctypes, os, sys; import qwen_plugins._core\n"
        f"for library in {libraries}: ctypes.CDLL(library, mode=os.RTLD_NOW | os.RTLD_LOCAL)\n"
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'qwen_plugins_kernels' in line})"
    )

    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert output.split() == [str(folder / KERNELS)]


def test_a_plugin_library_without_the_kernels_says_which_file_is_missing(folder: Path, tmp_path: Path) -> None:
    alone = shutil.copy(folder / "libqwen_plugins_trt8.so", tmp_path)

    program = f"import ctypes; ctypes.CDLL({str(alone)!r})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert result.returncode != 0
    assert f"OSError: {KERNELS}: cannot open shared object file" in result.stderr
