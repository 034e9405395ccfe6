"""The plug-ins through NVIDIA's own Python bindings of TensorRT 10 and 11, over a double of the library behind them.

Where the bindings are present: QWEN_PLUGINS_TENSORRT_BINDINGS names folders, separated by colons, each made by

    pip install --no-deps --target FOLDER tensorrt-cu13-bindings==11.1.0.106    # or tensorrt-cu12-bindings of 10
"""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from compiling import CPP_TESTS, compile_command, run_checked

FOLDERS = [Path(folder) for folder in os.environ.get("QWEN_PLUGINS_TENSORRT_BINDINGS", "").split(":") if folder]
LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")


@pytest.mark.parametrize("bindings", FOLDERS or [None], ids=str)
def test_bindings_register_and_create_the_plugins(bindings: Path | None, tmp_path: Path) -> None:
    if bindings is None:
        pytest.skip("QWEN_PLUGINS_TENSORRT_BINDINGS names no folder with NVIDIA's Python bindings")
    version = re.search(r"bindings-(.+)\.dist-info", next(bindings.glob("tensorrt_*bindings-*.dist-info")).name)[1]
    major = int(version.split(".")[0])
    for name in LIBRARIES:
        library = f"{name}.so.{major}"
        source = [CPP_TESTS / "registry_double.cpp"] if name == "libnvinfer" else ["-xc++", os.devnull]
        options = ["-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", tmp_path / library]
        run_checked([*compile_command(major), *options, *source])

    script = Path(__file__).with_name("registered_by_bindings.py")
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    printed = json.loads(run_checked([sys.executable, script, bindings], env=environment))

    assert version.startswith(printed["version"])
    found = printed["found"]
    assert "could not create the plug-in Gemm" in found.pop("refused")
    outputs = {"RmsNorm": 2, "RmsNormQuantization": 2, "Gemm": 1, "GptAttention": 2}
    assert found == {name: [name, "1", "qwen_plugins", count] for name, count in outputs.items()}
