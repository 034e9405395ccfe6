"""Find the plug-in library that fits each installed TensorRT and register it, once per process.

``import qwen_plugins`` does it, where TensorRT need not be installed: this module is not in `qwen_plugins.tensorrt`.
"""

import ctypes
import importlib
import importlib.util
import logging
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

PLUGIN_NAMESPACE = "qwen_plugins"
# The versions of each plug-in in the libraries, the newest last: csrc/plugins/README.md.
# QwenGemm is Gemm under a name that no operator of ONNX has.
PLUGIN_VERSIONS: dict[str, tuple[str, ...]] = {
    "RmsNorm": ("1",),
    "RmsNormQuantization": ("1",),
    "QuantizePerToken": ("1",),
    "QuantizeTensor": ("1",),
    "Gemm": ("1", "2", "3"),  # 2: with a quantized weight; 3: of codes of 8 bits
    "QwenGemm": ("1", "2", "3"),  # likewise
    "GptAttention": ("1", "2"),  # 2: over a cache of pages
}

# The packages whose registries take plug-ins: TensorRT, its runtimes without a builder, and TensorRT-RTX.
TENSORRT_PACKAGES = ("tensorrt", "tensorrt_lean", "tensorrt_dispatch", "tensorrt_rtx")

# TensorRT-RTX, whose versions begin with 1, has the interfaces of TensorRT 11.
_LIBRARIES = {
    1: "libqwen_plugins_trt11.so",
    8: "libqwen_plugins_trt8.so",
    10: "libqwen_plugins_trt10.so",
    11: "libqwen_plugins_trt11.so",
}
_RTX_NAME = "libqwen_plugins_tensorrt_rtx_name.so"
_log = logging.getLogger(__name__)
_lock = threading.Lock()


def tensorrt_library_path(version: str | int | None = None) -> Path:
    """Return the plug-in library for one version of TensorRT, for ``trtexec --dynamicPlugins`` and C++ programs.

    Args:
        version: of TensorRT, such as ``"10.14"`` or ``10``, or of TensorRT-RTX, such as ``"1.7"``. The installed
            ``tensorrt`` package's by default.

    Raises:
        ImportError: no version is given and ``tensorrt`` is not installed.
        ValueError: there is no library for this version.
        FileNotFoundError: the library is not where the package was installed.
    """
    if version is None:
        version = str(_import_package("tensorrt").__version__)
    return _installed_file(_library_name(str(version)))


def _installed_file(name: str) -> Path:
    # __path__ names both the sources and the installed files where the package is installed in editable mode.
    folders = [Path(folder) for folder in sys.modules[__package__].__path__]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    searched = ", ".join(str(folder) for folder in folders)
    raise FileNotFoundError(f"{name} is not in {searched}: qwen_plugins was installed without it; install it again")


def register_tensorrt_plugins(package: str = "tensorrt") -> bool:
    """Load the plug-in library into the registry of an installed TensorRT, unless its plug-ins are registered already.

    ``import qwen_plugins`` calls it for each of `TENSORRT_PACKAGES`. Where the package is not installed it does
    nothing; where it is installed but cannot be used, a RuntimeWarning says why.

    Args:
        package: one of `TENSORRT_PACKAGES`.

    Returns:
        Whether the plug-ins are registered there.
    """
    with _lock:
        try:
            if importlib.util.find_spec(package) is None:
                return False
            trt = _import_package(package)
            if package == "tensorrt_rtx":
                _provide_rtx_name()
            if not _is_registered(trt):
                library = tensorrt_library_path(trt.__version__)
                trt.get_plugin_registry().load_library(str(library))
                _log.info("%s %s loaded the plug-ins of %s", package, trt.__version__, library)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            message = f"the plug-ins are not registered in {package}: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            return False
        if not _is_registered(trt):
            library = tensorrt_library_path(trt.__version__)
            message = f"{package} {trt.__version__} did not take the plug-in library {library}; its log has the reason"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            return False
        return True


def _provide_rtx_name() -> None:
    """Open a library that is called ``libtensorrt_rtx.so`` and stands for the loaded ``libtensorrt_rtx.so.1``.

    TensorRT-RTX's ONNX parser opens that name when it adds a plug-in, and ends the process where there is none. The
    wheel does not have it.
    """
    ctypes.CDLL(str(_installed_file(_RTX_NAME)))


def find_creator(trt: Any, name: str, version: str | None = None) -> Any:
    """Return the creator of a plug-in in TensorRT's registry, or None.

    Args:
        trt: the tensorrt module.
        name: of the plug-in, a key of `PLUGIN_VERSIONS`.
        version: of the plug-in; None: the newest.
    """
    wanted = (name, version or PLUGIN_VERSIONS[name][-1], PLUGIN_NAMESPACE)
    registry = trt.get_plugin_registry()
    creators = registry.all_creators if hasattr(registry, "all_creators") else registry.plugin_creator_list
    for creator in creators or ():  # None where another library's creator is of a kind that Python does not know
        if (creator.name, creator.plugin_version, creator.plugin_namespace) == wanted:
            return creator
    return None


def _import_package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if error.name == name:
            raise ImportError(f'{name} is not installed: pip install "qwen-plugins[tensorrt]"', name=name) from None
        raise ImportError(f"the installed {name} cannot be imported: {error}", name=name) from error


def _library_name(version: str) -> str:
    parts = version.split(".")
    major = int(parts[0]) if parts[0].isdigit() else 0
    # 10.0 looks for an entry point that later versions do not know (getPluginCreators beside getCreators). The parser
    # of TensorRT-RTX 1.4 to 1.6 takes no plug-in.
    least = {1: 7, 8: 6, 10: 1}.get(major, 0)
    too_old = len(parts) > 1 and parts[1].isdigit() and int(parts[1]) < least
    if major not in _LIBRARIES or too_old:
        raise ValueError(
            f"TensorRT {version} is not supported; qwen_plugins has plug-ins for TensorRT 8.6, 10 (from 10.1 on) and "
            "11, and for TensorRT-RTX 1 (from 1.7 on)"
        )
    return _LIBRARIES[major]


def _is_registered(trt: Any) -> bool:
    wanted = [(name, version) for name, versions in PLUGIN_VERSIONS.items() for version in versions]
    return all(find_creator(trt, name, version) is not None for name, version in wanted)
