"""The whole life of each plug-in in C++, driven through the interfaces that TensorRT calls; no TensorRT, no GPU."""

from pathlib import Path

import pytest
from compiling import CPP_TESTS, MAJORS, compile_command, plugin_sources, run_checked

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]


@pytest.mark.parametrize("major", MAJORS)
def test_life_cycle_under_sanitizers(major: int, tmp_path: Path) -> None:
    test = "life_cycle_v2.cpp" if major == 8 else "life_cycle_v3.cpp"
    program = tmp_path / "life_cycle"
    sources = [CPP_TESTS / test, CPP_TESTS / "recorded_launches.cpp", *plugin_sources(major)]
    run_checked([*compile_command(major), "-Wall", "-Wextra", "-Werror", *SANITIZERS, *sources, "-o", program])

    assert "lives of plug-ins passed" in run_checked([program])
