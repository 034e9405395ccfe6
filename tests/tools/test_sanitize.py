"""What tools.sanitize runs, and what it makes of the results, with a stand-in for compute-sanitizer."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import sanitize

PASSED = "2 passed, 3 deselected in 1.20s"
STAND_IN = """#!/bin/sh
for last; do :; done
case "$*" in
  *synccheck*) sleep 60;;
  *racecheck*) echo '{passed}'; echo '========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)'; exit 9;;
  *test_attention*) echo '3 deselected in 1.20s'; echo '========= ERROR SUMMARY: 0 errors'; exit 0;;
  *launch.quantize*) echo '========= Invalid __global__ read of size 16 bytes'; exit 9;;
  *) echo '{passed}'; echo '========= ERROR SUMMARY: 0 errors'; exit 0;;
esac
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text(STAND_IN.format(passed=PASSED))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        sanitize.main(arguments)
    return stop.value.code


def test_clean_checks(stand_in, capsys, tmp_path):
    assert run("overflow", "quantize", "--output", str(tmp_path / "out")) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.split()[:2] == ["overflow", "memcheck"]
    assert "NOT CLEAN" not in first + second
    assert second.endswith(f"clean      {PASSED}; ERROR SUMMARY: 0 errors")
    assert PASSED in (tmp_path / "out" / "quantize.txt").read_text()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("race_sampling", f"{PASSED}; RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"),
        ("sync_pages", "did not end in time"),
        ("attention", "ERROR SUMMARY: 0 errors"),  # no test has passed
    ],
)
def test_checks_that_are_not_clean(stand_in, name, said, capsys):
    assert run(name, "quantize", "--seconds", "2") == 1
    first, second = capsys.readouterr().out.splitlines()
    assert "NOT CLEAN" in first
    assert first.endswith(said)
    assert "NOT CLEAN" not in second


def test_an_overflow_that_is_not_found_is_not_clean():
    assert not sanitize.Result("overflow", "", 0, 1.0).is_clean
    assert not sanitize.Result("overflow", "ModuleNotFoundError", 1, 1.0).is_clean


def test_wrong_use(monkeypatch, capsys):
    assert run("race") == 2
    assert "there is no check 'race'" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "")
    if not Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        assert "compute-sanitizer is neither on PATH nor in /usr/local/cuda" in str(run("overflow"))


def test_every_check_has_tests():
    commands = {name: check.command("", 0) for name, check in sanitize.CHECKS.items() if check.tests}
    collect = {name: [*command[command.index("pytest") + 1 :], "--collect-only"] for name, command in commands.items()}
    program = f"import pytest\nfor name, arguments in {collect!r}.items(): print(name, int(pytest.main(arguments)))"
    found = subprocess.run([sys.executable, "-c", program], cwd=sanitize.ROOT, capture_output=True, text=True)
    statuses = [line.split() for line in found.stdout.splitlines() if line.split()[:1] and line.split()[0] in collect]
    assert statuses == [[name, "0"] for name in collect]


def test_every_word_of_an_expression_is_in_the_name_of_a_test():
    """An alternative that selects nothing would leave its kernel unchecked, and the others would hide that."""
    files = sorted({f"{sanitize.TESTS}{name}.py" for check in sanitize.CHECKS.values() for name in check.tests})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "--collect-only", *files]
    found = subprocess.run(command, cwd=sanitize.ROOT, capture_output=True, text=True, check=True)
    names = [line.lower() for line in found.stdout.splitlines() if "::" in line]
    for name, check in sanitize.CHECKS.items():
        words = set(re.findall(r"[^\s()]+", check.expression.lower())) - {"and", "or", "not"}
        own = [line for line in names if any(f"{sanitize.TESTS}{file}.py::" in line for file in check.tests)]
        assert {word for word in words if not any(word in line for line in own)} == set(), name
