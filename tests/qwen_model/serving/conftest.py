"""Skip what is here, with the reason, where the server's extras are not installed; else give the fixtures."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

NEEDED = ("fastapi", "uvicorn", "msgspec", "prometheus_client", "llguidance", "httpx", "openai")
MISSING = [name for name in NEEDED if find_spec(name) is None]

if not MISSING:
    from .served import packaged_engine, serve_stub, served  # noqa: F401 (fixtures)


class SkippedModule(pytest.Module):
    def collect(self) -> list[pytest.Item]:
        pytest.skip(f"needs the extras serve and serve-test: {MISSING[0]} is not installed")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return SkippedModule.from_parent(parent, path=module_path) if MISSING else None
