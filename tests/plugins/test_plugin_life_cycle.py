"""The whole life of each plug-in in C++, driven through the interfaces that TensorRT calls; without TensorRT or GPU."""

import os
from pathlib import Path

import pytest
from compiling import CPP_TESTS, MAJORS, compile_command, plugin_sources, run_checked

from qwen_plugins._numbers import ACTIVATIONS, HEAD_SIZES

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]


@pytest.mark.parametrize("major", MAJORS)
def test_life_cycle_under_sanitizers(major: int, tmp_path: Path) -> None:
    test = "life_cycle_v2.cpp" if major == 8 else "life_cycle_v3.cpp"
    program = tmp_path / "life_cycle"
    sources = [CPP_TESTS / test, CPP_TESTS / "recorded_launches.cpp", *plugin_sources(major)]
    run_checked([*compile_command(major), "-Wall", "-Wextra", "-Werror", *SANITIZERS, *sources, "-o", program])

    printed = run_checked([program])

    assert "lives of plug-ins passed" in printed
    # Numbers that stand in C++ and in Python.
    assert f"activation: {' '.join(map(str, ACTIVATIONS.values()))}\n" in printed
    assert f"head_size: {' '.join(map(str, HEAD_SIZES))}\n" in printed


def test_launches_are_in_nvtx_ranges(tmp_path: Path) -> None:
    """A profiler sees each launch in a range that is named after the plug-in, and sees the range end."""
    program, listener = tmp_path / "life_cycle", tmp_path / "liblistener.so"
    sources = [CPP_TESTS / "life_cycle_v3.cpp", CPP_TESTS / "recorded_launches.cpp", *plugin_sources(10)]
    run_checked([*compile_command(10), *sources, "-o", program])
    run_checked([*compile_command(10), "-shared", "-fPIC", CPP_TESTS / "nvtx_listener.cpp", "-o", listener])

    lines = run_checked([program], env=os.environ | {"NVTX_INJECTION64_PATH": str(listener)}).splitlines()

    pushed = [line for line in lines if line.startswith("push")]
    names = ("RmsNorm", "RmsNormQuantization", "QuantizePerToken", "QuantizeTensor", "Gemm", "GptAttention", "QwenGemm")
    assert set(pushed) == {f"push {name}@qwen_plugins" for name in names}
    assert lines.count("pop") == len(pushed) >= 60
