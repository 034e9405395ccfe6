"""Which library `import qwen_plugins` registers, with stand-ins for the tensorrt package; no TensorRT needed."""

import sys
import threading
import types
import warnings
from pathlib import Path

import pytest

from qwen_plugins import registration


class Registry:
    """Remembers what it loads, and has the package's creators once it has loaded something."""

    def __init__(self, takes_libraries: bool = True) -> None:
        self.loaded: list[str] = []
        self.plugin_creator_list: list[types.SimpleNamespace] = []
        self.takes_libraries = takes_libraries

    def load_library(self, path: str) -> None:
        self.loaded.append(path)
        if self.takes_libraries:
            self.plugin_creator_list += [
                types.SimpleNamespace(name=name, plugin_version=version, plugin_namespace="qwen_plugins")
                for name, versions in registration.PLUGIN_VERSIONS.items()
                for version in versions
            ]


def install_tensorrt(
    monkeypatch: pytest.MonkeyPatch, version: str, registry: Registry, package: str = "tensorrt"
) -> None:
    module = types.ModuleType(package)
    module.__spec__ = types.SimpleNamespace(name=package)
    module.__version__ = version
    module.get_plugin_registry = lambda: registry
    monkeypatch.setitem(sys.modules, package, module)


@pytest.fixture
def library_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Give a package folder with every library, whatever this checkout was built with."""
    for name in ("libqwen_plugins_trt8.so", "libqwen_plugins_trt10.so", "libqwen_plugins_trt11.so"):
        (tmp_path / name).touch()
    monkeypatch.setattr(sys.modules["qwen_plugins"], "__path__", [str(tmp_path)])
    return tmp_path


@pytest.mark.parametrize(
    ("version", "library"),
    [
        ("8.6.0", "libqwen_plugins_trt8.so"),
        ("8.6.1.post1", "libqwen_plugins_trt8.so"),
        ("10.1.0", "libqwen_plugins_trt10.so"),
        ("10.14.1.48", "libqwen_plugins_trt10.so"),
        ("11.1.0", "libqwen_plugins_trt11.so"),
        ("1.7.1.116", "libqwen_plugins_trt11.so"),  # TensorRT-RTX
    ],
)
def test_registers_the_library_of_the_installed_version_once(
    monkeypatch: pytest.MonkeyPatch, library_folder: Path, version: str, library: str
) -> None:
    registry = Registry()
    install_tensorrt(monkeypatch, version, registry)

    threads = [threading.Thread(target=registration.register_tensorrt_plugins) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert registration.register_tensorrt_plugins()
    assert registry.loaded == [str(library_folder / library)]
    assert registration.tensorrt_library_path() == library_folder / library


def test_each_installed_package_has_its_own_registry(monkeypatch: pytest.MonkeyPatch, library_folder: Path) -> None:
    versions = {"tensorrt": "8.6.0", "tensorrt_lean": "10.16.1.11", "tensorrt_dispatch": "11.4.0.106"}
    registries = {package: Registry() for package in versions}
    for package, version in versions.items():
        install_tensorrt(monkeypatch, version, registries[package], package)

    assert all(registration.register_tensorrt_plugins(package) for package in versions)

    libraries = {"tensorrt": 8, "tensorrt_lean": 10, "tensorrt_dispatch": 11}
    for package, major in libraries.items():
        assert registries[package].loaded == [str(library_folder / f"libqwen_plugins_trt{major}.so")]


def test_path_for_a_named_version_needs_no_tensorrt(monkeypatch: pytest.MonkeyPatch, library_folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)

    assert registration.tensorrt_library_path("10.3") == library_folder / "libqwen_plugins_trt10.so"
    assert registration.tensorrt_library_path(11) == library_folder / "libqwen_plugins_trt11.so"
    with pytest.raises(ImportError, match=r"tensorrt is not installed: pip install"):
        registration.tensorrt_library_path()


@pytest.mark.parametrize("version", ["1.6.1", "7.2.3", "8.5.3", "9.3.0", "10.0.1", "12.0", "nightly"])
def test_unsupported_versions_are_named(version: str, library_folder: Path) -> None:
    with pytest.raises(ValueError, match=rf"TensorRT {version} is not .* 8\.6, 10 .* 11, and for TensorRT-RTX"):
        registration.tensorrt_library_path(version)


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys.modules["qwen_plugins"], "__path__", [str(tmp_path)])

    with pytest.raises(FileNotFoundError, match=r"libqwen_plugins_trt8.so is not in .*install it again"):
        registration.tensorrt_library_path("8.6")


def test_silent_without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration.importlib.util, "find_spec", lambda name: None)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not registration.register_tensorrt_plugins()


def test_warns_of_a_tensorrt_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.8: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)

    with pytest.warns(RuntimeWarning, match=r"not registered in tensorrt: the installed tensorrt cannot be imported"):
        assert not registration.register_tensorrt_plugins()


def test_warns_of_an_unsupported_version(monkeypatch: pytest.MonkeyPatch, library_folder: Path) -> None:
    install_tensorrt(monkeypatch, "7.2.3", Registry())

    with pytest.warns(RuntimeWarning, match=r"not registered in tensorrt: TensorRT 7.2.3 is not supported"):
        assert not registration.register_tensorrt_plugins()


def test_warns_where_tensorrt_takes_no_library(monkeypatch: pytest.MonkeyPatch, library_folder: Path) -> None:
    install_tensorrt(monkeypatch, "8.6.0", Registry(takes_libraries=False))

    with pytest.warns(RuntimeWarning, match=r"tensorrt 8.6.0 did not take the plug-in library"):
        assert not registration.register_tensorrt_plugins()


def test_a_second_version_of_a_plugin(monkeypatch: pytest.MonkeyPatch, library_folder: Path) -> None:
    """The newest is found by its name alone, an older one by its version; a library without it is not enough."""
    registry = Registry()
    install_tensorrt(monkeypatch, "8.6.0", registry)
    assert registration.register_tensorrt_plugins()
    monkeypatch.setattr(registration, "PLUGIN_VERSIONS", registration.PLUGIN_VERSIONS | {"Gemm": ("1", "2", "3", "4")})
    trt = sys.modules["tensorrt"]
    assert registration.find_creator(trt, "Gemm") is None

    assert registration.register_tensorrt_plugins()

    assert len(registry.loaded) == 2
    assert registration.find_creator(trt, "Gemm").plugin_version == "4"
    assert registration.find_creator(trt, "Gemm", "1").plugin_version == "1"
    assert registration.find_creator(trt, "RmsNorm").plugin_version == "1"
