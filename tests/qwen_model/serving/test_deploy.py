"""Test that the Dockerfile, the systemd unit and the page about serving name what there is."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from qwen_model.chat import make_parser as make_chat_parser
from qwen_model.serve import make_parser

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"


def dockerfile() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line]  # type: ignore[misc]


def extras() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    return set(re.findall(r"^([\w-]+) = \[", text.partition("\n[")[0], flags=re.M))


def test_the_dockerfile_starts_the_server_on_the_port_that_it_exposes() -> None:
    values = dict(dockerfile())
    command = json.loads(values["CMD"])
    assert json.loads(values["ENTRYPOINT"]) == ["qwen-model"]
    assert command[0] == "serve"
    options = make_parser().parse_args(command[1:])
    assert options.port == int(values["EXPOSE"])
    assert f":{options.port}/health" in values["HEALTHCHECK"]


def test_the_dockerfile_installs_extras_that_there_are() -> None:
    [installed] = [value for name, value in dockerfile() if name == "RUN" and "pip install" in value]
    names = re.search(r"\[([\w,-]+)\]", installed)
    assert names
    assert set(names[1].split(",")) <= extras()
    assert "serve" in names[1]


def test_the_image_is_built_from_what_the_build_reads() -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    kept = {line[1:] for line in ignored if line.startswith("!")}
    build = (ROOT / "CMakeLists.txt").read_text()
    read = re.findall(r"add_subdirectory\((\w+)|CMAKE_CURRENT_SOURCE_DIR}/(\w+)", build)
    project = (ROOT / "pyproject.toml").read_text()
    packages = re.search(r"^wheel.packages = \[(.*)\]", project, flags=re.M)
    assert packages
    needed = {name for pair in read for name in pair if name} | set(re.findall(r'"(\w+)', packages[1]))
    assert needed >= {"csrc", "cmake", "python", "qwen_model"}
    assert needed | {"CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"} == kept


def test_the_unit_starts_the_server_and_waits_until_it_has_drained() -> None:
    unit = configparser.ConfigParser(interpolation=None, delimiters=("=",), comment_prefixes=("#",), strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "qwen-model.service")
    program, command, *arguments = shlex.split(unit["Service"]["ExecStart"])
    assert Path(program).name == "qwen-model"
    assert command == "serve"
    options = make_parser().parse_args(arguments)
    assert float(unit["Service"]["TimeoutStopSec"]) > options.drain_seconds + 30
    assert unit["Service"]["Restart"] == "on-failure"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """Its program, which is not there, is one that is: everything else is as it is."""
    unit = tmp_path / "qwen-model.service"
    text = (DEPLOY / unit.name).read_text()
    unit.write_text(text.replace("ExecStart=/srv/qwen-model/bin/qwen-model ", "ExecStart=/bin/true "))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_page_names_every_option() -> None:
    text = (ROOT / "docs" / "serving.md").read_text()
    options = {name for action in make_parser()._actions for name in action.option_strings if name.startswith("--")}
    options -= {"--help", "--verbose", "--no-tuning"}
    assert {name for name in options if name not in text} == set()
    known = options | {name for action in make_chat_parser()._actions for name in action.option_strings}
    table = text[text.index("## Options") : text.index("## Endpoints")]
    assert set(re.findall(r"^\| `(--[\w-]+)", table, flags=re.M)) <= known
