"""Compare the GPU machine code of two builds, kernel by kernel.

    python tools/compare_machine_code.py OLD NEW [--rename OLD_TEXT NEW_TEXT]...

OLD and NEW are libraries (``.so``) or folders that hold some, such as two installations of the package for the same
GPU architectures. A change that should leave the kernels alone (a move, a new name, another way to link) is one after
which this prints "the same" and exits with 0; otherwise it lists the kernels that differ, were added or are gone, and
exits with 1. A kernel counts once however many libraries hold it.

Compared are a kernel's instructions, constants, registers and static shared memory. Not compared are its name in an
anonymous namespace, which holds a hash of the source file's path, and debug information. ``--rename`` replaces text in
the demangled names of OLD before names are matched: ``--rename gemm_hopper stream_gemm``.

Needs ``cuobjdump`` of the CUDA toolkit (pip: ``nvidia-cuda-cuobjdump``) on ``PATH``, and ``c++filt`` (binutils). PTX is
not looked at: build for real architectures, ``-C cmake.define.CMAKE_CUDA_ARCHITECTURES=90-real``.
"""

import argparse
import hashlib
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# By architecture and name: the digests of all code that has this name, more than one where source files differ in it.
Kernels = dict[tuple[str, str], set[str]]

_SECTION_HEADER = struct.Struct("<IIQQQQIIQQ")
_NO_BITS = 8  # a section's type: it takes no room in the file
_PROGRAMS = {"cuobjdump": "the CUDA toolkit, or pip install nvidia-cuda-cuobjdump", "c++filt": "binutils"}
_PARTS_OF_A_KERNEL = (".text.", ".nv.shared.", ".nv.constant")


@dataclass(frozen=True)
class Section:
    """Hold a section of a cubin: its name, its size in bytes, its sh_info field and what the file holds of it."""

    name: str
    size: int
    info: int
    content: bytes


def sections(cubin: bytes) -> Iterator[Section]:
    """Read the sections of a cubin, a 64-bit little-endian ELF file."""
    if cubin[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_size, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [_SECTION_HEADER.unpack_from(cubin, table + i * entry_size) for i in range(count)]
    names = headers[names_index][4]
    for name, kind, _, _, offset, size, _, info, _, _ in headers:
        end = cubin.index(b"\0", names + name)
        content = b"" if kind == _NO_BITS else cubin[offset : offset + size]
        yield Section(cubin[names + name : end].decode(), size, info, content)


def kernel_digests(cubin: bytes) -> dict[str, str]:
    """Return a digest of the code and resources of each kernel of a cubin, by mangled name."""
    parts: dict[str, list[Section]] = {}
    for section in sections(cubin):
        if section.name.startswith(_PARTS_OF_A_KERNEL):
            kernel = section.name[section.name.index("_Z") :] if "_Z" in section.name else section.name
            parts.setdefault(kernel, []).append(section)
    return {
        kernel: _digest(found) for kernel, found in parts.items() if any(p.name.startswith(".text.") for p in found)
    }


def _digest(parts: Iterable[Section]) -> str:
    digest = hashlib.sha256()
    for part in sorted(parts, key=lambda section: section.name):
        kind = part.name.partition("_Z")[0]
        # The upper byte of sh_info of a .text section counts registers; the rest is the index of a symbol.
        registers = part.info >> 24 if kind == ".text." else 0
        digest.update(f"{kind} {part.size} {registers}\n".encode() + part.content)
    return digest.hexdigest()


def without_file_names(mangled: str) -> str:
    """Replace nvcc's names of anonymous namespaces, with a source file's name and hashes in them, by the common one."""
    result = ""
    while found := re.search(r"(\d+)_GLOBAL__N__", mangled):
        result += mangled[: found.start()] + "12_GLOBAL__N_1"
        mangled = mangled[found.end(1) + int(found[1]) :]
    return result + mangled


def kernels_of(path: Path) -> Kernels:
    """Return the kernels of a library, or of all libraries in a folder, by architecture and demangled name."""
    libraries = sorted(path.rglob("*.so")) if path.is_dir() else [path]
    found: Kernels = {}
    for library in libraries:
        for architecture, cubin in cubins(library):
            for name, digest in kernel_digests(cubin).items():
                found.setdefault((architecture, without_file_names(name)), set()).add(digest)
    if not found:
        raise SystemExit(f"{path}: no library with machine code for a GPU")
    names = demangled([name for _, name in found])
    return {(architecture, names[name]): digests for (architecture, name), digests in found.items()}


def cubins(library: Path) -> Iterator[tuple[str, bytes]]:
    """Extract the cubins of a library with cuobjdump, each with its architecture (``sm_90``)."""
    with tempfile.TemporaryDirectory() as folder:
        command = [tool("cuobjdump"), "-xelf", "all", str(library.resolve())]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode != 0 and "does not contain device code" not in done.stderr + done.stdout:
            raise SystemExit(f"{library}: cuobjdump failed: {done.stderr.strip()}")
        for file in sorted(Path(folder).glob("*.cubin")):
            yield file.name.split(".")[-2], file.read_bytes()


def demangled(names: list[str]) -> dict[str, str]:
    """Demangle C++ names with c++filt."""
    done = subprocess.run([tool("c++filt")], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.splitlines(), strict=True))


def renamed(kernels: Kernels, renames: Iterable[tuple[str, str]]) -> Kernels:
    """Replace text in the kernels' names, one replacement after the other."""
    result: Kernels = {}
    for (architecture, name), digests in kernels.items():
        for old, new in renames:
            name = name.replace(old, new)
        result.setdefault((architecture, name), set()).update(digests)
    return result


def differences(old: Kernels, new: Kernels) -> list[str]:
    """Return a line for each kernel that differs, was added or is gone; none where all are the same."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            change = "added" if key not in old else "gone" if key not in new else "differs"
            lines.append(f"{change}: {' '.join(key)}")
    return lines


def tool(name: str) -> str:
    """Return the path of a program, or exit with a line that says how to get it."""
    path = shutil.which(name)
    if path is None:
        raise SystemExit(f"{name} is not on PATH: it comes with {_PROGRAMS[name]}")
    return path


def main() -> None:
    """Compare, print, and exit with 1 where kernels are not the same."""
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, metavar="OLD", help="a library, or a folder that holds some")
    parser.add_argument("new", type=Path, metavar="NEW", help="what it is compared with")
    parser.add_argument(
        "--rename", nargs=2, action="append", default=[], metavar=("OLD_TEXT", "NEW_TEXT"), help="in names of OLD"
    )
    options = parser.parse_args()
    old, new = renamed(kernels_of(options.old), options.rename), kernels_of(options.new)
    lines = differences(old, new)
    print("\n".join(lines) if lines else f"the same: {len(new)} kernels")
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
