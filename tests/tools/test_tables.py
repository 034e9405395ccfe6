"""The documentation's tables show the recorded results."""

import sys

import pytest

from tools import tables


def test_the_documentation_has_the_recorded_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tables", "--check"])
    tables.main()
