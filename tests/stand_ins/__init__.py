"""TensorRT, CUDA and our kernels in NumPy: the whole TensorRT back end runs where there is neither.

`installed(version)` puts them in place of the modules of that name, for TensorRT 8.6, 10 or 11.
"""

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

from tests.stand_ins import numpy_cuda, numpy_kernels, numpy_tensorrt

OURS = (
    "qwen_plugins.tensorrt",
    "qwen_plugins.registration",
    "qwen_model.backends.tensorrt",
    "benchmarks.generate_tensorrt",
)


@contextmanager
def installed(version: str) -> Iterator[types.ModuleType]:
    """Inside, `import tensorrt` and the like give the stand-ins; gives the module `tensorrt`."""
    before = dict(sys.modules)
    trt = numpy_tensorrt.make_module(version)
    bindings = types.ModuleType("cuda.bindings")
    bindings.runtime = numpy_cuda.runtime
    replaced = {
        "tensorrt": trt,
        "cuda": types.ModuleType("cuda"),
        "cuda.bindings": bindings,
        "cuda.bindings.runtime": numpy_cuda.runtime,
        "qwen_plugins._core": numpy_kernels.core,
    }
    _forget_ours()
    sys.modules.update(replaced)
    package = sys.modules.get("qwen_plugins")
    core = getattr(package, "_core", None)
    if package is not None:
        package._core = numpy_kernels.core
    try:
        yield trt
    finally:
        _forget_ours()
        for name in replaced:
            sys.modules.pop(name, None)
        sys.modules.update({name: module for name, module in before.items() if name in replaced or _is_ours(name)})
        if package is not None and core is not None:
            package._core = core


def _is_ours(name: str) -> bool:
    return name.startswith(OURS)


def _forget_ours() -> None:
    """What has been imported with another TensorRT is imported anew."""
    for name in [name for name in sys.modules if _is_ours(name)]:
        del sys.modules[name]
        package, _, attribute = name.rpartition(".")
        if hasattr(sys.modules.get(package), attribute):
            delattr(sys.modules[package], attribute)
