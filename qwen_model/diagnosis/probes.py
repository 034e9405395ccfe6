"""Look at one part of the installation, in a process of its own: what is broken may end the process, or never return.

`python -m qwen_model.diagnosis.probes NAME [ARGUMENT]` prints a JSON object: what was found, and under "lacks" a list
of what is wrong with the command that mends it. Nothing outside the standard library is imported before a probe starts.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ..common.errors import QwenModelError
from ..common.extras import PACKAGES, cuda_release, driver_of, import_extra, oldest_driver, require_kernels

Found = dict[str, Any]

TENSORRTS = ("tensorrt", "tensorrt_lean", "tensorrt_dispatch", "tensorrt_rtx")
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_...
REINSTALL = "pip install --force-reinstall"


def install_driver() -> str:
    """Return what to do about a driver that is missing or too old."""
    oldest = driver_of(cuda_release())
    return f"install driver {oldest} or later: https://www.nvidia.com/drivers; in a container: docker run --gpus all"


def lack(what: object, command: str) -> dict[str, str]:
    """Return an entry of "lacks"."""
    return {"what": str(what), "command": command}


def driver() -> Found:
    """Ask the driver for its version, its CUDA version and its GPUs."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return {"lacks": [lack(f"there is no NVIDIA driver ({error})", install_driver())]}
    version = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    found: Found = {
        "version": _driver_version(),
        "cuda": _cuda_version(version.value),
        "gpus": [],
    }
    status = cuda.cuInit(0)
    if version.value < 1000 * cuda_release():
        what = f"the NVIDIA driver, of CUDA {found['cuda']}, is older than {oldest_driver()}"
        found["lacks"] = [lack(what, install_driver())]
    elif status == NO_DEVICE:
        found["lacks"] = [lack("the driver finds no GPU", "nvidia-smi; check CUDA_VISIBLE_DEVICES")]
    elif status != 0:
        found["lacks"] = [lack(f"the driver cannot start: {_driver_error(cuda, status)}", "nvidia-smi; dmesg | tail")]
    if status == 0:
        found["gpus"] = list(_gpus(cuda))
    return found


def _driver_version() -> str | None:
    """Return the driver's own version, such as "580.95.05", from its management library."""
    try:
        management = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    text = ctypes.create_string_buffer(96)
    if management.nvmlInit_v2() != 0 or management.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text))) != 0:
        return None
    return text.value.decode()


def _driver_error(cuda: ctypes.CDLL, status: int) -> str:
    text = ctypes.c_char_p()
    cuda.cuGetErrorString(status, ctypes.byref(text))
    return text.value.decode() if text.value else f"error {status}"


def _gpus(cuda: ctypes.CDLL) -> Iterator[dict[str, Any]]:
    count = ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    for index in range(count.value):
        device, memory, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
        cuda.cuDeviceGet(ctypes.byref(device), index)
        cuda.cuDeviceGetName(name, len(name), device)
        cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        capability = []
        for attribute in (CAPABILITY_MAJOR, CAPABILITY_MINOR):
            value = ctypes.c_int()
            cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            capability.append(value.value)
        yield {"name": name.value.decode(), "compute_capability": capability, "memory_bytes": memory.value}


def runtime() -> Found:
    """Return the version of the CUDA runtime that the TensorRT back end calls; our kernels have one of their own."""
    try:
        cudart = importlib.import_module("cuda.bindings.runtime")
    except ModuleNotFoundError:
        return {"installed": False}
    _, version = cudart.cudaRuntimeGetVersion()
    return {"installed": True, "version": _cuda_version(version)}


def _cuda_version(number: int) -> str:
    """Convert CUDA's 13010 to "13.1"."""
    return f"{number // 1000}.{number % 1000 // 10}"


def kernels() -> Found:
    """Import our compiled kernels, and list our libraries with the architectures that they are compiled for."""
    _hide_tensorrt()
    found: Found = {"libraries": []}
    try:
        package = importlib.import_module("qwen_plugins")
        files = sorted(file for folder in package.__path__ for file in Path(folder).glob("*.so"))
        found["libraries"] = [{"file": str(file), "architectures": architectures(file.read_bytes())} for file in files]
        require_kernels()
    except Exception as error:
        found["lacks"] = [lack(error, "pip install ." if not found["libraries"] else f"{REINSTALL} qwen-plugins")]
        return found
    found["cublas_lt"] = importlib.import_module("qwen_plugins.launch").cublas_lt_status()
    return found


def architectures(library: bytes) -> list[str]:
    """Return what a library's kernels are compiled for: "9.0", and for PTX "12.0 and later", as CUDA's images say."""
    images = set()
    magic = struct.pack("<I", 0xBA55ED50)
    start = library.find(magic)
    while start >= 0:
        header_bytes, content_bytes = struct.unpack_from("<6xHQ", library, start)
        at, end = start + header_bytes, start + header_bytes + content_bytes
        while header_bytes == 16 and at < end <= len(library):
            kind, entry_bytes, image_bytes, architecture = struct.unpack_from("<HxxIQ12xI", library, at)
            images.add((architecture, kind))
            at += entry_bytes + image_bytes
        start = library.find(magic, start + len(magic))
    return [f"{number // 10}.{number % 10}" + (" and later" if kind == 1 else "") for number, kind in sorted(images)]


def tensorrt(kind: str) -> Found:
    """Import a TensorRT: tensorrt, tensorrt_lean, tensorrt_dispatch or tensorrt_rtx. Register our plug-ins in it."""
    module = _first_installed(kind, f"{kind}_bindings")
    if module is None:
        return {"installed": False}
    found: Found = {"installed": True, "module": module}
    package = f"{REINSTALL} {PACKAGES.get(kind, kind.replace('_', '-'))}"
    try:
        trt = importlib.import_module(module)
        found["version"] = str(trt.__version__)
    except Exception as error:
        return {**found, "lacks": [lack(f"the installed {module} cannot be imported: {error}", package)]}
    _hide_tensorrt()
    try:
        registration = importlib.import_module("qwen_plugins.registration")
        library = registration.tensorrt_library_path(found["version"])
        found["library"] = library.name
        registry = trt.get_plugin_registry()
        if registration.find_creator(trt, "RmsNorm") is None:
            registry.load_library(str(library))
        names = [name for name in registration.PLUGIN_VERSIONS if registration.find_creator(trt, name) is None]
    except Exception as error:
        what = f"the TensorRT plug-ins are not registered: {error}"
        return {**found, "lacks": [lack(what, f"{REINSTALL} qwen-plugins")]}
    found["registered"] = not names
    if names:
        what = f"TensorRT {found['version']} did not take the plug-ins {', '.join(names)} of {library}"
        found["lacks"] = [lack(what, f"{REINSTALL} qwen-plugins")]
    return found


def _hide_tensorrt() -> None:
    """Keep `import qwen_plugins` from importing a TensorRT that is not imported yet: it may be broken."""
    for name in TENSORRTS:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def _first_installed(*names: str) -> str | None:
    return next((name for name in names if importlib.util.find_spec(name) is not None), None)


def torch() -> Found:
    """Import PyTorch, ask for its GPUs, and run one of our kernels on the first."""
    try:
        module = importlib.import_module("torch")
    except ModuleNotFoundError:
        return {"installed": False}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = module.cuda.is_available()
    found: Found = {
        "installed": True,
        "version": module.__version__,
        "cuda": module.version.cuda,
        "gpus": module.cuda.device_count() if available else 0,
    }
    if not available and module.version.cuda is None:
        what = f"PyTorch {module.__version__} is built without CUDA: it runs on the CPU alone"
        found["lacks"] = [lack(what, f"{REINSTALL} torch")]
    elif not available and said:
        found["lacks"] = [lack(f"PyTorch finds no GPU: {str(said[0].message).splitlines()[0]}", install_driver())]
    return found


def launch() -> Found:
    """Launch one of our kernels from PyTorch, and compare its result."""
    torch_module = importlib.import_module("torch")
    _hide_tensorrt()
    qwen_plugins = importlib.import_module("qwen_plugins")
    x = torch_module.randn(4, 64, device="cuda", dtype=torch_module.float16)
    expected = torch_module.nn.functional.rms_norm(x.float(), (64,), eps=1e-6)
    try:
        found = qwen_plugins.rms_norm(x, torch_module.ones_like(x[0]), eps=1e-6).float()
        right = bool((found - expected).abs().max() < 0.01)
    except RuntimeError as error:
        return {"lacks": [lack(f"a kernel does not run: {str(error).splitlines()[0]}", "pip install .")]}
    return {} if right else {"lacks": [lack("a kernel gives wrong numbers", f"{REINSTALL} qwen-plugins")]}


def module(name: str, back_end: str) -> Found:
    """Import a module that a back end needs, as the back end does."""
    try:
        import_extra(name, f"the {back_end} back end", extra=back_end)
    except QwenModelError as error:
        what, colon, command = str(error).partition(": pip install ")
        package = PACKAGES.get(name, name)
        return {"lacks": [lack(what, f"pip install {command}" if colon else f"{REINSTALL} {package}")]}
    return {}


def back_end(name: str) -> Found:
    """Import a back end, and ask what an engine of it depends on, which needs a GPU in TensorRT's."""
    back_ends: ModuleType = importlib.import_module("qwen_model.engine.back_ends")
    try:
        return {"versions": back_ends.back_end(name).versions()}
    except QwenModelError as error:
        return {"lacks": [lack(error, "")]}


PROBES: dict[str, Callable[..., Found]] = {
    probe.__name__: probe for probe in (driver, runtime, kernels, tensorrt, torch, launch, module, back_end)
}


def main() -> None:
    """Run the probe that the command line names."""
    name, *arguments = sys.argv[1:]
    found = PROBES[name](*arguments)
    print(f"\n{json.dumps(found)}", flush=True)  # libraries may have printed to the line before


if __name__ == "__main__":
    main()
