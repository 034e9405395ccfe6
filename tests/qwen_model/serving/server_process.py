"""Start `qwen-model serve` on the CPU as a user does, and read where it listens."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

START_SECONDS = 120


class ServerProcess:
    """Hold a running server; `log` is what it said on standard error so far.

    program: Python's arguments that run the command.
    """

    def __init__(
        self,
        engine_dir: Path,
        *options: str,
        program: Sequence[str] = ("-m", "qwen_model.serve"),
        environment: dict[str, str] | None = None,
    ):
        command = [sys.executable, *program, "--engine-dir", str(engine_dir), "--port", "0", *options]
        self.process = subprocess.Popen(
            [*command, "--device", "cpu"],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # its process group is the server's alone
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        )
        self.log = ""
        threading.Thread(target=self._read, daemon=True).start()
        found = self.wait_for(lambda: re.search(r"at (http://\S+)", self.log), START_SECONDS)
        assert found, self.log
        self.url: str = found[1]
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line

    def wait_for(self, found: Callable[[], Any], seconds: float = 20) -> Any:
        """Return what the function returns as soon as it is true, the process has ended, or the time is over."""
        end = time.monotonic() + seconds
        while not (value := found()) and time.monotonic() < end and self.process.poll() is None:
            time.sleep(0.02)
        return value or found()

    def openai(self, **options: Any) -> Any:
        """Return OpenAI's client."""
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60, **options)

    def post(self, path: str, **body: Any) -> httpx.Response:
        """Send a JSON body."""
        return self.http.post(path, json=body)

    def metrics(self) -> dict[str, float]:
        """Return the values of /metrics by their names."""
        lines = (line.rpartition(" ") for line in self.http.get("/metrics").text.splitlines() if line[:1] != "#")
        return {name: float(value) for name, _, value in lines}

    def is_idle(self) -> bool:
        """Tell whether no sequence runs or waits, and no page is in use."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        metrics = self.metrics()
        return not any(metrics[name] for name in names)

    def children(self) -> dict[int, str]:
        """Return process ids of the children, and which part they are: engine or http."""
        found = child_processes(self.process.pid, "spawn_main")
        return {
            pid: "http" if number else "engine" for number, pid in enumerate(found)
        }  # the engine's is started first

    def rss(self, pid: int) -> int:
        """Return the resident bytes of a process."""
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def stop(self, seconds: float = 40) -> int:
        """Send SIGTERM, and return the exit status."""
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


def child_processes(parent: int, command: str) -> list[int]:
    """Return the process ids of the children that have this text in their command, the oldest first."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_child = int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent
            if is_child and command in (folder / "cmdline").read_text():
                found.append(int(folder.name))
        except OSError:
            continue
    return sorted(found)
