"""Format an installation for people."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .installation import PURPOSES, BackEndStatus, Found, Installation


def text(installation: Installation) -> str:
    """Return the installation as lines: what there is, then for each back end where it runs and what it lacks."""
    rows = [*_machine_rows(installation), *_library_rows(installation), *_package_rows(installation)]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name.ljust(width)}  {value}" for name, value in rows]
    for name, status in installation.back_ends.items():
        lines += ["", f"The {name} back end {_abilities(status)}{_reason(status)}"]
        for lack in status.lacks:
            lines.append(f"  - {lack.what}")
            lines += [f"    mend it: {lack.command}"] if lack.command else []
    return "\n".join(lines)


def _abilities(status: BackEndStatus) -> str:
    can = ["build engines here"] if status.builds else []
    can += [f"run on the {' and the '.join(status.runs_on)}"] if status.runs_on else []
    return f"can {' and '.join(can)}" if can else "cannot run"


def _reason(status: BackEndStatus) -> str:
    if not status.lacks:
        return "."
    return ". What keeps it from the GPU:" if status.runs_on or status.builds else ":"


def _machine_rows(found: Installation) -> Iterator[tuple[str, str]]:
    yield "qwen-plugins", found.version
    yield "Python", found.python
    yield "system", found.system
    driver = found.driver
    if "cuda" in driver:
        yield "driver", f"{driver['version'] or 'of unknown version'}, CUDA {driver['cuda']}{_problem(driver)}"
    else:
        yield "driver", f"none{_problem(driver)}"
    for index, gpu in enumerate(driver.get("gpus", ())):
        capability = ".".join(map(str, gpu["compute_capability"]))
        yield f"GPU {index}", f"{gpu['name']}, compute capability {capability}, {gpu['memory_bytes'] / 2**30:.1f} GiB"
    yield "CUDA runtime", _runtime(found.cuda_runtime)


def _runtime(runtime: Found) -> str:
    if not runtime.get("installed"):
        return "no cuda-bindings"
    return f"{runtime['version']} of cuda-bindings" if "version" in runtime else f"broken{_problem(runtime)}"


def _library_rows(found: Installation) -> Iterator[tuple[str, str]]:
    for library in found.kernels.get("libraries", ()):
        built = ", ".join(library["architectures"])
        yield "library", f"{Path(library['file']).name}{f', compute capability {built}' if built else ''}"
    if not found.kernels.get("libraries"):
        yield "library", f"none{_problem(found.kernels)}"
    elif "lacks" in found.kernels:
        yield "kernels", found.kernels["lacks"][0]["what"]
    yield "cuBLASLt", found.kernels.get("cublas_lt", "not known, without the kernels")
    torch = found.torch
    if not torch.get("installed"):
        yield "PyTorch", "not installed"
    elif "version" in torch:
        yield "PyTorch", f"{torch['version']}, CUDA {torch['cuda'] or 'none'}, {torch['gpus']} GPUs"
    else:
        yield "PyTorch", f"broken{_problem(torch)}"
    for kind, trt in found.tensorrt.items():
        yield kind, _tensorrt(trt)


def _tensorrt(trt: Found) -> str:
    if not trt.get("installed"):
        return "not installed"
    if "version" not in trt:
        return f"broken{_problem(trt)}"
    plugins = f"plug-ins of {trt['library']} registered" if trt.get("registered") else f"no plug-ins{_problem(trt)}"
    return f"{trt['version']}, {plugins}"


def _package_rows(found: Installation) -> Iterator[tuple[str, str]]:
    for name, version in found.packages.items():
        yield name, version or f"not installed; it is for {PURPOSES[name]}: pip install {name}"


def _problem(found: Found) -> str:
    return "".join(f": {lack['what']}" for lack in found.get("lacks", ())[:1])
