"""Put together what the probes find: what is installed, which back ends can run here, and what mends the others."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..common.extras import BACK_END_MODULES, PACKAGES
from ..common.version import package_version
from ..interface.engine_config import RTX_COMPUTE_CAPABILITIES
from .probes import REINSTALL, TENSORRTS

Found = dict[str, Any]  # what a probe found: see probes.py

TIMEOUT = 90.0
"""Seconds after which a probe is given up; importing PyTorch from a slow disk can take half a minute."""
AT_A_TIME = 4
PURPOSES = {
    "numpy": "everything",
    "safetensors": "reading and writing weights",
    "tokenizers": "text in and out of most models",
    "tiktoken": "text in and out of Qwen v1",
    "jinja2": "chats",
    "tqdm": "building",
    "ml_dtypes": "bfloat16 in TensorRT",
    "cuda-bindings": "TensorRT",
    "fastapi": "serving",
    "uvicorn": "serving",
    "msgspec": "serving",
    "prometheus-client": "serving",
    "llguidance": "structured output",
    "transformers": "comparing with the original model",
    "matplotlib": "drawing results",
}


@dataclass(frozen=True)
class Lack:
    """Say what is missing or wrong, and the command that mends it."""

    what: str
    command: str


@dataclass(frozen=True)
class BackEndStatus:
    """Say where a back end can run ("GPU", "CPU" or nowhere), and what keeps it from running, or from the GPU.

    builds: whether it can build engines here without running them.
    """

    runs_on: list[str]
    lacks: list[Lack]
    builds: bool = False


@dataclass(frozen=True)
class Installation:
    """Hold everything that `qwen-model doctor` prints; the values of the dictionaries are described in probes.py."""

    version: str
    python: str
    system: str
    driver: Found
    cuda_runtime: Found
    kernels: Found
    torch: Found
    tensorrt: dict[str, Found]
    packages: dict[str, str | None]
    back_ends: dict[str, BackEndStatus]

    @property
    def can_run(self) -> bool:
        """Tell whether any back end can run, or build engines for another machine."""
        return any(status.runs_on or status.builds for status in self.back_ends.values())


def examine(timeout: float = TIMEOUT) -> Installation:
    """Run all probes, each in a process of its own for at most `timeout` seconds, and judge what they found."""
    modules = [("module", module, name) for name, needed in BACK_END_MODULES.items() for module in needed]
    probes = [
        ("driver",),
        ("runtime",),
        ("kernels",),
        ("torch",),
        *(("tensorrt", kind) for kind in TENSORRTS),
        *modules,
    ]
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        found = dict(zip(probes, pool.map(lambda probe: run_probe(*probe, timeout=timeout), probes), strict=True))
        if found["torch",].get("gpus") and not found["kernels",].get("lacks"):
            found["launch",] = run_probe("launch", timeout=timeout)
        for name in BACK_END_MODULES:
            if not any(found[probe].get("lacks") for probe in modules if probe[2] == name):
                found["back_end", name] = run_probe("back_end", name, timeout=timeout)
    back_ends = {"torch": _torch_status(found), "tensorrt": _tensorrt_status(found)}
    if found["tensorrt", "tensorrt_rtx"].get("installed"):
        back_ends["tensorrt-rtx"] = _rtx_status(found)
    return Installation(
        version=package_version(),
        python=f"{platform.python_version()} ({sys.executable})",
        system=f"{platform.platform()}",
        driver=found["driver",],
        cuda_runtime=found["runtime",],
        kernels=found["kernels",],
        torch=found["torch",],
        tensorrt={kind: found["tensorrt", kind] for kind in TENSORRTS},
        packages={name: _installed_version(name) for name in PURPOSES},
        back_ends=back_ends,
    )


def run_probe(name: str, *arguments: str, timeout: float = TIMEOUT) -> Found:
    """Run a probe of probes.py in a process of its own; how that ends, if not well, is one of the "lacks"."""
    command = [sys.executable, "-m", "qwen_model.diagnosis.probes", name, *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return _failed(name, arguments, f"took longer than {timeout:.0f} s")
    except OSError as error:
        return _failed(name, arguments, f"cannot be tried: {error}")
    if done.returncode == 0:
        found: Found = json.loads(done.stdout.splitlines()[-1])
        return found
    said = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
    if done.returncode < 0:
        return _failed(name, arguments, f"ended the process with {signal.Signals(-done.returncode).name} ({said})")
    return _failed(name, arguments, f"fails: {said}")


def _failed(name: str, arguments: Iterable[str], how: str) -> Found:
    """Return what is found by a probe that found nothing: what it did, how that ended, and what may mend it."""
    about = next(iter(arguments), name)
    package = PACKAGES.get(about, about.replace("_", "-"))
    action, command = {
        "driver": ("asking the NVIDIA driver", "nvidia-smi"),
        "runtime": ("importing cuda.bindings", f"{REINSTALL} cuda-bindings"),
        "kernels": ("importing the kernels of qwen-plugins", f"{REINSTALL} qwen-plugins"),
        "launch": ("running a kernel of qwen-plugins", f"{REINSTALL} qwen-plugins"),
        "back_end": (f"starting the {about} back end", f"{REINSTALL} qwen-plugins"),
    }.get(name, (f"importing {about}", f"{REINSTALL} {package}"))
    return {"installed": True, "lacks": [{"what": f"{action} {how}", "command": command}]}


def _installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _lacks(*found: Found | None) -> list[Lack]:
    """Return what is lacking in any of these, each once."""
    every = [Lack(**each) for part in found if part is not None for each in part.get("lacks", ())]
    return list(dict.fromkeys(every))


def _modules(found: dict[tuple[str, ...], Found], name: str) -> list[Found]:
    return [part for probe, part in found.items() if probe[0] == "module" and probe[2] == name]


def _torch_status(found: dict[tuple[str, ...], Found]) -> BackEndStatus:
    """Judge the torch back end: without a GPU it runs on the CPU."""
    keeps = _lacks(*_modules(found, "torch"), found.get(("back_end", "torch")))
    if keeps:
        return BackEndStatus([], keeps)
    driver, kernels = found["driver",], found["kernels",]
    limits = [*_lacks(driver, found["torch",], kernels, found.get(("launch",))), *_wrong_architectures(driver, kernels)]
    on_gpu = found["torch",].get("gpus") and not limits
    return BackEndStatus(["GPU", "CPU"] if on_gpu else ["CPU"], limits)


def _tensorrt_status(found: dict[tuple[str, ...], Found]) -> BackEndStatus:
    """Judge the TensorRT back end, which needs a GPU for building too."""
    driver, kernels = found["driver",], found["kernels",]
    modules = _lacks(*_modules(found, "tensorrt"))
    plugins = None if ("module", "tensorrt", "tensorrt") in found and modules else found["tensorrt", "tensorrt"]
    keeps = [*modules, *_lacks(kernels, plugins, driver), *_wrong_architectures(driver, kernels)]
    keeps = keeps or _lacks(found.get(("back_end", "tensorrt")))
    return BackEndStatus([] if keeps else ["GPU"], keeps)


def _rtx_status(found: dict[tuple[str, ...], Found]) -> BackEndStatus:
    """Judge the TensorRT-RTX back end, which builds without a GPU and runs on RTX cards."""
    keeps = _lacks(*_modules(found, "tensorrt-rtx"), found["kernels",], found["tensorrt", "tensorrt_rtx"])
    keeps = keeps or _lacks(found.get(("back_end", "tensorrt-rtx")))
    if keeps:
        return BackEndStatus([], keeps)
    limits = _lacks(found["driver",], found["runtime",])
    gpus = [".".join(map(str, gpu["compute_capability"])) for gpu in found["driver",].get("gpus", ())]
    if not limits and not set(gpus) & set(RTX_COMPUTE_CAPABILITIES):
        wanted = ", ".join(RTX_COMPUTE_CAPABILITIES)
        limits = [Lack(f"it runs on compute capability {wanted}; the GPUs here have {', '.join(gpus)}", "")]
    return BackEndStatus([] if limits else ["GPU"], limits, builds=True)


def _wrong_architectures(driver: Found, kernels: Found) -> list[Lack]:
    """Return which GPUs have no kernels in our libraries."""
    built = [name for library in kernels.get("libraries", ()) for name in library["architectures"]]
    lacks = []
    for gpu in driver.get("gpus", ()):
        major, minor = gpu["compute_capability"]
        if built and not any(_runs_on(name, major, minor) for name in built):
            lacks.append(
                Lack(
                    f"the kernels are compiled for compute capability {', '.join(sorted(set(built)))}, and not for "
                    f"{major}.{minor} of the {gpu['name']}",
                    f"pip install . -C cmake.define.CMAKE_CUDA_ARCHITECTURES={major}{minor}-real",
                )
            )
    return lacks


def _runs_on(built_for: str, major: int, minor: int) -> bool:
    """Tell whether code for "8.6" or "8.6 and later" runs on a GPU: that is, in the first case, on 8.6 to 8.9."""
    number, _, later = built_for.partition(" ")
    least = tuple(map(int, number.split(".")))
    return (major, minor) >= least and (bool(later) or major == least[0])
