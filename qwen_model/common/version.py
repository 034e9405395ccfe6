"""Find the version of the installed package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """Return the version of qwen-plugins; "unknown" in a source tree that is not installed."""
    try:
        return version("qwen-plugins")
    except PackageNotFoundError:
        return "unknown"
