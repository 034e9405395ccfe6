"""Skip tests that this machine can't run, with the reason, and free the GPU memory of large ones."""

import importlib.util
import os
import sys

import pytest

# NumPy's threads only wait for each other in products as small as those of tests. Read when NumPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

LARGE_TEST = 2**31  # bytes of GPU memory


def _why_no_gpu() -> str | None:
    if importlib.util.find_spec("torch") is not None:
        import torch

        return None if torch.cuda.is_available() else "needs an NVIDIA GPU: PyTorch finds none"
    try:  # the environments for TensorRT have no PyTorch
        from cuda.bindings import runtime
    except ImportError:
        return "needs an NVIDIA GPU: neither torch nor cuda-bindings is installed to find one"
    error, count = runtime.cudaGetDeviceCount()
    return (
        None if error == runtime.cudaError_t.cudaSuccess and count > 0 else "needs an NVIDIA GPU: the driver finds none"
    )


def _why_no_tensorrt() -> str | None:
    if importlib.util.find_spec("tensorrt") is None:
        return "needs TensorRT: the package tensorrt is not installed"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {"gpu": _why_no_gpu, "tensorrt": _why_no_tensorrt}
    known: dict[str, str | None] = {}
    for item in items:
        for mark, find_reason in reasons.items():
            if item.get_closest_marker(mark) is None:
                continue
            if mark not in known:
                known[mark] = find_reason()
            reason = known[mark]
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_teardown() -> None:
    """Free what PyTorch keeps of the GPU memory of a large test: workers of pytest-xdist share the GPU."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized() and torch.cuda.memory_reserved() > LARGE_TEST:
        torch.cuda.empty_cache()
