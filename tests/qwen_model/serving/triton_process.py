"""Start NVIDIA's Triton on the CPU with the model repository of deploy/, from the wheel nvidia-pytriton."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import venv
from importlib.util import find_spec
from pathlib import Path

import httpx
import numpy as np

from .server_process import child_processes

REPOSITORY = Path(__file__).parents[3] / "deploy" / "triton" / "model_repository"
START_SECONDS = 180
SHARED_MEMORY = 4 << 20
"""Free bytes of /dev/shm, of which each Triton takes 1 MB at first, and more while large requests are under way."""
LIBPYTHON = Path(sysconfig.get_config_var("LIBDIR") or "", sysconfig.get_config_var("INSTSONAME") or "")


def missing() -> str | None:
    """Return why Triton cannot run here; None if it can."""
    for module, package in (("pytriton", "nvidia-pytriton"), ("tritonclient", "tritonclient[grpc]")):
        if find_spec(module) is None:
            return f"needs {package}, which is not installed"
    if int(np.__version__.partition(".")[0]) > 1:
        return "needs NumPy 1: Triton in nvidia-pytriton was built before NumPy 2"
    if ".so" not in LIBPYTHON.name or not LIBPYTHON.exists():
        return "needs a Python with a shared library, which Triton's process for models loads"
    if shutil.disk_usage("/dev/shm").free < SHARED_MEMORY:
        return f"needs {SHARED_MEMORY >> 20} MB of /dev/shm, through which Triton talks to its process for models"
    return None


class TritonProcess:
    """Hold a running Triton: `http` is a client of its HTTP address, `grpc` the other address, `log` its output."""

    def __init__(self, engine_dir: Path, folder: Path, **parameters: str):
        """Start to serve an engine; `folder` takes what Triton reads.

        parameters: of config.pbtxt, in place of those there.
        """
        spec = find_spec("pytriton")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        triton = Path(spec.submodule_search_locations[0], "tritonserver")
        libraries = (LIBPYTHON.parent, triton.parents[1] / "nvidia_pytriton.libs")
        http, grpc, metrics = _free_ports(3)
        self.log_file = folder / "log.txt"
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                [
                    triton / "bin" / "tritonserver",
                    f"--model-repository={_repository(folder, engine_dir, parameters)}",
                    f"--backend-directory={_back_ends(folder, triton)}",
                    *(f"--{name}-address=127.0.0.1" for name in ("http", "grpc", "metrics")),
                    *(f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"),
                ],
                stdout=log,
                stderr=log,
                env={
                    **os.environ,
                    "PATH": f"{_environment(folder)}{os.pathsep}{os.environ['PATH']}",
                    "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
                    "OMP_NUM_THREADS": "1",
                },
            )
        self.grpc = f"127.0.0.1:{grpc}"
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{http}", timeout=60)

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def wait_until_ready(self) -> None:
        """Return when Triton answers.

        Raises:
            RuntimeError: it has ended, or has been killed because it took too long; the text is its log.
        """
        end = time.monotonic() + START_SECONDS
        while not self.is_ready():
            if self.ended or time.monotonic() > end:
                self.process.kill()
                self.process.wait()
                raise RuntimeError(self.log)
            time.sleep(0.1)

    def is_ready(self) -> bool:
        """Tell whether Triton says that it is."""
        try:
            return self.http.get("/v2/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    def generate(self, **inputs: object) -> httpx.Response:
        """Send a request for one response."""
        return self.http.post("/v2/models/qwen/generate", json=inputs)

    def engine(self) -> int:
        """Return the process id of the engine."""
        [model] = child_processes(self.process.pid, "triton_python_backend_stub")
        return child_processes(model, "spawn_main")[-1]

    def stop(self) -> int:
        """Send SIGTERM, and return the exit status."""
        self.http.close()
        if not self.ended:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()


def _repository(folder: Path, engine_dir: Path, parameters: dict[str, str]) -> Path:
    """Return a copy of the repository, with an engine and parameters."""
    copy = shutil.copytree(REPOSITORY, folder / "repository", ignore=shutil.ignore_patterns("engine", "__pycache__"))
    (copy / "qwen" / "1" / "engine").symlink_to(engine_dir)
    path = copy / "qwen" / "config.pbtxt"
    lines = path.read_text().splitlines()
    for name, value in parameters.items():
        [place] = [number for number, line in enumerate(lines) if f'key: "{name}"' in line]
        lines[place] = f'parameters {{ key: "{name}" value {{ string_value: "{value}" }} }}'
    path.write_text("\n".join(lines))
    return copy


def _back_ends(folder: Path, triton: Path) -> Path:
    """Return a folder of Triton's Python back end with the process for models of this version of Python."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    copy = shutil.copytree(triton / "backends", folder / "backends")
    stub = "triton_python_backend_stub"
    shutil.copy(triton / "python_backend_stubs" / version / stub, copy / "python")
    return copy


def _environment(folder: Path) -> Path:
    """Return the commands of an environment with this one's packages: Triton's process takes no PYTHONPATH."""
    builder = venv.EnvBuilder(symlinks=True)
    builder.create(folder / "environment")
    packages = sysconfig.get_path("purelib", vars={"base": str(folder / "environment")})
    Path(packages, "packages.pth").write_text("\n".join(str(Path(entry).resolve()) for entry in sys.path))
    return folder / "environment" / "bin"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
