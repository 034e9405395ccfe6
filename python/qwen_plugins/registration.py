"""Find the plug-in library that fits the installed TensorRT and register it, once per process.

``import qwen_plugins`` does it, where TensorRT need not be installed: this module is not in `qwen_plugins.tensorrt`.
"""

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
PLUGIN_VERSIONS = {"RmsNorm": ("1",), "RmsNormQuantization": ("1",), "Gemm": ("1",), "GptAttention": ("1",)}

_LIBRARIES = {8: "libqwen_plugins_trt8.so", 10: "libqwen_plugins_trt10.so", 11: "libqwen_plugins_trt11.so"}
_log = logging.getLogger(__name__)
_lock = threading.Lock()


def tensorrt_library_path(version: str | int | None = None) -> Path:
    """Return the plug-in library for one version of TensorRT, for ``trtexec --dynamicPlugins`` and C++ programs.

    Args:
        version: of TensorRT, such as ``"10.14"`` or ``10``. The installed ``tensorrt`` package's by default.

    Raises:
        ImportError: no version is given and ``tensorrt`` is not installed.
        ValueError: there is no library for this version.
        FileNotFoundError: the library is not where the package was installed.
    """
    if version is None:
        version = str(_import_tensorrt().__version__)
    name = _library_name(str(version))
    # __path__ names both the sources and the installed files where the package is installed in editable mode.
    folders = [Path(folder) for folder in sys.modules[__package__].__path__]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    searched = ", ".join(str(folder) for folder in folders)
    raise FileNotFoundError(f"{name} is not in {searched}: qwen_plugins was installed without it; install it again")


def register_tensorrt_plugins() -> bool:
    """Load the plug-in library into the registry of the installed TensorRT, unless its plug-ins are registered already.

    ``import qwen_plugins`` calls it. Where ``tensorrt`` is not installed it does nothing; where it is installed but
    cannot be used, a RuntimeWarning says why.

    Returns:
        Whether the plug-ins are registered.
    """
    with _lock:
        try:
            if importlib.util.find_spec("tensorrt") is None:
                return False
            trt = _import_tensorrt()
            if not _is_registered(trt):
                trt.get_plugin_registry().load_library(str(tensorrt_library_path()))
                _log.info("TensorRT %s loaded the plug-ins of %s", trt.__version__, tensorrt_library_path())
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            warnings.warn(f"the TensorRT plug-ins are not registered: {error}", RuntimeWarning, stacklevel=2)
            return False
        if not _is_registered(trt):
            warnings.warn(
                f"TensorRT {trt.__version__} did not take the plug-in library {tensorrt_library_path()}; "
                "its log has the reason",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        return True


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


def _import_tensorrt() -> Any:
    try:
        return importlib.import_module("tensorrt")
    except ImportError as error:
        if error.name == "tensorrt":
            raise ImportError(
                'tensorrt is not installed: pip install "qwen-plugins[tensorrt]"', name="tensorrt"
            ) from None
        raise ImportError(f"the installed tensorrt cannot be imported: {error}", name="tensorrt") from error


def _library_name(version: str) -> str:
    parts = version.split(".")
    major = int(parts[0]) if parts[0].isdigit() else 0
    # 10.0 looks for an entry point that later versions do not know (getPluginCreators beside getCreators).
    least = {8: 6, 10: 1}.get(major, 0)
    too_old = len(parts) > 1 and parts[1].isdigit() and int(parts[1]) < least
    if major not in _LIBRARIES or too_old:
        raise ValueError(
            f"TensorRT {version} is not supported; qwen_plugins has plug-ins for TensorRT 8.6, 10 (from 10.1 on) and 11"
        )
    return _LIBRARIES[major]


def _is_registered(trt: Any) -> bool:
    wanted = [(name, version) for name, versions in PLUGIN_VERSIONS.items() for version in versions]
    return all(find_creator(trt, name, version) is not None for name, version in wanted)
