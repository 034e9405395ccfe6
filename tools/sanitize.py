"""Run compute-sanitizer over tests of the kernels, several checks at once on one GPU.

    python -m tools.sanitize [NAME...] [--list] [--jobs N] [--seconds N] [--output DIR]

Each check is a process of its own: one of compute-sanitizer's tools over a few tests of small sizes. A line says what
it found: "clean", the number of errors, or that it did not end in time. The exit status is 1 if one is not clean.
Kernels of PyTorch are not looked at, and each tensor has memory of its own, so that memcheck sees what is read behind
its end.

The check `overflow` launches a kernel with a wrong size, and is clean if memcheck finds that: else the others prove
nothing.

Needs a GPU, the installed package, PyTorch and pytest, and `compute-sanitizer` of the CUDA toolkit on PATH or in
/usr/local/cuda.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = "tests/qwen_plugins/test_"
FOUND = 9
"""compute-sanitizer's exit status where it has found something."""
FIRST_PORT = 49152
PORTS = 20
"""Of a process: those that run at once must not share any."""

OVERFLOW = """
import torch
from qwen_plugins import launch
x, q = torch.zeros(64, dtype=torch.float16, device="cuda"), torch.zeros(4096, dtype=torch.int8, device="cuda")
scales = torch.zeros(1, device="cuda")
launch.quantize(
    x=x.data_ptr(), x_row_stride=4096, q=q.data_ptr(), rows=1, columns=4096, dtype=launch.DataType.float16,
    quant_dtype=launch.DataType.int8, static_scale=0, scales=scales.data_ptr(), stream=0,
)
torch.cuda.synchronize()
"""


@dataclass(frozen=True)
class Check:
    """Name a tool, and the tests that it runs over.

    tests: files of tests/qwen_plugins, without "test_" and ".py"; (): `OVERFLOW`.
    expression: pytest's -k.
    launches: the kernels that are looked at, the first ones; 0: all.
    """

    tool: str
    tests: tuple[str, ...]
    expression: str = ""
    launches: int = 0

    def command(self, sanitizer: str, port: int) -> list[str]:
        """Return the command line."""
        options = ["--tool", self.tool, "--error-exitcode", str(FOUND), "--port", str(port), "--print-limit", "20"]
        options += ["--kernel-name", "kernel_substring=qwen_plugins", "--launch-count", str(self.launches)]
        program = [sys.executable, "-c", OVERFLOW]
        if self.tests:
            files = [f"{TESTS}{name}.py" for name in self.tests]
            program = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *files]
            program += ["-k", self.expression]
        return [sanitizer, *options, *program]


SIZES = "test_matches_float64 and cuda and (127 or 4096 or 4100)"
LONG_ROWS = "test_long_rows and (65535 or 32776)"
STREAM_QUANTIZED = "test_every_variant and (128-False-4-None-dtype0 or 32-True-8-swiglu-dtype1)"
STREAM_INT8 = "test_every_variant and code_type0-False-None-dtype0"
STREAM_FP8 = "test_every_variant and code_type2-True-swiglu-dtype1"
TILES_INT8 = "test_every_variant and code_type0-False-swiglu-dtype0"
TILES_FP8 = "test_every_variant and code_type2-True-None-dtype1"
DEQUANTIZED = "many_rows and (4-dequantized-None-dtype0 or 8-dequantized-swiglu-dtype1)"
TILES_QUANTIZED = "many_rows and (4-tiles_quantized:n128e-swiglu-dtype0 or 8-tiles_quantized:n256s3-None-dtype1)"
PAGES = "(test_new_tokens or test_prompts) and 128 and 14 and (cache_dtype1 or cache_dtype2) and dtype1"
PROMPT_TILES = "test_prompts and 256 and 14 and (dtype1-None or dtype1-cache_dtype1)"  # a kernel without wgmma
# synccheck takes the barrier of attend_on_hopper, at which warpgroups meet from two loops, for one that all threads
# must reach at one place. PTX allows what they do.
SYNC_PAGES = f"{PROMPT_TILES} or test_new_tokens and 128 and 14 and (cache_dtype1 or cache_dtype2) and dtype1"
ATTENTION = (
    "short_cache_meet or (whole_and_split and 128 and dtype0) or (prefill_after and 128 and dtype0) "
    "or (one_sequence and 9000)"
)
CHECKS = {
    "overflow": Check("memcheck", ()),
    "stream_quantized": Check("memcheck", ("stream_quantized",), STREAM_QUANTIZED),
    "dequantized": Check("memcheck", ("quantized_gemm",), DEQUANTIZED),
    "tiles_quantized": Check("memcheck", ("quantized_gemm",), TILES_QUANTIZED),
    "stream_int8": Check("memcheck", ("stream_eight_bit",), STREAM_INT8),
    "stream_fp8": Check("memcheck", ("stream_eight_bit",), STREAM_FP8),
    "tiles_int8": Check("memcheck", ("tiles_eight_bit",), TILES_INT8),
    "tiles_fp8": Check("memcheck", ("tiles_eight_bit",), TILES_FP8),
    "scaled_gemm": Check("memcheck", ("scaled_gemm",), "test_plain_kernel or test_cublas_lt or any_size"),
    "quantize": Check("memcheck", ("quantize",), f"{SIZES} or any_size"),
    "rms_norm_quant": Check("memcheck", ("rms_norm_quant",), f"{SIZES} or any_size or test_strided_rows"),
    "pages": Check("memcheck", ("paged_attention",), PAGES),
    "context": Check("memcheck", ("quantized_context",), "test_with_a_cache_of_8_bits or (test_prefill and 64)"),
    "sampling": Check("memcheck", ("sampling",), "(test_logprobs and not graph) or (test_argmax and 1000)"),
    "race_rows": Check("racecheck", ("quantize", "rms_norm_quant"), "test_matches_float64 and cuda and 4100", 100),
    "race_pages": Check("racecheck", ("paged_attention",), PAGES, 8),
    "race_prompts": Check("racecheck", ("paged_attention",), PROMPT_TILES),
    "race_sampling": Check("racecheck", ("sampling",), "test_logprobs and 1000", 12),
    "sync_stream_quantized": Check("synccheck", ("stream_quantized",), STREAM_QUANTIZED, 100),
    "sync_stream_eight_bit": Check("synccheck", ("stream_eight_bit",), STREAM_INT8, 100),
    "sync_tiles_quantized": Check("synccheck", ("quantized_gemm",), TILES_QUANTIZED, 100),
    "sync_tiles_eight_bit": Check("synccheck", ("tiles_eight_bit",), TILES_FP8, 100),
    "sync_rows": Check("synccheck", ("quantize", "rms_norm_quant"), "test_zeros and cuda"),
    "sync_pages": Check("synccheck", ("paged_attention",), SYNC_PAGES),
    "sync_sampling": Check("synccheck", ("sampling",), "test_logprobs and 1000"),
    # The kernels of 16 bits.
    "rms_norm": Check("memcheck", ("rms_norm",), f"{SIZES} or test_rows_in_any_layout and cuda or {LONG_ROWS}"),
    "race_rms_norm": Check("racecheck", ("rms_norm",), f"{SIZES} or {LONG_ROWS}"),
    "init_rms_norm": Check("initcheck", ("rms_norm", "rms_norm_quant"), f"{SIZES} or {LONG_ROWS}"),
    "gemm": Check("memcheck", ("gemm",), "test_matches_float64 and (72 or 2056) and not dtype2"),
    "gemm_of_prompts": Check("memcheck", ("gemm",), "dtype0 and (hundreds and 136 or tens_of_rows and (8232 or 1000))"),
    "attention": Check("memcheck", ("attention",), ATTENTION),
    "race_attention": Check("racecheck", ("attention",), "short_cache_meet and dtype0"),
}


@dataclass(frozen=True)
class Result:
    """Hold what a check printed, its exit status (None: it did not end in time) and its seconds."""

    name: str
    output: str
    status: int | None
    seconds: float

    @property
    def is_clean(self) -> bool:
        """Tell whether the tool has found nothing, or in `overflow` something, and the tests have passed."""
        if not CHECKS[self.name].tests:
            return self.status == FOUND and "Invalid __global__ read" in self.output
        return self.status == 0 and re.search(r"\b\d+ passed", self.output) is not None

    @property
    def line(self) -> str:
        """Return the line that says what was found."""
        tests = re.findall(r"^(?:\d+ \w+(?:, )?)+ in .*$", self.output, re.MULTILINE)
        summary = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", self.output, re.MULTILINE)
        said = [*tests[-1:], *summary[:1]] if self.status is not None else ["did not end in time"]
        found = "clean" if self.is_clean else "NOT CLEAN"
        return f"{self.name:<22} {CHECKS[self.name].tool:<10} {self.seconds:4.0f} s  {found:<9}  {'; '.join(said)}"


def run_check(name: str, sanitizer: str, seconds: float) -> Result:
    """Run a check; its processes are ended after so many seconds."""
    port = FIRST_PORT + PORTS * list(CHECKS).index(name)
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_MODULE_LOADING": "LAZY"}
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            CHECKS[name].command(sanitizer, port),
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        status: int | None = None
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also where the user interrupts
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Result(name, text, status, time.monotonic() - start)


def find_sanitizer() -> str:
    """Return the path of compute-sanitizer; exit with a line if there is none."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"])
    found = shutil.which("compute-sanitizer", path=path)
    if found is None:
        sys.exit("error: compute-sanitizer is neither on PATH nor in /usr/local/cuda: it is part of the CUDA toolkit")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the checks, print a line for each, and write what those that are not clean printed."""
    parser = argparse.ArgumentParser(prog="python -m tools.sanitize", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="checks to run (default: all)")
    parser.add_argument("--list", action="store_true", help="print the checks, and run none")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="checks at once (default: one a core)"
    )
    parser.add_argument("--seconds", type=float, default=600, help="that a check may take (default: 600)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write what the checks printed")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in CHECKS:
            parser.error(f"there is no check {name!r}: choose from {', '.join(CHECKS)}")
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, not {options.jobs}")
    names = options.names or list(CHECKS)
    if options.list:
        print("\n".join(f"{name:<22} {CHECKS[name].tool:<10} {' '.join(CHECKS[name].tests)}" for name in names))
        return
    sanitizer = find_sanitizer()
    clean = True
    with ThreadPoolExecutor(options.jobs) as threads:
        for result in threads.map(lambda name: run_check(name, sanitizer, options.seconds), names):
            print(result.line, flush=True)
            clean = clean and result.is_clean
            if options.output is not None:
                options.output.mkdir(parents=True, exist_ok=True)
                (options.output / f"{result.name}.txt").write_text(result.output, encoding="utf-8")
    sys.exit(0 if clean else 1)


if __name__ == "__main__":
    main()
