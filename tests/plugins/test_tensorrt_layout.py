"""Our declarations of TensorRT's interfaces against the official headers: layout, virtual tables, and calls.

Where the headers are present: QWEN_PLUGINS_TENSORRT_HEADERS names folders with a NvInferRuntime.h, separated by colons,
such as the include folders of several releases of TensorRT's public repository.
"""

import os
import re
from pathlib import Path

import pytest
from compiling import CPP_TESTS, CSRC, MAJORS, compile_command, plugin_sources, run_checked


def headers_and_majors() -> list[tuple[Path, int]]:
    folders = [Path(folder) for folder in os.environ.get("QWEN_PLUGINS_TENSORRT_HEADERS", "").split(":") if folder]
    return [(folder, major_of(folder)) for folder in folders]


def major_of(folder: Path) -> int:
    text = (folder / "NvInferVersion.h").read_text()
    found = re.search(r"define (?:NV_TENSORRT_MAJOR|TRT_MAJOR_ENTERPRISE) (\d+)", text)
    assert found, f"{folder} has no version that this test can read"
    return int(found[1])


def virtual_tables(major: int, official: Path | None, folder: Path) -> dict[str, list[str]]:
    """Return the compiler's listing of every virtual table that TensorRT or the plug-ins call through."""
    folder.mkdir()
    run_checked([*compile_command(major, official), "-fdump-lang-class", "-c", CPP_TESTS / "layout.cpp"], cwd=folder)
    listing = next(folder.glob("*.class")).read_text()
    tables = {}
    for block in listing.split("\n\n"):
        title, _, entries = block.partition("\n")
        if re.match(r"Vtable for (probe::|qwen_plugins::.*(Adapter|Creator)<)", title):
            tables[title] = entries.splitlines()
    assert len(tables) == 8, sorted(tables)
    return tables


def printed_layout(major: int, official: Path | None, folder: Path) -> str:
    program = folder / "layout"
    sources = [CPP_TESTS / "layout.cpp", CPP_TESTS / "recorded_launches.cpp", *plugin_sources(major)]
    run_checked([*compile_command(major, official), "-Wno-invalid-offsetof", *sources, "-o", program])
    return run_checked([program])


@pytest.fixture(params=headers_and_majors() or [None], ids=str)
def official_and_major(request: pytest.FixtureRequest) -> tuple[Path, int]:
    if request.param is None:
        pytest.skip("QWEN_PLUGINS_TENSORRT_HEADERS names no folder with TensorRT's official headers")
    assert request.param[1] in MAJORS
    return request.param


def test_declarations_match_official_headers(official_and_major: tuple[Path, int], tmp_path: Path) -> None:
    official, major = official_and_major
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"

    assert virtual_tables(major, None, ours) == virtual_tables(major, official, theirs)
    assert printed_layout(major, None, ours) == printed_layout(major, official, theirs)


def test_a_caller_with_official_headers_drives_our_library(
    official_and_major: tuple[Path, int], tmp_path: Path
) -> None:
    """As with TensorRT: the caller is compiled with the official headers, the library with our declarations."""
    official, major = official_and_major
    library, program = tmp_path / "libplugins.so", tmp_path / "life_cycle"
    shared = ["-shared", "-fPIC", "-fvisibility=hidden", f"-Wl,--version-script={CSRC / 'plugins' / 'exports.map'}"]
    run_checked([*compile_command(major), *shared, *plugin_sources(major), "-o", library])
    life_cycle = CPP_TESTS / ("life_cycle_v2.cpp" if major == 8 else "life_cycle_v3.cpp")
    # The library's calls of the kernels end in the program's stand-ins for them.
    sources = ["-rdynamic", life_cycle, CPP_TESTS / "recorded_launches.cpp", library]
    run_checked([*compile_command(major, official), *sources, "-o", program])

    assert "lives of plug-ins passed" in run_checked([program])
