"""TensorRT, CUDA and the kernels in NumPy, so that the whole TensorRT back end runs without TensorRT and without a GPU.

`installed(version)` puts them in the place of the modules of these names, for TensorRT 8.6, 10 or 11, and
`installed("rtx")` for TensorRT-RTX, without TensorRT.
"""

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.stand_ins import numpy_cuda, numpy_kernels, numpy_tensorrt

with suppress(ImportError):  # it packs with the compiled module, and so is imported before that is replaced
    from qwen_plugins import quantized  # noqa: F401

OURS = (
    "qwen_plugins.tensorrt",
    "qwen_plugins.registration",
    "qwen_model.backends.tensorrt",  # and tensorrt_rtx
    "benchmarks.generate_tensorrt",
)


KERNELS = ("qwen_plugins._core", "qwen_plugins.launch", "qwen_plugins.tuning")


@contextmanager
def installed(version: str) -> Iterator[types.ModuleType]:
    """Put the stand-ins in the place of TensorRT, cuda and the kernels, and yield the module of TensorRT."""
    before = dict(sys.modules)
    trt = _tensorrt_rtx() if version == "rtx" else numpy_tensorrt.make_module(version)
    bindings = types.ModuleType("cuda.bindings")
    bindings.runtime = numpy_cuda.runtime
    replaced = {
        "tensorrt": None,  # not installed
        trt.__name__: trt,
        "cuda": types.ModuleType("cuda"),
        "cuda.bindings": bindings,
        "cuda.bindings.runtime": numpy_cuda.runtime,
        **dict.fromkeys(KERNELS, numpy_kernels.core),
    }
    _forget_ours()
    sys.modules.update(replaced)
    package = sys.modules.get("qwen_plugins")
    attributes = [name.rpartition(".")[2] for name in KERNELS]
    kernels = {name: vars(package)[name] for name in attributes if package is not None and name in vars(package)}
    if package is not None:
        vars(package).update(dict.fromkeys(attributes, numpy_kernels.core))
    try:
        yield trt
    finally:
        _forget_ours()
        for name in replaced:
            sys.modules.pop(name, None)
        sys.modules.update({name: module for name, module in before.items() if name in replaced or _is_ours(name)})
        if package is not None:
            for name in attributes:
                vars(package).pop(name, None)
            vars(package).update(kernels)


def _tensorrt_rtx() -> types.ModuleType:
    import qwen_plugins  # noqa: F401 (registers with what is really installed)
    from tests.stand_ins import numpy_rtx  # needs onnx

    return numpy_rtx.make_module()


def _is_ours(name: str) -> bool:
    return name.startswith(OURS)


def _forget_ours() -> None:
    """Forget what was imported with another TensorRT, so that it is imported again."""
    for name in [name for name in sys.modules if _is_ours(name)]:
        del sys.modules[name]
        package, _, attribute = name.rpartition(".")
        if hasattr(sys.modules.get(package), attribute):
            delattr(sys.modules[package], attribute)
